"""Log-prob and entropy of every response token, from hidden states: the logits workspace is bounded, whatever N."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mgrpo_kernels import TokenStats, linear_token_stats
from mgrpo_kernels.train.model.attention import Sequences, gather_rows
from mgrpo_kernels.train.model.policy import Policy


class ResponseStates(NamedTuple):
    """The N response tokens of some sequences, one sequence after the other."""

    hidden: Tensor  # (N, H), of the position before each token
    labels: Tensor  # (N,)
    cu_seqlens: Tensor  # (B+1,) int32


def micro_batches(
    prompts: Sequence[Sequence[int]], lengths: Sequence[int], budget: int, *, packed: bool
) -> list[list[int]]:
    """Split sequences into batches of at most `budget` tokens; one that is longer goes alone.

    Args:
        prompts: of each sequence.
        lengths: of the responses.
        budget: in tokens that go through the model.
        packed: those of :class:`mgrpo_kernels.train.model.attention.Sequences`, for which responses to the same prompt stay together. Else
            padding counts, and like goes with like: within and across batches, lengths fall.
    """
    rest = [max(length - 1, 0) for length in lengths]  # what follows the last token is not asked for
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
    """Run the decoder on prompts followed by their responses ``(B, R)``; return its states at the response tokens alone."""
    lengths, labels = mask.sum(-1), tokens[mask]
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    if policy.unpackable is None:
        layout = Sequences(prompts, lengths.tolist(), labels)
        hidden = policy.packed_hidden(layout.ids, layout.positions, layout)
        return ResponseStates(gather_rows(hidden, layout.states), labels, cu_seqlens)
    before = torch.tensor([len(prompt) for prompt in prompts], device=tokens.device)
    width = max(int((before + lengths).max()) - 1, 1)  # what follows the last token is not asked for
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
) -> TokenStats:
    """Score responses under the model as it stands.

    Args:
        policy: the model.
        prompts: B prompts, as token ids.
        tokens: ``(B, R)``.
        mask: ``(B, R)`` bool.
        temperature: divides the logits.
        budget: most tokens in one forward pass.
        stats: out of logprob, entropy, self_certainty.

    Returns:
        TokenStats, ``(B, R)`` float32 in nats, 0 beyond the end; None where it was not asked for.

    Raises:
        FloatingPointError: the model gives NaN.
    """
    rows = torch.nonzero(mask.any(-1)).squeeze(-1).tolist()  # an empty response has nothing to score
    lengths = mask.sum(-1).tolist()
    out = {name: torch.zeros(tokens.shape, device=tokens.device) for name in stats}
    weight, bias = policy.head()
    of_rows = [prompts[row] for row in rows], [lengths[row] for row in rows]
    for batch in micro_batches(*of_rows, budget, packed=policy.unpackable is None):
        chosen = torch.tensor([rows[each] for each in batch], device=tokens.device)
        with policy.autocast():
            packed = response_states(policy, [prompts[row] for row in chosen.tolist()], tokens[chosen], mask[chosen])
            result = linear_token_stats(
                packed.hidden, weight, packed.labels, bias=bias, stats=tuple(stats), temperature=temperature,
                **policy.head_options._asdict(),
            )  # fmt: skip
        for name, values in out.items():
            part = torch.zeros(len(batch), tokens.shape[1], device=tokens.device)
            part[mask[chosen]] = getattr(result, name)
            values[chosen] = part
    for name, values in out.items():
        if bool(values.isnan().any()):
            raise FloatingPointError(
                f"score: expected numbers, got NaN in {name}: the model's hidden states or head are not finite"
            )
    return TokenStats(*(out.get(name) for name in TokenStats._fields))
