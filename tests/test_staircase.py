"""The backward pass over few entries on a GPU: what is listed of a row, which columns it is multiplied with, and that these are few."""

import contextlib
from unittest import mock

import pytest
import torch

from mgrpo_kernels import linear_token_stats
from mgrpo_kernels.ops import _statistics
from mgrpo_kernels.ops._statistics import EVERYTHING
from mgrpo_kernels.ops._triton import tuning
from mgrpo_kernels.ops.linear_token_stats import staircase, tiled, triton
from mgrpo_kernels.ops.linear_token_stats.specs import Entries, Head

V, WIDTH = 1500, 64
TOLERANCE = 2.0**-8


def sets_of(number, vocab, seed):
    """Return which columns each row needs ``(number, vocab)``: of one row all, of some none, and otherwise from one to many, often the same."""
    generator = torch.Generator().manual_seed(seed)
    frequency = (1.0 + torch.arange(vocab)).reciprocal()[torch.randperm(vocab, generator=generator)]
    reach = 10.0 ** (2.5 * torch.rand(number, 1, generator=generator))
    needs = torch.rand(number, vocab, generator=generator) < frequency * reach
    needs[::7] = False
    return needs


def least_of(needs):
    """Return what the kernel finds for these sets: the number of each row's columns, and the least number of each column's rows."""
    vocab = needs.shape[1]
    needed = needs.sum(-1)
    least = torch.where(needs, needed.unsqueeze(-1), vocab + 1).amin(0)
    return needed.int(), least.int()


@pytest.mark.parametrize("number", [1, 2, 5, 64, 700])
@pytest.mark.parametrize("outside", [False, True])
def test_every_row_is_multiplied_with_the_columns_that_it_needs(number, outside):
    needs = sets_of(number, V, number)
    needed, least = least_of(needs)
    if outside:
        needs[number // 2], needed[number // 2] = True, V + 1
        if number == 1:
            least[:] = V + 1
    stair = staircase.stair_of(needed, least)
    multiplied = torch.zeros_like(needs)
    for step in stair.steps:
        multiplied[stair.rows[: step.rows].unsqueeze(-1), stair.columns[step.columns]] = True
    assert multiplied[needs].all()
    assert not multiplied[needed == 0].any()
    assert multiplied.sum() == stair.products  # none twice
    assert [step.rows for step in stair.steps] == sorted((step.rows for step in stair.steps), reverse=True)
    assert sorted(stair.rows.tolist()) == list(range(number))
    assert sorted(stair.columns.tolist()) == list(range(V))


def test_a_stair_multiplies_a_fraction_more_than_the_needs_ask_for():
    number, vocab = 2000, 40_000
    needed, least = least_of(sets_of(number, vocab, 0))
    asked = sum(
        int((needed >= each).sum()) * int(count) for each, count in zip(*least.unique(return_counts=True), strict=True)
    )
    stair = staircase.stair_of(needed, least)
    assert asked <= stair.products <= 1.3 * asked < 0.6 * number * vocab
    assert 3 <= len(stair.steps) <= 4 * 12


def head_of(*, sharp, number=40, dtype=torch.float32, seed=0):
    """Return hidden, weight and labels. Sharp rows have a few likely tokens each, out of a hundred, before a tail that falls as a power."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(V, WIDTH, generator=generator)
    hidden = 0.02 * torch.randn(number, WIDTH, generator=generator)
    labels = torch.randint(0, 100, (number,), generator=generator)
    if sharp:
        weight[:, 0] = -(1.0 + torch.arange(V)).log()
        hidden[:, 0] = 4.0
        hidden[:, 1:] += 0.15 * weight[labels, 1:]
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels


@contextlib.contextmanager
def counted_work():
    """Count the logits whose gradient is formed, and watch which way the backward pass takes."""
    work, fill_gradient = [], triton.GpuPasses.fill_gradient

    def counting(self, x, *given):
        work.append(x.numel())
        return fill_gradient(self, x, *given)

    with (
        mock.patch.object(triton.GpuPasses, "fill_gradient", counting),
        mock.patch.object(staircase, "backward", side_effect=staircase.backward) as stairs,
    ):
        yield work, stairs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sharp_rows_multiply_few_columns(dtype):
    hidden, weight, labels = head_of(sharp=True, dtype=dtype)

    def run(tolerance):
        stats = linear_token_stats(
            hidden, weight, labels, gradient_tolerance=tolerance, backend="triton", workspace_bytes=2**16
        )
        with counted_work() as (work, stairs):
            grads = torch.autograd.grad(stats.logprob.sum() + 0.1 * stats.entropy.sum(), (hidden, weight))
        return grads, sum(work), stairs.call_count

    exact, *_ = run(None)
    grads, work, stairs = run(TOLERANCE)
    assert stairs == 1
    assert work <= 0.25 * len(labels) * V
    rounding = 0.02 if dtype == torch.bfloat16 else 1e-5
    for got, want in zip(grads, exact, strict=True):
        assert (got.double() - want.double()).norm() <= (TOLERANCE + rounding) * want.double().norm()
    assert (grads[1] == 0).all(-1).sum() > V / 2  # whole rows of the weight's gradient are left out


def test_flat_rows_take_the_dense_way():
    hidden, weight, labels = head_of(sharp=False)
    stats = linear_token_stats(hidden, weight, labels, gradient_tolerance=TOLERANCE, backend="triton")
    with counted_work() as (work, stairs):
        stats.logprob.sum().backward()
    assert sum(work) == len(labels) * V
    assert stairs.call_count == 0


def test_rows_without_a_gradient_are_not_multiplied():
    hidden, weight, labels = head_of(sharp=False)
    live = torch.arange(len(labels)) % 4 == 0
    stats = linear_token_stats(hidden, weight, labels, gradient_tolerance=TOLERANCE, backend="triton")
    with counted_work() as (work, _):
        (stats.logprob * live).sum().backward()
    assert sum(work) == live.sum() * V
    assert (hidden.grad[~live] == 0).all()


@pytest.mark.parametrize("room", [40, 300, V])
@pytest.mark.parametrize("rising", [False, True])
def test_what_is_not_listed_is_summed_up(room, rising):
    """A row whose list overflows gives up its smallest entries, those of earlier tiles too; none is lost and none counted twice."""
    generator = torch.Generator().manual_seed(room)
    z = torch.randn(6, V, generator=generator) * torch.tensor([0.01, 1.0, 3.0, 6.0, 9.0, 1.0]).unsqueeze(-1)
    z[5, V // 2] = 30.0
    z = z.sort(-1).values if rising else z
    labels = torch.tensor([0, V - 1, 3, 700, -1, V])
    head = Head(torch.zeros(V, 1), None, 1.0, 1.0, None, 0, None)
    entries, state = Entries.empty(6, room, z.device), tiled.empty_state(6, z.device)
    passes = triton.TopPasses(EVERYTHING, entries, 0, 1e-7)
    for columns in tiled.spans(V, 400):
        passes.state(z[:, columns].contiguous(), tiled.of_tile(head, slice(0, 6), columns), labels, state)
    for row, (count, (high, sum_exp, sum_expz, bound)) in enumerate(zip(entries.counts, entries.rest.t(), strict=True)):
        ids = entries.ids[row, 1:count].long()
        assert 1 <= count <= room
        assert (ids.diff() > 0).all()
        assert torch.equal(entries.logits[row, 1:count], z[row, ids])
        unlisted = torch.ones(V, dtype=torch.bool).index_fill(0, ids, False)
        assert (z[row, unlisted] <= bound).all()
        shifted = z[row, unlisted].double() - high
        torch.testing.assert_close(sum_exp.double(), shifted.exp().sum(), rtol=1e-4, atol=1e-30)
        torch.testing.assert_close(sum_expz.double(), (shifted.exp() * shifted).sum(), rtol=1e-4, atol=1e-30)
        label = labels[row].item()
        assert entries.ids[row, 0] == (label if 0 <= label < V else -1)
        if 0 <= label < V:
            assert entries.logits[row, 0] == z[row, label]
    assert entries.counts[5] > 1


def test_the_sums_of_all_that_is_not_listed_bound_the_selection():
    """One entry has p = 0.905, and 14 of probability e^-5 are not listed: they have most of the entropy's gradient."""
    entries = Entries.empty(1, 16, torch.device("cpu"))
    entries.logits[:], entries.counts[:] = 4.9, 2
    entries.rest[:] = torch.tensor([[0.0], [14.0], [0.0], [-1.0]])
    head = Head(torch.zeros(16, 1), None, 1.0, 1.0, None, 0, None)
    coefficients = torch.tensor([[0.0], [-1.0], [0.0], [0.0]])
    needed, least = triton.select(head, coefficients, torch.tensor([5.0]), 0.5, entries)
    assert needed.tolist() == [17]
    assert (least == 17).all()


def test_rows_that_are_sure_of_their_token_need_few_entries():
    """All other entries have a probability of 3e-10: less than a float32 sum resolves, but it is all the gradient that the row has."""
    z = -22.0 - 3.0 * (1.0 + torch.arange(V)).log().expand(4, V)
    labels = torch.tensor([0, 5, V // 2, V - 1])
    z = z.scatter(1, labels.unsqueeze(-1), 0.0)
    head = Head(torch.eye(V), None, 1.0, 1.0, None, 0, None)
    entries = Entries.empty(4, triton.entries_room(V), z.device)
    state = triton.sparse_forward(z, head, labels, EVERYTHING, TOLERANCE, entries)
    statistics = _statistics.finish(state, labels)
    coefficients = _statistics.gradient_coefficients(torch.ones(4), None, None, None, V, None, statistics.logsumexp)
    needed, _ = triton.select(head, coefficients, statistics.logsumexp, TOLERANCE, entries)
    assert (needed < 40).all()


def test_the_host_reads_the_device_once():
    """Everything but the sizes of the steps stays on the device."""
    hidden, weight, labels = (each.detach() for each in head_of(sharp=True))
    head = Head(weight, None, 1.0, 1.0, None, 0, None)
    entries = Entries.empty(len(labels), triton.entries_room(V), hidden.device)
    state = triton.sparse_forward(hidden, head, labels, EVERYTHING, TOLERANCE, entries)
    statistics = _statistics.finish(state, labels)
    ones = torch.ones(len(labels))
    coefficients = _statistics.gradient_coefficients(ones, None, None, None, V, None, statistics.logsumexp)
    reads, tolist = [], torch.Tensor.tolist

    def counting(tensor):
        reads.append(tensor.numel())
        return tolist(tensor)

    selected = triton.select(head, coefficients, statistics.logsumexp, TOLERANCE, entries)
    with (
        mock.patch.object(triton, "select", return_value=selected),
        mock.patch.object(
            triton.GpuPasses, "fill_gradient", lambda self, x, hidden, head, labels, c, lse, out: out.zero_()
        ),
        mock.patch.object(torch.Tensor, "tolist", counting),
        mock.patch.object(torch.Tensor, "item", side_effect=AssertionError("the host waits")),
        mock.patch.object(torch.Tensor, "nonzero", side_effect=AssertionError("the host waits")),
    ):
        triton.sparse_backward(
            hidden,
            head,
            labels,
            coefficients,
            statistics.logsumexp,
            (True, True, False),
            EVERYTHING,
            TOLERANCE,
            entries,
        )
    assert len(reads) == 1
    assert reads[0] <= 2 * 4 * 12


def test_a_huge_number_of_rows_keeps_to_the_workspace():
    """The rows of a step are cut where a few columns of all of them would not fit."""
    hidden, weight, labels = (each.detach() for each in head_of(sharp=True, number=3000))
    head = Head(weight, None, 1.0, 1.0, None, 0, 2**16)
    stair = staircase.Stair(
        torch.arange(3000), torch.arange(V), [staircase.Step(3000, slice(0, 64)), staircase.Step(10, slice(64, 128))]
    )
    made, make_workspace = [], tiled.make_workspace

    def recorded(*given):
        made.append(make_workspace(*given))
        return made[-1]

    class Ones(tiled.Passes):
        def fill_gradient(self, x, hidden, head, labels, coefficients, logsumexp, out):
            out.fill_(1.0)

    row = torch.ones(3000)
    with mock.patch.object(tiled, "make_workspace", recorded):
        grad, of_weight, _ = staircase.backward(
            hidden, head, labels, torch.ones(4, 3000), row, (True, True, False), Ones(), stair, 2**16
        )
    assert max(each.nbytes for each in made) <= 2**16
    torch.testing.assert_close(grad[10:], weight[:64].sum(0).expand(2990, -1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(of_weight[:64], hidden.sum(0).expand(64, -1), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(of_weight[64:128], hidden[:10].sum(0).expand(64, -1), rtol=1e-4, atol=1e-3)
    assert (of_weight[128:] == 0).all()


def test_the_sizes_of_the_list_are_those_of_the_documentation():
    assert triton.entries_room(152064) == 4096
    assert triton.entries_room(12_000) == 1001
    assert tuning.Tuning().workspace_bytes == 512 * 2**20
