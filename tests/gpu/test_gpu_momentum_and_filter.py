"""The momentum update, to the reference's bits, and the IQR filter, to torch.quantile, on the device."""

import itertools

import pytest
import torch
from on_device import DEVICE, NAN, pick

from mgrpo_kernels import MomentumModel, ema_update_, iqr_filter

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
LARGE = pick(1_000_003, 40_003)  # elements: several chunks of a program, and a ragged end


def updated(lists, device, backend, decay=0.99, **options):
    """Return the EMAs and copies, on the CPU, after an update on `device`. What `misaligned` holds begins one element late there."""
    misaligned = options.pop("misaligned", False)

    def place(tensor):
        if not misaligned:
            return tensor.to(device, copy=True)
        return torch.cat([tensor.new_zeros(1), tensor.flatten()]).to(device)[1:].view_as(tensor)

    ema, params, emit = ([place(tensor) for tensor in tensors] if tensors else None for tensors in lists)
    ema_update_(ema, params, decay, emit=emit, backend=backend, **options)
    return [tensor.cpu() for tensor in (*ema, *(emit or []))]


def assert_bits(lists, **options):
    want = updated(lists, "cpu", "reference", **options)
    got = updated(lists, DEVICE, "triton", **options)
    for i, (mine, theirs) in enumerate(zip(got, want, strict=True)):
        different = (mine != theirs) & ~(mine.isnan() & theirs.isnan())
        assert not different.any(), (
            f"tensor {i}, {mine.dtype}: {int(different.sum())} of {mine.numel()} elements differ"
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_average_in_the_cpus_memory_is_the_one_beside_the_weights(dtype):
    model = torch.nn.Sequential(*(torch.nn.Linear(pick(4096, 64), pick(4096, 64)) for _ in range(3))).to(DEVICE)
    beside, apart = MomentumModel(model, 0.9, dtype), MomentumModel(model, 0.9, dtype, "cpu")
    for _ in range(3):
        for momentum in (beside, apart):
            momentum.update()
        with torch.no_grad():  # at once: what is being copied is as it was
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
    for momentum in (beside, apart):
        momentum.update(overlap=True)
    assert all(
        value.device.type == "cpu" and value.is_pinned() == (DEVICE.type == "cuda") for value in apart.ema.values()
    )
    assert all(torch.equal(value, apart.ema[name].to(DEVICE)) for name, value in beside.ema.items())
    torch.testing.assert_close(apart.distance(model), beside.distance(model))
    with apart.swapped_into(model):
        for name, parameter in model.named_parameters():
            assert parameter.device.type == DEVICE.type
            assert torch.equal(parameter, beside.ema[name].to(parameter.dtype))
        apart.wait()


def mixed(sizes, seed=0, emit=True):
    """Every combination of dtypes of EMA and parameter, copies of all of them, over tensors of these sizes.

    Not every combination of three: for each the kernel's code is compiled once more.
    """
    torch.manual_seed(seed)
    pairs = [(ema, param, FLOATS[(i + i // 3) % 3]) for i, (ema, param) in enumerate(itertools.product(FLOATS, FLOATS))]
    kinds = list(itertools.islice(itertools.cycle(pairs), max(2 * len(pairs), len(sizes))))
    sizes = list(itertools.islice(itertools.cycle(sizes), len(kinds)))
    lists = [[torch.randn(size).to(kind[i]) for size, kind in zip(sizes, kinds, strict=True)] for i in range(3)]
    return lists if emit else [*lists[:2], None]


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("misaligned", [False, True])
def test_mixed_dtypes(stochastic, misaligned):
    options = {"stochastic_rounding": True, "seed": 7} if stochastic else {}
    assert_bits(mixed([1, 31, 2048, pick(100_001, 2049)]), misaligned=misaligned, **options)


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.999, 1.0])
def test_the_usual(decay):
    lists = [torch.randn(LARGE)], [torch.randn(LARGE).bfloat16()], [torch.empty(LARGE, dtype=torch.bfloat16)]
    assert_bits(lists, decay=decay)
    assert_bits(lists, decay=torch.tensor(decay))


def test_small_steps_are_kept_by_stochastic_rounding():
    ema, params = torch.full((LARGE,), 1.0).bfloat16(), torch.full((LARGE,), 1.5).bfloat16()
    assert_bits(([ema], [params], None), decay=0.999, stochastic_rounding=True, seed=3)
    got = updated(([ema], [params], None), DEVICE, "triton", decay=0.999, stochastic_rounding=True, seed=3)[0]
    assert abs(got.double().mean() - 1.0005) < 5e-5 * pick(1, 5)


def test_many_tensors():
    assert_bits(mixed([1 + i % 97 for i in range(pick(3000, 60))], emit=False))


def test_equal_stays_equal():
    same = [torch.randn(5000).bfloat16()]
    for options in ({}, {"stochastic_rounding": True, "seed": 1}):
        assert torch.equal(updated((same, same, None), DEVICE, "triton", **options)[0], same[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [[32] * 40, [0, 1, 2, 3, 100, 0, pick(1000, 90), 33]])
@pytest.mark.parametrize("k", [0.0, 0.75])
def test_iqr_filter(dtype, sizes, k):
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    entropy = torch.rand(sum(sizes)).to(dtype)
    entropy[torch.rand(sum(sizes)) < 0.1] = NAN
    mask = torch.rand(sum(sizes)) > 0.2
    got = iqr_filter(entropy.to(DEVICE), offsets.to(DEVICE), k=k, mask=mask.to(DEVICE), backend="triton")
    keep, lower, q1, q3 = (each.cpu() for each in got)
    for group, (begin, end) in enumerate(itertools.pairwise(offsets.tolist())):
        members, valid = entropy[begin:end].float(), mask[begin:end] & ~entropy[begin:end].isnan()
        if not valid.any():
            assert q1[group].isnan()
            assert not keep[begin:end].any()
            continue
        quartiles = torch.quantile(members[valid], torch.tensor([0.25, 0.75]))
        torch.testing.assert_close(torch.stack([q1[group], q3[group]]), quartiles, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(lower[group], quartiles[0] - k * (quartiles[1] - quartiles[0]), rtol=1e-5, atol=1e-6)
        assert torch.equal(keep[begin:end], valid & (members >= lower[group]))
