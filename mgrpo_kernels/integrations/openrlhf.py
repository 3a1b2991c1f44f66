"""OpenRLHF 0.11: its actor's log-probs and entropies without the logits.

OpenRLHF has no hook: ``Actor.forward`` calls the model, casts all logits to float32, and takes log-probs and entropies of them.
:func:`patched` has the model's head return the statistics in the logits' place, and the two functions hand them on. The model is
called as before, so whatever wraps it (DeepSpeed, PEFT, packed samples) works as before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from mgrpo_kernels.integrations import Patch
from mgrpo_kernels.ops.linear_token_stats import linear_token_stats
from mgrpo_kernels.ops.token_stats import token_stats_from_logits

INSTALL = "pip install 'openrlhf==0.11.*'"

_MODULE = "openrlhf.models.actor"
_PARAMETERS = (
    "self",
    "sequences",
    "action_mask",
    "attention_mask",
    "return_output",
    "allgather_logits",
    "return_logprobs",
    "ring_attn_group",
    "packed_seq_lens",
    "return_entropy",
    "mm_inputs",
)


@dataclass
class _Call:
    """One call of ``Actor.forward`` whose head is fused."""

    stats: tuple[str, ...]
    temperature: float
    labels: Tensor | None  # of the logits' shape before V; None until packed samples have theirs
    values: Tensor | None = None  # (..., len(stats)) float32, what the head returned


_CHANGED = "expected logits as the head gives them, got {}, which scales or caps them"

_call: ContextVar[_Call | None] = ContextVar("_call", default=None)


class _LogitsChangedError(Exception):
    """The model does something to its logits after the head: a scale, a soft cap."""


def patched(strict: bool = False) -> Patch:
    """Put the fused head under OpenRLHF's actor, until ``undo()`` or the end of a ``with`` block.

    Replaced in ``openrlhf.models.actor``: ``Actor.forward``, ``log_probs_from_logits``, ``compute_entropy`` and
    ``unpad_and_slice_tensor``, which is only listened to. A call that asks for the logits themselves gets them, as before.

    Args:
        strict: raise IntegrationError where a call would run OpenRLHF's own code: a head that is no plain linear layer, a model that
            scales or caps its logits, a model with images.

    Raises:
        IntegrationError: OpenRLHF is not installed, or has moved one of these names or its parameters.
    """
    patch = Patch("openrlhf", install=INSTALL, strict=strict)
    patch.replace(
        _MODULE, "Actor.forward", _forward(patch, patch.original(_MODULE, "Actor.forward")), parameters=_PARAMETERS
    )
    patch.replace(
        _MODULE, "log_probs_from_logits", log_probs_from_logits, parameters=("logits", "labels", "temperature")
    )
    patch.replace(_MODULE, "compute_entropy", compute_entropy)
    patch.replace(_MODULE, "unpad_and_slice_tensor", _note_labels(patch.original(_MODULE, "unpad_and_slice_tensor")))
    return patch.apply()


def _forward(patch: Patch, own: Callable[..., Any]) -> Callable[..., Any]:
    changed: WeakSet[nn.Module] = WeakSet()  # models that turned out to change their logits after the head

    def forward(
        self: Any,
        sequences: Tensor,  # (B, L)
        action_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_output: bool = False,
        allgather_logits: bool = False,
        return_logprobs: bool = False,
        ring_attn_group: Any = None,
        packed_seq_lens: list[int] | None = None,
        return_entropy: bool = False,
        **mm_inputs: Any,
    ) -> Any:
        def call() -> Any:
            return own(
                self,
                sequences,
                action_mask,
                attention_mask,
                return_output,
                allgather_logits,
                return_logprobs,
                ring_attn_group,
                packed_seq_lens,
                return_entropy,
                **mm_inputs,
            )

        if action_mask is None and not return_logprobs:
            return call()  # what is asked for are the logits
        model = getattr(self.model, "module", self.model)  # DeepSpeed's engine
        head = model.get_output_embeddings()
        reason = None
        if getattr(self, "is_vlm", False):
            reason = "expected a model of text, got one with images"
        elif type(head) is not nn.Linear:
            reason = f"expected a head that is nn.Linear, got {type(head).__name__}"
        elif model in changed:
            reason = _CHANGED.format(type(model).__name__)
        else:
            fused = _Call(
                ("logprob", "entropy") if return_entropy else ("logprob",),
                self.temperature,
                None if self.packing_samples else torch.roll(sequences, shifts=-1, dims=1),
            )
            try:
                with _fused(self, head, fused):
                    result = call()
            except _LogitsChangedError:
                changed.add(model)
                reason = _CHANGED.format(type(model).__name__)
            else:
                if return_output:
                    result[1]["logits"] = None  # they hold statistics, not logits
                return result
        patch.fall_back("Actor.forward", reason)
        return call()

    return forward


@contextmanager
def _fused(actor: Any, head: nn.Linear, call: _Call) -> Iterator[None]:
    """Have `head` return the statistics; the temperature is in them, so the actor's own is 1 meanwhile."""

    def forward(hidden: Tensor) -> Tensor:
        assert call.labels is not None
        found = linear_token_stats(
            hidden, head.weight, call.labels, bias=head.bias, stats=call.stats, temperature=call.temperature
        )
        call.values = torch.stack([getattr(found, name) for name in call.stats], -1)
        return call.values

    before = vars(head).get("forward")
    token = _call.set(call)
    actor.temperature = 1.0
    head.forward = forward  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        if before is None:
            del head.forward
        else:
            head.forward = before  # type: ignore[method-assign]
        actor.temperature = call.temperature
        _call.reset(token)


def _statistic(call: _Call, logits: Tensor, name: str) -> Tensor:
    # The same memory, not the same object: DeepSpeed passes a module's output through functions of its own.
    if call.values is None or logits.data_ptr() != call.values.data_ptr() or logits.shape != call.values.shape:
        raise _LogitsChangedError
    return logits[..., call.stats.index(name)]


def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the labels' log-probs ``(...)`` of logits ``(..., V)``; where the head is fused, what it found.

    The logits are not changed (OpenRLHF divides them by the temperature in place).
    """
    call = _call.get()
    if call is not None:
        return _statistic(call, logits, "logprob")
    found = token_stats_from_logits(logits, labels, stats=("logprob",), temperature=temperature).logprob
    assert found is not None
    return found


def compute_entropy(logits: Tensor) -> Tensor:
    """Return the entropies ``(...)`` of logits ``(..., V)``; where the head is fused, what it found."""
    call = _call.get()
    if call is not None:
        return _statistic(call, logits, "entropy")
    found = token_stats_from_logits(logits, None, stats=("entropy",)).entropy
    assert found is not None
    return found


def _note_labels(own: Callable[..., Any]) -> Callable[..., Any]:
    """Return `own`, listened to: where samples are packed, the labels are made there."""

    def unpad_and_slice_tensor(*args: Any, **kwargs: Any) -> Any:
        result = own(*args, **kwargs)
        call = _call.get()
        if call is not None:
            call.labels = result[2]
        return result

    return unpad_and_slice_tensor


__all__ = ["compute_entropy", "log_probs_from_logits", "patched"]
