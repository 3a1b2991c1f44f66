"""What the contract tests of all ops share: backends, tolerances, and watchers of memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mgrpo_kernels import backend as backends

CPU = torch.device("cpu")
BACKENDS = ("reference", "native", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def each_backend(op: str) -> pytest.MarkDecorator:
    """Run the test on every backend of `op`. One that cannot run fails the test: nothing is skipped in silence."""
    return pytest.mark.parametrize("backend", [name for name in BACKENDS if name in backends._registry[op]])


def assert_no_worse_than_plain(
    got: Tensor, plain: Tensor, truth: Tensor, *, factor: float = 1.5, floor: float = 1e-6
) -> None:
    """Hold `got`'s error against the float64 `truth` to `factor` times that of plain PyTorch in the working precision.

    The error is the root mean square; the largest one may be twice as far out again, for it is one draw of many roundings.
    `floor` is relative to the truth's largest magnitude: below it both are exact for every purpose. Non-finite values must
    stand in the same places as in the truth.
    """
    assert got.shape == truth.shape
    finite = truth.isfinite()
    torch.testing.assert_close(got[~finite].double(), truth[~finite], equal_nan=True)
    if not finite.any():
        return
    floor = floor * max(1.0, truth[finite].abs().max().item())
    for name, norm, allowance in (
        ("rms", lambda e: e.square().mean().sqrt(), factor),
        ("max", lambda e: e.abs().max(), 2 * factor),
    ):
        error, plain_error = (norm(each[finite].double() - truth[finite]).item() for each in (got, plain))
        assert error <= allowance * plain_error + floor, (
            f"{name} error {error:.3e}, plain PyTorch's {plain_error:.3e}, floor {floor:.1e}"
        )


class _Allocations(TorchDispatchMode):
    """Watches the results of every ATen call below it."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor):
                elements = value.untyped_storage().nbytes() // max(1, value.element_size())
                self.largest = max(self.largest, elements)
                assert elements < self.limit, f"{func} made a tensor of {elements} elements, limit {self.limit}"
        return result


@contextlib.contextmanager
def forbid_large_allocations(elements: int) -> Iterator[_Allocations]:
    """Fail when an ATen call under the block returns a tensor whose storage holds `elements` or more."""
    with _Allocations(elements) as watcher:
        yield watcher


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill every fresh ``empty`` tensor with NaN (or the largest integer), so that unwritten results show."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]
