"""Run the trainer with another comparison for the IQR filter than that of the rollouts of one prompt in one step.

    python examples/collapse/quartiles.py batch --method srt --iqr-filter --output DIR

The first argument says with what the entropy of a rollout is compared; the others are those of ``python -m mgrpo_kernels.train``.

=======  =======================================================================================================
batch    all rollouts of the step
history  all rollouts of the step and of the last 50 steps
length   the rollouts of the prompt, after the linear effect of the response's length within the step is removed
=======  =======================================================================================================

No comparison was better on both start models of the study, so the library does not have them as an option.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import deque
from typing import Any

import torch
from torch import Tensor

from mgrpo_kernels.method import MethodOptions, Selection, select
from mgrpo_kernels.method.pruning import survivors
from mgrpo_kernels.ops.iqr_filter import trajectory_entropy
from mgrpo_kernels.train import step
from mgrpo_kernels.train.__main__ import main

STEPS = 50
"""Number of steps in the history."""
KINDS = ("batch", "history", "length")


def residual(entropy: Tensor, lengths: Tensor) -> Tensor:
    """Return the entropies less their least-squares line over the lengths, ``(B,)``; NaN for an empty response."""
    known = ~entropy.isnan()
    line = torch.stack([torch.ones_like(entropy), lengths.float()], dim=1)
    found = torch.linalg.lstsq(line[known], entropy[known, None], driver="gelsd").solution  # also for equal lengths
    return entropy - (line @ found).squeeze(1)


class Filter:
    """``select`` with another comparison of the entropies. It has a state: the entropies of the last steps."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.past: deque[Tensor] = deque(maxlen=STEPS)

    def keep(self, entropy: Tensor, lengths: Tensor, group: int, k: float) -> Tensor:
        """Return which rollouts survive, ``(B,)`` bool, for the entropies and lengths of the responses to prompts with `group` each."""
        if self.kind == "length":
            return survivors(residual(entropy, lengths), group, k=k)
        compared = torch.cat([*self.past, entropy])
        if self.kind == "history":
            self.past.append(entropy)
        return survivors(compared, torch.tensor([0, len(compared)]), k=k)[-len(entropy) :]

    def select(
        self, mask: Tensor, answers: list[str | None], group: int, options: MethodOptions, **given: Any
    ) -> Selection:
        """Return what ``select`` does if these rollouts are the ones that survive: the others neither vote nor train."""
        entropy = trajectory_entropy(given["entropy"], mask=mask, reduction=options.entropy_reduction)
        keep = self.keep(entropy, mask.sum(-1), group, options.iqr_k)
        given |= {"may_vote": keep, "may_train": keep}
        found = select(mask, answers, group, dataclasses.replace(options, iqr_filter=False), **given)
        return found._replace(survives=keep)


if __name__ == "__main__":
    kind = sys.argv.pop(1) if sys.argv[1:] else None
    if kind not in KINDS:
        sys.exit(f"first argument: expected one of {', '.join(KINDS)}, got {kind!r}")
    step.select = Filter(kind).select
    sys.exit(main())
