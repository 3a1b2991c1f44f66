"""Two hundred steps in bfloat16 beside float32: the entropy must not drift away.

A gradient that is summed over pieces (of the vocabulary for hidden states, of the rows for the weight) is an exact sum of inexact products if
each product is rounded to 16 bits first. No single step shows it. But the same pieces are rounded the same way step after step: the
errors add up where those of plain bfloat16 average out.
"""

import contextlib
import functools
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from mgrpo_kernels import linear_token_stats
from mgrpo_kernels.ops.linear_token_stats import native, tiled, triton

STEPS = 200
DRIFT = 3e-4  # of what the entropy moves by: six times what float32 sums give, a fifth of what rounded products do


def rounded_products(total, a, b, first):
    """What no path may do: round a piece's product to 16 bits, and add it up in float32 then."""
    product = torch.mm(a, b)
    total.copy_(product) if first else total.add_(product)


def missing(total, a, b, first):
    """Leave the CPU without a matmul that gives float32, as an AMD GPU may be."""
    return False


def head(rows=4, vocab=1024, width=16):
    """Return hidden states and weight, whose parts of the gradient are large in common and different in sign.

    So are a real head's: the rows of its weight share a large part, and a vocabulary is sorted by frequency.
    """
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(width, generator=generator) * 16
    direction = torch.randn(width, generator=generator)
    direction -= common * (direction @ common) / (common @ common)
    direction /= direction.norm()
    order = torch.linspace(1, -1, vocab)[:, None]
    weight = torch.randn(vocab, width, generator=generator) * 0.1 + common + order * direction
    hidden = torch.randn(rows, width, generator=generator) * 0.5 + direction
    hidden -= (hidden @ common)[:, None] * common / (common @ common)
    return hidden, weight.bfloat16().float()


def train(dtype, backend):
    """Lower the entropy by gradient descent on float32 hidden states; return it, in float32, at first and after the last 50 steps."""
    hidden, weight = head()
    hidden.requires_grad_()
    labels = torch.zeros(len(hidden), dtype=torch.int64)
    entropies = []
    for step in range(STEPS):
        stats = linear_token_stats(
            hidden.bfloat16().to(dtype), weight.to(dtype), labels, stats=("entropy",), backend=backend
        )
        (grad,) = torch.autograd.grad(stats.entropy.sum(), hidden)
        with torch.no_grad():
            hidden -= 0.01 * grad
            if step == 0 or step >= STEPS - 50:
                entropies.append(
                    linear_token_stats(hidden, weight, labels, stats=("entropy",), backend="reference").entropy
                )
    return torch.stack(entropies)


@contextlib.contextmanager
def in_tiles(rows, columns):
    """Let both tiled backends compute the gradient in tiles of this shape."""
    shape = tiled.TileShape(rows, columns)
    with (
        mock.patch.object(native, "tile_shape", return_value=shape),
        mock.patch.object(triton, "backward_shape", return_value=shape),
    ):
        yield


@functools.cache
def in_float32():
    """Return the entropies that the others are held to."""
    return train(torch.float32, "reference")


def drift(backend):
    """Return how far the entropies of the last 50 steps are from those of float32, as a share of how far they have moved."""
    want = in_float32()
    with in_tiles(16, 256):
        got = train(torch.bfloat16, backend)
    moved = (want[-1] - want[0]).square().mean().sqrt()
    assert moved > 0.02
    return ((got - want)[-50:].square().mean().sqrt() / moved).item()


PATHS = {
    "reference": ("reference", None),
    "native": ("native", None),
    "native, widened": ("native", missing),
    "triton": ("triton", None),
}


@contextlib.contextmanager
def on_path(path):
    """Yield the backend of a path, with what it lacks taken away."""
    backend, replaced = PATHS[path]
    tiled.multiplies_16_bits(
        torch.device("cpu"), torch.bfloat16
    )  # found out once in a process: before anything is taken away
    with mock.patch.object(tiled, "native_accumulate", replaced or tiled.native_accumulate):
        yield backend


@pytest.mark.parametrize("path", PATHS)
def test_the_entropy_does_not_drift(path):
    with on_path(path) as backend:
        assert drift(backend) < DRIFT


@pytest.fixture
def rounding():
    """Put the fault in that these tests are for, on a CPU that multiplies 16 bits or behaves as one."""
    with (
        mock.patch.object(tiled, "multiplies_16_bits", return_value=True),
        mock.patch.object(tiled, "native_accumulate", missing),
        mock.patch.object(tiled, "accumulate_widened", rounded_products),
    ):
        yield


@pytest.mark.usefixtures("rounding")
def test_it_drifts_where_products_are_rounded():
    assert drift("native") > 2 * DRIFT


def different_bits(backend):
    """Return the shares of the gradients of hidden and weight that differ between one tile and 16 x 16 tiles."""
    results = []
    for rows, columns in ((128, 1024), (8, 64)):
        leaves = [each.bfloat16().requires_grad_() for each in head(rows=128)]
        with in_tiles(rows, columns):
            stats = linear_token_stats(*leaves, torch.arange(128), backend=backend)
        with in_tiles(rows, columns):
            results.append(torch.autograd.grad(stats.logprob.sum() + stats.entropy.sum(), leaves))
    return [(one != many).float().mean().item() for one, many in zip(*results, strict=True)]


@pytest.mark.parametrize("path", ["native", "native, widened"])
def test_tiles_change_the_order_of_the_sums_alone(path):
    """Rounded to bfloat16 at the end alone, sums of another order have nearly always the same bits."""
    with on_path(path) as backend:
        assert max(different_bits(backend)) < 0.05


@pytest.mark.usefixtures("rounding")
def test_tiles_change_more_where_products_are_rounded():
    assert min(different_bits("native")) > 0.2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("path", [tiled.native_accumulate, tiled.accumulate_widened])
@pytest.mark.parametrize(
    ("rows", "inner", "columns"),
    [
        (1, 1, 1),
        (5, 0, 3),
        (40, 70, 0),
        (0, 70, 40),
        (0, 70, 0),
        (65, 513, 129),
        (130, 1030, 40),
        (17, 65, 700),
        (20, 1030, 200),
        (97, 576, 384),
        (80, 31, 128),
    ],
)
@pytest.mark.parametrize("layout", ["rows", "transposed", "sliced", "sliced and transposed", "every other element"])
def test_products_are_summed_in_float32(dtype, path, rows, inner, columns, layout):
    """Of factors in any layout: the slices begin where no 4 bytes do, and their rows are as long as an odd number of elements."""
    a, b = torch.rand(rows, inner).to(dtype), torch.rand(columns, inner).to(dtype).t()
    if layout == "sliced":
        a, b = (F.pad(x, (1, 1 - x.shape[1] % 2, 1, 0))[1:, 1 : 1 + x.shape[1]] for x in (a, b.contiguous()))
    elif layout == "sliced and transposed":
        a, b = (F.pad(x.t(), (1, 1 - x.shape[0] % 2, 1, 0))[1:, 1 : 1 + x.shape[0]].t() for x in (a, b))
    elif layout == "every other element":
        a, b = (x.repeat_interleave(2, 0).repeat_interleave(2, 1)[::2, ::2] for x in (a, b))
    elif layout == "transposed":
        a, b = a.t().contiguous().t(), b.contiguous()
    place = torch.full((rows, columns + 3), torch.nan)
    total = place[:, :columns]
    want = a.double() @ b.double()
    if path(total, a, b, True) is False:
        assert dtype != torch.bfloat16 or not torch.cpu._is_avx512_supported()
        return
    torch.testing.assert_close(total.double(), want, rtol=1e-5, atol=1e-5)
    path(total, a, b, False)
    torch.testing.assert_close(total.double(), 2 * want, rtol=1e-5, atol=1e-5)
    assert place[:, columns:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "columns"), [(5, 1000), (70, 300), (300, 130)])
def test_threads_change_no_bit(dtype, rows, columns):
    """Where there are fewer blocks of rows than threads, each thread has some of the columns."""
    a, b = torch.randn(rows, 200).to(dtype), torch.randn(200, columns).to(dtype)
    threads, totals = torch.get_num_threads(), []
    try:
        for number in (1, 2, 7):
            torch.set_num_threads(number)
            totals.append(torch.full((rows, columns), torch.nan))
            if not tiled.native_accumulate(totals[-1], a, b, True):
                return
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(totals[0], a.float() @ b.float(), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(each, totals[0]) for each in totals)


def test_float32_is_multiplied_in_blocks_where_mkl_has_avx2_at_most():
    """MKL takes its kernels for AVX-512 on Intel's processors alone."""
    is_intel = "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    want = torch.backends.mkl.is_available() and not is_intel and torch.cpu._is_avx512_supported()
    assert tiled.native_accumulate(torch.empty(64, 128), torch.ones(64, 64), torch.ones(64, 128), True) == want


@pytest.mark.parametrize(
    ("rows", "inner", "columns", "blocks"), [(32, 64, 128, 1), (31, 64, 128, 0), (32, 63, 128, 0), (32, 64, 127, 0)]
)
def test_small_float32_products_are_not_filled_up_to_blocks(monkeypatch, rows, inner, columns, blocks):
    seen, real = [], tiled.native_accumulate
    monkeypatch.setattr(tiled, "native_accumulate", lambda *given: seen.append(given) or real(*given))
    a, b = torch.rand(rows, inner), torch.rand(inner, columns)
    total = torch.full((rows, columns), torch.nan)
    for times in (1, 2):
        tiled.accumulate(total, a, b, first=times == 1)
        torch.testing.assert_close(total, times * (a.double() @ b.double()).float())
    assert len(seen) == 2 * blocks


def test_a_device_that_multiplies_into_float32_is_asked_once():
    """Where PyTorch has `out_dtype` it is used, on whatever device: the version of HIP or CUDA is no answer to that."""
    calls = []

    def mm(*args, **options):
        calls.append(options)
        raise NotImplementedError("no such operator")

    device = torch.device("cpu")
    tiled.multiplies_into_float32.cache_clear()
    try:
        with mock.patch.object(torch, "mm", mm):
            assert [tiled.multiplies_into_float32(device, torch.bfloat16) for _ in range(3)] == [False] * 3
        assert len(calls) == 1
        assert calls[0]["out_dtype"] == torch.float32
        tiled.multiplies_into_float32.cache_clear()
        with mock.patch.multiple(torch, mm=mock.DEFAULT, addmm=mock.DEFAULT) as product:
            assert tiled.multiplies_into_float32(device, torch.bfloat16)
            tiled.accumulate(torch.zeros(2, 2), torch.ones(2, 2).bfloat16(), torch.ones(2, 2).bfloat16(), first=False)
        assert product["addmm"].call_args.kwargs["out_dtype"] == torch.float32
    finally:
        tiled.multiplies_into_float32.cache_clear()


FLAGS = {
    "allow_fp16_reduced_precision_reduction": torch.float16,
    "allow_bf16_reduced_precision_reduction": torch.bfloat16,
}


@pytest.mark.parametrize("flag", FLAGS)
def test_each_16_bit_dtype_goes_by_its_own_flag(flag):
    small, large, device = torch.Size([64, 64]), torch.Size([2**13, 2**13]), torch.device("cuda")
    matmul = torch.backends.cuda.matmul
    before = {name: getattr(matmul, name) for name in FLAGS}
    try:
        for name in FLAGS:
            setattr(matmul, name, name == flag)
        for name, dtype in FLAGS.items():
            assert tiled.rounds_once(small, device, dtype) == (name != flag)
            assert tiled.rounds_once(large, device, dtype)
            assert tiled.rounds_once(small, torch.device("cpu"), dtype)
    finally:
        for name, value in before.items():
            setattr(matmul, name, value)


def test_sums_in_float16_round_more_than_once():
    matmul, device = torch.backends.cuda.matmul, torch.device("cuda")
    before = matmul.allow_fp16_accumulation
    try:
        matmul.allow_fp16_accumulation = True
        assert not tiled.rounds_once(torch.Size([2**13, 2**13]), device, torch.float16)
        assert tiled.rounds_once(torch.Size([2**13, 2**13]), device, torch.bfloat16)
    finally:
        matmul.allow_fp16_accumulation = before
