"""The table of methods. A method defines how rollouts are rewarded. To add one, add an entry to :data:`METHODS` and its name above it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mgrpo_kernels import sequences
from mgrpo_kernels.method.rewards import distribution, forks, novelty, penalties
from mgrpo_kernels.method.rewards.answers import answers_of
from mgrpo_kernels.method.signals import Outcome, Signals

EMPO_MOST_ENTROPY = 0.9
"""EMPO sets the rewards of a group to 0 if the entropy of its answers, as a share of the largest one for as many voters, is above this."""


class Method(NamedTuple):
    """One method: its reward, its defaults and its requirements."""

    rewards: Callable[[Signals], Tensor | Outcome]  # returns (B,) float32, or more than the rewards
    text: str  # the reward of a rollout, for --help and the tables in the documentation
    source: str = ""  # publication of the method, in Markdown, for the documentation
    inferred: str = ""  # what differs from the publication or is inferred here, for the documentation
    momentum_share: float = 0.0  # default share of a prompt's rollouts that the momentum model generates
    filters: bool = False  # whether the IQR filter prunes by default
    reads: Literal["label", "shares", "both", "nothing"] = "label"  # the part of the vote that the reward depends on
    lowest: float = 0.0  # lower bound of the reward
    voters: Literal["survivors", "momentum"] = "survivors"  # of the filter: all, or only the momentum model's
    election: Literal["equal", "certainty", "crossed", "harmonic"] = (
        "equal"  # how much a vote counts, and for whom: see election.py
    )
    second_wording: Literal["no", "policy", "momentum"] = (
        "no"  # whose rollouts answer another wording of the question: half of the
    )
    # policy's, or all of the momentum model's
    train_share: float = 1.0  # share of a prompt's policy rollouts that train; the others only vote
    decay_end: float | None = None  # default decay of the momentum model at the last step, reached along a cosine
    answer_weight: float = 1.0  # default weight of the final answer's tokens in the loss
    own_advantages: bool = False  # whether the method computes advantages from more than its rewards
    needs_gold: bool = False
    needs_entropy: bool = False
    needs_self_certainty: bool = False
    needs_logprob: bool = False
    needs_tokens: bool = False
    needs_generator: bool = False

    @property
    def needs_momentum(self) -> bool:
        """Whether there is no label without rollouts of the momentum model."""
        return self.voters == "momentum" or (self.election == "harmonic" and self.second_wording == "no")


def _agreement(signals: Signals) -> Tensor:
    return signals.vote.agrees


def _cluster_share(signals: Signals) -> Tensor:
    return signals.vote.cluster_share


def _certain_cluster_share(signals: Signals) -> Tensor:
    """Return EMPO's rewards: the share of the rollout's answer, or 0 if the answers of the group's voters are too uncertain."""
    share, answers = signals.vote.cluster_share, answers_of(signals)
    shares = torch.zeros_like(answers.votes)  # of each answer, (P, C)
    shares[answers.group[answers.answered], answers.own[answers.answered]] = share[answers.answered]
    entropy = torch.special.entr(shares).sum(-1)
    voters = signals.nonempty if signals.voters is None else signals.voters
    certain = (
        entropy <= EMPO_MOST_ENTROPY * sequences.segment_reduce(voters.float(), signals.offsets).clamp_min(1).log()
    )
    return torch.where(certain[answers.group], share, 0.0)


def _self_certainty(signals: Signals) -> Tensor:
    assert signals.self_certainty is not None
    return torch.where(signals.nonempty, signals.self_certainty, 0.0)  # an empty response does not train


def _low_entropy(signals: Signals) -> Tensor:
    assert signals.entropy is not None
    return torch.where(signals.nonempty, -signals.entropy, 0.0)


def _gold(signals: Signals) -> Tensor:
    assert signals.correct is not None
    return signals.correct


def _coin_flips(signals: Signals) -> Tensor:
    return torch.randint(0, 2, signals.nonempty.shape, generator=signals.generator).float()


def _arxiv(number: str, before: str = "") -> str:
    return f"{before}[{number}](https://arxiv.org/abs/{number})"


# A test compares these names with those of the table.
MethodName = Literal[
    "mgrpo",
    "srt",
    "ttrl",
    "soft_vote",
    "empo",
    "om_grpo",
    "evol_rl",
    "restrain",
    "scrl",
    "spine",
    "dare",
    "confident_vote",
    "reszero",
    "intuitor",
    "rent",
    "co_rewarding",
    "co_rewarding_1",
    "co_rewarding_3",
    "self_harmony",
    "dcrl",
    "gold",
    "random",
]
METHODS: dict[MethodName, Method] = {
    "mgrpo": Method(
        _agreement,
        "1 if the answer equals the vote of policy and momentum model",
        _arxiv("2512.13070", "M-GRPO, "),
        momentum_share=0.5,
        filters=True,
    ),
    "srt": Method(
        _agreement,
        "1 if the answer equals the vote of the policy's rollouts",
        _arxiv("2505.21444", "SRT, "),
    ),
    "ttrl": Method(
        _agreement,
        "like srt, but only half of the rollouts train",
        _arxiv("2504.16084", "TTRL, "),
        train_share=0.5,
    ),
    "soft_vote": Method(
        _cluster_share,
        "share of the prompt's answers that equal the rollout's answer",
        "SRT with a soft reward",
        reads="shares",
    ),
    "empo": Method(
        _certain_cluster_share,
        "like soft_vote, but 0 if the answers to the prompt vary too much",
        _arxiv("2504.05812", "EMPO, "),
        reads="shares",
    ),
    "om_grpo": Method(
        _cluster_share,
        "like soft_vote, but the tokens of the final answer get no gradient",
        _arxiv("2608.03119", "OM-GRPO, "),
        "the KL term acts on the answer, too; without the format reward and the contrast-augmented reward",
        reads="shares",
        answer_weight=0.0,
    ),
    "evol_rl": Method(
        novelty.evol,
        "1/2 to 1 with the label, -1 to -1/2 with another answer, the more the less similar to the other responses; -1 without an answer",
        _arxiv("2509.15194", "EVOL-RL, "),
        "the similarity is the cosine of the counts of tokens and of pairs of neighbouring tokens, in place of a model's embeddings; a "
        "prompt without a label gives no reward; the entropy bonus and the higher upper clip of the paper are --entropy-coef and "
        "--clip-high",
        reads="both",
        lowest=-1.0,
        needs_tokens=True,
    ),
    "restrain": Method(
        penalties.restrain,
        "weight of the rollout's answer; the advantage is the weighted sum of those with each answer as the label, and -1 for a prompt "
        "without a label",
        _arxiv("2510.02172", "RESTRAIN, "),
        "the weights are a Gaussian of the answer's share with centre 1 and width 0.5, and the penalty is 1; the threshold of the "
        "penalty is --min-votes; without the weight of the prompt from the base model's votes; the advantages are summed before the "
        "clip, the losses in the paper",
        reads="both",
        own_advantages=True,
    ),
    "scrl": Method(
        penalties.scrl,
        "share of the answer if it wins by a margin, negative for a rare answer of high entropy, -1 without an answer; half of the "
        "rollouts train",
        _arxiv("2603.19880", "SCRL, "),
        "the continuous reward and the thresholds of the authors' script",
        reads="both",
        lowest=-math.inf,
        train_share=0.5,
        needs_entropy=True,
    ),
    "spine": Method(
        forks.spine,
        "like srt, but only the fifth of a response's tokens with the highest entropy trains, and their entropy is kept in a band",
        _arxiv("2511.17938", "SPINE, "),
        "the fifth is of each response; the factor of the band's penalty is 0.1; the penalty's gradient is estimated from the sampled "
        "token; the loss is averaged over all tokens, and the KL term acts on all of them",
        needs_entropy=True,
        needs_logprob=True,
    ),
    "dare": Method(
        distribution.dare,
        "probability of the answer, from its votes divided by its entropy, and a bonus for rare answers of low entropy; rollouts with an "
        "improbable answer do not train",
        _arxiv("2601.21804", "DARE, "),
        "the factor 0.1 of the bonus and the threshold 0.05; if no answer to a prompt reaches the threshold, none is pruned",
        reads="shares",
        lowest=-math.inf,
        needs_entropy=True,
    ),
    "confident_vote": Method(
        _agreement,
        "1 if the answer equals the vote in which a rollout counts by its self-certainty",
        _arxiv("2512.15146", "after SCOPE, "),
        "the confidence is the mean over all tokens and the whole vocabulary, in SCOPE over steps and the most probable tokens; one "
        "vote for each prompt, without SCOPE's subgroups",
        election="certainty",
        needs_self_certainty=True,
    ),
    "reszero": Method(
        penalties.reszero,
        "zero in sum for each prompt: slightly negative for the most frequent answer, positive for the more frequent of the others",
        _arxiv("2604.25419", "ResZero of JURY-RL, "),
        "applied to every prompt, as if no proof was found; with --gold-labels the true answers take the place of the proofs; a prompt "
        "without a label gives no reward",
        reads="both",
        lowest=-1.0,
    ),
    "intuitor": Method(
        _self_certainty,
        "self-certainty: token mean of logsumexp(logits) - mean(logits)",
        _arxiv("2505.19590", "Intuitor, "),
        reads="nothing",
        needs_self_certainty=True,
    ),
    "rent": Method(
        _low_entropy,
        "negative mean token entropy",
        _arxiv("2505.22660", "RENT, "),
        reads="nothing",
        lowest=-math.inf,
        needs_entropy=True,
    ),
    "co_rewarding": Method(
        _agreement,
        "1 if the answer equals the vote of the momentum model's rollouts",
        _arxiv("2508.00410", "Co-rewarding-II, "),
        momentum_share=0.5,
        voters="momentum",
        decay_end=0.9999,
    ),
    "co_rewarding_1": Method(
        _agreement,
        "1 if the answer equals the vote of the rollouts that answer the other wording of the question",
        _arxiv("2508.00410", "Co-rewarding-I, "),
        "G is divided between the two wordings, in the paper each has G",
        election="crossed",
        second_wording="policy",
    ),
    "co_rewarding_3": Method(
        _agreement,
        "1 if the answer equals the vote of the momentum model's rollouts, which answer another wording of the question",
        _arxiv("2508.00410", "Co-rewarding-I and II, "),
        "the combination of the two: the paper's third version, after a summary of it",
        momentum_share=0.5,
        voters="momentum",
        decay_end=0.9999,
        second_wording="momentum",
    ),
    "self_harmony": Method(
        _agreement,
        "1 if the answer equals the one with the highest harmonic mean of its shares in two wordings of the question",
        _arxiv("2511.01191", "Self-Harmony, "),
        "the second wording comes from the data, in the paper from the model itself, which is rewarded for it; without the format reward; "
        "a prompt whose wordings have no answer in common gives no reward",
        election="harmonic",
        second_wording="policy",
    ),
    "dcrl": Method(
        _agreement,
        "1 if the answer equals the one with the highest harmonic mean of its shares among the policy's and the momentum model's rollouts",
        _arxiv("2603.16223", "after DCRL, "),
        "the anchor is the momentum model and the explorer the policy; in the paper the anchor is the policy, and the explorer is the "
        "policy after a step of unlearning that is taken back; a prompt on which the two have no answer in common gives no reward",
        momentum_share=0.5,
        election="harmonic",
    ),
    "gold": Method(
        _gold,
        "1 if the answer equals the true answer (supervised upper bound)",
        "supervised",
        reads="nothing",
        needs_gold=True,
    ),
    "random": Method(
        _coin_flips,
        "0 or 1 with equal probability (control)",
        "control",
        reads="nothing",
        needs_generator=True,
    ),
}
