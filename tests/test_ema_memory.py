"""How the tensors of a momentum update may share memory. Any other sharing would average twice, or depend on the order of the pairs."""

import pytest
import torch
from contract import each_backend

from mgrpo_kernels import ema_update_
from mgrpo_kernels.ops.ema import OP


@each_backend(OP)
@pytest.mark.parametrize("copies", [1, 2])
def test_every_copy_of_tied_tensors_is_written(backend, copies):
    """A sampler's copies need not be tied where the parameters are."""
    ema, param = torch.zeros(4), torch.tensor([1.0, 3.0, -5.0, 7.0])
    emit = [torch.full((4,), torch.nan, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)[:copies]]
    ema_update_([ema, ema], [param, param], 0.5, emit=[emit[0], emit[-1]], backend=backend)
    assert all(torch.equal(each.float(), param / 2) for each in [ema, *emit])


@each_backend(OP)
def test_a_copy_may_be_the_average_or_the_parameter(backend):
    ema, param = torch.zeros(4), torch.ones(4)
    ema_update_([ema], [ema], 0.5, emit=[ema], backend=backend)
    assert (ema == 0).all()
    ema_update_([ema], [param], 0.5, emit=[param], backend=backend)
    assert (ema == 0.5).all()
    assert (param == 0.5).all()


@each_backend(OP)
def test_columns_of_one_tensor_share_no_memory(backend):
    whole, param = torch.zeros(4, 6), torch.ones(4, 3)
    ema_update_([whole[:, :3], whole[:, 3:]], [param, param], 0.5, backend=backend)
    ema_update_([whole[:2], whole[2:]], [torch.ones(2, 6), torch.ones(2, 6)], 0.5, backend=backend)
    assert (whole == 0.75).all()


def square():
    return torch.arange(9.0).view(3, 3).clone()


def transposed(ema, param):
    return [ema, ema.t()], [param, param.t()], None


def flat(ema, param):
    return [ema.view(-1), ema], [param.view(-1), param], None


def overlapping(ema, param):
    return [ema[:2], ema[1:]], [param[:2], param[:2]], None


def shifted(ema, param):
    return [ema[1:]], [ema[:2]], None


def exchanged(ema, param):
    return [ema, param], [param, ema], None


def one_copy_of_two(ema, param):
    return [ema, square()], [param, param], [out := square(), out]


def a_copy_over_another_average(ema, param):
    return [ema, square()], [param, param], [square(), ema]


@each_backend(OP)
@pytest.mark.parametrize(
    "shared", [transposed, flat, overlapping, shifted, exchanged, one_copy_of_two, a_copy_over_another_average]
)
def test_other_shared_memory_is_refused_before_anything_is_written(backend, shared):
    ema, param = square(), square() + 1
    lists = shared(ema, param)
    with pytest.raises(ValueError, match=r"(ema|emit)\[\d\]: expected memory of its own, got memory that is shared"):
        ema_update_(*lists[:2], 0.5, emit=lists[2], backend=backend)
    assert torch.equal(ema, square())
    assert torch.equal(param, square() + 1)
