"""The M-GRPO trainer: ``python -m mgrpo_kernels.train``."""

from mgrpo_kernels.train import extras

extras.check_command()
