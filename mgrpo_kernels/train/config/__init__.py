"""The trainer's options: one frozen dataclass per section, checked when it is built.

A field is an option: ``max_response_tokens`` is ``--max-response-tokens`` on the command line and ``max_response_tokens:`` in a YAML
file. Its metadata holds the help text, from which ``--help`` is generated.
"""

from mgrpo_kernels.method.fields import fields_of
from mgrpo_kernels.train.config.fields import PAIR, Section
from mgrpo_kernels.train.config.layers import (
    PRESETS,
    build,
    find_config,
    preset_descriptions,
    preset_files,
    read_yaml,
)
from mgrpo_kernels.train.config.model_sections import LoraConfig, ModelConfig
from mgrpo_kernels.train.config.run_sections import EvalConfig, RunConfig
from mgrpo_kernels.train.config.sections import (
    DEFAULT_TEMPLATE,
    DataConfig,
    LossConfig,
    MethodConfig,
    OptimConfig,
    RolloutConfig,
    VllmConfig,
)
from mgrpo_kernels.train.config.whole import SECTIONS, Config

__all__ = [
    "DEFAULT_TEMPLATE",
    "PAIR",
    "PRESETS",
    "SECTIONS",
    "Config",
    "DataConfig",
    "EvalConfig",
    "LoraConfig",
    "LossConfig",
    "MethodConfig",
    "ModelConfig",
    "OptimConfig",
    "RolloutConfig",
    "RunConfig",
    "Section",
    "VllmConfig",
    "build",
    "fields_of",
    "find_config",
    "preset_descriptions",
    "preset_files",
    "read_yaml",
]
