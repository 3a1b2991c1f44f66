"""Gradients to a stated tolerance: what may be left out of a row, and that nothing else changes."""

from pathlib import Path

import pytest
import torch
from contract import each_backend
from torch._dynamo.testing import CompileCounterWithBackend

from mgrpo_kernels import backend as backends
from mgrpo_kernels import linear_policy_loss, linear_token_stats
from mgrpo_kernels.ops import _statistics
from mgrpo_kernels.ops._statistics import EVERYTHING
from mgrpo_kernels.ops.linear_token_stats import native, triton
from mgrpo_kernels.ops.linear_token_stats.op import OP, linear_token_stats_op
from mgrpo_kernels.ops.linear_token_stats.specs import Entries, Head

V = 701
TOLERANCE = 2.0**-8


def rows_of_logits(seed=0):
    """Return logits ``(N, V)`` of rows that are sharp, flat, of two levels and with heavy tails, and labels that are likely or in the tail."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(6, V, generator=generator)
    shapes = {
        "sharp": 8.0 * noise,
        "one entry has nearly all": noise + 25.0 * torch.nn.functional.one_hot(torch.arange(6), V),
        "flat": 0.01 * noise,
        "two levels": torch.where(noise > 2.0, 9.0, 0.0) + 0.1 * noise,
        "heavy tails": noise.sign() * noise.abs().exp(),
        "falling as a power": -2.0 * (1.0 + torch.rand(6, V, generator=generator).argsort(-1)).log(),
    }
    logits = torch.cat(list(shapes.values()))
    likely, unlikely = logits.argmax(-1), logits.argmin(-1)
    labels = torch.where(torch.arange(len(logits)) % 3 == 0, unlikely, likely)
    return logits, labels


def gradients(logits, labels, backend, tolerance, weights=(1.0, 0.0, 0.0), **options):
    """Return statistics and the gradient of the raw logits: a head whose weight is the identity hands it on unchanged."""
    hidden, weight = logits.clone().requires_grad_(), torch.eye(V, dtype=logits.dtype)
    stats = linear_token_stats(
        hidden,
        weight,
        labels,
        stats=("logprob", "entropy", "self_certainty"),
        backend=backend,
        gradient_tolerance=tolerance,
        **options,
    )
    loss = sum(by * stat.sum() for by, stat in zip(weights, stats, strict=True) if by != 0)
    return stats, torch.autograd.grad(loss, hidden)[0]


OPTIONS = [
    {},
    {"temperature": 0.7},
    {"softcap": 9.0, "logit_scale": 0.8},
    {"logit_scale": -1.1},
    {"temperature": torch.linspace(0.5, 2.0, 36)},
]


@each_backend(OP)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("weights", [(1.0, 0.0, 0.0), (1.0, 0.3, 0.0), (0.0, -1.0, 0.0), (1.0, 0.1, 0.2)])
def test_no_row_leaves_out_more_than_its_share(backend, options, weights):
    logits, labels = rows_of_logits()
    stats, got = gradients(logits, labels, backend, TOLERANCE, weights, **options)
    exact_stats, exact = gradients(logits, labels, backend, None, weights, **options)
    for each, want in zip(stats, exact_stats, strict=True):
        assert torch.equal(each, want)  # bit for bit
    kept = got != 0
    total = exact.abs().sum(-1, keepdim=True)
    ulp = 4e-6  # of the largest logit, by which an entry's own is rounded when it is kept
    assert (torch.where(kept, got - exact, 0.0).abs() <= 2e-5 * exact.abs() + 1e-5 * total + ulp).all()
    left_out = torch.where(kept, 0.0, exact.abs()).sum(-1)
    assert (left_out <= TOLERANCE * 1.001 * total[:, 0]).all()


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_as_few_entries_are_kept_as_the_tolerance_allows(backend):
    logits, labels = rows_of_logits()
    _, got = gradients(logits, labels, backend, TOLERANCE)
    _, exact = gradients(logits, labels, backend, None)
    magnitudes = exact.abs().sort(-1, descending=True).values
    needed = 1 + (magnitudes.cumsum(-1) < (1 - TOLERANCE) * magnitudes.sum(-1, keepdim=True)).sum(-1)
    kept = (got != 0).sum(-1)
    fits = needed < native.entries_room(V) * 0.6
    assert fits.sum() >= 12  # the sharp rows, and those of which one entry has nearly all
    assert (kept[fits] <= 1.2 * needed[fits] + 1).all()
    if backend == "native":  # what does not fit is not left out at all
        assert (kept[(exact != 0).sum(-1) == V] > 0).all()
        assert (kept[12:18] == V).all()


@each_backend(OP)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_every_gradient_is_within_the_tolerance(backend, dtype, bias):
    generator = torch.Generator().manual_seed(3)
    hidden = (3.0 * torch.randn(150, 24, generator=generator)).to(dtype)
    weight = (0.6 * torch.randn(V, 24, generator=generator)).to(dtype)
    offset = torch.randn(V, generator=generator).to(dtype) if bias else None
    labels = torch.randint(0, V, (150,), generator=generator)
    leaves = [each.requires_grad_() for each in (hidden, weight, offset) if each is not None]

    def run(tolerance):
        stats = linear_token_stats(
            hidden, weight, labels, bias=offset, gradient_tolerance=tolerance, backend=backend, workspace_bytes=2**17
        )
        return torch.autograd.grad(stats.logprob.sum() + 0.1 * stats.entropy.sum(), leaves)

    rounding = 0.02 if dtype == torch.bfloat16 else 1e-5
    for got, want in zip(run(2.0**-6), run(None), strict=True):
        assert got.dtype == dtype
        error = (got.double() - want.double()).norm() / want.double().norm()
        assert error <= 2.0**-6 + rounding


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_rows_that_cannot_keep_to_the_tolerance_are_computed_exactly(backend):
    generator = torch.Generator().manual_seed(3)
    hidden = 0.1 * torch.randn(50, 24, generator=generator)  # flat rows: every entry counts
    weight, bias = 0.6 * torch.randn(V, 24, generator=generator), 0.1 * torch.randn(V, generator=generator)
    labels = torch.randint(0, V, (50,), generator=generator)
    leaves = [each.requires_grad_() for each in (hidden, weight, bias)]

    def run(tolerance):
        stats = linear_token_stats(hidden, weight, labels, bias=bias, gradient_tolerance=tolerance, backend=backend)
        return torch.autograd.grad(stats.logprob.sum() + 0.1 * stats.entropy.sum(), leaves)

    for got, want in zip(run(TOLERANCE), run(None), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@each_backend(OP)
def test_masked_rows_and_rows_without_a_gradient(backend):
    logits, labels = rows_of_logits()
    mask = torch.arange(36) % 4 != 1
    logits[~mask] = torch.nan
    labels[~mask] = -100
    hidden, weight = logits.clone().requires_grad_(), torch.eye(V).requires_grad_()
    stats = linear_token_stats(hidden, weight, labels, mask=mask, gradient_tolerance=TOLERANCE, backend=backend)
    by = (torch.arange(36) % 3 == 0).float()
    (stats.logprob * by).sum().backward()
    dead = ~mask | (by == 0)
    assert (hidden.grad[dead] == 0).all()
    assert (hidden.grad[~dead] != 0).any(-1).all()
    assert weight.grad.isfinite().all()


@each_backend(OP)
def test_a_nan_stays_visible(backend):
    logits, labels = rows_of_logits()
    logits[5, 7] = torch.nan
    stats, grad = gradients(logits, labels, backend, TOLERANCE)
    assert stats.logprob[5].isnan()
    assert grad[5].isnan().any()
    assert grad[[row for row in range(36) if row != 5]].isfinite().all()


@each_backend(OP)
def test_impossible_logits_get_no_gradient(backend):
    logits, labels = rows_of_logits()
    impossible = torch.rand(36, V, generator=torch.Generator().manual_seed(1)) < 0.3
    impossible[torch.arange(36), labels] = False
    weight = torch.eye(V)
    hidden = logits.clone().requires_grad_()
    for row in range(0, 36, 5):  # a bias is the same for all rows
        bias = torch.where(impossible[row], -torch.inf, 0.0)
        stats = linear_token_stats(
            hidden[row : row + 1],
            weight,
            labels[row : row + 1],
            bias=bias,
            gradient_tolerance=TOLERANCE,
            backend=backend,
        )
        (grad,) = torch.autograd.grad(stats.logprob.sum() + stats.entropy.sum(), hidden)
        assert (grad[row][impossible[row]] == 0).all()
        assert grad[row].isfinite().all()


@each_backend(OP)
def test_the_loss_takes_it_too(backend):
    generator = torch.Generator().manual_seed(5)
    hidden = (3.0 * torch.randn(64, 24, generator=generator)).requires_grad_()
    weight = (0.6 * torch.randn(V, 24, generator=generator)).requires_grad_()
    labels = torch.randint(0, V, (64,), generator=generator)
    advantages = torch.randn(4, generator=generator)
    offsets = torch.arange(0, 65, 16, dtype=torch.int32)

    def run(tolerance):
        result = linear_policy_loss(
            hidden, weight, labels, None, advantages, cu_seqlens=offsets, gradient_tolerance=tolerance, backend=backend
        )
        return result.loss.detach(), *torch.autograd.grad(result.loss, [hidden, weight])

    loss, *grads = run(TOLERANCE)
    exact_loss, *exact = run(None)
    torch.testing.assert_close(loss, exact_loss)
    for got, want in zip(grads, exact, strict=True):
        assert (got - want).norm() <= TOLERANCE * want.norm()


@each_backend(OP)
def test_same_bits_every_time_and_a_second_backward_pass(backend):
    logits, labels = rows_of_logits()
    hidden, weight = logits.clone().requires_grad_(), torch.eye(V).requires_grad_()

    def run():
        stats = linear_token_stats(hidden, weight, labels, gradient_tolerance=TOLERANCE, backend=backend)
        loss = stats.logprob.sum()
        first = torch.autograd.grad(loss, [hidden, weight], retain_graph=True)
        again = torch.autograd.grad(loss, [hidden, weight])
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        return first

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@each_backend(OP)
def test_opcheck_and_compile(backend):
    logits, labels = rows_of_logits()
    hidden, weight = logits[:, :64].clone().requires_grad_(), torch.randn(V, 64).requires_grad_()
    arguments = (
        hidden, weight, None, labels, None, None, 1.0, 1.0, None, None, 0, None, torch.float32, None, None, True, False, True, TOLERANCE, False, backend,
    )  # fmt: skip
    torch.library.opcheck(linear_token_stats_op, arguments)
    counter = CompileCounterWithBackend("aot_eager")

    def loss(h, y):
        return linear_token_stats(h, weight, y, gradient_tolerance=TOLERANCE, backend=backend).logprob.sum()

    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    for rows in (36, 20, 11):
        torch.testing.assert_close(compiled(hidden[:rows], labels[:rows]), loss(hidden[:rows], labels[:rows]))
    assert counter.frame_count <= 2


@each_backend(OP)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_real_rollouts_against_float64(backend, temperature):
    """Rows of a real model, where python scripts/real_rollouts.py has made them; the other tests make theirs up."""
    file = Path(__file__).resolve().parents[1] / "build" / "real_rollouts.pt"
    if not file.exists():
        pytest.skip("needs build/real_rollouts.pt, which python scripts/real_rollouts.py makes")
    data = torch.load(file)
    hidden, labels = (each[::40] for each in data["rollouts"][temperature])  # 13 tokens
    leaves = [each.clone().requires_grad_() for each in (hidden, data["weight"])]
    stats = linear_token_stats(*leaves, labels, temperature=temperature, gradient_tolerance=TOLERANCE, backend=backend)
    got = torch.autograd.grad(stats.logprob.sum() + 0.1 * stats.entropy.sum(), leaves)
    wide = [each.detach().double().requires_grad_() for each in leaves]
    logp = (wide[0] @ wide[1].t() / temperature).log_softmax(-1)
    logprob, entropy = logp.gather(-1, labels.unsqueeze(-1)), -(logp.exp() * logp).sum(-1)
    truth = torch.autograd.grad(logprob.sum() + 0.1 * entropy.sum(), wide)
    for each, want in zip(got, truth, strict=True):
        assert (each - want).norm() <= (TOLERANCE + 1e-4) * want.norm()
    # One row computed exactly reaches the whole weight: at 1.0 one that needs more entries than are kept. A row that is sure of its token
    # (here 1 - 5.5e-9) does not.
    if temperature == 0.6:
        assert (got[1] == 0).all(-1).double().mean() > 0.9


@pytest.mark.parametrize("module", [native, triton], ids=["native", "triton"])
def test_shards_of_a_vocabulary_keep_to_the_tolerance_together(module):
    logits, labels = rows_of_logits()
    _, exact = gradients(logits, labels, module.__name__.rpartition(".")[2], None, (1.0, 0.2, 0.0), temperature=0.9)
    weight = torch.eye(V)
    parts, states = [], []
    for start, stop in ((0, 300), (300, 450), (450, V)):
        head = Head(weight[start:stop], None, 0.9, 1.0, None, start, None)
        entries = Entries.empty(len(labels), module.entries_room(stop - start), logits.device)
        states.append(module.sparse_forward(logits, head, labels, EVERYTHING, TOLERANCE, entries))
        parts.append((head, entries))
    statistics = _statistics.finish(_statistics.merge(torch.stack(states)), labels)
    ones = torch.ones(len(labels))
    coefficients = _statistics.gradient_coefficients(
        ones, 0.2 * ones, None, statistics.entropy, V, None, statistics.logsumexp
    )
    got = torch.zeros_like(logits)
    for head, entries in parts:
        need = (True, False, False)
        got += module.sparse_backward(
            logits, head, labels, coefficients, statistics.logsumexp, need, EVERYTHING, TOLERANCE, entries
        )[0]
    left_out = (got - exact).abs().sum(-1)
    assert (left_out <= TOLERANCE * 1.001 * exact.abs().sum(-1) + 1e-4).all()
    assert (got == 0).any(-1).sum() > (
        6 if module is native else 0
    )  # the other multiplies all rows of a step with its columns


def test_the_entropy_of_what_is_not_kept_is_held_against_the_tolerance():
    """One entry has p = 0.905, and 14 of probability e^-5 are not kept: they have most of the entropy's gradient."""
    backends.choose(OP, "native", torch.device("cpu"), torch.float32)
    ids = torch.zeros(1, 16, dtype=torch.int32)
    ids[0, 0] = -1
    logits = torch.full((1, 16), 4.9)
    counts, rest = torch.tensor([2], dtype=torch.int32), torch.tensor([[0.0], [14.0], [0.0], [-1.0]])
    coefficients = torch.tensor([[0.0], [-1.0], [0.0], [0.0]])
    *_, outside = torch.ops.mgrpo_native.entry_gradient(
        ids, logits, counts, rest, coefficients, torch.tensor([5.0]), None, 1.0, 1.0, None, 0.5
    )
    assert outside.tolist() == [True]


@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, 2, float("nan"), True, "exact"])
def test_bad_tolerances(value):
    logits, labels = rows_of_logits()
    with pytest.raises((ValueError, TypeError), match="gradient_tolerance: expected"):
        gradients(logits, labels, None, value)
    with pytest.raises((ValueError, TypeError), match="gradient_tolerance: expected"):
        linear_policy_loss(logits[None], torch.eye(V), labels[None], None, torch.ones(1), gradient_tolerance=value)
