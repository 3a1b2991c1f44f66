"""Log-prob and entropy of every response token, computed from hidden states with a bounded workspace for the logits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mgrpo_kernels import TokenStats, linear_token_stats
from mgrpo_kernels.train.model.attention import Sequences, gather_rows
from mgrpo_kernels.train.model.policy import Policy


class ResponseStates(NamedTuple):
    """The N response tokens of some sequences, one sequence after another."""

    hidden: Tensor  # (N, H), state at the position before each token
    labels: Tensor  # (N,)
    cu_seqlens: Tensor  # (B+1,) int32


def micro_batches(
    prompts: Sequence[Sequence[int]], lengths: Sequence[int], budget: int, *, packed: bool
) -> list[list[int]]:
    """Split sequences into batches of at most `budget` tokens. A longer sequence is a batch by itself.

    Args:
        prompts: prompt of each sequence.
        lengths: lengths of the responses.
        budget: largest number of tokens that pass through the model in one batch.
        packed: whether sequences are packed as in :class:`mgrpo_kernels.train.model.attention.Sequences`; responses to the same prompt then
            stay together. Otherwise padding counts, and sequences are sorted by decreasing length.
    """
    rest = [max(length - 1, 0) for length in lengths]  # the last token of a response does not pass through the model
    whole = [len(prompt) + length for prompt, length in zip(prompts, rest, strict=True)]
    rows: Iterable[int] = range(len(whole))
    if packed:
        first: dict[tuple[int, ...], int] = {}
        group = [first.setdefault(tuple(prompt), row) for row, prompt in enumerate(prompts)]
        rows = sorted(rows, key=lambda row: group[row])
    else:
        rows = sorted(rows, key=lambda row: -whole[row])
    batches: list[list[int]] = []
    tokens = 0  # of the last batch
    for row in rows:
        shared = batches and packed and group[row] == group[batches[-1][-1]]
        more = rest[row] if shared else whole[row]
        if batches and (tokens + more if packed else (len(batches[-1]) + 1) * whole[batches[-1][0]]) <= budget:
            batches[-1].append(row)
            tokens += more
        else:
            batches.append([row])
            tokens = whole[row]
    return batches


def response_states(policy: Policy, prompts: Sequence[Sequence[int]], tokens: Tensor, mask: Tensor) -> ResponseStates:
    """Run the decoder on prompts followed by their responses ``(B, R)``; return the states from which response tokens are predicted."""
    lengths, labels = mask.sum(-1), tokens[mask]
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    if policy.unpackable is None:
        layout = Sequences(prompts, lengths.tolist(), labels)
        hidden = policy.packed_hidden(layout.ids, layout.positions, layout)
        return ResponseStates(gather_rows(hidden, layout.states), labels, cu_seqlens)
    before = torch.tensor([len(prompt) for prompt in prompts], device=tokens.device)
    width = max(int((before + lengths).max()) - 1, 1)  # the last token does not pass through the model
    ids = torch.zeros(len(prompts), width, dtype=torch.int64)
    for row, (prompt, response, length) in enumerate(zip(prompts, tokens.cpu(), lengths.tolist(), strict=True)):
        sequence = torch.cat([torch.tensor(prompt), response[:length]])[:width]
        ids[row, : len(sequence)] = sequence
    position = torch.arange(width, device=tokens.device)
    states = (position >= (before - 1)[:, None]) & (position < (before - 1 + lengths)[:, None])  # (B, width)
    return ResponseStates(policy.hidden(ids.to(tokens.device))[states], labels, cu_seqlens)


@torch.no_grad()
def score(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    tokens: Tensor,
    mask: Tensor,
    *,
    temperature: float,
    budget: int,
    stats: Sequence[str] = ("logprob", "entropy"),
    kept: Tensor | None = None,
) -> TokenStats:
    """Score responses with the model's current weights.

    Args:
        policy: model that scores.
        prompts: B prompts, as token ids.
        tokens: ``(B, R)`` tokens of the responses.
        mask: ``(B, R)`` bool, True for tokens.
        temperature: divisor of the logits.
        budget: largest number of tokens in one forward pass.
        stats: statistics to compute, out of logprob, entropy and self_certainty.
        kept: ``(B, R, K)`` the sets that a truncated sampler kept, over which the statistics are then computed; None: the whole vocabulary.

    Returns:
        TokenStats, ``(B, R)`` float32 in nats, 0 beyond the end of a response; None for statistics that are not in `stats`.

    Raises:
        FloatingPointError: the model returned NaN.
    """
    rows = torch.nonzero(mask.any(-1)).squeeze(-1).tolist()  # without empty responses
    lengths = mask.sum(-1).tolist()
    out = {name: torch.zeros(tokens.shape, device=tokens.device, dtype=torch.float32) for name in stats}
    weight, bias = policy.head()
    of_rows = [prompts[row] for row in rows], [lengths[row] for row in rows]
    for batch in micro_batches(*of_rows, budget, packed=policy.unpackable is None):
        chosen = torch.tensor([rows[each] for each in batch], device=tokens.device)
        with policy.autocast():
            packed = response_states(policy, [prompts[row] for row in chosen.tolist()], tokens[chosen], mask[chosen])
            result = linear_token_stats(
                packed.hidden,
                weight,
                packed.labels,
                bias=bias,
                stats=tuple(stats),
                temperature=temperature,
                kept=None if kept is None else kept[chosen][mask[chosen]],
                **policy.head_options._asdict(),
            )
        for name, values in out.items():
            part = torch.zeros(len(batch), tokens.shape[1], device=tokens.device, dtype=torch.float32)
            part[mask[chosen]] = getattr(result, name)
            values[chosen] = part
    for name, values in out.items():
        if bool(values.isnan().any()):
            raise FloatingPointError(
                f"score: expected numbers, got NaN in {name}: the model's hidden states or head are not finite"
            )
    return TokenStats(*(out.get(name) for name in TokenStats._fields))
