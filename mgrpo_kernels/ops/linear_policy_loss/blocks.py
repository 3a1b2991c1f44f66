"""The loss of blocks of rows, whose gradient is formed while their logits are at hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mgrpo_kernels import backend as backends
from mgrpo_kernels import sequences
from mgrpo_kernels.ops import _statistics
from mgrpo_kernels.ops._rows import Kept, first_rows, number_with_gradient, spoil, take
from mgrpo_kernels.ops.policy_loss import OP as LOSS_OP
from mgrpo_kernels.ops.policy_loss.options import LossOptions
from mgrpo_kernels.ops.policy_loss.reference import token_weights
from mgrpo_kernels.ops.policy_loss.specs import LOSSES, METRICS, Tokens

_RATIO_MAX = METRICS.index("ratio_max")


def live_first(kept: Kept, given: dict[str, Any], form: LossOptions) -> tuple[Tensor | None, int, Tensor | None]:
    """Return the kept rows (None: all), those that can have a gradient first; how many these are; and whether their number is too low.

    Without KL penalty and entropy bonus a token whose advantage is 0 has none, and its logits are needed for the metrics alone.
    """
    mask = given["mask"]
    if form.entropy_coef != 0 or (form.kl_coef != 0 and given["ref"] is not None):
        live = torch.ones_like(given["labels"], dtype=torch.bool) if mask is None else mask
    else:
        live = advantages_per_token(given) != 0  # a NaN too
        live = live if mask is None else live & mask
    count, too_low = number_with_gradient(live, kept, given["tokens_with_gradient"])
    rows = kept.rows if count == kept.number else first_rows(kept.number, live, mask)
    return rows, count, too_low


def advantages_per_token(given: dict[str, Any]) -> Tensor:
    """Return the advantage of each token ``(T,)``."""
    advantages, offsets, number = given["advantages"], given["offsets"], given["hidden"].shape[0]
    if advantages.shape[0] != number or advantages.shape[0] == offsets.shape[0] - 1:
        return advantages[sequences.group_index(offsets, number)]  # type: ignore[no-any-return]
    return advantages  # type: ignore[no-any-return]


def tokens_of(given: dict[str, Any], form: LossOptions, rows: Tensor | None) -> tuple[Tokens, Tensor]:
    """Return the tokens of these rows with the whole batch's shares and counts, and the number of sequences (0-d)."""
    hidden, mask, offsets = (given[name] for name in ("hidden", "mask", "offsets"))
    wide = _statistics.statistics_dtype(hidden)
    counted = torch.ones_like(given["labels"], dtype=torch.bool) if mask is None else mask
    number_of_tokens = counted.sum().to(wide)
    number_of_sequences = number_of_tokens.new_full((), offsets.shape[0] - 1)
    normalizer, entropy_normalizer = given["normalizer"], given["entropy_normalizer"]
    if normalizer is None:
        loss = LOSSES[form.loss_type]
        normalizer = loss.normalizer(number_of_tokens, number_of_sequences, form.max_response_tokens)
    tokens = Tokens(
        logprob=hidden.new_empty(0, dtype=wide),
        old=take(given["old"], rows),
        advantages=take(advantages_per_token(given), rows),
        mask=take(mask, rows),
        offsets=offsets,
        ref=take(given["ref"], rows),
        entropy=None,
        behaviour=take(given["behaviour"], rows),
        normalizer=normalizer,
        entropy_normalizer=number_of_tokens if entropy_normalizer is None else entropy_normalizer,
        weights=take(token_weights(counted, offsets, form, wide), rows),
    )
    return tokens, number_of_sequences


class BlockLoss:
    """The loss of blocks of rows, added up."""

    def __init__(
        self, tokens: Tokens, form: LossOptions, backend: str, vocab: int, wrong: tuple[Tensor | None, ...] = ()
    ) -> None:
        self.tokens, self.form, self.vocab = tokens, form, vocab
        self.gradients = _statistics.Wanted(logprob=True, entropy=form.entropy_coef != 0, self_certainty=False)
        self.wrong = wrong  # counts of the caller, as far as only the device knows: 0-d bool
        self.loss_of = backends.implementation(LOSS_OP, backend).forward
        self.total = tokens.logprob.new_zeros(())
        self.metrics = torch.zeros(len(METRICS), device=tokens.logprob.device, dtype=torch.float32)

    def coefficients_of(self, block: slice, statistics: _statistics.Statistics) -> Tensor:
        """Add the loss of a block; return what the gradient of its logits is made of."""
        part = _block(self.tokens, block)._replace(logprob=statistics.logprob, entropy=statistics.entropy)
        loss, seen, gradient, scales = self.loss_of(part, None, self.form)
        self.total = self.total + loss
        highest = torch.maximum(self.metrics[_RATIO_MAX], seen[_RATIO_MAX])
        self.metrics = self.metrics + seen
        self.metrics[_RATIO_MAX] = highest
        bonus = torch.zeros_like(gradient) - scales[1] if self.gradients.entropy else None
        coefficients = _statistics.gradient_coefficients(
            gradient * scales[0], bonus, None, statistics.entropy, self.vocab, part.mask, statistics.logprob
        )
        return spoil(coefficients, *self.wrong)


def _block(tokens: Tokens, block: slice) -> Tokens:
    """Return some rows of per-token tensors. Each is a sequence of its own: what sequences share is in `weights` by now."""
    number = block.stop - block.start

    def cut(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[block]

    return tokens._replace(
        old=cut(tokens.old),
        advantages=cut(tokens.advantages),
        mask=cut(tokens.mask),
        ref=cut(tokens.ref),
        behaviour=cut(tokens.behaviour),
        weights=cut(tokens.weights),
        offsets=torch.arange(number + 1, device=tokens.offsets.device),
    )
