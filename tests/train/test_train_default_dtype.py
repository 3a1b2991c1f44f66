"""The trainer, the methods and the integrations under a default dtype that the user has set: the same bits as under float32."""

from __future__ import annotations

import ast
import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

import mgrpo_kernels
from mgrpo_kernels.method import METHODS, MethodOptions, select
from mgrpo_kernels.train.model.policy import load_policy
from mgrpo_kernels.train.run.checkpoint.state import state_of
from mgrpo_kernels.train.step import train_step
from mgrpo_kernels.train.watch.metrics import VARYING

DTYPES = (torch.float64, torch.bfloat16, torch.float16)
OF_DEFAULT_DTYPE = {
    "empty",
    "eye",
    "full",
    "linspace",
    "logspace",
    "normal",
    "ones",
    "rand",
    "randn",
    "scalar_tensor",
    "zeros",
}


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one.nan_to_num(nan=-7.0), other.nan_to_num(nan=-7.0))
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other) or (isinstance(one, float) and math.isnan(one) and math.isnan(other))


def two_steps(base: Path, dtype: torch.dtype, **changes: Any) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    with default_dtype(dtype):
        learner = tiny.learner(load_policy(str(base), torch.device("cpu"), torch.float32), **changes)
        lines = [train_step(learner, learner.task.train[:3], step)[0] for step in (1, 2)]
        return [{key: value for key, value in line.items() if key not in VARYING} for line in lines], state_of(learner)


@pytest.mark.parametrize("changes", [{}, {"method": "spine"}, {"method": "scrl", "engine": "transformers"}], ids=str)
def test_the_default_dtype_changes_no_bit_of_two_steps(base: Path, changes: dict[str, Any]) -> None:
    want_lines, want = two_steps(base, torch.float32, **changes)
    for dtype in DTYPES:
        lines, state = two_steps(base, dtype, **changes)
        assert state.keys() == want.keys()
        for name, value in state.items():
            if not name.endswith(".step"):  # which torch counts in float64 under that default
                assert same(value, want[name]), (dtype, name)
        for line, expected in zip(lines, want_lines, strict=True):
            for key, value in line.items():
                assert same(value, expected[key]), (dtype, key)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("more", [{}, {"vote_by": "excess"}, {"gold_labels": True}], ids=str)
def test_the_default_dtype_changes_no_bit_of_a_selection(method: str, more: dict[str, Any]) -> None:
    B, L = 16, 5
    generator = torch.Generator().manual_seed(0)
    entropy, certainty, surprise = (torch.rand(B, L, generator=generator, dtype=torch.float32) for _ in range(3))
    half = torch.arange(B) % 8 >= 4
    options = MethodOptions(method=method, min_votes=1, equivalence="exact", **more)

    def selected() -> Any:
        return select(
            torch.arange(L) < torch.arange(B)[:, None] % L + 1,
            [None if each == 3 else str(each % 4) for each in torch.arange(B).remainder(7).tolist()],
            8,
            options,
            by_momentum=half,
            second_wording=half,
            entropy=entropy,
            self_certainty=certainty,
            logprob=-surprise,
            tokens=torch.arange(B * L).view(B, L) % 6,
            answer_tokens=torch.arange(L).expand(B, L) == 1,
            gold=["1"] * B,
            generator=torch.Generator().manual_seed(1),
        )

    want = selected()
    for dtype in DTYPES:
        with default_dtype(dtype):
            got = selected()
            assert got.metrics() == want.metrics()
        for name, one, other in zip(want._fields, got, want, strict=True):
            assert same(one, other), (dtype, name)


def without_dtype(source: str) -> list[int]:
    """Return the lines that make a tensor whose dtype would be the user's default, or be guessed from a value."""
    return [
        call.lineno
        for call in ast.walk(ast.parse(source))
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and ast.unparse(call.func.value) == "torch"
        and (call.func.attr in OF_DEFAULT_DTYPE or (call.func.attr in ("tensor", "arange") and has_float(call)))
        and not any(keyword.arg in ("dtype", "out", None) for keyword in call.keywords)
    ]


def has_float(call: ast.Call) -> bool:
    return any(isinstance(each, ast.Constant) and isinstance(each.value, float) for each in ast.walk(call))


def test_no_tensor_is_made_of_the_default_dtype() -> None:
    package = Path(mgrpo_kernels.__file__).parent
    found = {str(path): without_dtype(path.read_text()) for path in package.rglob("*.py")}
    assert len(found) > 100
    assert {path: lines for path, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    ("source", "bad"),
    [
        ("torch.zeros(3)", True),
        ("torch.zeros(3, device=x.device)", True),
        ("torch.full((), 1 / n)", True),
        ("torch.tensor([1, 2.5])", True),
        ("torch.zeros(3, dtype=torch.float32)", False),
        ("torch.tensor([len(x)])", False),
        ("torch.arange(3)", False),
        ("torch.zeros_like(x)", False),
    ],
)
def test_the_search_finds_what_it_should(source: str, bad: bool) -> None:
    assert without_dtype(source) == ([1] if bad else [])
