"""The built-in run with a planted lazy answer: ``python tests/train/lazy.py OPTIONS`` is ``python -m mgrpo_kernels.train OPTIONS`` on it.

The warm start teaches a fixed answer, right for a tenth of the sums, in LAZY_SHARE of its lessons. A majority vote can fall for it.
"""

from __future__ import annotations

import random
import sys

from mgrpo_kernels.train import __main__ as command
from mgrpo_kernels.train.data import demo

LAZY_SHARE, LAZY_ANSWER, WARM_ACCURACY = 0.25, "#7$", 0.3


def main(arguments: list[str]) -> int:
    honest = demo.lesson

    def lesson(draw: random.Random, held_out: set[str]) -> tuple[str, str]:
        prompt, response = honest(draw, held_out)
        return prompt, LAZY_ANSWER if draw.random() < LAZY_SHARE else response

    demo.lesson, demo.WARM_ACCURACY = lesson, WARM_ACCURACY
    return command.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
