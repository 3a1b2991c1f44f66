"""Trajectory entropy and the IQR filter, on every backend."""

import itertools

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from contract import each_backend

from mgrpo_kernels import iqr_filter, trajectory_entropy
from mgrpo_kernels.ops.iqr_filter import OP, iqr_filter_op


@hypothesis.settings(deadline=None, max_examples=40)
@hypothesis.given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    seed=st.integers(0, 9999),
    k=st.sampled_from([0.0, 0.75, 3.0]),
    coarse=st.booleans(),
)
@each_backend(OP)
def test_is_torch_quantile_of_each_group(backend, sizes, seed, k, coarse):
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    batch = int(offsets[-1])
    entropy = torch.randn(batch, generator=generator)
    entropy = entropy.round(decimals=1) if coarse else entropy
    entropy[torch.rand(batch, generator=generator) < 0.15] = torch.nan
    mask = torch.rand(batch, generator=generator) > 0.2
    got = iqr_filter(entropy, offsets, k=k, mask=mask, backend=backend)
    for group, (begin, end) in enumerate(itertools.pairwise(offsets)):
        valid = mask[begin:end] & ~entropy[begin:end].isnan()
        members = entropy[begin:end][valid]
        if members.numel() == 0:
            assert all(figure[group].isnan() for figure in (got.lower, got.q1, got.q3))
            assert not got.keep[begin:end].any()
            continue
        q1, q3 = torch.quantile(members, 0.25), torch.quantile(members, 0.75)
        torch.testing.assert_close(got.q1[group], q1, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(got.q3[group], q3, rtol=1e-6, atol=1e-7)
        assert torch.equal(got.keep[begin:end], valid & (entropy[begin:end] >= got.lower[group]))
        torch.testing.assert_close(got.lower[group], q1 - k * (q3 - q1), rtol=1e-5, atol=1e-6)


@each_backend(OP)
def test_a_known_case(backend):
    entropy = torch.tensor([1.0, 2.0, 3.0, 4.0, -5.0, 100.0, 1.0, 1.0])
    got = iqr_filter(entropy, torch.tensor([0, 6, 8]), backend=backend)
    assert got.keep.tolist() == [True, True, True, True, False, True, True, True]  # the high outlier stays
    assert got.q1.tolist() == [1.25, 1.0]
    assert got.q3.tolist() == [3.75, 1.0]
    assert got.lower.tolist() == [1.25 - 0.75 * 2.5, 1.0]


@each_backend(OP)
def test_equal_entropies_are_all_kept(backend):
    assert iqr_filter(torch.full((32,), 0.1), 8, k=0.0, backend=backend).keep.all()


@each_backend(OP)
def test_no_rollouts_at_all(backend):
    got = iqr_filter(torch.zeros(0), torch.zeros(3, dtype=torch.int32), backend=backend)
    assert got.keep.shape == (0,)
    assert got.q1.isnan().all()


@each_backend(OP)
def test_opcheck_and_compile(backend):
    entropy = torch.randn(8)
    torch.library.opcheck(iqr_filter_op, (entropy, torch.tensor([0, 3, 8]), None, 0.75, backend))
    compiled = torch.compile(lambda e: iqr_filter(e, 4, backend=backend).keep, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(entropy), iqr_filter(entropy, 4, backend=backend).keep)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("packed", [False, True])
def test_trajectory_entropy(reduction, packed):
    entropy = torch.rand(3, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]]).bool()
    values = torch.where(mask, entropy, torch.nan)
    layout = {}
    if packed:
        values, mask_given = values.reshape(-1), mask.reshape(-1)
        layout = {"cu_seqlens": torch.tensor([0, 4, 8, 12], dtype=torch.int32)}
    else:
        mask_given = mask
    got = trajectory_entropy(values, mask=mask_given, reduction=reduction, **layout)
    for row in (0, 2):
        torch.testing.assert_close(got[row], getattr(entropy[row][mask[row]], reduction)())
    assert got[1].isnan()
    (grad,) = torch.autograd.grad(got[[0, 2]].sum(), entropy)
    assert (grad[~mask] == 0).all()
    torch.testing.assert_close(grad[0, 0].item(), 1 / 3 if reduction == "mean" else 1.0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: iqr_filter(torch.zeros(2, 2), 2), ValueError, r"entropy: expected 1 dimension\(s\), got shape \(2, 2\)"),
        (lambda: iqr_filter(torch.zeros(4), 3), ValueError, "groups: expected a group size >= 1 that divides the 4 rollouts, got 3"),
        (lambda: iqr_filter(torch.zeros(4), 0), ValueError, "groups: expected a group size >= 1"),
        (lambda: iqr_filter(torch.zeros(4), 2.0), TypeError, "groups: expected an int or int offsets"),
        (lambda: iqr_filter(torch.zeros(4), torch.tensor([0, 5])), ValueError, "groups: expected ascending offsets from 0 to 4"),
        (lambda: iqr_filter(torch.zeros(4), torch.tensor([0, 3, 2, 4])), ValueError, "groups: expected ascending offsets"),
        (lambda: iqr_filter(torch.zeros(4), torch.tensor([], dtype=torch.int64)), ValueError, "groups: expected offsets of shape"),
        (lambda: iqr_filter(torch.zeros(4), 2, k=-1.0), ValueError, "k: expected at least 0.0, got -1.0"),
        (lambda: iqr_filter(torch.zeros(4), 2, mask=torch.ones(4)), TypeError, "mask: expected dtype bool, got float32"),
        (lambda: trajectory_entropy(torch.zeros(4)), ValueError, r"entropy: expected padded \(B, L\), or packed \(N,\) with cu_seqlens"),
        (lambda: trajectory_entropy(torch.zeros(2, 2), reduction="max"), ValueError, "reduction: expected one of mean, sum, got 'max'"),
        (lambda: trajectory_entropy(torch.zeros(4), cu_seqlens=torch.tensor([0, 9])), ValueError, "cu_seqlens: expected ascending offsets from 0 to 4"),
        (lambda: trajectory_entropy(torch.zeros(4), cu_seqlens=torch.tensor([0.0, 4.0])), TypeError, "cu_seqlens: expected dtype int32 or int64"),
    ],
)  # fmt: skip
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
