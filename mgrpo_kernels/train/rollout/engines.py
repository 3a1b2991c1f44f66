"""The table of rollout engines. An engine's class states its memory, its lines of the plan and how it is built.

Reading the options must not import an engine, so this table holds what the options need to know of each.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from mgrpo_kernels.train.config import Config
    from mgrpo_kernels.train.rollout import RolloutEngine


class EngineInfo(NamedTuple):
    """The properties of an engine that the options depend on."""

    module: str
    class_name: str
    least_temperature: float = 0.0  # below it, the engine does not sample at the requested temperature
    rounds_differently: bool = False  # its log-probs differ from the trainer's by rounding, which the loss corrects
    section: str | None = None  # section of the configuration that holds the engine's own options
    package: str | None = None  # optional package that the engine requires


EngineName = Literal["transformers", "vllm"]  # a test compares these names with the table's
ENGINES: dict[EngineName, EngineInfo] = {
    "transformers": EngineInfo("mgrpo_kernels.train.rollout.transformers", "TransformersEngine"),
    "vllm": EngineInfo(
        "mgrpo_kernels.train.rollout.vllm",
        "VllmEngine",
        least_temperature=0.01,
        rounds_differently=True,
        section="vllm",
        package="vllm",
    ),
}


def engine_class(config: Config) -> type[RolloutEngine]:
    """Return the class of the configured engine. This imports the engine's module, but not the package that it requires."""
    info = ENGINES[config.rollout.engine]
    engine: type[RolloutEngine] = getattr(importlib.import_module(info.module), info.class_name)
    return engine
