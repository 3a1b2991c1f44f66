"""Token statistics from logits: log-probability of the label, entropy, self-certainty, in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mgrpo_kernels import backend as backends
from mgrpo_kernels import checks
from mgrpo_kernels.ops import _autograd
from mgrpo_kernels.ops._statistics import Wanted, statistics_dtype
from mgrpo_kernels.ops.token_stats import native, reference, triton
from mgrpo_kernels.ops.token_stats.specs import TokenStats, check_stats

OP = "token_stats"
backends.register(OP, reference=reference, native=native, triton=triton)


def token_stats_from_logits(
    logits: Tensor,
    labels: Tensor | None,
    *,
    stats: Sequence[str] = ("logprob", "entropy"),
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    inplace_backward: bool = False,
    backend: str | None = None,
    debug: bool = False,
) -> TokenStats:
    """Return statistics of the distribution softmax(z), z = logits / temperature, of every token, in nats.

    - logprob: log softmax(z)[label] = z[label] - logsumexp(z)
    - entropy: -sum_j p_j log p_j
    - self_certainty: logsumexp(z) - mean_j z_j (Intuitor, arXiv 2505.19590, without its constant log V)

    One pass over the logits whichever are asked for, and one more in backward. A logit of -inf has probability 0; a NaN stays
    in its row. Differentiable once with respect to `logits`.

    Args:
        logits: ``(..., V)``, float32, bfloat16 or float16 (float64 on the reference backend). Any strides.
        labels: ``(...)`` int32 or int64, already shifted: ``logits[i]`` scores ``labels[i]``. Also ``(..., K)``, K labels for
            each token; then logprob is ``(..., K)``. None if "logprob" is not asked for.
        stats: names of the statistics wanted.
        temperature: a number > 0, or a tensor that broadcasts to ``(...)`` (it gets no gradient).
        mask: ``(...)`` bool, True counts. A masked token gives exactly 0 and gets exactly zero gradient, whatever its row holds.
        inplace_backward: let backward overwrite `logits` with their gradient. Nothing else may read them afterwards.
            Ignored while compiling: there the compiler plans the memory.
        backend: ``reference``, ``native`` or ``triton``; None picks.
        debug: on a GPU, pay a host sync to raise for a bad label.

    Returns:
        TokenStats of float32 (float64 for float64 logits); None where a statistic was not asked for.

    Raises:
        TypeError: wrong type or dtype.
        ValueError: wrong shape, device or option; on a CPU also an unmasked label outside [0, V) (on a GPU such a row is NaN).
        BackendUnavailable: `backend` cannot run here.
    """
    wanted = check_stats(stats)
    checks.check_tensor("logits", logits)
    if logits.dim() < 1 or logits.shape[-1] < 1:
        raise ValueError(f"logits: expected shape (..., V) with V >= 1, got {checks.shape_text(logits.shape)}")
    rows = logits.shape[:-1]
    mask = checks.check_mask("mask", mask, rows, logits.device)
    number, per_row = checks.check_temperature(temperature, rows, logits.device)
    checks.check_flag("inplace_backward", inplace_backward)
    checks.check_flag("debug", debug)
    labels = _check_labels(labels, logits) if wanted.logprob else None
    many = labels is not None and labels.dim() == logits.dim()
    if labels is not None and not many:
        labels = labels.unsqueeze(-1)
    if inplace_backward and logits.requires_grad and logits.is_leaf:
        raise ValueError(
            "inplace_backward: expected logits that are an op's output (backward overwrites them), got a leaf"
        )

    name = backends.choose(OP, backend, logits.device, logits.dtype)
    inplace = inplace_backward and not torch.compiler.is_compiling()
    logprob, entropy, self_certainty, _ = token_stats_op(
        logits,
        labels,
        mask,
        per_row,
        number,
        wanted.logprob,
        wanted.entropy,
        wanted.self_certainty,
        inplace,
        debug,
        name,
    )
    return TokenStats(
        (logprob if many else logprob.squeeze(-1)) if wanted.logprob else None,
        entropy if wanted.entropy else None,
        self_certainty if wanted.self_certainty else None,
    )


def _check_labels(labels: Tensor | None, logits: Tensor) -> Tensor:
    """Return labels ``(...)`` or ``(..., K)`` of logits ``(..., V)``, or raise TypeError or ValueError."""
    if labels is None:
        raise ValueError('labels: expected a tensor when stats has "logprob", got None')
    checks.check_tensor("labels", labels, dtypes=checks.INTS, device=logits.device)
    rows = logits.shape[:-1]
    if labels.shape != rows and not (labels.dim() == logits.dim() and labels.shape[:-1] == rows):
        raise ValueError(
            f"labels: expected shape {checks.shape_text(rows)} or that and K more behind it (logits without V), "
            f"got {checks.shape_text(labels.shape)}"
        )
    return labels


@torch.library.custom_op("mgrpo_kernels::token_stats", mutates_args=())
def token_stats_op(
    logits: Tensor,  # (..., V)
    labels: Tensor | None,  # (..., K)
    mask: Tensor | None,  # (...)
    temperature_per_row: Tensor | None,  # (...) float32
    temperature: float,
    want_logprob: bool,
    want_entropy: bool,
    want_self_certainty: bool,
    inplace_backward: bool,
    debug: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return logprob ``(..., K)``, entropy, self_certainty and logsumexp ``(...)``; those not wanted are empty."""
    _autograd.refuse_tangents("token_stats", logits)
    _check_rows(logits, labels, mask, temperature_per_row)
    if want_logprob and labels is None:
        raise ValueError("labels: expected a tensor with want_logprob, got None")
    checks.check_temperature_values(temperature_per_row)
    if labels is not None and (debug or logits.device.type == "cpu"):
        checks.check_label_values(labels.squeeze(-1) if labels.shape[-1] == 1 else labels, mask, logits.shape[-1])
    wanted = Wanted(want_logprob, want_entropy, want_self_certainty)
    outputs: tuple[Tensor, Tensor, Tensor, Tensor] = backends.implementation(OP, backend).forward(
        logits, labels, mask, temperature if temperature_per_row is None else temperature_per_row, wanted
    )
    return outputs


def _check_rows(logits: Tensor, labels: Tensor | None, mask: Tensor | None, temperature_per_row: Tensor | None) -> None:
    """Check what the forward and the backward op have in common."""
    checks.check_tensor("logits", logits)
    if logits.dim() < 1 or logits.shape[-1] < 1:
        raise ValueError(f"logits: expected shape (..., V) with V >= 1, got {checks.shape_text(logits.shape)}")
    rows = logits.shape[:-1]
    if labels is not None and labels.dim() != logits.dim():
        raise ValueError(
            f"labels: expected shape (..., K) with {logits.dim()} dimension(s), got {checks.shape_text(labels.shape)}"
        )
    checks.check_inside(
        logits.device,
        ("labels", labels, rows if labels is None else (*rows, labels.shape[-1]), checks.INTS),
        ("mask", mask, rows, checks.BOOL),
        ("temperature_per_row", temperature_per_row, rows, checks.WIDE_FLOATS),
    )


@token_stats_op.register_fake
def _(
    logits: Tensor,
    labels: Tensor | None,
    mask: Tensor | None,
    temperature_per_row: Tensor | None,
    temperature: float,
    want_logprob: bool,
    want_entropy: bool,
    want_self_certainty: bool,
    inplace_backward: bool,
    debug: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype, rows = statistics_dtype(logits), logits.shape[:-1]
    none = (0,)
    return (
        logits.new_empty(labels.shape if want_logprob and labels is not None else none, dtype=dtype),
        logits.new_empty(rows if want_entropy else none, dtype=dtype),
        logits.new_empty(rows if want_self_certainty else none, dtype=dtype),
        logits.new_empty(rows, dtype=dtype),
    )


@torch.library.custom_op("mgrpo_kernels::token_stats_backward", mutates_args=())
def token_stats_backward_op(
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
    grad_self_certainty: Tensor | None,
    logits: Tensor,
    labels: Tensor | None,
    mask: Tensor | None,
    temperature_per_row: Tensor | None,
    temperature: float,
    logsumexp: Tensor,
    entropy: Tensor | None,
    backend: str,
) -> Tensor:
    """Return the gradient of the logits, contiguous, of their shape and dtype."""
    _check_rows(logits, labels, mask, temperature_per_row)
    rows = logits.shape[:-1]
    checks.check_tensor("logsumexp", logsumexp)  # not None, which the dispatcher lets pass
    if (grad_logprob is not None and labels is None) or (grad_entropy is not None and entropy is None):
        raise ValueError("expected labels with grad_logprob and entropy with grad_entropy, got None")
    checks.check_inside(
        logits.device,
        ("grad_logprob", grad_logprob, rows if labels is None else labels.shape, checks.FLOATS),
        ("grad_entropy", grad_entropy, rows, checks.FLOATS),
        ("grad_self_certainty", grad_self_certainty, rows, checks.FLOATS),
        ("logsumexp", logsumexp, rows, checks.WIDE_FLOATS),
        ("entropy", entropy, rows, checks.WIDE_FLOATS),
    )
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    _backward_into(
        out,
        grad_logprob,
        grad_entropy,
        grad_self_certainty,
        logits,
        labels,
        mask,
        temperature_per_row,
        temperature,
        logsumexp,
        entropy,
        backend,
    )
    return out


@token_stats_backward_op.register_fake
def _(grad_logprob: Any, grad_entropy: Any, grad_self_certainty: Any, logits: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _backward_into(out: Tensor, *args: Any) -> None:
    """Write the gradient into `out`. The other arguments are those of :func:`token_stats_backward_op`."""
    *tensors, per_row, number, logsumexp, entropy, backend = args
    temperature = number if per_row is None else per_row
    backends.implementation(OP, backend).backward(out, *tensors, temperature, logsumexp, entropy)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, labels, mask, per_row, ctx.temperature, *wanted, ctx.inplace, _, ctx.backend = inputs
    _, entropy, _, logsumexp = output
    _, want_entropy, _ = wanted
    ctx.set_materialize_grads(False)  # an unused statistic costs no work in backward
    ctx.mark_non_differentiable(logsumexp, *(stat for stat, want in zip(output, wanted, strict=False) if not want))
    ctx.save_for_backward(logits, labels, mask, per_row, logsumexp, entropy if want_entropy else None)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_logprob, grad_entropy, grad_self_certainty, _ = grads
    logits, labels, mask, per_row, logsumexp, entropy = ctx.saved_tensors
    rest = (labels, mask, per_row, ctx.temperature, logsumexp, entropy, ctx.backend)
    if ctx.inplace:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "inplace_backward: expected a first derivative only (create_graph=False), got create_graph=True"
            )
        grad = logits.detach()
        _backward_into(grad, grad_logprob, grad_entropy, grad_self_certainty, logits, *rest)
    else:
        grad = token_stats_backward_op(grad_logprob, grad_entropy, grad_self_certainty, logits, *rest)
    return (grad, *[None] * 10)


_autograd.register(token_stats_op, token_stats_backward_op, _backward, _setup_context)


def logprobs_from_logits(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Return log softmax(logits / temperature)[labels], of labels' shape, ``(...)`` or ``(..., K)``, float32.

    As :func:`token_stats_from_logits`, whose arguments and errors these are.
    """
    stats = token_stats_from_logits(
        logits, labels, stats=("logprob",), temperature=temperature, mask=mask, backend=backend
    )
    assert stats.logprob is not None
    return stats.logprob


def entropy_from_logits(
    logits: Tensor, *, temperature: float | Tensor = 1.0, mask: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """Return the entropy of softmax(logits / temperature), ``(...)`` float32, in nats.

    As :func:`token_stats_from_logits`, whose arguments and errors these are.
    """
    stats = token_stats_from_logits(
        logits, None, stats=("entropy",), temperature=temperature, mask=mask, backend=backend
    )
    assert stats.entropy is not None
    return stats.entropy


def logprobs_and_entropy_from_logits(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (log-probability of the labels, entropy), of labels' shape and ``(...)``, float32, in nats.

    As :func:`token_stats_from_logits`, whose arguments and errors these are.
    """
    stats = token_stats_from_logits(logits, labels, temperature=temperature, mask=mask, backend=backend)
    assert stats.logprob is not None
    assert stats.entropy is not None
    return stats.logprob, stats.entropy
