"""The table of loss types. Backends, the trainer, the integrations and the documentation read it; nothing repeats it."""

from __future__ import annotations

from typing import Any, NamedTuple


class Surrogate(NamedTuple):
    """The surrogate of the policy's objective on one token. Each backend has one function of this name."""

    name: str
    formula: str  # with r the importance ratio, A the advantage and logprob the token's log-probability
    options: tuple[str, ...]  # the options that only this surrogate reads
    per_sequence: bool = False  # a token's gradient depends on other tokens of its sequence
    weighs_behaviour: bool = False  # it reads the behaviour weight itself; the others are multiplied by it
    geometric_mean: bool = (
        False  # its ratio is the geometric mean over the sequence of ratios that are clipped one by one
    )


CLIP = Surrogate(
    "clip",
    "-min(min(r, clip_delta) A, clip(r, 1 - clip_low, 1 + clip_high) A)",
    options=("clip_low", "clip_high", "clip_delta"),
)
CISPO = Surrogate("cispo", "-min(r, cispo_cap) A logprob, with the weight held constant", options=("cispo_cap",))
SAPO = Surrogate("sapo", "-4 sigmoid(tau (r - 1)) / tau A, with tau = sapo_temperature", options=("sapo_temperature",))
VESPO = Surrogate(
    "vespo",
    "-exp(lambda + k log w - lambda w) A logprob, with w, the weight of the sequence, held constant",
    options=("vespo_k", "vespo_lambda"),
    per_sequence=True,
    weighs_behaviour=True,
)
DPPO_TV = Surrogate(
    "dppo_tv",
    "-min(r, dppo_cap) A logprob, with the weight held constant; 0 where p - p_old > dppo_tv_bounds[0] and A > 0, or "
    "p_old - p > dppo_tv_bounds[1] and A <= 0",
    options=("dppo_tv_bounds", "dppo_cap"),
)
DPPO_KL = Surrogate(
    "dppo_kl",
    "-min(r, dppo_cap) A logprob, with the weight held constant; 0 where KL(p_old, p) > dppo_kl_bounds[0], p > p_old and "
    "A > 0, or KL(p_old, p) > dppo_kl_bounds[1], p < p_old and A <= 0",
    options=("dppo_kl_bounds", "dppo_cap"),
)
GMPO = Surrogate(
    "gmpo",
    "-w A, with w the geometric mean over the sequence of min(r, exp(clip_high)) where A > 0, of max(r, exp(-clip_low)) elsewhere",
    options=("clip_low", "clip_high"),
    per_sequence=True,
    geometric_mean=True,
)

ONE, SEQUENCE_MEAN = "1", "1 / length of its sequence"
TOKENS, SEQUENCES, SEQUENCE_LENGTHS = "tokens", "sequences", "sequences x max_response_tokens"


class LossType(NamedTuple):
    """One loss: a surrogate, and how it is averaged."""

    surrogate: Surrogate
    share: str  # of a token in the sum: ONE or SEQUENCE_MEAN
    counts: str  # what the normalizer counts: TOKENS, SEQUENCES or SEQUENCE_LENGTHS
    source: str | None  # arXiv identifier; None: as in TRL

    def normalizer(self, tokens: Any, sequences: Any, max_response_tokens: Any) -> Any:
        """Return what the sum over these tokens and sequences is divided by; the counts may be numbers or tensors."""
        if self.counts == TOKENS:
            return tokens
        return sequences if self.counts == SEQUENCES else sequences * max_response_tokens


LOSSES = {
    "grpo": LossType(CLIP, SEQUENCE_MEAN, SEQUENCES, "2402.03300"),
    "bnpo": LossType(CLIP, ONE, TOKENS, None),
    "dapo": LossType(CLIP, ONE, TOKENS, "2503.14476"),
    "dr_grpo": LossType(CLIP, ONE, SEQUENCE_LENGTHS, "2503.20783"),
    "cispo": LossType(CISPO, ONE, TOKENS, "2506.13585"),
    "sapo": LossType(SAPO, SEQUENCE_MEAN, SEQUENCES, "2511.20347"),
    "vespo": LossType(VESPO, ONE, TOKENS, "2602.10693"),
    "luspo": LossType(CLIP, ONE, SEQUENCES, "2602.05261"),
    "dppo_tv": LossType(DPPO_TV, ONE, TOKENS, "2602.04879"),
    "dppo_kl": LossType(DPPO_KL, ONE, TOKENS, "2602.04879"),
    "gmpo": LossType(GMPO, SEQUENCE_MEAN, SEQUENCES, "2507.20673"),
}
LOSS_TYPES = tuple(LOSSES)


def rows() -> list[tuple[str, str, str, str]]:
    """Return each loss type's name, surrogate, share of a token and what its normalizer counts, for documentation."""
    return [(name, loss.surrogate.formula, loss.share, loss.counts) for name, loss in LOSSES.items()]


def table() -> list[str]:
    """Return the lines of the table in reStructuredText."""
    widths = [max(map(len, column)) for column in zip(*rows(), strict=True)]
    line = "  ".join("=" * width for width in widths)
    cells = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows()]
    return [line, *cells, line]
