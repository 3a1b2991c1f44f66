"""The majority vote of a group of rollouts."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mgrpo_kernels import checks, sequences
from mgrpo_kernels.vote.equality import KEYS, Equivalence, check_equivalence, verdict
from mgrpo_kernels.vote.symbolic import budget

VOTE_SECONDS = 5.0
"""Time for the integrals, sums and limits among a vote's answers."""


class Vote(NamedTuple):
    """The outcome of :func:`majority_vote`; tensors are on the CPU."""

    labels: list[str | None]
    """P labels: the winner as its first voter spelled it; None if no answer parsed, or too few voters agree."""
    share: Tensor
    """(P,) float32 in [0, 1]: the winner's share of the voters' parsed answers, 0 where there are none."""
    cluster: Tensor
    """(B,) int64: equal answers of a group share a number, from 0 in each group by first appearance; -1 for none."""
    cluster_share: Tensor
    """(B,) float32 in [0, 1]: the share of the rollout's own cluster among the voters' parsed answers."""
    agrees: Tensor
    """(B,) float32: 1 where the rollout's answer equals its group's label, else 0."""


def majority_vote(
    answers: Sequence[str | None],
    groups: int | Tensor,
    *,
    voters: Tensor | Sequence[bool] | None = None,
    weights: Tensor | Sequence[float] | None = None,
    equivalence: Equivalence = "math",
    min_share: float = 0.0,
    min_votes: int = 1,
    seconds: float = VOTE_SECONDS,
) -> Vote:
    """Let each group's voters elect the label that the whole group is then scored by.

    Equal answers form a cluster. Of "math" and "exact", which are equivalences, the clusters do not depend on the order of the rollouts;
    with a function, an answer joins the first cluster whose first answer it equals. Voters are clustered before the others, so that who
    may not vote has no say in the label. The largest cluster of voters wins; of two as large, the one whose first voter came first.

    Args:
        answers: B answers; None or an empty one did not parse, and neither votes nor agrees.
        groups: group size G, or ascending int offsets (P+1,); groups may be empty.
        voters: (B,) bool, as a tensor or a sequence: who may vote. Everybody is scored. None: all.
        weights: (B,) >= 0: how much each vote counts. The answer with the largest sum wins, and shares are of the sums. None: 1 each.
        equivalence: "math" and "exact" as in :func:`answers_equal`, or a function (first of the cluster, new answer) ->
            bool. It is not called for an answer that its group has had before in the same characters.
        min_share: in [0, 1]. A winner with a smaller share of all voters, those without an answer included, gives no label.
        min_votes: a winner with fewer votes, whatever their weights, gives no label.
        seconds: for all that SymPy evaluates (integrals, sums, products, limits); answers beyond it are compared as texts, with a warning
            in the log.

    Raises:
        TypeError: an argument of the wrong kind, or a function that returns no bool.
        ValueError: `groups`, `voters`, `weights`, `equivalence`, `min_share`, `min_votes` or `seconds` out of range or of the wrong shape.
        ImportError: an answer has an integral, sum, product or limit, and math-verify is not installed.
    """
    if isinstance(answers, str) or not isinstance(answers, Sequence):
        raise TypeError(f"answers: expected a sequence of strings and None, got {type(answers).__name__}")
    for i, answer in enumerate(answers):
        if answer is not None and not isinstance(answer, str):
            raise TypeError(f"answers: expected strings and None, got {type(answer).__name__} at {i}")
    B = len(answers)
    offsets = sequences.group_offsets(groups.cpu() if isinstance(groups, Tensor) else groups, B, torch.device("cpu"))
    sequences.check_offset_values("groups", offsets, B)
    may_vote = _voters(voters, B)
    weight = _weights(weights, may_vote)
    check_equivalence(equivalence)
    checks.check_number("min_share", min_share, at_least=0.0, at_most=1.0)
    checks.check_number("min_votes", min_votes, at_least=1)
    checks.check_number("seconds", seconds, at_least=0.0)

    labels: list[str | None] = []
    share: list[float] = []
    cluster: list[int] = []
    cluster_share: list[float] = []
    agrees: list[bool] = []
    with budget(seconds):
        for start, end in itertools.pairwise(offsets.tolist()):
            firsts, of_rollout = _clusters(answers[start:end], may_vote[start:end], equivalence)
            counts, votes = [0] * len(firsts), [0.0] * len(firsts)
            for c, votes_too, each in zip(of_rollout, may_vote[start:end], weight[start:end], strict=True):
                if votes_too and c >= 0:
                    counts[c] += 1
                    votes[c] += each
            total, most = sum(votes), max(votes, default=0.0)
            shares = [count / total if total else 0.0 for count in votes]
            winner = votes.index(most) if total else -1  # clusters stand in the order of their first voter
            wins = total > 0 and counts[winner] >= min_votes and most / sum(weight[start:end]) >= min_share
            labels.append(firsts[winner] if wins else None)
            share.append(shares[winner] if total else 0.0)
            cluster_share += [shares[c] if c >= 0 else 0.0 for c in of_rollout]
            agrees += [wins and c == winner for c in of_rollout]
            number = {c: n for n, c in enumerate(dict.fromkeys(c for c in of_rollout if c >= 0))}
            cluster += [number.get(c, -1) for c in of_rollout]
    return Vote(
        labels=labels,
        share=torch.tensor(share, dtype=torch.float32),
        cluster=torch.tensor(cluster, dtype=torch.int64),
        cluster_share=torch.tensor(cluster_share, dtype=torch.float32),
        agrees=torch.tensor(agrees, dtype=torch.float32),
    )


def _voters(voters: Tensor | Sequence[bool] | None, B: int) -> list[bool]:
    if voters is None:
        return [True] * B
    if isinstance(voters, Tensor):
        return checks.check_tensor("voters", voters, dtypes=(torch.bool,), shape=(B,)).tolist()
    if isinstance(voters, str) or not isinstance(voters, Sequence):
        raise TypeError(f"voters: expected a bool tensor or a sequence of bools, got {type(voters).__name__}")
    if len(voters) != B:
        raise ValueError(f"voters: expected one bool for each of the {B} answers, got {len(voters)}")
    return [checks.check_flag(f"voters[{i}]", voter) for i, voter in enumerate(voters)]


def _weights(weights: Tensor | Sequence[float] | None, may_vote: Sequence[bool]) -> list[float]:
    """Return the weight of each rollout's vote, 0 for one that may not vote."""
    if weights is None:
        return [float(votes) for votes in may_vote]
    values = weights.tolist() if isinstance(weights, Tensor) else list(weights)
    if len(values) != len(may_vote):
        raise ValueError(f"weights: expected one for each of the {len(may_vote)} answers, got {len(values)}")
    for i, each in enumerate(values):
        checks.check_number(f"weights[{i}]", each, at_least=0.0)
    return [each if votes else 0.0 for each, votes in zip(values, may_vote, strict=True)]


def _clusters(
    answers: Sequence[str | None], may_vote: Sequence[bool], equivalence: Equivalence
) -> tuple[list[str], list[int]]:
    """Return the first answer of each cluster, and each rollout's cluster: voters' clusters first, -1 for no answer."""
    firsts: list[str] = []
    of_rollout = [-1] * len(answers)
    known: dict[str, int] = {}  # by the answer's characters
    by_key: dict[Hashable, int] = {}
    for i in sorted(range(len(answers)), key=lambda i: not may_vote[i]):
        answer = answers[i]
        if answer is None or not answer.strip():
            continue
        if answer not in known:
            if isinstance(equivalence, str):
                known[answer] = by_key.setdefault(KEYS[equivalence](answer), len(firsts))
            else:
                same = (c for c, first in enumerate(firsts) if verdict(equivalence, first, answer))
                known[answer] = next(same, len(firsts))
            if known[answer] == len(firsts):
                firsts.append(answer)
        of_rollout[i] = known[answer]
    return firsts, of_rollout
