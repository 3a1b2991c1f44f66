"""Checkpoints that are complete or absent, written by torch.distributed.checkpoint while training continues.

A checkpoint is written beside its place, brought to the disk, and then renamed; the link ``latest`` follows. A run that is killed at any
moment thus leaves complete checkpoints alone under the name ``step_N``. Random numbers, the order of the data and the learning rate
follow from the seed and the step, so a step number is all the state that they have.

``step_N/`` holds a file of tensors for each rank and ``run.json``: the step, and the size of every file, which is checked before
anything is read. Any number of ranks can read what any other number has written.
"""

from mgrpo_kernels.train.run.checkpoint.reading import (
    NONE_YET,
    Facts,
    candidates,
    complete,
    latest,
    load,
    read,
    restore,
    resume,
    saved_steps,
    sizes,
    step_of,
)
from mgrpo_kernels.train.run.checkpoint.state import not_finite, state_of
from mgrpo_kernels.train.run.checkpoint.writing import Writer, save

__all__ = [
    "NONE_YET",
    "Facts",
    "Writer",
    "candidates",
    "complete",
    "latest",
    "load",
    "not_finite",
    "read",
    "restore",
    "resume",
    "save",
    "saved_steps",
    "sizes",
    "state_of",
    "step_of",
]
