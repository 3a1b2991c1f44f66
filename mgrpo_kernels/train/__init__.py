"""A lean M-GRPO trainer: ``python -m mgrpo_kernels.train``."""
