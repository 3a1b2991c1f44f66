"""What makes Triton's interpreter faster leaves Triton as it was after each launch, failed ones too, and changes no result."""

import dataclasses
import re

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


TYPES = (tl.int1, tl.int8, tl.int32, tl.uint32, tl.int64, tl.bfloat16, tl.float16, tl.float32, tl.float64)


def operand(type, shape):
    data = interpreter.np.ones(shape or 1, interpreter._get_np_dtype(type))
    return tl.tensor(interpreter.TensorHandle(data, type), tl.block_type(type, list(shape)) if shape else type)


def described(operands):
    return [
        (str(each.type), str(each.shape), str(each.numel), each.handle.data.dtype, repr(each.handle.data.tolist()))
        for each in operands
    ]


@pytest.mark.parametrize("division", [False, True])
def test_the_common_type_of_two_operands_is_the_one_of_triton(division):
    semantic = interpreter.interpreter_semantic
    real = semantic.binary_op_type_checking_impl.__func__.__wrapped__
    numbers = [2, 0.5, 2.0, 2, 0.0, -0.0, -1, True, float("nan"), float("inf"), 2**40, 1e300]
    operands = [operand(type, shape) for type in TYPES for shape in ((), (4,), (1, 4), (2, 4))] + numbers
    for lhs in operands:
        for rhs in operands[: -len(numbers)] if isinstance(lhs, (int, float)) else operands:
            try:
                wanted = described(real(semantic, lhs, rhs, div_or_mod=division))
            except (TypeError, ValueError, AttributeError) as error:  # Triton 3.6 has no constants of bfloat16
                with pytest.raises(type(error), match=re.escape(str(error))):
                    semantic.binary_op_type_checking_impl(lhs, rhs, div_or_mod=division)
            else:
                assert described(semantic.binary_op_type_checking_impl(lhs, rhs, div_or_mod=division)) == wanted


def test_types_that_share_their_parts_are_still_checked_and_told_apart():
    made = [tl.block_type(tl.float32, [4]) for _ in range(2)]
    assert made[0] == made[1] != tl.block_type(tl.int32, [4])
    assert operand(tl.float32, (4,)).shape == operand(tl.int32, (4,)).shape != operand(tl.float32, (1, 4)).shape
    for shape, error in (([3], ValueError), ([4.0], TypeError), ([], TypeError)):
        with pytest.raises(error):
            tl.block_type(tl.float32, shape)
    spaces = [tl.block_type(tl.pointer_type(tl.float32, space), [4]) for space in ("global", "shared", "global")]
    assert spaces[0] == spaces[2] != spaces[1]


@triton.jit
def sum_kernel(x, out):
    tl.store(out, tl.load(x) + tl.load(x + 1))


def test_an_overflow_is_reported_where_triton_reports_it(monkeypatch):
    builder, x = interpreter.interpreter_builder, torch.tensor([2**31 - 1, 1], dtype=torch.int32)
    sum_kernel[(1,)](x, torch.empty_like(x))
    monkeypatch.setattr(builder, "options", dataclasses.replace(builder.options, debug=True))
    with pytest.raises(interpreter.InterpreterError, match="int32 overflow"):
        sum_kernel[(1,)](x, torch.empty_like(x))
