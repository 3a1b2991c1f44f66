"""The trainer's options: one frozen dataclass per concern, checked when built.

A field is an option: ``max_response_tokens`` is ``--max-response-tokens`` on the command line and ``max_response_tokens:`` in a YAML
file. Its metadata carries the help text, from which ``--help`` is made.
"""

from mgrpo_kernels.train.config.fields import PAIR, Section, fields_of, option
from mgrpo_kernels.train.config.layers import PRESETS, build, find_config, read_yaml
from mgrpo_kernels.train.config.sections import (
    DEFAULT_TEMPLATE,
    DTYPES,
    DataConfig,
    EvalConfig,
    LoraConfig,
    LossConfig,
    MethodConfig,
    ModelConfig,
    OptimConfig,
    RolloutConfig,
    RunConfig,
    VllmConfig,
)
from mgrpo_kernels.train.config.whole import SECTIONS, Config

__all__ = [
    "DEFAULT_TEMPLATE", "DTYPES", "PAIR", "PRESETS", "SECTIONS", "Config", "DataConfig", "EvalConfig", "LoraConfig", "LossConfig",
    "MethodConfig", "ModelConfig", "OptimConfig", "RolloutConfig", "RunConfig", "Section", "VllmConfig", "build", "fields_of",
    "find_config", "option", "read_yaml",
]  # fmt: skip
