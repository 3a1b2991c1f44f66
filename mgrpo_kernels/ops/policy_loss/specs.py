"""Names, options and inputs that the policy losses share with their backends, tests and benchmarks."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from mgrpo_kernels import checks

METRICS = (
    "tokens", "sequences", "kl_sum", "entropy_sum", "ratio_sum", "ratio_max", "clip_low_count", "clip_high_count",
)  # fmt: skip
LOSS_TYPES = ("grpo", "bnpo", "dapo", "dr_grpo", "cispo", "sapo", "vespo", "luspo")
CLIPPED = ("grpo", "bnpo", "dapo", "dr_grpo", "luspo")  # PPO's clipped surrogate; they differ in what they average over
SEQUENCE_MEANS = ("grpo", "sapo")  # a token's share is 1 / (tokens of its sequence)
COUNT_SEQUENCES = ("grpo", "sapo", "luspo")  # what the normalizer counts; dr_grpo: sequences x max_response_tokens
IMPORTANCE_LEVELS = ("token", "sequence")
KL_ESTIMATORS = ("k1", "k2", "k3")
BEHAVIOUR_MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
BASELINES = ("mean", "leave_one_out")
SCALES = ("std", "batch", "none")


class PolicyLoss(NamedTuple):
    """A policy loss and its metrics."""

    loss: Tensor  # 0-d, differentiable
    metrics: dict[
        str, Tensor
    ]  # 0-d float32, detached: sums and counts (ratio_max: a maximum), so that micro-batches add up


class LossOptions(NamedTuple):
    """Every scalar option of a policy loss, with the contract's defaults."""

    loss_type: str = "grpo"
    importance_level: str = "token"
    clip_low: float = 0.2
    clip_high: float = 0.2
    clip_delta: float | None = None
    kl_coef: float = 0.0
    kl_estimator: str = "k3"
    kl_bias_correction: bool = False
    entropy_coef: float = 0.0
    behaviour_mode: str = "token_truncate"
    behaviour_cap: float = 2.0
    cispo_cap: float = 5.0
    sapo_temperature: tuple[float, float] = (1.0, 1.05)
    vespo_k: tuple[float, float] = (2.0, 3.0)
    vespo_lambda: tuple[float, float] = (3.0, 2.0)
    max_response_tokens: int | None = None


class Tokens(NamedTuple):
    """The tokens of a batch, one sequence after the other; a padded batch is its rows."""

    logprob: Tensor  # (T,)
    old: Tensor | None  # (T,); None: on-policy
    advantages: Tensor | None  # (T,) or (B,); None: from a group's rewards
    mask: Tensor | None  # (T,) bool
    offsets: Tensor  # (B+1,) int64
    ref: Tensor | None  # (T,)
    entropy: Tensor | None  # (T,)
    behaviour: Tensor | None  # (T,)
    normalizer: Tensor | None  # 0-d; None: this batch's own count
    entropy_normalizer: Tensor | None  # 0-d; None: this batch's own tokens
    weights: Tensor | None = None  # (T,) share of each token, where `offsets` do not show whole sequences


class Groups(NamedTuple):
    """Rewards in groups, and how they become advantages."""

    rewards: Tensor  # (B,)
    offsets: Tensor  # (P+1,) int64
    mask: Tensor | None  # (B,) bool
    baseline: str
    scale: str
    eps: float


def check_options(options: LossOptions) -> LossOptions:
    """Return `options` if every one is in its range, else raise TypeError or ValueError that names it."""
    checks.check_choice("loss_type", options.loss_type, LOSS_TYPES)
    checks.check_choice("importance_level", options.importance_level, IMPORTANCE_LEVELS)
    checks.check_choice("kl_estimator", options.kl_estimator, KL_ESTIMATORS)
    checks.check_choice("behaviour_mode", options.behaviour_mode, BEHAVIOUR_MODES)
    checks.check_flag("kl_bias_correction", options.kl_bias_correction)
    checks.check_number("clip_low", options.clip_low, at_least=0.0, at_most=1.0)
    checks.check_number("clip_high", options.clip_high, at_least=0.0)
    if options.clip_delta is not None:
        checks.check_number("clip_delta", options.clip_delta, above=0.0)
    checks.check_number("kl_coef", options.kl_coef, at_least=0.0)
    checks.check_number("entropy_coef", options.entropy_coef)
    checks.check_number("behaviour_cap", options.behaviour_cap, above=0.0)
    checks.check_number("cispo_cap", options.cispo_cap, above=0.0)
    _check_pair("sapo_temperature", options.sapo_temperature, above=0.0)
    _check_pair("vespo_k", options.vespo_k, at_least=0.0)
    _check_pair("vespo_lambda", options.vespo_lambda, at_least=0.0)
    if options.max_response_tokens is not None:
        checks.check_number("max_response_tokens", options.max_response_tokens, at_least=1)
    return options


def _check_pair(name: str, pair: Any, **bounds: float) -> None:
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise TypeError(f"{name}: want a pair (advantage >= 0, advantage < 0), got {pair!r}")
    for value in pair:
        checks.check_number(name, value, **bounds)


def is_token_level(options: LossOptions, behaviour: Tensor | None) -> bool:
    """Return whether a token's gradient depends on that token alone, given its share of the loss."""
    per_sequence = options.loss_type == "vespo" or options.importance_level == "sequence"
    return not per_sequence and (behaviour is None or options.behaviour_mode.startswith("token"))
