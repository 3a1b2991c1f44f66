"""What the user should know of the data."""

from __future__ import annotations

import logging

from mgrpo_kernels.train import parallel
from mgrpo_kernels.train.text import printable

logger = logging.getLogger("mgrpo_kernels")


def log_info(text: str, *values: object) -> None:
    """Log what the user should know, once however many ranks there are."""
    if parallel.is_first():
        logger.warning(text, *(printable(each) if isinstance(each, str) else each for each in values))
