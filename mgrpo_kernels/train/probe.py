"""The probe before a run: what the vote of the untrained model would teach, with one verdict and what it cannot know.

A method that rewards agreement sharpens what the model already prefers. That helps where the majority is right, and entrenches errors
where it is wrong (*How Far Can Unsupervised RLVR Scale LLM Training?*, arXiv 2603.08660). The paper's own measure, the Model Collapse Step,
takes a training run; this probe samples only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mgrpo_kernels import Vote, majority_vote, trajectory_entropy
from mgrpo_kernels.method import Gold, equal_to_gold, top_answer_share
from mgrpo_kernels.train.config import Config
from mgrpo_kernels.train.data.task import Task, prompts_of_step
from mgrpo_kernels.train.model.policy import Policy
from mgrpo_kernels.train.rng import generator_for
from mgrpo_kernels.train.rollout import RolloutEngine
from mgrpo_kernels.train.watch.guard import UNPARSED
from mgrpo_kernels.vote.extraction import read_answers

SIGMAS = 2.0
"""Standard errors by which a figure must be away from a threshold to count as above or below it."""
HALF = 0.5
"""Threshold of the majority's accuracy, and of the share of one label among all."""
SATURATED = 0.98
"""Vote share above which nearly no rollout differs from its label, so that there is nothing to learn."""


class Figures(NamedTuple):
    """What a probe has measured over P prompts; None for a figure that is undefined."""

    prompts: int
    rollouts: int
    answered: float  # share of the responses with an answer
    vote_share: float  # of the winner among the answers, mean over the prompts
    margin: float  # share of the winner minus that of the second, mean over the prompts
    top_label: float | None  # share of the prompts with a label that have the most frequent one; None without labels
    top_answer: float | None  # share of the most frequent answer among all answers
    known: int = 0  # number of prompts with a true answer
    accuracy: float | None = None  # of the single responses
    majority: float | None = None  # accuracy of the majority; a prompt without a label counts as wrong
    majority_error: float | None = None
    confidently_wrong: float | None = None  # share of the prompts whose wrong label has more than half of the votes
    share_correlation: float | None = None  # of vote share and right label, over the prompts
    logprob_correlation: float | None = None  # of mean log-prob and right answer, over the responses that answer


def measure(
    answers: Sequence[str | None],
    groups: int,
    gold: Sequence[Gold | None],
    confidence: Tensor,
    *,
    equivalence: object = "math",
    min_votes: int = 2,
) -> Figures:
    """Return the figures of a sample.

    Args:
        answers: B = P x G answers, grouped by prompt.
        groups: G.
        gold: P true answers, None if unknown.
        confidence: ``(B,)`` mean log-prob of each response; NaN for an empty one.
        equivalence, min_votes: as for :func:`mgrpo_kernels.majority_vote`.
    """
    vote = majority_vote(answers, groups, equivalence=equivalence, min_votes=min_votes)  # type: ignore[arg-type]
    found = Figures(
        prompts=len(gold),
        rollouts=groups,
        answered=sum(answer is not None for answer in answers) / len(answers),
        vote_share=float(vote.share.mean()),
        margin=float(margins(vote, groups).mean()),
        top_label=top_answer_share(vote.labels),
        top_answer=top_answer_share(answers),
    )
    known = [row for row, each in enumerate(gold) if each is not None]
    if not known:
        return found
    rows = torch.tensor(known)
    right = (equal_to_gold(vote.labels, gold, equivalence) == 1)[rows].float()  # type: ignore[arg-type]
    hits = equal_to_gold(answers, [each for each in gold for _ in range(groups)], equivalence) == 1  # type: ignore[arg-type]
    of_known = torch.zeros(len(gold), dtype=torch.bool).index_fill(0, rows, True).repeat_interleave(groups)
    spoke = of_known & torch.tensor([each is not None for each in answers]) & ~confidence.isnan()
    majority = float(right.mean())
    return found._replace(
        known=len(known),
        accuracy=float(hits[of_known].float().mean()),
        majority=majority,
        # Of a share near 0 or 1 the plain standard error is too small: two prompts are added, one right and one wrong.
        majority_error=math.sqrt((majority * (1 - majority) * len(known) + 0.5) / (len(known) + 2) ** 2),
        confidently_wrong=float(((right == 0) & (vote.share[rows] > HALF)).float().mean()),
        share_correlation=correlation(vote.share[rows], right),
        logprob_correlation=correlation(confidence[spoke], hits[spoke].float()),
    )


def margins(vote: Vote, groups: int) -> Tensor:
    """Return by how much the winner's share of a prompt's answers is above that of the second, ``(P,)``; 0 without answers."""
    found = []
    for row in vote.cluster.view(-1, groups):
        counts = torch.bincount(row[row >= 0], minlength=2).sort(descending=True).values
        found.append((counts[0] - counts[1]) / counts.sum().clamp(min=1))
    return torch.stack(found)


def correlation(one: Tensor, two: Tensor) -> float | None:
    """Return Pearson's correlation; None where one of them does not vary."""
    if len(one) < 3 or float(one.std()) == 0.0 or float(two.std()) == 0.0:
        return None
    return float(torch.corrcoef(torch.stack([one.double(), two.double()]))[0, 1])


class Verdict(NamedTuple):
    """The result of a probe: one word for scripts, one sentence, and what the figures cannot show."""

    word: str  # improves, collapses, undecided, unfit or unknown
    reason: str
    unknown: str


def judge(figures: Figures) -> Verdict:
    """Return the verdict that the figures allow, for a method that rewards agreement with the majority."""
    limits = "The probe does not train, so it estimates no step of a collapse; a majority that is right now may become wrong later."
    unfit = obstacle(figures)
    if unfit is not None:
        return Verdict("unfit", unfit, limits)
    if figures.majority is None or figures.majority_error is None:
        return Verdict(
            "unknown",
            f"no label-free sign speaks against a run (vote share {figures.vote_share:.2f}, margin {figures.margin:.2f})",
            "Without true answers nothing shows whether the majority is right, and that decides whether the vote improves the model or "
            "entrenches its errors; a hundred prompts with true answers would show it. " + limits,
        )
    text = f"the majority is right on {figures.majority:.2f} ± {figures.majority_error:.2f} of the prompts"
    # In standard errors of a majority that is right on half of the prompts: with few prompts, all of them may be right by chance.
    gap = (figures.majority - HALF) * math.sqrt(figures.known) / HALF
    if gap < -SIGMAS:
        wrong = (
            f"and {figures.confidently_wrong:.2f} of the prompts have a wrong label with more than half of the votes"
        )
        return Verdict(
            "collapses", f"{text}, wrong more often than right, {wrong}: the vote would entrench errors", limits
        )
    related = figures.share_correlation
    error = 1.0 / math.sqrt(max(1, figures.known - 1))
    if gap > SIGMAS and (related is None or related > -SIGMAS * error):
        trust = "its share is the same everywhere" if related is None else f"correlation with its share {related:+.2f}"
        return Verdict(
            "improves", f"{text}, more often than not ({trust}): the vote has something right to sharpen", limits
        )
    return Verdict(
        "undecided",
        f"{text}, too few prompts or too close to one half to tell, or its confidence points to errors",
        limits,
    )


def obstacle(figures: Figures) -> str | None:
    """Return the label-free figure that speaks against a run, None if there is none."""
    if figures.answered < 1.0 - UNPARSED:
        return f"only {figures.answered:.2f} of the responses have an answer: the vote would elect whatever is left"
    if figures.top_label is not None and figures.top_label > HALF * (1.0 + SIGMAS / math.sqrt(figures.prompts)):
        return f"{figures.top_label:.2f} of the labels are the same: the model already answers most prompts alike"
    if figures.vote_share > SATURATED:
        return f"the vote share is {figures.vote_share:.2f}: nearly no rollout differs from its label, so that there is nothing to learn"
    return None


def sample(config: Config, task: Task, policy: Policy, engine: RolloutEngine, number: int) -> Figures:
    """Sample the rollouts of a step of `number` training prompts from the policy, and measure them."""
    chosen = [task.train[each] for each in prompts_of_step(len(task.train), number, 1, config.run.seed)]
    texts = [each.prompt for each in chosen]
    rollouts = engine.sample(
        policy.encode(texts),
        config.rollout.rollouts,
        temperature=config.rollout.temperature,
        generator=generator_for(config.run.seed, "probe", 0, policy.device),
        truncation=config.rollout.truncation,
    )
    responses = policy.decode(rollouts.tokens, rollouts.mask)
    return measure(
        read_answers(task.extract, responses, rollouts.finished.tolist()),
        config.rollout.rollouts,
        [each.gold for each in chosen],
        trajectory_entropy(rollouts.logprobs, mask=rollouts.mask).cpu(),  # its mean, whatever the values are
        equivalence=task.equivalence,
        min_votes=config.method.min_votes,
    )


def lines(figures: Figures, verdict: Verdict) -> list[str]:
    """Return what a probe prints."""
    names = {
        "answered": "responses with an answer",
        "vote_share": "vote share of the winner",
        "margin": "margin of the winner over the second",
        "top_label": "share of the most frequent label",
        "top_answer": "share of the most frequent answer",
        "accuracy": "accuracy of a response",
        "majority": "accuracy of the majority",
        "majority_error": "its standard error",
        "confidently_wrong": "prompts with a wrong label of more than half of the votes",
        "share_correlation": "correlation of vote share and right label",
        "logprob_correlation": "correlation of log-prob and right answer",
    }
    values = figures._asdict()
    return [
        f"probe: {figures.prompts} prompts x {figures.rollouts} rollouts, {figures.known} prompts with a true answer",
        *(
            f"  {text}: {'not known' if values[name] is None else f'{values[name]:.3f}'}"
            for name, text in names.items()
        ),
        f"verdict: {verdict.word}: {verdict.reason}",
        f"not known: {verdict.unknown}",
    ]
