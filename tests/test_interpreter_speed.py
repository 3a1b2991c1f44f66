"""What makes Triton's interpreter faster leaves Triton as it was after each launch, failed ones too, and changes no result."""

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter


@triton.jit
def doubled(x):
    return x + x


@triton.jit
def kernel(x, out, limit, N: tl.constexpr):
    columns = tl.arange(0, N)
    values = doubled(tl.load(x + columns))
    tl.store(out + columns, tl.where(tl.max(values, 0) < limit, values, -values))


def is_restored():
    return all(tl.core.is_builtin(each) for each in (tl.load, tl.arange, tl.core.load, tl.core.reduce, tl.tensor.to))


def launch(out, limit=100.0):
    kernel[(1,)](torch.arange(4.0), out, limit, N=4)
    return out.tolist()


def test_the_language_is_restored_after_each_launch():
    for _ in range(2):
        assert launch(torch.empty(4)) == [0.0, 2.0, 4.0, 6.0]
        assert is_restored()
    assert launch(torch.empty(4), 5.0) == [0.0, -2.0, -4.0, -6.0]


def test_and_after_one_that_failed(monkeypatch):
    monkeypatch.setattr(interpreter.interpreter_builder, "create_masked_store", None)
    with pytest.raises(interpreter.InterpreterError):
        launch(torch.empty(4))
    assert is_restored()
    monkeypatch.undo()
    assert launch(torch.empty(4)) == [0.0, 2.0, 4.0, 6.0]


def test_it_looks_through_the_language_once(monkeypatch):
    launch(torch.empty(4))
    monkeypatch.setattr(interpreter.inspect, "getmembers", None)
    assert launch(torch.empty(4)) == [0.0, 2.0, 4.0, 6.0]
