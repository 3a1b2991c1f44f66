"""Key-value caches for generation. The keys and values of a prompt are stored once for all its rollouts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from mgrpo_kernels import _native
from mgrpo_kernels.ops.linear_token_stats.layers import are_plain
from mgrpo_kernels.train.model.attention import Sequences, padded
from mgrpo_kernels.train.model.policy import Policy

ROOM = 64
"""Initial capacity for the tokens of a rollout. It doubles when it is used up."""


def room_for(tokens: int, most: int) -> int:
    """Return the capacity, in tokens per rollout, of a cache that holds `tokens`. It doubles, up to `most`."""
    room = min(most, ROOM)
    while room < tokens:
        room = min(most, 2 * room)
    return room


class Cache(Protocol):
    """The cache of U prompts with c rollouts each, grouped by prompt."""

    HOW: ClassVar[str]
    """What is stored, for the user."""

    def __init__(self, policy: Policy, prompts: Sequence[Sequence[int]], copies: int, max_tokens: int) -> None: ...

    def start(self) -> Tensor:
        """Process the prompts; return the logits of the first tokens, ``(U c, V)``."""

    def extend(self, tokens: Tensor) -> Tensor:
        """Append a token to each rollout, ``(U c,)``; return the logits of the next tokens, ``(U c, V)``."""

    def keep(self, prompts: Tensor, rollouts: Tensor) -> None:
        """Keep only some rollouts: those in `rollouts`, ``(u, k)``, of each prompt in `prompts`, ``(u,)``."""


class SharedCache:
    """Stores and reads the keys and values of a prompt once for all its rollouts.

    It is also the layout (:class:`mgrpo_kernels.train.model.attention.Layout`) of one token per rollout: T = U c.
    """

    HOW: ClassVar[str] = "with keys and values of a prompt stored once for all its rollouts"

    def __init__(self, policy: Policy, prompts: Sequence[Sequence[int]], copies: int, max_tokens: int) -> None:
        self.policy, self.ids, self.copies, self.max_tokens = policy, prompts, copies, max_tokens
        self.lengths = torch.tensor([len(prompt) for prompt in prompts], device=policy.device)  # (U,)
        self.longest = max(map(len, prompts))
        self.length = 0  # of each rollout
        # Of each layer, keys (U K, D, L) and values (U K, L, D): products over keys and over values then read what lies side by side.
        self.prompt: list[tuple[Tensor, Tensor]] = []
        self.own: dict[int, tuple[Tensor, Tensor]] = {}  # (U, K, c, D, room) and (U, K, c, room, D)
        self._positions: Tensor | None = None  # (1, T), of the next tokens
        self._bias: dict[int | None, Tensor] = {}

    def start(self) -> Tensor:
        """See :class:`Cache`."""
        layout = Sequences(self.ids, [1] * len(self.ids), torch.zeros_like(self.lengths), keep=True)
        hidden = self.policy.packed_hidden(layout.ids, layout.positions, layout)[layout.states]  # (U, H)
        for layer in range(len(layout.kept)):
            keys, values = (padded(each, layout.prompts).flatten(0, 1) for each in layout.kept[layer])
            # Under autocast the rotary embedding returns keys in float32.
            self.prompt.append((keys.to(values.dtype).transpose(1, 2).contiguous(), values))
        return self.policy.logits(hidden).repeat_interleave(self.copies, 0)

    def extend(self, tokens: Tensor) -> Tensor:
        """See :class:`Cache`."""
        if self._positions is None:
            self._positions = (self.lengths + self.length).repeat_interleave(self.copies).unsqueeze(0)
        logits = self.policy.logits(self.policy.packed_hidden(tokens[None], self._positions, self))
        self.length += 1
        self._positions = self._positions + 1
        return logits

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        """See :class:`mgrpo_kernels.train.model.attention.Layout`."""
        T, K, D = k.shape
        c, repeat, U = self.copies, q.shape[1] // K, T // self.copies
        own_keys, own_values = self._with_room(layer, k, v)
        keys, values = self.prompt[layer]
        if _native.missing() is None and are_plain(q, k, v, keys, values):
            new, held = (q, k, v), (keys, values, self.lengths, own_keys, own_values)
            return torch.ops.mgrpo_native.attend_(*new, *held, self.length, window, scale)  # type: ignore[no-any-return]
        own_keys[..., self.length], own_values[..., self.length, :] = (
            each.view(U, c, K, -1).transpose(1, 2) for each in (k, v)
        )
        q = q.to(values.dtype).view(U, c, K, repeat, D).transpose(1, 2).reshape(U * K, c * repeat, D)
        # The n tokens of each rollout within the window: (U K c, D, n) and (U K c, n, D).
        first = 0 if window is None else max(0, self.length + 1 - window)
        own_keys = own_keys[..., first : self.length + 1].flatten(0, 2)
        own_values = own_values[..., first : self.length + 1, :].flatten(0, 2)
        with_prompt = torch.baddbmm(self._seen(window, K, q.dtype), q, keys, alpha=scale)
        alone = torch.baddbmm(q.new_zeros(1), q.reshape(U * K * c, repeat, D), own_keys, beta=0, alpha=scale)
        weights = torch.cat([with_prompt, alone.view(U * K, c * repeat, -1)], dim=-1)
        weights = weights.softmax(-1, dtype=torch.float32).to(values.dtype)
        of_prompt, of_own = weights.split([keys.shape[2], own_keys.shape[2]], dim=-1)
        out = torch.bmm(of_prompt, values).view(U * K * c, repeat, -1)
        out = torch.baddbmm(out, of_own.view(U * K * c, repeat, -1), own_values)
        return out.view(U, K, c, repeat, -1).transpose(1, 2).reshape(T, K * repeat, -1)

    def _with_room(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys ``(U, K, c, D, room)`` and values ``(U, K, c, room, D)`` of all tokens, with room for one more."""
        held = self.own.get(layer)
        if held is None or held[0].shape[-1] == self.length:
            room = room_for(self.length + 1, self.max_tokens)
            shape = len(self.lengths), k.shape[1], self.copies
            new = v.new_empty(*shape, k.shape[2], room), v.new_empty(*shape, room, v.shape[2])
            if held is not None:
                new[0][..., : self.length], new[1][..., : self.length, :] = held
            self.own[layer] = held = new
        return held

    def _seen(self, window: int | None, heads: int, dtype: torch.dtype) -> Tensor:
        """Return 0 where a rollout's newest token attends to a token of the prompt, else -inf, ``(U K, 1, L)``."""
        if window is not None and self.longest + self.length < window:
            window = None
        if window is not None or None not in self._bias:
            position = torch.arange(self.longest, device=self.lengths.device)
            seen = position < self.lengths[:, None]
            if window is not None:
                seen &= (self.lengths + self.length)[:, None] - position < window
            bias = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)
            self._bias[window] = bias.repeat_interleave(heads, 0).unsqueeze(1)
        return self._bias[window]

    def keep(self, prompts: Tensor, rollouts: Tensor) -> None:
        """See :class:`Cache`."""
        U = len(self.lengths)

        def of_prompts(rows: Tensor) -> Tensor:
            return rows.view(U, -1, *rows.shape[1:])[prompts].flatten(0, 1)

        for layer, (keys, values) in enumerate(self.prompt):
            self.prompt[layer] = (of_prompts(keys), of_prompts(values))
        for layer, (keys, values) in self.own.items():
            self.own[layer] = chosen(keys, prompts, rollouts), chosen(values, prompts, rollouts)
        self.lengths, self.copies, self._positions = self.lengths[prompts], rollouts.shape[1], None
        self._bias.clear()


class PaddedCache:
    """The model's own cache. Rollouts are left-padded, each with its prompt's keys, values and states."""

    HOW: ClassVar[str] = "with transformers' cache, in one batch of left-padded prompts"

    def __init__(self, policy: Policy, prompts: Sequence[Sequence[int]], copies: int, max_tokens: int) -> None:
        self.policy, self.ids, self.copies = policy, prompts, copies
        self.cache = policy.new_cache()

    def start(self) -> Tensor:
        """See :class:`Cache`."""
        ids, mask = left_pad(self.ids, self.policy.device)
        logits = self.policy.next_logits(ids, mask, positions(mask), self.cache)
        rows = torch.arange(len(ids), device=ids.device).repeat_interleave(self.copies)
        self.cache.reorder_cache(rows)  # type: ignore[arg-type]  # annotated as a LongTensor
        self.mask, self.position = mask[rows], mask.sum(-1)[rows]  # of the next token
        return logits[rows]

    def extend(self, tokens: Tensor) -> Tensor:
        """See :class:`Cache`."""
        self.mask = torch.nn.functional.pad(self.mask, (0, 1), value=True)
        logits = self.policy.next_logits(tokens[:, None], self.mask, self.position[:, None], self.cache)
        self.position = self.position + 1
        return logits

    def keep(self, prompts: Tensor, rollouts: Tensor) -> None:
        """See :class:`Cache`."""
        rows = (prompts[:, None] * self.copies + rollouts).flatten()
        self.cache.reorder_cache(rows)  # type: ignore[arg-type]  # annotated as a LongTensor
        self.mask, self.position, self.copies = self.mask[rows], self.position[rows], rollouts.shape[1]


class UnpaddedCache:
    """Whatever cache the model creates itself, one for the prompts of each length, as when ``generate`` is called for each of them.

    For models that ignore padding before a prompt, or whose state has a form of its own: no row is ever taken out of the state.
    """

    HOW: ClassVar[str] = "with transformers' cache, the prompts of each length by themselves (slower)"

    def __init__(self, policy: Policy, prompts: Sequence[Sequence[int]], copies: int, max_tokens: int) -> None:
        self.policy = policy
        by_length: dict[int, list[int]] = {}
        for number, prompt in enumerate(prompts):
            by_length.setdefault(len(prompt), []).append(number)
        every = torch.arange(len(prompts) * copies, device=policy.device).view(-1, copies)
        self.parts = [every[numbers].flatten() for numbers in by_length.values()]  # which rollouts, of each length
        self.ids = [
            torch.tensor([prompts[number] for number in numbers], device=policy.device).repeat_interleave(copies, 0)
            for numbers in by_length.values()
        ]
        self.states: list[dict[str, Any]] = [{} for _ in self.parts]
        self.all = every.flatten()
        self.rows, self.copies = self.all, copies  # the rollouts that are kept

    def start(self) -> Tensor:
        """See :class:`Cache`."""
        return self._step(self.ids)

    def extend(self, tokens: Tensor) -> Tensor:
        """See :class:`Cache`."""
        given = torch.zeros_like(self.all).index_copy_(0, self.rows, tokens)  # 0 for those that are not kept
        return self._step([given[part, None] for part in self.parts])

    def _step(self, ids: Sequence[Tensor]) -> Tensor:
        found = []
        for number, part in enumerate(ids):
            logits, self.states[number] = self.policy.step(part, self.states[number])
            found.append(logits)
        return torch.cat(found)[torch.cat(self.parts).argsort()[self.rows]]

    def keep(self, prompts: Tensor, rollouts: Tensor) -> None:
        """See :class:`Cache`."""
        self.rows = self.rows.view(-1, self.copies)[prompts[:, None], rollouts].flatten()
        self.copies = rollouts.shape[1]


class NoCache:
    """Processes each rollout from its first token again for every token, as scoring does. It is slow, and right for every model."""

    HOW: ClassVar[str] = (
        "without a cache, each rollout processed again for every token (slow): no cache gives this model's own log-probs"
    )

    def __init__(self, policy: Policy, prompts: Sequence[Sequence[int]], copies: int, max_tokens: int) -> None:
        self.policy, self.copies = policy, copies
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=policy.device)
        ids = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.tensor(prompt)
        self.ids, self.lengths = (each.to(policy.device).repeat_interleave(copies, 0) for each in (ids, lengths))

    def start(self) -> Tensor:
        """See :class:`Cache`."""
        rows = torch.arange(len(self.ids), device=self.ids.device)
        return self.policy.logits(self.policy.hidden(self.ids)[rows, self.lengths - 1])

    def extend(self, tokens: Tensor) -> Tensor:
        """See :class:`Cache`."""
        if int(self.lengths.max()) == self.ids.shape[1]:
            self.ids = torch.nn.functional.pad(self.ids, (0, 1))
        self.ids.scatter_(1, self.lengths[:, None], tokens[:, None])
        self.lengths = self.lengths + 1
        return self.start()

    def keep(self, prompts: Tensor, rollouts: Tensor) -> None:
        """See :class:`Cache`."""
        rows = (prompts[:, None] * self.copies + rollouts).flatten()
        self.ids, self.lengths, self.copies = self.ids[rows], self.lengths[rows], rollouts.shape[1]


def chosen(held: Tensor, prompts: Tensor, rollouts: Tensor) -> Tensor:
    """Select some rollouts, ``(u, k)``, of some prompts, ``(u,)``, from ``(U, K, c, ...)``."""
    return held.transpose(1, 2)[prompts[:, None], rollouts].transpose(1, 2).contiguous()


def left_pad(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return left-padded token ids ``(B, L)`` and their mask."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    starts = torch.tensor([width - len(prompt) for prompt in prompts], device=device)
    return ids, torch.arange(width, device=device) >= starts[:, None]


def positions(mask: Tensor) -> Tensor:
    """Return each token's position in its sequence without padding, ``(B, L)``."""
    return (mask.long().cumsum(-1) - 1).clamp_min(0)
