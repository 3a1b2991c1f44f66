"""The contract of token statistics from logits, on every backend."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from contract import DTYPES, assert_no_worse_than_plain, each_backend, poisoned_memory
from torch._dynamo.testing import CompileCounterWithBackend

import mgrpo_kernels
from mgrpo_kernels import (
    entropy_from_logits,
    logprobs_and_entropy_from_logits,
    logprobs_from_logits,
    token_stats_from_logits,
)
from mgrpo_kernels.ops.token_stats import OP, token_stats_op
from mgrpo_kernels.ops.token_stats import reference as definition
from mgrpo_kernels.ops.token_stats.specs import Wanted

ALL = ("logprob", "entropy", "self_certainty")
BLOCK = 2048  # of the native kernel; Triton's blocks are smaller powers of two


def plain(logits, labels, temperature=1.0):
    """What one writes in PyTorch, in the dtype of `logits`."""
    z = logits / temperature
    logp = torch.log_softmax(z, -1)
    terms = torch.where(logp == -torch.inf, 0.0, logp.exp() * logp)
    return logp.gather(-1, labels.unsqueeze(-1)).squeeze(-1), -terms.sum(-1), z.logsumexp(-1) - z.mean(-1)


def ours(logits, labels, backend, **kwargs):
    return token_stats_from_logits(logits, labels, stats=ALL, backend=backend, **kwargs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_native_rows_of_several_parts_have_the_same_bits_shared_by_threads_or_not(dtype):
    """The native kernel sums a row as parts of 4 blocks; few rows share them among threads, many rows take one thread each."""
    vocab = 2 * 4 * BLOCK + 5
    logits = (torch.randn(3, vocab) * 4 + torch.linspace(-20, 20, vocab)).to(
        dtype
    )  # the maximum grows from part to part
    labels = torch.tensor([0, vocab - 1, 4 * BLOCK])
    few = ours(logits, labels, "native")
    many = ours(logits.repeat(400, 1), labels.repeat(400), "native")  # more than any number of threads shares
    truth, float32 = plain(logits.double(), labels), plain(logits.float(), labels)
    for one, each, usual, true in zip(few, many, float32, truth, strict=True):
        assert torch.equal(one.repeat(400), each)
        assert_no_worse_than_plain(one, usual, true, floor=2e-6)


def test_the_native_exponential_is_exact_to_rounding():
    logits = torch.zeros(4001, 2)
    logits[:, 1] = torch.linspace(-2, 0, 4001)
    logits.requires_grad_()
    ours(logits, torch.zeros(4001, dtype=torch.long), "native")[0].sum().backward()
    truth = torch.softmax(logits.detach().double(), -1)[:, 1]
    assert ((logits.grad[:, 1].double() + truth).abs() / truth).max() < 5e-7


@each_backend(OP)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 2, 31, BLOCK - 1, BLOCK, BLOCK + 1, 5000])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_values_and_gradients(backend, dtype, vocab, temperature):
    logits = (torch.randn(3, 4, vocab) * 4).to(dtype)
    labels = torch.randint(0, vocab, (3, 4))
    labels[0, 0], labels[0, 1] = 0, vocab - 1
    weights = torch.randn(3, 3, 4)

    def run(function, values):
        values = values.clone().requires_grad_()
        stats = function(values)
        loss = sum((stat * weight.to(stat.dtype)).sum() for stat, weight in zip(stats, weights, strict=True))
        return [*stats, torch.autograd.grad(loss, values)[0]]

    truth = run(lambda x: plain(x, labels, temperature), logits.double())
    float32 = run(lambda x: plain(x, labels, temperature), logits.float())
    with poisoned_memory():
        got = run(lambda x: ours(x, labels, backend, temperature=temperature), logits)
    for stat, reference, true in zip(got[:3], float32, truth, strict=False):
        assert stat.dtype == torch.float32
        assert_no_worse_than_plain(stat.detach(), reference.detach(), true.detach(), floor=2e-6)
    assert got[3].dtype == dtype
    # Backward has the float32 logsumexp, whose rounding is a relative error of every probability.
    assert_no_worse_than_plain(got[3], float32[3].to(dtype), truth[3], floor=1e-5)


@each_backend(OP)
@pytest.mark.parametrize("name", ALL)
def test_each_output_alone(backend, name):
    logits = torch.randn(5, 70).requires_grad_()
    labels = torch.randint(0, 70, (5,))
    stats = token_stats_from_logits(logits, labels if name == "logprob" else None, stats=(name,), backend=backend)
    assert [stat is not None for stat in stats] == [name == each for each in ALL]
    grad = torch.autograd.grad(getattr(stats, name).sum(), logits)[0]
    reference = torch.autograd.grad(plain(logits, labels)[ALL.index(name)].sum(), logits)[0]
    torch.testing.assert_close(grad, reference)


@each_backend(OP)
def test_masked_rows_are_never_read(backend):
    logits = torch.randn(6, 50)
    mask = torch.tensor([True, False, True, True, False, True])
    logits[1], logits[4] = torch.nan, torch.inf
    labels = torch.randint(0, 50, (6,))
    labels[~mask] = -100
    logits.requires_grad_()
    stats = ours(logits, labels, backend, mask=mask)
    (stats.logprob + stats.entropy + stats.self_certainty).sum().backward()
    for stat in stats:
        assert (stat[~mask] == 0).all()
    assert (logits.grad[~mask] == 0).all()
    for got, want in zip(stats, plain(logits[mask], labels[mask]), strict=True):
        torch.testing.assert_close(got[mask], want)


@each_backend(OP)
def test_infinite_and_nan_logits(backend):
    logits = torch.randn(5, 300)
    logits[0, 7:] = -torch.inf  # a top-k mask
    logits[1, 3] = -torch.inf  # its label
    logits[2, 299] = torch.nan
    logits[3, :299] = -torch.inf  # certain
    labels = torch.tensor([2, 3, 0, 299, 5])
    logits.requires_grad_()
    stats = ours(logits, labels, backend)
    assert stats.entropy[[0, 1, 3, 4]].isfinite().all()
    assert stats.entropy[3].abs() < 1e-6
    assert stats.logprob[3].abs() < 1e-6
    assert stats.logprob[1] == -torch.inf
    assert (stats.self_certainty[[0, 1, 3]] == torch.inf).all()
    assert all(stat[2].isnan() and not stat[4].isnan() for stat in stats)
    torch.testing.assert_close(stats.logprob[0].detach(), torch.log_softmax(logits[0, :7].detach(), 0)[2])
    (stats.logprob[[0, 3, 4]].sum() + stats.entropy[[0, 1, 3, 4]].sum()).backward()
    keep = [0, 1, 3, 4]
    assert (logits.grad[keep][logits[keep] == -torch.inf] == 0).all()
    assert logits.grad[keep].isfinite().all()


EXTREME = {
    "equal": lambda noise: torch.full_like(noise, 3.0),
    "negative": lambda noise: torch.full_like(noise, -70.0),
    "huge": lambda noise: noise * 1e4,
    "offset": lambda noise: noise + 1e4,
    "peaked": lambda noise: torch.zeros_like(noise).index_fill(1, torch.tensor([0]), 50.0),
    "astronomic": lambda noise: noise * 1e30,
}


@each_backend(OP)
@pytest.mark.parametrize("case", EXTREME)
def test_extreme_logits(backend, case):
    logits = EXTREME[case](torch.randn(64, 100))
    labels = torch.tensor([0, 99]).repeat(32)
    truth = plain(logits.double(), labels)
    float32 = plain(logits, labels)
    for got, reference, true in zip(ours(logits, labels, backend), float32, truth, strict=True):
        assert_no_worse_than_plain(got, reference, true, floor=5e-7)


@each_backend(OP)
def test_many_labels_and_repeats(backend):
    logits = torch.randn(3, 200).requires_grad_()
    labels = torch.tensor([[0, 5, 5, 199]] * 3)
    got = logprobs_from_logits(logits, labels, backend=backend)
    want = torch.log_softmax(logits, -1).gather(-1, labels)
    torch.testing.assert_close(got, want)
    weights = torch.randn(3, 4)
    torch.testing.assert_close(*(torch.autograd.grad((x * weights).sum(), logits)[0] for x in (got, want)))


def test_a_label_outside_the_vocabulary_is_nan_in_its_row_alone():
    """As on a GPU, where nothing looks at the labels' values before."""
    logits, labels = torch.randn(4, 7), torch.tensor([[-1], [7], [2**31 - 1], [6]])
    logprob, *_ = definition.forward(logits, labels, None, 1.0, Wanted(True, True, True))
    assert logprob[:3].isnan().all()
    torch.testing.assert_close(logprob[3], logits.log_softmax(-1)[3, 6:])


@each_backend(OP)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides(backend, dtype):
    base = torch.randn(4, 6, 260).to(dtype)
    for logits in (base[:, ::2], base.transpose(0, 1), base[..., ::2], base[0, :1].expand(5, 260)):
        labels = torch.randint(0, logits.shape[-1], logits.shape[:-1])
        views = logits.detach().clone().requires_grad_(), logits.detach().requires_grad_()
        results = [ours(view, labels, backend) for view in views]
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)
        grads = [
            torch.autograd.grad(sum(stat.sum() for stat in stats), view)[0]
            for stats, view in zip(results, views, strict=True)
        ]
        assert torch.equal(*grads)


@each_backend(OP)
def test_temperature_per_row(backend):
    logits, labels = torch.randn(2, 3, 40), torch.randint(0, 40, (2, 3))
    temperature = torch.tensor([[0.5], [2.0]])
    got = ours(logits, labels, backend, temperature=temperature)
    for stat, want in zip(got, plain(logits, labels, temperature.unsqueeze(-1)), strict=True):
        torch.testing.assert_close(stat, want)


@each_backend(OP)
def test_inplace_backward_gives_the_same_gradient_in_the_same_memory(backend):
    leaf, labels = torch.randn(4, 90).requires_grad_(), torch.randint(0, 90, (4,))
    grads = []
    for inplace in (False, True):
        logits = leaf * 1.0
        place = logits.data_ptr()
        seen = []
        logits.register_hook(lambda grad, seen=seen: seen.append(grad.data_ptr()))
        stats = token_stats_from_logits(logits, labels, inplace_backward=inplace, backend=backend)
        grads.append(torch.autograd.grad(stats.logprob.sum() + stats.entropy.sum(), leaf)[0])
        assert (seen == [place]) == inplace
    assert torch.equal(*grads)


@each_backend(OP)
def test_same_bits_every_time_and_no_rows(backend):
    logits, labels = torch.randn(7, 6000), torch.randint(0, 6000, (7,))
    first, again = (ours(logits, labels, backend) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for rows in (1, 3):  # few rows are cut up differently
        few = ours(logits[:rows], labels[:rows], backend)
        assert all(torch.allclose(a[:rows], b, rtol=1e-6, atol=1e-6) for a, b in zip(first, few, strict=True))
    empty = torch.zeros(0, 5).requires_grad_()
    stats = ours(empty, torch.zeros(0, dtype=torch.int64), backend)
    sum(stat.sum() for stat in stats).backward()
    assert empty.grad.shape == (0, 5)


@hypothesis.settings(deadline=None, max_examples=25)
@hypothesis.given(
    rows=st.integers(1, 5), vocab=st.integers(1, 70), seed=st.integers(0, 999), scale=st.sampled_from([1e-3, 1.0, 30.0])
)
@pytest.mark.parametrize("backend", ["native", "triton"])
def test_agrees_with_the_reference_on_any_shape(backend, rows, vocab, seed, scale):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocab, generator=generator) * scale
    labels = torch.randint(0, vocab, (rows,), generator=generator)
    mask = torch.rand(rows, generator=generator) > 0.3
    results = []
    for name in ("reference", backend):
        x = logits.clone().requires_grad_()
        stats = ours(x, labels, name, mask=mask)
        results.append([*stats, torch.autograd.grad(sum(stat.sum() for stat in stats), x)[0]])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


def test_gradcheck_in_float64():
    logits = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 7, (2, 3))
    mask = torch.tensor([[True, True, False], [True, True, True]])
    torch.autograd.gradcheck(lambda x: tuple(ours(x, labels, "reference", mask=mask, temperature=0.7)), logits)


@each_backend(OP)
def test_opcheck(backend):
    logits, labels = torch.randn(3, 9, requires_grad=True), torch.randint(0, 9, (3, 1))
    mask = torch.tensor([True, False, True])
    for case in (
        (logits, labels, mask, None, 0.8, True, True, True, False, False, backend),
        (logits, None, None, torch.ones(3), 1.0, False, True, False, False, False, backend),
    ):
        torch.library.opcheck(token_stats_op, case)


@each_backend(OP)
def test_compiles_whole_and_recompiles_once(backend):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def function(logits, labels):
        stats = ours(logits, labels, backend)
        return stats.logprob.sum() + stats.entropy.sum() * 0.1

    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for rows in (4, 6, 9, 13):
        logits, labels = torch.randn(rows, 50).requires_grad_(), torch.randint(0, 50, (rows,))
        grads = [torch.autograd.grad(f(logits, labels), logits)[0] for f in (compiled, function)]
        torch.testing.assert_close(*grads)
    assert counter.frame_count <= 2


def test_second_derivative_is_refused():
    logits, labels = torch.randn(2, 9, requires_grad=True), torch.tensor([0, 1])
    stats = token_stats_from_logits(logits, labels)
    grad = torch.autograd.grad(stats.logprob.sum(), logits, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="first derivative only"):
        grad.sum().backward()


def test_familiar_names():
    logits, labels = torch.randn(2, 3, 11), torch.randint(0, 11, (2, 3))
    want = plain(logits, labels, 0.5)
    torch.testing.assert_close(logprobs_from_logits(logits, labels, temperature=0.5), want[0])
    torch.testing.assert_close(entropy_from_logits(logits, temperature=0.5), want[1])
    for got, each in zip(logprobs_and_entropy_from_logits(logits, labels, temperature=0.5), want, strict=False):
        torch.testing.assert_close(got, each)


GOOD = {"logits": torch.zeros(2, 5), "labels": torch.zeros(2, dtype=torch.int64)}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": [1.0]}, TypeError, "logits: expected a tensor, got list"),
        ({"logits": torch.zeros(2, 5, dtype=torch.int64)}, TypeError, "logits: expected dtype float32"),
        ({"logits": torch.zeros(2, 0)}, ValueError, r"logits: expected shape \(..., V\) with V >= 1, got \(2, 0\)"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, ValueError, r"labels: expected shape \(2,\) .* got \(3,\)"),
        ({"labels": torch.zeros(2)}, TypeError, "labels: expected dtype int32 or int64, got float32"),
        ({"labels": torch.tensor([0, 5])}, ValueError, r"labels: expected values in \[0, 5\) where the mask is True, got 5 at \[1\]"),
        ({"labels": torch.tensor([-1, 0])}, ValueError, r"got -1 at \[0\]"),
        ({"labels": None}, ValueError, 'labels: expected a tensor when stats has "logprob"'),
        ({"stats": ("logprobs",)}, ValueError, "stats: expected a tuple of names out of logprob, entropy, self_certainty"),
        ({"stats": ()}, ValueError, "stats: expected"),
        ({"stats": "entropy"}, ValueError, "stats: expected"),
        ({"temperature": 0.0}, ValueError, "temperature: expected more than 0.0, got 0.0"),
        ({"temperature": float("nan")}, ValueError, "temperature: expected a finite number"),
        ({"temperature": "hot"}, TypeError, "temperature: expected a number, got str"),
        ({"temperature": torch.ones(3)}, ValueError, r"temperature: expected a shape that broadcasts to \(2,\), got \(3,\)"),
        ({"temperature": torch.tensor([1.0, -1.0])}, ValueError, "temperature: expected finite numbers > 0, got -1"),
        ({"temperature": torch.ones(2, requires_grad=True)}, ValueError, "temperature: expected a tensor without requires_grad"),
        ({"mask": torch.ones(2)}, TypeError, "mask: expected dtype bool, got float32"),
        ({"mask": torch.ones(5, dtype=torch.bool)}, ValueError, r"mask: expected shape \(2,\), got \(5,\)"),
        ({"inplace_backward": 1}, TypeError, "inplace_backward: expected a bool"),
        ({"logits": torch.zeros(2, 5, requires_grad=True), "inplace_backward": True}, ValueError, "inplace_backward: expected logits that are"),
        ({"debug": None}, TypeError, "debug: expected a bool"),
        ({"backend": "cuda"}, ValueError, "backend: expected one of reference, native, triton, got 'cuda'"),
        ({"logits": torch.zeros(2, 5, dtype=torch.float64), "backend": "native"}, mgrpo_kernels.BackendUnavailable, "float64"),
    ],
)  # fmt: skip
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        token_stats_from_logits(**{**GOOD, **change})
