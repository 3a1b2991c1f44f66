"""The head on a CPU without instructions for 16-bit numbers: 16-bit operands are multiplied in float32, each converted once for a tile."""

from unittest import mock

import pytest
import torch
from contract import watch_memory

from mgrpo_kernels import linear_policy_loss, linear_token_stats, token_stats_from_logits
from mgrpo_kernels.ops.linear_token_stats import native, tiled

N, H, V = 150, 24, 701
TILE = tiled.TileShape(64, 256)  # three blocks of rows, three of columns
DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def without_instructions(monkeypatch):
    """Let no matmul take 16-bit factors, as on a CPU with AVX2 alone."""
    monkeypatch.setattr(tiled, "multiplies_16_bits", lambda device, dtype: False)
    monkeypatch.setattr(tiled, "native_accumulate", lambda *_, **__: False)
    monkeypatch.setattr(native, "tile_shape", lambda dtype: TILE)


def make(dtype, number=N):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, H, generator=generator).to(dtype) for n in (number, V))
    labels = torch.randint(0, V, (number,), generator=generator)
    return hidden, weight, labels, torch.arange(number) % 5 != 0


def statistics_and_gradients(hidden, weight, labels, mask, **options):
    leaves = [each.clone().requires_grad_() for each in (hidden, weight)]
    stats = linear_token_stats(*leaves, labels, mask=mask, backend="native", temperature=0.8, **options)
    return [*stats[:2], *torch.autograd.grad(stats.logprob.sum() + 0.3 * stats.entropy.square().sum(), leaves)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("number", [5, N])
def test_everything_is_that_of_a_float32_head_but_for_the_rounding_of_gradients(dtype, number):
    hidden, weight, labels, mask = make(dtype, number)
    got = statistics_and_gradients(hidden, weight, labels, mask)
    want = statistics_and_gradients(hidden.float(), weight.float(), labels, mask)
    for one, other in zip(got[:2], want[:2], strict=True):
        assert torch.equal(one, other)
    for one, other in zip(got[2:], want[2:], strict=True):
        assert one.dtype == dtype
        assert torch.equal(one, other.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_tile_of_the_weight_is_converted_once_for_all_rows(dtype):
    converted, real = [], tiled.operand

    def operand(x):
        y = real(x)
        if y.dtype != x.dtype:
            converted.append(x.shape[0])
        return y

    with mock.patch.object(tiled, "operand", operand), mock.patch.object(tiled, "accumulate_widened") as piecewise:
        statistics_and_gradients(*make(dtype))
    assert not piecewise.called
    tiles = [each for each in converted if each > TILE.rows]
    assert sum(tiles) == 2 * V  # the whole weight, forward and backward
    with mock.patch.object(tiled, "operand", operand):
        converted.clear()
        statistics_and_gradients(*make(dtype, 5))
    assert [each for each in converted if each <= TILE.rows] == [4, 4]  # the unmasked rows, once a pass


def test_large_factors_are_converted_piece_by_piece():
    given = make(torch.bfloat16)
    want = statistics_and_gradients(*given)
    with (
        mock.patch.object(tiled, "OPERAND_BYTES", 64),
        mock.patch.object(tiled, "WIDENED_BYTES", 8192),
        mock.patch.object(tiled, "accumulate_widened", wraps=tiled.accumulate_widened) as piecewise,
    ):
        got = statistics_and_gradients(*given)
    assert piecewise.called
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-4)


def test_the_copies_do_not_grow_with_the_number_of_tokens():
    peaks = []
    for number in (N, 4 * N):
        hidden, weight, labels, mask = make(torch.bfloat16, number)
        with watch_memory() as memory:
            statistics_and_gradients(hidden, weight, labels, mask, workspace_bytes=2**17)
        assert memory.largest <= max(2**17, 4 * number * H, 2 * V * H)
        peaks.append(memory.peak)
    assert peaks[1] - peaks[0] <= 3 * N * 40 * H


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_fused_loss_takes_this_path_too(dtype):
    hidden, weight, labels, _ = make(dtype)
    old, advantages = torch.full((3, 50), -6.5), torch.tensor([1.0, -0.5, 2.0])
    results = []
    for wide in (False, True):
        leaves = [(each.float() if wide else each.clone()).requires_grad_() for each in (hidden, weight)]
        loss = linear_policy_loss(
            leaves[0].view(3, 50, H), leaves[1], labels.view(3, 50), old, advantages, clip_high=10.0, backend="native"
        ).loss
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got.float(), want, rtol=1e-2, atol=1e-5)


def test_a_default_tile_has_the_columns_of_float32(monkeypatch):
    monkeypatch.undo()
    for multiplies, columns in ((True, 2048), (False, 1024)):
        with mock.patch.object(tiled, "multiplies_16_bits", return_value=multiplies):
            assert native.tile_shape(torch.bfloat16).columns == columns
            assert native.tile_shape(torch.float32).columns == 1024


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("number", [5, N])
@pytest.mark.parametrize("gradient_tolerance", [None, 2**-8])
def test_logits_of_16_bits_are_rounded_products_in_float32(dtype, number, gradient_tolerance):
    hidden, weight, labels, mask = make(dtype, number)
    options = {"logits_dtype": dtype, "gradient_tolerance": gradient_tolerance}
    got = statistics_and_gradients(hidden, weight, labels, mask, **options)
    logits = (hidden.float() @ weight.float().t()).to(dtype)
    for one, other in zip(got[:2], token_stats_from_logits(logits, labels, mask=mask, temperature=0.8), strict=False):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    want = statistics_and_gradients(hidden.float(), weight.float(), labels, mask)
    for one, other in zip(got[2:], want[2:], strict=True):
        assert one.dtype == dtype
        assert (one - other).norm() <= 0.02 * other.norm()


def test_logits_of_16_bits_need_few_bytes_in_float32():
    total, a, b = torch.zeros(4096, 1024).bfloat16(), torch.ones(4096, 8), torch.ones(8, 1024)
    with watch_memory() as memory:
        tiled.accumulate(total, a, b, first=True)
    assert memory.largest <= tiled.WIDENED_BYTES
    assert bool((total == 8).all())
    tiled.accumulate(total, a.bfloat16(), b, first=False)
    assert bool((total == 16).all())
