"""What generation runs between the products of a decoder (csrc/cpu/decoder.cpp), against plain PyTorch in float64."""

from __future__ import annotations

import itertools
from unittest import mock

import pytest
import torch
from absent import need_native
from fuzz_ops import attention_call
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from mgrpo_kernels.ops.linear_token_stats import layers


@pytest.fixture(autouse=True)
def _native_kernels():
    need_native()


def truth(q, k, v, prompt_keys, prompt_values, lengths, keys, values, before, window, scale):
    """Return the attention of each rollout's newest token by itself, in float64."""
    U, K, c = keys.shape[:3]
    keys, values = keys.double().clone(), values.double().clone()
    keys[..., before], values[..., before, :] = (each.double().view(U, c, K, -1).transpose(1, 2) for each in (k, v))
    out = torch.empty(*q.shape[:2], v.shape[2], dtype=torch.float64)
    for u, rollout, head in itertools.product(range(U), range(c), range(q.shape[1])):
        of, shared = head // (q.shape[1] // K), u * K + head // (q.shape[1] // K)
        seen = int(lengths[u])
        all_keys = torch.cat([prompt_keys[shared, :, :seen].double(), keys[u, of, rollout, :, : before + 1]], -1)
        all_values = torch.cat([prompt_values[shared, :seen].double(), values[u, of, rollout, : before + 1]])
        first = 0 if window is None else max(0, all_keys.shape[1] - window)
        query = q[u * c + rollout, head].double()
        weights = (query @ all_keys[:, first:] * scale).softmax(-1)
        out[u * c + rollout, head] = weights @ all_values[first:]
    return out


@pytest.mark.parametrize("window", [None, 1, 5, 40])
@pytest.mark.parametrize("sizes", [(64, 64), (1, 3), (17, 100), (192, 128)])
@pytest.mark.parametrize(("prompt", "before", "room"), [(1, 0, 1), (27, 31, 32), (70, 8, 64)])
def test_attention_of_the_newest_tokens(window, sizes, prompt, before, room):
    torch.manual_seed(0)
    for queries in (1, 3):
        args = attention_call(2, 2, 3, queries, *sizes, prompt, room)
        call = *args, before, window, 0.3
        want = truth(*call)
        torch.testing.assert_close(torch.ops.mgrpo_native.attend_(*call), want.float(), rtol=1e-5, atol=1e-5)
        for held, new in ((args[6][..., before], args[1]), (args[7][..., before, :], args[2])):
            assert torch.equal(held, new.view(2, 3, 2, -1).transpose(1, 2))


def test_rows_of_a_larger_tensor_and_nothing_beyond_the_lengths():
    """Queries and keys are views of one projection, as the decoder has them; what no token has written is NaN and is not read."""
    torch.manual_seed(0)
    args = list(attention_call(2, 2, 3, 2, 16, 16, 9, 8))
    both = torch.cat([args[0], args[1]], 1)
    args[0], args[1] = both.split([4, 2], 1)
    args[5] = torch.tensor([0, 4])
    for rows, length in zip((slice(0, 2), slice(2, 4)), (0, 4), strict=True):
        args[3][rows, :, length:] = args[4][rows, length:] = torch.nan
    args[6][..., 3:] = args[7][..., 3:, :] = torch.nan
    call = *args, 2, None, 0.25
    want = truth(*call)
    torch.testing.assert_close(torch.ops.mgrpo_native.attend_(*call), want.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("empty", range(7))
def test_what_is_empty_stays_empty(empty):
    sizes = [2, 2, 2, 2, 4, 4, 3]
    sizes[empty] = 0
    args = attention_call(*sizes, 4)
    got = torch.ops.mgrpo_native.attend_(*args, 1, None, 1.0)
    assert got.shape == (*args[0].shape[:2], sizes[5])
    assert got.isfinite().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_number_that_is_not_finite_reaches_its_rollout_alone(bad):
    args = attention_call(2, 1, 2, 2, 8, 8, 5, 4)
    args[1][1, 0, 0] = bad
    args[0][1, :, 0] = 1.0  # inf - inf, not 1 / inf
    got = torch.ops.mgrpo_native.attend_(*args, 0, None, 1.0)
    assert got.isnan().flatten(1).any(1).tolist() == [False, True, False, False]


def test_attention_refuses_what_does_not_fit():
    args = attention_call(2, 2, 3, 2, 8, 8, 5, 4)
    attend = torch.ops.mgrpo_native.attend_
    names = ("q", "k", "v", "prompt_keys", "prompt_values", "lengths", "keys", "values")
    for place, name in enumerate(names):
        wrong = [*args]
        wrong[place] = args[place].double()
        with pytest.raises(TypeError, match=f"{name}: expected one of the dtypes"):
            attend(*wrong, 0, None, 1.0)
        wrong[place] = args[place][:-1]
        with pytest.raises(ValueError, match="expected shape"):
            attend(*wrong, 0, None, 1.0)
    for lengths in ([-1, 5], [5, 6]):
        with pytest.raises(ValueError, match="lengths: expected 0 to 5"):
            attend(*args[:5], torch.tensor(lengths), *args[6:], 0, None, 1.0)
    for before in (-1, 4):
        with pytest.raises(ValueError, match="before: expected at least 0 and less than the room of 4"):
            attend(*args, before, None, 1.0)
    with pytest.raises(ValueError, match="window: expected at least 1"):
        attend(*args, 0, 0, 1.0)
    with pytest.raises(ValueError, match="contiguous"):
        attend(*args[:6], args[6].transpose(0, 1), args[7].transpose(0, 1), 0, None, 1.0)


@pytest.mark.parametrize("columns", [1, 15, 16, 17, 64, 100, 576])
def test_the_norm_is_pytorchs(columns):
    x, weight = torch.randn(3, 2, 2 * columns)[..., ::2], torch.randn(columns)
    x[1, 1, 0] = torch.nan
    want = torch.nn.functional.rms_norm(x.double(), (columns,), weight.double(), 1e-5).float()
    got = torch.ops.mgrpo_native.rms_norm(x, weight, 1e-5)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert torch.ops.mgrpo_native.rms_norm(x[:0], weight, 1e-5).shape == (0, 2, columns)
    with pytest.raises(ValueError, match="weight: expected shape"):
        torch.ops.mgrpo_native.rms_norm(x, torch.randn(columns + 1), 1e-5)
    with pytest.raises(TypeError, match="x: expected one of the dtypes"):
        torch.ops.mgrpo_native.rms_norm(x.bfloat16(), weight, 1e-5)


@pytest.mark.parametrize("inner", [2, 6, 16, 34, 64, 128])
def test_the_rotation_is_that_of_the_modules(inner):
    """q and k are views of one projection; cos and sin are those that transformers' own function takes."""
    both, angles = torch.randn(5, 7, inner), torch.randn(1, 5, inner)
    both[3, 2, 0] = torch.nan
    q, k = both.split([5, 2], 1)
    cos, sin = angles.cos(), angles.sin()
    want = apply_rotary_pos_emb(*(each.double().transpose(0, 1)[None] for each in (q, k)), cos.double(), sin.double())
    signed = torch.cat([-sin[0, :, : inner // 2], sin[0, :, inner // 2 :]], -1)
    for gradient in (False, True):  # the kernel, and plain PyTorch
        with torch.set_grad_enabled(gradient):
            got = layers.rotate(q, k, cos[0], signed)
        for each, other in zip(got, want, strict=True):
            torch.testing.assert_close(each, other[0].transpose(0, 1).float(), rtol=1e-5, atol=1e-6, equal_nan=True)
    assert layers.rotate(q[:0], k[:0], cos[0, :0], signed[:0])[0].shape == (0, 5, inner)


def test_the_rotation_refuses_what_does_not_fit():
    rotate, x, angles = torch.ops.mgrpo_native.rotate, torch.randn(3, 2, 8), torch.randn(3, 8)
    for bad in (x[0], x[..., 1:]):
        with pytest.raises(ValueError, match="x: expected shape"):
            rotate(bad, angles, angles)
    for cos, sin, name in ((angles[1:], angles, "cos"), (angles, angles[:, 1:], "sin")):
        with pytest.raises(ValueError, match=f"{name}: expected shape"):
            rotate(x, cos, sin)
    with pytest.raises(TypeError, match="sin: expected one of the dtypes"):
        rotate(x, angles, angles.double())


@pytest.mark.parametrize("shape", [(1,), (3, 17), (2, 3, 64), (40, 1000)])
def test_the_gated_activation_is_pytorchs(shape):
    gate, up = 30 * torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2], torch.randn(shape)
    gate.view(-1)[:1] = torch.nan
    want = (torch.nn.functional.silu(gate.double()) * up).float()
    got = torch.ops.mgrpo_native.swiglu(gate, up)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-30, equal_nan=True)
    assert torch.ops.mgrpo_native.swiglu(gate[:0], up[:0]).shape == (0, *shape[1:])
    with pytest.raises(ValueError, match="up: expected shape"):
        torch.ops.mgrpo_native.swiglu(gate, up[..., None])
    with pytest.raises(TypeError, match="gate: expected one of the dtypes"):
        torch.ops.mgrpo_native.swiglu(gate.double(), up)


def test_extreme_gates():
    gate = torch.tensor([-torch.inf, -200.0, -100.0, -88.5, -0.0, 0.0, 100.0, torch.inf])
    got = torch.ops.mgrpo_native.swiglu(gate, torch.ones(8))
    torch.testing.assert_close(got, torch.nn.functional.silu(gate), rtol=1e-5, atol=1e-36, equal_nan=True)


WITH_GRADIENTS = {
    "rms_norm": lambda x: layers.rms_norm(x, torch.ones(64, dtype=x.dtype), 1e-5),
    "rotate": lambda x: layers.rotate(x.view(4, 2, 32), x.view(4, 2, 32), *x.detach().view(2, 4, 32))[0],
    "swiglu": lambda x: layers.swiglu(x, x),
}


@pytest.mark.parametrize("name", WITH_GRADIENTS)
def test_where_a_gradient_is_required_pytorch_computes(name):
    x, call = torch.randn(4, 64, requires_grad=True), WITH_GRADIENTS[name]
    with mock.patch.object(torch.ops.mgrpo_native, name, side_effect=AssertionError):
        call(x).sum().backward()
        assert x.grad is not None
        with torch.no_grad():
            assert call(x.bfloat16()).dtype == torch.bfloat16
            with pytest.raises(AssertionError):
                call(x)
