"""How far policy and momentum model agree, and how often one answer is given: signs of collapse that need no true answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from mgrpo_kernels.method.selection import Selection


def label_free_signs(
    selection: Selection, answers: Sequence[str | None], groups: int | Tensor, by_momentum: Tensor
) -> dict[str, float | None]:
    """Return the metrics of a step that a gated teacher reads; without a vote or without rollouts of the momentum model, none."""
    if selection.vote is None or not bool(by_momentum.any()):
        return {}
    return {name: selection.metrics()[name] for name in ("vote_share", "distinct_labels")} | {
        "top_answer_share": top_answer_share(answers),
        "teacher_agreement": teacher_agreement(selection.vote.cluster, groups, by_momentum),
    }


def teacher_agreement(cluster: Tensor, groups: int | Tensor, by_momentum: Tensor) -> float | None:
    """Return the fraction of the prompts whose most frequent answer is the same for the policy and for the momentum model.

    Of equally frequent answers, the one that came first counts. A prompt to which either of them has no answer does not count.

    Args:
        cluster: ``(B,)`` int, which answers of a group are equal, as in :class:`mgrpo_kernels.Vote`; -1 for no answer.
        groups: group size, or offsets ``(P+1,)``.
        by_momentum: ``(B,)`` bool, the rollouts of the momentum model.

    Returns:
        None if no prompt counts.
    """
    bounds = torch.arange(0, len(cluster) + 1, groups) if isinstance(groups, int) else groups
    clusters, momentum = cluster.tolist(), by_momentum.tolist()
    agree = []
    for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        counts: tuple[Counter[int], Counter[int]] = Counter(), Counter()
        for row in range(start, end):
            if clusters[row] >= 0:
                counts[momentum[row]][clusters[row]] += 1
        if all(counts):
            own, teachers = (each.most_common(1)[0][0] for each in counts)
            agree.append(own == teachers)
    return sum(agree) / len(agree) if agree else None


def top_answer_share(answers: Sequence[str | None]) -> float | None:
    """Return the fraction of all answers of a step that equal the most frequent one, as texts; None without answers."""
    counts = Counter(answer for answer in answers if answer is not None)
    return max(counts.values()) / counts.total() if counts else None
