"""Attention without padding: sequences are concatenated, and a prompt occurs once for all its responses.

transformers passes the queries, keys and values of every layer to a function that is registered by name. The function in this module reads
from the keyword ``layout`` to which sequence each token belongs; the rest of the model processes a single row of tokens. Without a layout
it is PyTorch's scaled dot-product attention, as transformers calls it.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

NAME = "mgrpo_kernels"
HARMLESS = frozenset(
    {
        "position_ids",
        "use_cache",
        "cache_position",
        "position_embeddings",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
        "logits_to_keep",
    }
)
"""Keywords that models pass on and that do not change which tokens attend to which."""


class UnpackableError(ValueError):
    """A model requires a kind of attention that layouts do not support."""


class Layout(Protocol):
    """States to which sequence each token belongs, and computes the attention."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        """Return the outputs ``(T, H, D)`` of queries ``(T, H, D)`` over keys and values ``(T, K, D)``, where K divides H.

        A token attends to itself and to the tokens before it in its sequence; with a window, only to the last `window` of these.
        """


def register() -> None:
    """Register the attention function with transformers."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: Layout | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Return the layout's attention, ``(1, T, H, D)``, for ``(1, H, T, D)``, as transformers calls it.

    Raises:
        UnpackableError: the layer has an option that would change the result and that layouts do not support.
    """
    if layout is None:
        sdpa: Callable[..., tuple[Tensor, None]] = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return sdpa(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, is_causal=is_causal, **others
        )
    odd = [name for name, given in others.items() if given is not None and name not in HARMLESS]
    odd += ["dropout"] * (dropout > 0) + ["is_causal=False"] * (is_causal is False)
    if attention_mask is not None and attention_mask.numel() > 1:  # the trainer gives a single number
        odd.append("a mask of its own")
    if odd:
        raise UnpackableError(f"attention: expected only options that layouts support, got {', '.join(odd)}")
    q, k, v = (each[0].transpose(0, 1) for each in (query, key, value))
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    return layout.attend(module.layer_idx, q, k, v, scale, sliding_window).unsqueeze(0), None


class Rows(NamedTuple):
    """Sequences of similar length, padded only for attention: the indices of their queries and keys among the T tokens."""

    queries: Tensor  # (r, Q) int64, -1 beyond the end
    keys: Tensor  # (r, L) int64, -1 beyond the end
    begin: Tensor  # (r,) position of the first query in its sequence
    whole: bool  # whether the queries are all tokens of each sequence

    def mask(self, window: int | None) -> Tensor | None:
        """Return which keys each query attends to, ``(r, 1, Q, L)`` bool; None for plain causal attention, which excludes padding."""
        if self.whole and (window is None or window >= self.keys.shape[1]):
            return None
        keys = torch.arange(self.keys.shape[1], device=self.keys.device)
        places = self.begin[:, None] + torch.arange(self.queries.shape[1], device=self.keys.device)  # (r, Q)
        # Padding queries attend to a key too, or their outputs would be NaN.
        places = places.clamp_max(self.keys.shape[1] - 1)[:, None, :, None]
        return keys <= places if window is None else (keys <= places) & (keys > places - window)


class Sequences:
    """The layout of prompts and their responses: each distinct prompt once, then all tokens but the last of each response.

    The last token of a response does not pass through the model. There are T tokens in all, and N response tokens.

    Args:
        prompts: B prompts, as token ids, none of them empty.
        lengths: lengths of the B responses.
        tokens: ``(N,)`` tokens of the responses, one response after another.
        keep: whether to keep the keys and values of every layer.

    Attributes:
        ids, positions: ``(1, T)`` token ids and positions.
        states: ``(N,)`` index of the state that predicts each response token.
        prompts: ``(B, L)`` indices of each prompt's tokens; -1 beyond its end.
        kept: keys and values of each layer, ``(T, K, D)``, after the model has run.
    """

    def __init__(
        self, prompts: Sequence[Sequence[int]], lengths: Sequence[int], tokens: Tensor, *, keep: bool = False
    ) -> None:
        device = tokens.device
        number: dict[tuple[int, ...], int] = {}  # of each distinct prompt
        of = torch.tensor([number.setdefault(tuple(prompt), len(number)) for prompt in prompts])  # (B,)
        before = torch.tensor([len(prompt) for prompt in number])  # (U,)
        length = torch.tensor(lengths)
        rest = (length - 1).clamp_min(0)
        prompt_start = starts(before)
        start = int(before.sum()) + starts(rest)

        sequence, position = spread(length)  # (N,)
        kept = position < rest[sequence]
        words = torch.tensor([word for prompt in number for word in prompt])
        last = prompt_start + before - 1  # of each prompt
        states = torch.where(position == 0, last[of][sequence], start[sequence] + position - 1)
        places = torch.cat([spread(before)[1], (before[of][sequence] + position)[kept]])
        self.ids = torch.cat([words.to(device), tokens[kept.to(device)]]).unsqueeze(0)
        self.positions = places.unsqueeze(0).to(device)
        self.states = states.to(device)
        position = torch.arange(int(before.max()))
        prompts_at = torch.where(position < before[of][:, None], prompt_start[of][:, None] + position, -1)
        self.prompts = prompts_at.to(device)

        if len(number) == len(of):  # no prompt is shared: each prompt and its response are one piece
            pieces = [(prompt_start, before, start, torch.zeros_like(before), before + rest)]
        else:
            longer = rest.nonzero().squeeze(-1)
            mine = of[longer]
            pieces = [
                (prompt_start, before, prompt_start, torch.zeros_like(before), before),
                (prompt_start[mine], before[mine], start[longer], before[mine], before[mine] + rest[longer]),
            ]
        rows = [make_rows(*(column[chosen] for column in piece)) for piece in pieces for chosen in buckets(piece[-1])]
        flat = torch.cat([each.queries.flatten() for each in rows])
        inside = (flat >= 0).nonzero().squeeze(-1)
        back = torch.empty(len(places), dtype=torch.int64)
        back[flat[inside]] = inside
        self.rows = [Rows(row.queries.to(device), row.keys.to(device), row.begin.to(device), row.whole) for row in rows]
        self.back = back.to(device)  # (T,) index of each token's output in the concatenated outputs of the rows
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}
        self._keep = keep
        self._masks: dict[int | None, list[Tensor | None]] = {}
        self._varlen: Varlen | None = None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        """See :class:`Layout`."""
        if self._keep:
            self.kept[layer] = k, v
        if flash_attention(v):
            self._varlen = Varlen.of(self.rows) if self._varlen is None else self._varlen
            return gather_rows(self._varlen.attend(q, k, v, scale, window), self._varlen.back)
        outputs = []
        if window not in self._masks:  # many layers have the same window
            self._masks[window] = [rows.mask(window) for rows in self.rows]
        for rows, mask in zip(self.rows, self._masks[window], strict=True):
            out = scaled_dot_product_attention(
                padded(q, rows.queries),
                padded(k, rows.keys),
                padded(v, rows.keys),
                attn_mask=mask,
                is_causal=mask is None,
                scale=scale,
                enable_gqa=q.shape[1] != k.shape[1],
            )
            outputs.append(out.transpose(1, 2).flatten(0, 1))  # (r Q, H, D)
        return gather_rows(torch.cat(outputs), self.back)


class Probe(Sequences):
    """A layout of prompts that tests whether a model supports layouts."""

    def __init__(self, prompts: Sequence[Sequence[int]], tokens: Tensor) -> None:
        super().__init__(prompts, [1] * len(prompts), tokens)
        self.windows: dict[int, int | None] = {}  # of each layer that has called attend()

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        """See :class:`Layout`."""
        self.windows[layer] = window
        return super().attend(layer, q, k, v, scale, window)

    def why_not(self, apart: Tensor, together: Tensor, sliding: Sequence[bool]) -> str | None:
        """Return None if the model supports layouts, or the reason why it does not.

        Args:
            apart: hidden states ``(T, H)`` of each prompt processed by itself.
            together: hidden states with this layout.
            sliding: whether each layer's attention has a window, according to the model's configuration.
        """
        if len(self.windows) != len(sliding):
            return f"only {len(self.windows)} of its {len(sliding)} layers call the attention function"
        for layer, slides in enumerate(sliding):
            if slides != (self.windows[layer] is not None):
                return f"layer {layer} {'does not pass' if slides else 'passes'} a sliding window"
        return self.difference(apart, together)

    def difference(self, apart: Tensor, together: Tensor) -> str | None:
        """Return None if the hidden states are equal up to rounding, or a text with their difference."""
        worst = (apart - together).abs().max().item()
        if worst <= 1e-4 * max(1.0, apart.abs().max().item()):
            return None
        return f"hidden states of sequences in one row differ by {worst:.2g} from those of single sequences"


def make_rows(prompt_start: Tensor, before: Tensor, start: Tensor, begin: Tensor, end: Tensor) -> Rows:
    """Return sequences whose queries are their tokens from `begin` to `end`. All arguments are ``(r,)``.

    Args:
        prompt_start: index of the first token of each sequence's prompt.
        before: length of the prompt.
        start: index of the first token after the prompt.
        begin: position of the first query in its sequence.
        end: length of the sequence.
    """

    def tokens(places: Tensor) -> Tensor:
        found = places + torch.where(places < before[:, None], prompt_start[:, None], (start - before)[:, None])
        return torch.where(places < end[:, None], found, -1)

    queries = begin[:, None] + torch.arange(int((end - begin).max()))
    return Rows(tokens(queries), tokens(torch.arange(int(end.max())).expand(len(end), -1)), begin, not begin.any())


def buckets(lengths: Tensor) -> list[Tensor]:
    """Group sequences of similar length; return their numbers. A new group starts if its call costs less than the padding it avoids."""
    order = lengths.argsort(descending=True, stable=True).tolist()
    groups: list[list[int]] = []
    longest = 0  # of the last group
    for each in order:
        length = int(lengths[each])
        if groups and (length >= 0.8 * longest or length * longest * len(groups[-1]) < SMALL):
            groups[-1].append(each)
        else:
            groups.append([each])
            longest = length
    return [torch.tensor(group) for group in groups]


SMALL = 2**20
"""Number of attention scores (rows x queries x keys) that cost as much as one more call."""


def padded(values: Tensor, index: Tensor) -> Tensor:
    """Return rows of ``(T, H, D)`` in the shape for attention, ``(r, H, Q, D)``; padding has the values of token 0."""
    found = gather_rows(values, index.clamp_min(0).flatten())
    return found.view(*index.shape, *values.shape[1:]).transpose(1, 2)


def gather_rows(values: Tensor, index: Tensor) -> Tensor:
    """Return rows of ``(T, ...)``. Backward accumulates the gradient of a repeated row in a deterministic order."""
    return values.index_select(0, index) if values.device.type == "cpu" else values[index]


def starts(lengths: Tensor) -> Tensor:
    """Return the start of each sequence in the concatenation of sequences with these lengths."""
    return lengths.cumsum(0) - lengths


def spread(lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sequence number and the position of every token in the concatenation of sequences with these lengths."""
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    return sequence, torch.arange(len(sequence)) - starts(lengths)[sequence]


@functools.cache
def has_flash_attention() -> bool:
    """Return whether flash-attn is installed."""
    return importlib.util.find_spec("flash_attn") is not None


def flash_attention(values: Tensor) -> bool:
    """Return whether flash-attn supports these values: they are on a GPU and not in float32."""
    return values.device.type == "cuda" and values.dtype != torch.float32 and has_flash_attention()


class Varlen(NamedTuple):
    """The arguments of flash-attn: queries and keys of all sequences, concatenated."""

    queries: Tensor  # indices into the T tokens
    keys: Tensor
    back: Tensor  # (T,) index of each token's output
    cu_queries: Tensor  # (r+1,) int32
    cu_keys: Tensor
    longest: tuple[int, int]  # largest number of queries and of keys in a sequence

    @classmethod
    def of(cls, rows: Sequence[Rows]) -> Varlen:
        """Return the sequences in these rows, without their padding."""
        columns = [[each.queries for each in rows], [each.keys for each in rows]]
        queries, keys = (torch.cat([index[index >= 0] for index in column]) for column in columns)
        lengths = [torch.cat([(index >= 0).sum(-1) for index in column]) for column in columns]
        back = torch.empty_like(queries)
        back[queries] = torch.arange(len(queries), device=queries.device)
        cu = [torch.nn.functional.pad(each.cumsum(0), (1, 0)).int() for each in lengths]
        return cls(queries, keys, back, cu[0], cu[1], (int(lengths[0].max()), int(lengths[1].max())))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        """Return the outputs in the order of `queries`. flash-attn aligns its causal mask with the last query and key, as required."""
        from flash_attn import flash_attn_varlen_func

        outputs: Tensor = flash_attn_varlen_func(
            gather_rows(q, self.queries).to(v.dtype),  # under autocast the rotary embedding returns q and k in float32
            gather_rows(k, self.keys).to(v.dtype),
            gather_rows(v, self.keys),
            self.cu_queries,
            self.cu_keys,
            *self.longest,
            softmax_scale=scale,
            causal=True,
            window_size=(-1, -1) if window is None else (window - 1, 0),
            deterministic=True,
        )
        return outputs.to(q.dtype)
