"""Rows whose logits have no gradient are left out of the backward pass on a CPU, and change nothing else."""

from unittest import mock

import pytest
import torch
from contract import watch_memory

from mgrpo_kernels import linear_policy_loss, linear_token_stats
from mgrpo_kernels.ops.linear_policy_loss import native as loss_native
from mgrpo_kernels.ops.linear_policy_loss import three_matmuls
from mgrpo_kernels.ops.linear_policy_loss import triton as loss_triton
from mgrpo_kernels.ops.linear_token_stats import native, reference, tiled, triton

HEADS = {"reference": reference, "native": native, "triton": triton}
LOSSES = {"native": loss_native, "triton": loss_triton}


def make(rows=40, width=24, vocab=701):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator).requires_grad_()
    weight = torch.randn(vocab, width, generator=generator).requires_grad_()
    return hidden, weight, torch.randint(0, vocab, (rows,), generator=generator)


@pytest.mark.parametrize("backend", HEADS)
def test_statistics_compute_the_gradient_of_rows_that_have_one(backend):
    hidden, weight, labels = make()
    by = (torch.arange(40) % 4 == 1).float()
    with mock.patch.object(HEADS[backend], "backward", wraps=HEADS[backend].backward) as backward:
        stats = linear_token_stats(hidden, weight, labels, backend=backend)
        got = torch.autograd.grad((stats.logprob * by).sum(), [hidden, weight])
    assert backward.call_args.args[0].shape == (10, 24)
    want = torch.autograd.grad(((hidden @ weight.T).log_softmax(-1)[range(40), labels] * by).sum(), [hidden, weight])
    assert (got[0][by == 0] == 0).all()
    for each, other in zip(got, want, strict=True):
        torch.testing.assert_close(each, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", HEADS)
def test_a_nan_coefficient_is_a_gradient(backend):
    hidden, weight, labels = make()
    by = torch.zeros(40)
    by[3] = torch.nan
    stats = linear_token_stats(hidden, weight, labels, backend=backend)
    grad, _ = torch.autograd.grad((stats.logprob * by).sum(), [hidden, weight])
    assert grad[3].isnan().all()
    assert (grad[torch.arange(40) != 3] == 0).all()


@pytest.mark.parametrize("backend", HEADS)
def test_a_count_that_nan_exceeds_is_refused_with_that_reason(backend):
    """A token without a gradient from the loss has one if its entropy is NaN: 0 x NaN is NaN."""
    hidden, weight, labels = make()
    with torch.no_grad():
        hidden[3] = torch.nan
    by = (torch.arange(40) < 2).float()
    stats = linear_token_stats(hidden, weight, labels, tokens_with_gradient=2, backend=backend)
    text = (
        "expected at least 3, the number of tokens that have a gradient, got 2: .* and so does NaN, in a token's stat"
    )
    with pytest.raises(ValueError, match=text):
        (stats.entropy * by).sum().backward()


def loss_of(tensors, advantages, backend, **options):
    hidden, weight, labels = tensors
    offsets = torch.arange(0, 41, 10, dtype=torch.int32)
    result = linear_policy_loss(
        hidden, weight, labels, None, advantages, cu_seqlens=offsets, backend=backend, workspace_bytes=2**16, **options
    )
    return result, torch.autograd.grad(result.loss, [hidden, weight])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("backend", LOSSES)
def test_the_loss_computes_the_gradient_of_tokens_with_an_advantage(backend, masked):
    tensors, advantages = make(), torch.tensor([0.0, 1.5, 0.0, -0.5])
    mask = (torch.arange(40) % 5 != 0) if masked else None
    with mock.patch.object(three_matmuls, "forward_backward", wraps=three_matmuls.forward_backward) as forward_backward:
        result, grads = loss_of(tensors, advantages, backend, mask=mask)
    assert forward_backward.call_args.args[-1] == (16 if masked else 20)
    want, want_grads = loss_of(tensors, advantages, "reference", mask=mask)
    torch.testing.assert_close(result.loss, want.loss)
    for name, value in want.metrics.items():
        torch.testing.assert_close(result.metrics[name], value, msg=name)
    for got, each in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(got, each, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "width, dead, blocks",
    [
        (64, 1, {40}),  # all logits lie in the gradient of the weight, which has room for 64 rows
        (24, 3, {24, 16}),  # or those that fit
        (8, 3, {40}),  # or in a workspace, which has room for all logits of 23 rows
        (8, 1, {23, 7 + 10}),
    ],
)
def test_rows_with_and_without_a_gradient_share_the_matmuls_of_the_logits(width, dead, blocks):
    """The next tile is written over the logits of rows without a gradient. A matmul of few rows is slow on a CPU."""
    tensors, advantages = make(width=width), torch.ones(4).index_fill(0, torch.arange(dead), 0.0)
    with (
        mock.patch.object(loss_native, "COLUMNS", 128),
        mock.patch.object(tiled, "accumulate", wraps=tiled.accumulate) as accumulate,
    ):
        _, got = loss_of(tensors, advantages, "native")
    factors = [call.args[1].shape for call in accumulate.call_args_list]
    assert {rows for rows, inner in factors if inner == width} == blocks
    _, want = loss_of(tensors, advantages, "reference")
    for each, other in zip(got, want, strict=True):
        torch.testing.assert_close(each, other, rtol=1e-4, atol=1e-6)


def test_logits_of_rows_without_a_gradient_are_not_kept():
    hidden, weight, labels = make(rows=400, width=8, vocab=2048)
    offsets, advantages = torch.tensor([0, 10, 400]), torch.tensor([1.0, 0.0])
    with mock.patch.object(loss_native, "COLUMNS", 256), watch_memory() as memory:
        linear_policy_loss(hidden, weight, labels, None, advantages, cu_seqlens=offsets, backend="native")
    assert memory.largest == 4 * (10 * 2048 + 390 * 256)


def test_the_columns_of_a_tile_are_those_that_readme_and_the_plan_name():
    assert loss_native.COLUMNS == 1024


@pytest.mark.parametrize("width, rows, fits", [(64, 32, True), (64, 33, False), (63, 16, False)])
def test_a_16_bit_gradient_holds_float32_logits_of_half_as_many_rows(width, rows, fits):
    hidden, weight, labels = make(rows=rows, width=width, vocab=4096)
    hidden, weight = (each.detach().bfloat16().requires_grad_() for each in (hidden, weight))
    with (
        mock.patch.object(tiled, "multiplies_16_bits", return_value=True),
        mock.patch.object(loss_native, "COLUMNS", 256),
        watch_memory() as memory,
    ):
        loss = linear_policy_loss(hidden[None], weight, labels[None], None, torch.ones(1), backend="native").loss
    assert (memory.peak - 2 * width * 4096 < 4 * rows * 4096) == fits
    got = torch.autograd.grad(loss, (hidden, weight))
    wide = [each.detach().double().requires_grad_() for each in (hidden, weight)]
    exact = linear_policy_loss(wide[0][None], wide[1], labels[None], None, torch.ones(1), backend="reference").loss
    for mine, true in zip(got, torch.autograd.grad(exact, wide), strict=True):
        assert (mine - true).norm() < 0.01 * true.norm()


@pytest.mark.parametrize("rows", [64, 65])
def test_the_weights_gradient_holds_the_logits_of_as_many_rows_as_hidden_states_have_elements(rows):
    hidden, weight, labels = make(rows=rows, width=64, vocab=4096)
    with mock.patch.object(loss_native, "COLUMNS", 256), watch_memory() as memory:
        linear_policy_loss(hidden[None], weight, labels[None], None, torch.ones(1), backend="native")
    logits, gradient, tile = 4 * rows * 4096, 4 * 64 * 4096, 4 * rows * 256
    beside = memory.peak - gradient
    assert beside < 2 * tile if rows == 64 else beside > logits


@pytest.mark.parametrize("backend", LOSSES)
@pytest.mark.parametrize("term", ["entropy_coef", "kl_coef"])
def test_a_penalty_gives_every_token_a_gradient(backend, term):
    tensors, advantages = make(), torch.zeros(4)
    options = {term: 0.1, "ref_logprobs": torch.randn(40, generator=torch.Generator().manual_seed(1)) - 20.0}
    with mock.patch.object(three_matmuls, "forward_backward", wraps=three_matmuls.forward_backward) as forward_backward:
        _, grads = loss_of(tensors, advantages, backend, **options)
    assert forward_backward.call_args.args[-1] == 40
    _, want = loss_of(tensors, advantages, "reference", **options)
    for got, each in zip(grads, want, strict=True):
        assert each.norm() > 0
        torch.testing.assert_close(got, each, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("backend", LOSSES)
def test_no_token_has_an_advantage(backend):
    result, grads = loss_of(make(), torch.zeros(4), backend)
    assert result.loss == 0
    assert result.metrics["tokens"] == 40
    assert all(bool((grad == 0).all()) for grad in grads)
