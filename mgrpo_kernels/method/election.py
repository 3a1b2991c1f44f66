"""How the rollouts of a group elect its label: with equal votes, by self-certainty, or across two wordings of the question."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mgrpo_kernels import sequences
from mgrpo_kernels.method.excess import excess_weights
from mgrpo_kernels.method.options import MethodOptions
from mgrpo_kernels.vote import Equivalence, Vote, majority_vote


def elect(
    options: MethodOptions,
    answers: Sequence[str | None],
    offsets: Tensor,
    voters: Tensor,
    *,
    certainty: Tensor | None,
    second: Tensor,
    equivalence: Equivalence,
) -> tuple[Vote, Tensor]:
    """Return the vote of each group's `voters`, and how much each vote counts, ``(B,)``; 0 for a rollout that does not vote.

    `second` ``(B,)`` bool are the rollouts of the second party of a crossed or harmonic election: those of another wording of the question,
    or of another model. With a crossed election the label is theirs, and `agrees` compares each rollout with the other party's label.
    The caller limits the time for all of it, with :func:`mgrpo_kernels.vote.symbolic.budget`.
    """
    counts = voters.float()
    if options.vote_by == "excess":
        counts = excess_weights(answers, offsets, voters, equivalence)

    def vote(who: Tensor, weights: Tensor) -> Vote:
        return majority_vote(
            answers,
            offsets,
            voters=who,
            weights=weights,
            equivalence=equivalence,
            min_share=options.min_share,
            min_votes=options.min_votes,
        )

    election = options.row.election
    if election == "crossed":
        of_first, of_second = (vote(voters & each, counts) for each in (~second, second))
        agrees = torch.where(second, of_first.agrees, of_second.agrees)
        return of_second._replace(agrees=agrees), counts * second
    weights = counts
    if election == "certainty":
        assert certainty is not None
        weights = counts * torch.where(voters, certainty.nan_to_num(nan=0.0), 0.0)
    if election == "harmonic":
        weights = counts * harmonic_weights(vote(voters, counts).cluster, offsets, voters, second)
    return vote(voters, weights), weights


def harmonic_weights(cluster: Tensor, offsets: Tensor, voters: Tensor, second: Tensor) -> Tensor:
    """Return weights whose sum over the voters with an answer is the harmonic mean of its shares in two parties, ``(B,)``.

    Self-Harmony (arXiv 2511.01191) and DCRL (arXiv 2603.16223): the score of an answer with the shares p and q is 2 p q / (p + q), 0 if a
    party never has it. `second` ``(B,)`` bool are the rollouts of the second party.
    """
    group = sequences.group_index(offsets, len(cluster))
    columns = 1 + int(cluster.max()) if (cluster >= 0).any() else 1
    cell = group * columns + cluster.clamp(min=0)

    def counts(who: Tensor) -> Tensor:
        votes = (who & voters & (cluster >= 0)).float()
        return (
            torch.zeros((len(offsets) - 1) * columns, dtype=torch.float32)
            .index_add(0, cell, votes)
            .reshape(-1, columns)
        )

    firsts, seconds = counts(~second), counts(second)
    p, q = (each / each.sum(-1, keepdim=True).clamp(min=1.0) for each in (firsts, seconds))
    score = 2.0 * p * q / (p + q).clamp(min=1e-12)
    of_vote = (score / (firsts + seconds).clamp(min=1.0)).flatten()[cell]
    return torch.where(voters & (cluster >= 0), of_vote, 0.0)


def offsets_of_wordings(offsets: Tensor, second_wording: Tensor) -> Tensor:
    """Return offsets that also divide each group between the rollouts of its first and of its second wording.

    Raises:
        ValueError: within a group, a rollout of the first wording comes after one of the second.
    """
    group = sequences.group_index(offsets, len(second_wording))
    later = second_wording.long()
    if bool(((later.diff() < 0) & (group.diff() == 0)).any()):
        raise ValueError(
            "second_wording: expected the rollouts of a group's first wording before those of its second, got them in another order"
        )
    firsts = torch.zeros(len(offsets) - 1, dtype=torch.int64).index_add(0, group, 1 - later)
    return torch.cat([torch.stack([offsets[:-1], offsets[:-1] + firsts], dim=1).flatten(), offsets[-1:]])
