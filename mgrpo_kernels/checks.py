"""Argument checks. Every message states what was expected and what was received."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
WIDE_FLOATS = (torch.float32, torch.float64)
INTS = (torch.int32, torch.int64)
BOOL = (torch.bool,)

Choice = TypeVar("Choice", bound=str)


def _dtype_names(dtypes: Iterable[torch.dtype]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def shape_text(shape: Sequence[int]) -> str:
    """Return a shape as (a, b, c)."""
    return f"({', '.join(str(int(size)) for size in shape)}{',' if len(shape) == 1 else ''})"


def check_tensor(
    name: str,
    value: Any,
    *,
    dtypes: Sequence[torch.dtype] = FLOATS,
    shape: Sequence[int] | None = None,
    dim: int | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Return `value` if it is a strided tensor of one of `dtypes`, with this shape (or number of dimensions) and device.

    Raises:
        TypeError: no tensor, or the wrong dtype.
        ValueError: wrong shape, device or layout.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name}: expected dtype {_dtype_names(dtypes)}, got {_dtype_names([value.dtype])}")
    if value.layout != torch.strided:
        raise ValueError(f"{name}: expected a dense tensor, got layout {value.layout}")
    if shape is not None and tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {shape_text(shape)}, got {shape_text(value.shape)}")
    if dim is not None and value.dim() != dim:
        raise ValueError(f"{name}: expected {dim} dimension(s), got shape {shape_text(value.shape)}")
    if device is not None and value.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got one on {value.device}")
    return value


def check_inside(
    device: torch.device, *expected: tuple[str, Tensor | None, Sequence[int], Sequence[torch.dtype]]
) -> None:
    """Check the tensors that a custom op was given, (name, tensor, shape, dtypes) each, so that no kernel reads outside of them.

    Raises:
        TypeError: wrong dtype.
        ValueError: wrong shape, device or layout.
    """
    for name, tensor, shape, dtypes in expected:
        if tensor is not None and not (
            tensor.shape == shape
            and tensor.dtype in dtypes
            and tensor.device == device
            and tensor.layout is torch.strided
        ):
            check_tensor(name, tensor, dtypes=dtypes, shape=shape, device=device)


def check_choice(name: str, value: Any, choices: Sequence[Choice]) -> Choice:
    """Return `value` if it is one of `choices`, else raise ValueError."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
    choice: Choice = value
    return choice


def check_number(
    name: str,
    value: Any,
    *,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> float:
    """Return `value` if it is a finite real number inside the given bounds.

    Raises:
        TypeError: no number.
        ValueError: outside the bounds, NaN or infinite.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    fine = (
        value == value  # noqa: PLR0124 - NaN
        and value not in (float("inf"), -float("inf"))
        and (above is None or value > above)
        and (at_least is None or value >= at_least)
        and (at_most is None or value <= at_most)
        and (below is None or value < below)
    )
    if not fine:
        bounds = [
            f"{words} {bound}"
            for words, bound in (
                ("more than", above),
                ("at least", at_least),
                ("at most", at_most),
                ("less than", below),
            )
            if bound is not None
        ]
        finite = -float("inf") < value < float("inf")
        wanted = [*([] if finite and bounds else ["a finite number"]), *([" and ".join(bounds)] if bounds else [])]
        raise ValueError(f"{name}: expected {', '.join(wanted)}, got {value}")
    return value  # type: ignore[return-value]


def check_flag(name: str, value: Any) -> bool:
    """Return `value` if it is a bool, else raise TypeError."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")
    return value


def check_mask(name: str, value: Any, shape: Sequence[int], device: torch.device) -> Tensor | None:
    """Return a bool mask of exactly this shape, or None."""
    if value is None:
        return None
    return check_tensor(name, value, dtypes=BOOL, shape=shape, device=device)


def check_temperature(value: Any, shape: Sequence[int], device: torch.device) -> tuple[float, Tensor | None]:
    """Split a temperature into (number, None) or (1.0, float32 tensor expanded to `shape`).

    Raises:
        TypeError: neither a number nor a floating-point tensor.
        ValueError: not above 0 (checked on numbers and on CPU tensors; on a GPU the row gets NaN or inf instead of a sync),
            not broadcastable to `shape`, on another device, or asking for a gradient.
    """
    if not isinstance(value, Tensor):
        return float(check_number("temperature", value, above=0.0)), None
    check_tensor("temperature", value, device=device)
    if value.requires_grad:
        raise ValueError(
            "temperature: expected a tensor without requires_grad (it gets no gradient), got one that requires grad"
        )
    if value.dim() > len(shape) or any(
        size not in (1, want) for size, want in zip(reversed(value.shape), reversed(tuple(shape)), strict=False)
    ):
        raise ValueError(
            f"temperature: expected a shape that broadcasts to {shape_text(shape)}, got {shape_text(value.shape)}"
        )
    value = value if value.dtype == torch.float64 else value.float()
    return 1.0, value.expand(tuple(shape))


def check_temperature_values(temperature: Tensor | None) -> None:
    """Raise ValueError unless every temperature is a finite number above 0 (CPU tensors only: no host sync on a GPU)."""
    if temperature is not None and temperature.device.type == "cpu" and temperature.numel():
        good = (temperature > 0) & temperature.isfinite()
        if not bool(good.all()):
            raise ValueError(f"temperature: expected finite numbers > 0, got {temperature[~good][0].item()}")


def check_label_values(labels: Tensor, mask: Tensor | None, vocab: int) -> None:
    """Raise ValueError if an unmasked label is outside [0, vocab). Reads values, which is a host sync for a GPU tensor.

    `labels` has the mask's shape, or one more dimension behind it.
    """
    bad = (labels < 0) | (labels >= vocab)
    if mask is not None:
        bad &= mask if mask.dim() == labels.dim() else mask.unsqueeze(-1)
    if bool(bad.any()):
        where = bad.nonzero()[0].tolist()
        raise ValueError(
            f"labels: expected values in [0, {vocab}) where the mask is True, got {labels[bad][0].item()} at {where}"
        )
