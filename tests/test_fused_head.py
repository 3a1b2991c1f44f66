"""The head's own matmul, under the interpreter: its statistics and gradients, and the ops that choose it."""

import dataclasses
from unittest import mock

import pytest
import torch
from contract import assert_no_worse_than_plain, poisoned_memory

from mgrpo_kernels import linear_policy_loss, linear_token_stats
from mgrpo_kernels.ops import _statistics
from mgrpo_kernels.ops._triton import tuning
from mgrpo_kernels.ops.linear_token_stats import tiled, triton
from mgrpo_kernels.ops.linear_token_stats.specs import Head, transform, transform_gradient

INF, NAN = torch.inf, torch.nan
SMALL = dataclasses.replace(tuning.Tuning(), fused_tile=(16, 32, 16, 3, 4), matmul="fused")


@pytest.fixture(autouse=True)
def small_tiles():
    with mock.patch.object(tuning, "of", return_value=SMALL), mock.patch.object(triton, "FUSED_FROM", 1):
        yield


def head_of(rows, width, vocab, dtype, *, bias=False, per_row=False, softcap=None, vocab_start=0):
    torch.manual_seed(0)
    hidden, weight = torch.randn(rows, width).to(dtype), (torch.randn(vocab, width) * 0.3).to(dtype)
    temperature = torch.rand(rows) + 0.5 if per_row else 0.7
    added = torch.randn(vocab).to(dtype) if bias else None
    return hidden, Head(weight, added, temperature, 0.8, softcap, vocab_start, None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rows", "width", "vocab"),
    [
        (1, 8, 1),
        (16, 16, 32),
        (17, 24, 33),
        (150, 40, 300),
    ],  # within a tile, just one, just over, several groups of tiles
)
@pytest.mark.parametrize(
    "options", [{}, {"bias": True, "per_row": True, "softcap": 6.0, "vocab_start": 100}], ids=["plain", "everything"]
)
def test_passes(dtype, rows, width, vocab, options):
    hidden, head = head_of(rows, width, vocab, dtype, **options)
    hidden[rows // 2] = NAN
    labels = torch.randint(0, vocab, (rows,)) + head.vocab_start
    labels[-1] = 0 if head.vocab_start else vocab - 1  # elsewhere; the last
    raw = hidden.float() @ head.weight.float().T + (0 if head.bias is None else head.bias.float())
    z = transform(raw, head, head.temperature)
    want = _statistics.row_state(z, labels, head.vocab_start)
    passes = triton.passes_of(hidden, head)
    assert isinstance(passes, triton.FusedPasses)

    with poisoned_memory():
        states = [tiled.empty_state(rows + 2, hidden.device)[:, 1:-1] for _ in range(2)]
        for state in states:
            passes.fill(None, hidden, head, labels, state)
    assert torch.equal(states[0].nan_to_num(nan=5.5), states[1].nan_to_num(nan=5.5))
    for got, expected in zip(_statistics.finish(states[0], None), _statistics.finish(want, None), strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5, equal_nan=True)
    assert (states[0][_statistics.COUNT] == vocab).all()

    x = torch.full((rows, vocab + 5), 77.0, dtype=dtype)[:, :vocab]
    stored = tiled.empty_state(rows, hidden.device)
    passes.fill(x, hidden, head, labels, stored)
    torch.testing.assert_close(
        x, (hidden.float() @ head.weight.float().T).to(dtype), rtol=1e-2, atol=1e-3, equal_nan=True
    )
    of_stored = transform(x.float() + (0 if head.bias is None else head.bias.float()), head, head.temperature)
    of_stored = _statistics.row_state(of_stored, labels, head.vocab_start)
    for got, expected in zip(_statistics.finish(stored, None), _statistics.finish(of_stored, None), strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5, equal_nan=True)

    coefficients = torch.randn(4, rows)
    coefficients[:, rows // 2] = 0  # masked: the row of NaN
    logsumexp = _statistics.finish(want, None).logsumexp.nan_to_num()
    gradient = x.fill_(NAN)
    passes.fill_gradient(gradient, hidden, head, labels, coefficients, logsumexp, gradient)
    grad_z = _statistics.row_gradient(z, labels, coefficients, logsumexp, head.vocab_start)
    expected = transform_gradient(grad_z, raw, head, head.temperature)
    expected[rows // 2] = 0
    torch.testing.assert_close(gradient.float(), expected, rtol=1e-2, atol=1e-3)
    assert (gradient[rows // 2] == 0).all()
    beyond = gradient.as_strided((rows, 5), gradient.stride(), gradient.storage_offset() + vocab)
    assert (beyond == 77).all()  # nothing written beside the tile


def test_logits_of_minus_infinity_and_rows_of_nothing_else():
    hidden, head = head_of(5, 8, 70, torch.bfloat16, bias=True)
    head.bias[::3] = -INF
    labels = torch.tensor([0, 1, 2, 3, 69])
    for bias in (head.bias, torch.full_like(head.bias, -INF)):
        head = head._replace(bias=bias)
        state = tiled.empty_state(5, hidden.device)
        triton.FusedPasses().fill(None, hidden, head, labels, state)
        z = transform(hidden.float() @ head.weight.float().T + bias.float(), head, head.temperature)
        got, want = (_statistics.finish(s, labels) for s in (state, _statistics.row_state(z, labels)))
        torch.testing.assert_close(got.logsumexp, want.logsumexp, rtol=2e-5, atol=2e-5)
        if bias.isfinite().any():
            torch.testing.assert_close(got[:3], want[:3], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("op", ["stats", "loss"])
def test_the_ops_are_no_worse_than_plain(op):
    torch.manual_seed(1)
    hidden, weight = torch.randn(4, 30, 24), torch.randn(333, 24) * 0.4
    labels, mask = torch.randint(0, 333, (4, 30)), torch.rand(4, 30) > 0.2
    old, advantages = torch.randn(4, 30) * 0.1 - 6, torch.tensor([1.0, -1.0, 0.5, 2.0])
    weights = torch.randn(2, 4, 30)

    def run(dtype, backend):
        leaves = [t.to(torch.bfloat16).to(dtype).requires_grad_() for t in (hidden, weight)]
        options = {"mask": mask, "backend": backend, "workspace_bytes": 2**16}
        if op == "stats":
            stats = linear_token_stats(*leaves, labels, **options)
            outputs = [stats.logprob, stats.entropy]
            total = (torch.stack(outputs) * weights).sum()
        else:
            outputs = [
                linear_policy_loss(
                    *leaves, labels, old.to(dtype), advantages.to(dtype), loss_type="dapo", **options
                ).loss
            ]
            total = outputs[0]
        return [t.detach() for t in outputs] + list(torch.autograd.grad(total, leaves))

    with (
        mock.patch.object(triton.FusedPasses, "_launch", wraps=triton.FusedPasses._launch) as launches,
        poisoned_memory(),
    ):
        got = run(torch.bfloat16, "triton")
    assert launches.called
    plain, truth = run(torch.bfloat16, "reference"), run(torch.float64, "reference")
    for mine, theirs, true in zip(got, plain, truth, strict=True):
        assert_no_worse_than_plain(mine, theirs, true, floor=1e-5)


def test_operands_that_descriptors_cannot_describe_go_to_the_librarys_matmul():
    good, head = head_of(8, 16, 40, torch.bfloat16)
    assert isinstance(triton.passes_of(good, head), triton.FusedPasses)
    with mock.patch.object(tuning, "of", return_value=tuning.Tuning()):
        assert not isinstance(triton.passes_of(good, head), triton.FusedPasses)
    odd, odd_head = head_of(8, 17, 40, torch.bfloat16)  # rows of 34 bytes
    single, single_head = head_of(8, 16, 40, torch.float32)
    shifted = torch.zeros(8 * 16 + 1, dtype=torch.bfloat16)[1:].view(8, 16)
    for hidden, its_head in (
        (odd, odd_head),
        (single, single_head),
        (shifted, head),
        (good.t().contiguous().t(), head),
    ):
        assert not isinstance(triton.passes_of(hidden, its_head), triton.FusedPasses)
