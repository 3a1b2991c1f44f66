"""Token statistics from hidden states on the device, and the library's matmuls that they lean on."""

import dataclasses
from unittest import mock

import pytest
import torch
from on_device import ALL, DEVICE, NAN, ON_CPU, hold, pick, run, same_bits
from torch.nn.functional import linear

from mgrpo_kernels import linear_token_stats, token_stats_from_logits
from mgrpo_kernels.ops._triton import tuning
from mgrpo_kernels.ops.linear_token_stats import tiled, triton

ROWS = pick([1, 7, 1000, 4096], [1, 7, 40])
WIDTH, VOCAB = pick((64, 10007), (16, 701))  # more columns than a tile of the default has, and no multiple of anything
SMALL = pick(2**20, 2**16)  # bytes of workspace: many tiles
SOFTCAP, SCALE = 8.0, 0.8


def batch(rows, dtype, *, bias=False, mask=False, per_row=False, frozen=(), vocab=VOCAB, width=WIDTH):
    torch.manual_seed(0)
    hidden, weight = torch.randn(rows, width).to(dtype), (torch.randn(vocab, width) * 2.5 * width**-0.5).to(dtype)
    inputs = {
        "hidden": hidden,
        "weight": weight,
        "labels": torch.randint(0, vocab, (rows,)),
        "temperature": 0.7,
        "mask": None,
    }
    inputs["labels"][0], inputs["labels"][-1] = 0, vocab - 1
    if bias:
        inputs["bias"] = torch.randn(vocab).to(dtype)
    if per_row:
        inputs["temperature"] = torch.rand(rows) + 0.5
    if mask and rows > 1:
        inputs["mask"] = torch.arange(rows) % 3 != 1
        hidden[1::3], inputs["labels"][1::3] = NAN, -100
    for name in {"hidden", "weight", "bias"} & inputs.keys() - set(frozen):
        inputs[name].requires_grad_()
    return inputs


def head(inputs, backend, **options):
    """The op; or with "plain" what one writes in PyTorch, whose logits are of the inputs' dtype."""
    hidden, weight, labels, mask = (inputs[name] for name in ("hidden", "weight", "labels", "mask"))
    temperature, bias = inputs["temperature"], inputs.get("bias")
    if backend != "plain":
        return linear_token_stats(
            hidden, weight, labels, bias=bias, stats=ALL, temperature=temperature, mask=mask, backend=backend, **options
        )
    hidden = hidden if mask is None else torch.where(mask.unsqueeze(1), hidden, 0.0)
    y = linear(hidden, weight, bias).float() * options.get("logit_scale", 1.0)
    if softcap := options.get("softcap"):
        y = softcap * torch.tanh(y / softcap)
    return token_stats_from_logits(y, labels, stats=ALL, temperature=temperature, mask=mask, backend="reference")


BENT = {"softcap": SOFTCAP, "logit_scale": SCALE}
CASES = {  # inputs, options; for every number of rows
    "plain": ({}, {}),
    "everything": ({"bias": True, "mask": True, "per_row": True}, BENT),
    "small workspace": ({"bias": True, "mask": True}, {"workspace_bytes": SMALL}),
}


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_values_and_gradients(rows, case, dtype):
    made, options = CASES[case]
    inputs = batch(rows, dtype, **made)
    # The error of a few rows' statistics is a few draws of the logits' rounding: plain PyTorch's says little of ours.
    floor = 5e-3 if rows < 10 and dtype == torch.bfloat16 else 2e-6
    got = hold(lambda inputs, backend: head(inputs, backend, **options), inputs, plain="plain", floor=floor)
    if inputs["mask"] is not None:
        assert all((got[name][~inputs["mask"]] == 0).all() for name in ("output 0", "output 1", "gradient of hidden"))


def test_float16():
    hold(head, batch(100, torch.float16, bias=True, mask=True), plain="plain")


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_frozen(frozen):
    whole, part = (run(head, batch(50, torch.bfloat16, frozen=names), DEVICE, "triton") for names in ((), (frozen,)))
    assert f"gradient of {frozen}" not in part
    same_bits(part, {name: whole[name] for name in part})


def test_each_output_alone():
    inputs = batch(20, torch.float32, bias=True)
    for i in range(3):
        hold(lambda inputs, backend, i=i: [head(inputs, backend)[i]], inputs, plain="plain")


def test_autocast():
    inputs = batch(30, torch.float32, bias=True)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        got = run(head, inputs, DEVICE, "triton")
    for name in ("hidden", "weight", "bias"):
        inputs[name] = inputs[name].detach().bfloat16().requires_grad_()
    want = run(head, inputs, DEVICE, "triton")
    same_bits(got, {name: value.float() for name, value in want.items()})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "width"), pick([(1024, 64), (1500, 200)], [(17, 16), (40, 24)]))
def test_own_matmul(rows, width, dtype):
    """The matmul that a device's tuning may choose, whether or not it does."""
    chosen = dataclasses.replace(tuning.of(DEVICE), matmul="fused")
    if ON_CPU:
        chosen = dataclasses.replace(chosen, fused_tile=(16, 32, 16, 3, 4))
    inputs = batch(rows, dtype, bias=True, mask=True, per_row=True, width=width)
    with (
        mock.patch.object(tuning, "of", return_value=chosen),
        mock.patch.object(triton, "FUSED_FROM", pick(triton.FUSED_FROM, 1)),
        mock.patch.object(triton.FusedPasses, "_launch", wraps=triton.FusedPasses._launch) as launched,
    ):
        hold(lambda inputs, backend: head(inputs, backend, **BENT), inputs, plain="plain")
    assert launched.call_count >= 2  # forward and backward


@pytest.mark.device_only
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [False, True])
def test_accumulate_is_in_float32(dtype, transposed):
    """`out_dtype` of the library's 16-bit matmuls: results in 16 bits are off by up to 2^-9 or 2^-11, sums in float32 by far less."""
    rows, inner, columns = 256, 8192, 192
    a = (
        torch.rand(inner, rows + 64, device=DEVICE).to(dtype)[:, :rows].t()
        if transposed
        else torch.rand(rows, inner, device=DEVICE).to(dtype)
    )
    b = torch.rand(inner, columns, device=DEVICE).to(dtype)
    want = a.double() @ b.double()
    total = torch.full((rows, columns), NAN, device=DEVICE)
    tiled.accumulate(total, a, b, first=True)
    assert total.dtype == torch.float32
    assert ((total - want).abs() / want).max() < 2**-13
    # A small addend is not lost either.
    a = a * 2**-10
    tiled.accumulate(total, a, b, first=False)
    want += a.double() @ b.double()
    assert ((total - want).abs() / want).max() < 2**-13
