"""Liger's fused scaled cross-entropy as a backend that is used by name alone: ``linear_token_stats(..., backend="liger")``.

liger-kernel 0.8.5 has it as two functions of one signature. They return the negative log-prob of each label in float32 and, if asked, the
entropy in the operands' dtype, with gradients of both. For compute capability 9.0 it is a CuTe kernel, which stages logits in float16 and
sums the weight's gradient over blocks of 1024 tokens in bfloat16; for 10.x it is cuTile kernels around the library's matmul, which stage
logits in the operands' dtype. On other devices Liger runs plain PyTorch in chunks of 512 tokens, which is not offered here.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mgrpo_kernels import checks
from mgrpo_kernels.ops._rows import kept_rows, put_back, take
from mgrpo_kernels.ops._statistics import Wanted
from mgrpo_kernels.ops.token_stats.specs import TokenStats

__all__ = ["refuse", "token_stats", "unsupported"]

FUNCTION = "LigerFusedLinearScaledCrossEntropyFunction"
IGNORED = -100  # the label of a row that Liger leaves out
DTYPE = torch.bfloat16


class Kernel(NamedTuple):
    """One of Liger's implementations: its module, what that imports from which package, and Liger's extra that installs the packages."""

    module: str
    needs: Mapping[str, str]
    extra: str


HOPPER = Kernel(
    "liger_kernel.ops.fused_linear_scaled_cross_entropy",
    {"cutlass": "nvidia-cutlass-dsl", "tvm_ffi": "apache-tvm-ffi"},
    "cutedsl",
)
BLACKWELL = Kernel(
    "liger_kernel.ops.cutile.ops.fused_linear_scaled_cross_entropy", {"cuda.tile": "cuda-tile"}, "cutile"
)


def unsupported(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return None if Liger has a kernel for this device and what that needs is installed; else the reason."""
    if not _installed("liger_kernel"):
        return "liger-kernel is not installed: pip install 'liger-kernel[cutedsl]>=0.8.5'"
    if device.type != "cuda" or torch.version.hip is not None:
        got = "ROCm" if device.type == "cuda" else device.type
        return f"Liger's kernels run on NVIDIA GPUs of compute capability 9.0 or 10.x, got {got}"
    kernel = _kernel_of(device)
    if kernel is None:
        major, minor = torch.cuda.get_device_capability(device)
        return f"Liger's kernels are for compute capability 9.0 or 10.x, got {major}.{minor}"
    if missing := [package for module, package in kernel.needs.items() if not _installed(module)]:
        return f"Liger's kernel needs {' and '.join(missing)}: pip install 'liger-kernel[{kernel.extra}]>=0.8.5'"
    if not _installed(kernel.module):
        return f"expected liger-kernel 0.8.5 or later, got one without {kernel.module}"
    return None if dtype == DTYPE else f"expected bfloat16, got {str(dtype).removeprefix('torch.')}"


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # of a package above it
        return False


def _kernel_of(device: torch.device) -> Kernel | None:
    major, minor = torch.cuda.get_device_capability(device)
    return HOPPER if (major, minor) == (9, 0) else BLACKWELL if major == 10 else None


def _function(device: torch.device) -> Callable[..., Any]:
    kernel = _kernel_of(device)
    assert kernel is not None, "unsupported() has been asked"
    return getattr(importlib.import_module(kernel.module), FUNCTION).apply  # type: ignore[no-any-return]


def refuse(wanted: Wanted, logit_scale: float, logits_dtype: torch.dtype, lacking: Mapping[str, Any]) -> None:
    """Raise ValueError for an argument that Liger's kernels lack; those in `lacking` must be None."""
    expected = {
        "stats": ('"logprob" and "entropy" only', "self_certainty" if wanted.self_certainty else None),
        "logit_scale": ("a number > 0", None if logit_scale > 0 else logit_scale),
        "logits_dtype": ("torch.float32, the default", None if logits_dtype == torch.float32 else logits_dtype),
        **{name: ("a number" if name == "temperature" else "None", value) for name, value in lacking.items()},
    }
    for name, (words, value) in expected.items():
        if value is not None:
            got = "a tensor" if isinstance(value, Tensor) else repr(value)
            raise ValueError(
                f"{name}: expected {words} with backend='liger', got {got}: leave backend out, or name 'triton'"
            )


def token_stats(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    labels: Tensor | None,  # (N,); None: no log-probs
    mask: Tensor | None,  # (N,)
    temperature: float,
    wanted: Wanted,
    *,
    unmasked_tokens: int | None,
    debug: bool,
) -> TokenStats:
    """Return log-probs and entropy ``(N,)``, float32, with their graph. Masked rows are 0 and have no gradient.

    With `unmasked_tokens`, the number of True in `mask`, Liger is given the unmasked rows alone.

    Raises:
        ValueError: with `debug`, an unmasked label outside the vocabulary, or another number of unmasked rows.
    """
    if mask is None or unmasked_tokens is None:
        return _of_rows(hidden, weight, labels, mask, temperature, wanted, debug=debug)
    number = hidden.shape[0]
    kept = kept_rows(mask, number, unmasked_tokens, debug=debug)
    if kept.rows is not None:
        hidden, labels, mask = hidden.index_select(0, kept.rows), take(labels, kept.rows), mask[kept.rows]
    found = _of_rows(hidden, weight, labels, mask, temperature, wanted, debug=debug)
    factor = (
        1.0 if kept.wrong is None else torch.where(kept.wrong, torch.nan, 1.0)
    )  # a factor makes the gradients NaN too
    return TokenStats(*[None if each is None else put_back(each, kept.rows, number) * factor for each in found])


def _of_rows(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor | None,
    mask: Tensor | None,
    temperature: float,
    wanted: Wanted,
    *,
    debug: bool,
) -> TokenStats:
    if hidden.shape[0] == 0:  # which Liger refuses
        nothing = (hidden @ weight[:1].t()).float().squeeze(-1)
        return TokenStats(nothing if wanted.logprob else None, nothing if wanted.entropy else None, None)
    if labels is None:
        labels = torch.zeros(hidden.shape[0], dtype=torch.int64, device=hidden.device)
    elif debug:
        checks.check_label_values(labels, mask, weight.shape[0])
    outside = (labels < 0) | (labels >= weight.shape[0])  # Liger waits for the device to raise, and gives IGNORED a 0
    targets = torch.where(outside, 0, labels.long())
    if mask is not None:
        hidden = torch.where(mask.unsqueeze(-1), hidden, 0.0)  # a NaN of a masked row would reach the weight's gradient
        targets = torch.where(mask, targets, IGNORED)
    found = _function(hidden.device)(hidden, weight, targets, temperature, IGNORED, 1, wanted.entropy)
    nll, entropy = found if wanted.entropy else (found, None)
    logprob = torch.where(outside, torch.nan, -nll)
    if mask is not None:
        logprob = torch.where(mask, logprob, 0.0)
        entropy = None if entropy is None else torch.where(mask, entropy, 0.0)
    return TokenStats(logprob if wanted.logprob else None, None if entropy is None else entropy.float(), None)
