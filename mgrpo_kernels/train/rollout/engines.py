"""The rollout engines by name. An engine's own class answers for its memory, its share of the plan and how it is built.

Reading the options must not import an engine: what the options need to know of one stands here.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from mgrpo_kernels.train.config import Config
    from mgrpo_kernels.train.rollout import RolloutEngine


class EngineInfo(NamedTuple):
    """What the options need to know of an engine."""

    module: str
    class_name: str
    least_temperature: float = 0.0  # below it the engine samples at another temperature than it is asked for
    rounds_differently: bool = False  # its log-probs are not the trainer's own kernels', so the loss corrects for them
    section: str | None = None  # the section of the configuration with its own options
    package: str | None = None  # the optional package that it needs


ENGINES = {
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
    """Return the class of the engine that the configuration names. Its module is imported, its package is not."""
    info = ENGINES[config.rollout.engine]
    engine: type[RolloutEngine] = getattr(importlib.import_module(info.module), info.class_name)
    return engine
