"""The fused head forms only the sums and gradient terms of the statistics that are asked for, and gives them as with all of them."""

import itertools
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from contract import assert_no_worse_than_plain, each_backend, on_ranks, poisoned_memory
from test_linear_token_stats import ALL, SMALL, make, plain, run

from mgrpo_kernels import _native, linear_policy_loss, linear_token_stats
from mgrpo_kernels.ops import _statistics
from mgrpo_kernels.ops._statistics import Wanted
from mgrpo_kernels.ops._triton import tuning
from mgrpo_kernels.ops.linear_token_stats import native, op, tiled, triton
from mgrpo_kernels.ops.linear_token_stats.op import OP, linear_token_stats_op
from mgrpo_kernels.ops.linear_token_stats.specs import Head
from mgrpo_kernels.ops.token_stats import token_stats_from_logits

SUBSETS = [names for size in (1, 2, 3) for names in itertools.combinations(ALL, size)]
OF_NAMES = pytest.mark.parametrize("names", SUBSETS, ids="+".join)
MASK = torch.arange(37) % 5 != 0


@pytest.fixture(autouse=True, scope="module")
def _extension():
    assert _native.missing() is None  # loads it


def of_names(names, stats):
    return [stat for name, stat in zip(ALL, stats, strict=True) if name in names]


def head_stats(names, labels, **options):
    """Return a function of hidden, weight and bias that gives these statistics, and checks that it gives no others."""

    def function(h, w, b):
        stats = linear_token_stats(h, w, labels if "logprob" in names else None, bias=b, stats=names, **options)
        assert [stat is not None for stat in stats] == [name in names for name in ALL]
        return of_names(names, stats)

    return function


def held_to_float64(got, names, tensors, labels, weights, **options):
    def masked(h, w, b):
        return [torch.where(MASK, stat, 0.0) for stat in of_names(names, plain(h, w, b, labels, **options))]

    truth = run(masked, [None if t is None else t.double() for t in tensors], weights)
    usual = run(masked, tensors, weights)
    for part, floor in ((0, 2e-6), (1, 1e-5)):
        for mine, theirs, true in zip(got[part], usual[part], truth[part], strict=True):
            assert_no_worse_than_plain(mine, theirs, true, floor=floor)


@each_backend(OP)
@pytest.mark.parametrize(
    ("dtype", "workspace", "options"),
    [
        (torch.float32, None, {}),
        (torch.float32, SMALL, {"softcap": 5.0, "logit_scale": -0.8, "temperature": 0.7}),
        (torch.bfloat16, None, {"temperature": 0.7}),
    ],
    ids=["plain, logits stored", "softcap, tiles", "bfloat16"],
)
@OF_NAMES
def test_each_subset_equals_the_definition(backend, dtype, options, workspace, names):
    *tensors, labels = make(dtype, bias="softcap" in options)
    weights = torch.randn(len(names), len(labels))
    with poisoned_memory():
        function = head_stats(names, labels, mask=MASK, backend=backend, workspace_bytes=workspace, **options)
        got = run(function, tensors, weights)
    held_to_float64(got, names, tensors, labels, weights, **options)


@each_backend(OP)
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}], ids=["plain", "softcap"])
def test_a_gradient_of_some_of_the_statistics_is_that_of_these_alone(backend, options):
    *tensors, labels = make(bias=True)
    weights = torch.randn(3, len(labels))
    for names in SUBSETS:
        one = head_stats(ALL, labels, mask=MASK, backend=backend, **options)
        got = run(lambda *leaves, one=one, names=names: of_names(names, one(*leaves)), tensors, weights[: len(names)])
        held_to_float64(got, names, tensors, labels, weights[: len(names)], **options)


@each_backend(OP)
def test_a_statistic_has_the_same_bits_whatever_else_is_asked_for(backend):
    *tensors, labels = make(bias=True, vocab=5000)
    every = linear_token_stats(*tensors[:2], labels, bias=tensors[2], stats=ALL, backend=backend)
    for names in SUBSETS:
        some = head_stats(names, labels, backend=backend)(*tensors)
        assert all(torch.equal(a, b) for a, b in zip(some, of_names(names, every), strict=True))


@each_backend(OP)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@OF_NAMES
def test_bad_logits_reach_every_statistic_that_is_asked_for(backend, value, names):
    h, w, b, labels = make(rows=6, bias=True)
    h[2, 0] = value
    w[:, 0] = 1.0
    for stat in head_stats(names, labels, backend=backend)(h, w, b):
        assert stat.isfinite().tolist() == [True, True, False, True, True, True]


@each_backend(OP)
@OF_NAMES
def test_impossible_logits_are_no_obstacle(backend, names):
    *tensors, labels = make(bias=True)
    tensors[2][::3] = -torch.inf
    labels = labels - (labels % 3 == 0).long() + 3 * (labels == 0).long()
    names = tuple(name for name in names if name != "self_certainty")  # infinite where a logit is -inf
    if not names:
        return
    h, w, b = (t.requires_grad_() for t in tensors)
    found = head_stats(names, labels, backend=backend)(h, w, b)
    grads = torch.autograd.grad(sum(stat.sum() for stat in found), [h, w, b])
    assert all(each.isfinite().all() for each in (*found, *grads))
    assert (grads[2][::3] == 0).all()


@each_backend(OP)
def test_the_op_gives_no_number_for_what_is_not_asked_for(backend):
    h, w, _, labels = make()
    h, w = h.requires_grad_(), w.requires_grad_()
    for mask in (None, MASK, torch.zeros(37, dtype=torch.bool)):
        for names in SUBSETS:
            of_labels = labels if "logprob" in names else None
            asked = "entropy" in names, "self_certainty" in names
            options = (1.0, 1.0, None, None, 0, None, torch.float32, None, None, *asked, True, None, False, backend)
            outputs = linear_token_stats_op(h, w, None, of_labels, mask, None, *options)
            for name, stat in zip(ALL, outputs, strict=False):
                assert stat.shape == ((37,) if name in names else (0,))
                assert stat.requires_grad == (name in names)


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_sums_that_are_not_wanted_are_nan_and_stay_so(backend):
    h, w, _, labels = make()
    head = Head(w, None, 0.7, 1.0, None, 0, SMALL)
    module = {"native": native, "triton": triton}[backend]
    for names in SUBSETS:
        wanted = Wanted(*(name in names for name in ALL))
        state = module.forward(h, head, labels if wanted.logprob else None, wanted)
        merged = _statistics.merge(torch.stack([state, state]))
        for each in (state, merged):
            for name, stat in zip(ALL, _statistics.finish(each, None), strict=False):
                assert stat.isnan().all() if name not in names else stat.isfinite().all()


@each_backend(OP)
def test_a_backward_pass_refuses_a_gradient_of_what_was_not_computed(backend):
    h, w, _, labels = make()
    ones = torch.ones(37)
    *_, logsumexp, vocab, ids, logits, counts, rest, stored = linear_token_stats_op(
        h, w, None, labels, None, None, 1.0, 1.0, None, None, 0, None, torch.float32, None, None, False, False, False, None, False, backend
    )  # fmt: skip
    head = (None, None, 1.0, 1.0, None, None, 0, None, torch.float32, None, None, None)
    saved = (logsumexp, vocab, ids, logits, counts, rest, stored, True, True, False, backend)
    backward = op.linear_token_stats_backward_op
    with pytest.raises(ValueError, match="entropy with grad_entropy"):
        backward(None, ones, None, h, w, None, labels, *head, None, *saved)
    with pytest.raises(ValueError, match="labels with grad_logprob"):
        backward(ones, None, None, h, w, None, None, *head, None, *saved)


# --------------------------------------------------------------------------------------- which kernel it is that runs


@pytest.fixture(params=["library", "fused"])
def launches(request):
    """The keyword arguments of Triton's launches, by kernel."""
    seen = {}

    def record(kernel, *args, **options):
        options.pop("enable_fp_fusion", None)
        seen.setdefault(kernel.__name__, []).append({k: v for k, v in options.items() if k.startswith("WANT")})

    sizes = tuning.Tuning(matmul=request.param)
    with (
        mock.patch.object(tuning, "of", return_value=sizes),
        mock.patch.object(triton, "FUSED_FROM", 1),
        mock.patch.object(triton, "launch", record),
    ):
        yield seen


def passes_asked(launches):
    """Return what the launches of the passes ask for, each once."""
    return {name: {tuple(each.values()) for each in found} for name, found in launches.items()}


@OF_NAMES
def test_triton_kernels_are_told_what_is_asked_for(launches, names):
    h, w, _, labels = make(torch.bfloat16)
    h, w = h.requires_grad_(), w.requires_grad_()
    found = head_stats(names, labels, backend="triton")(h, w, None)
    torch.autograd.grad(sum(stat.sum() for stat in found), [h, w])
    flags = "entropy" in names, "self_certainty" in names
    assert {"state_kernel", "gradient_kernel"} <= set(launches)
    assert passes_asked(launches) == {kernel: {flags} for kernel in launches}


@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
def test_the_fused_loss_asks_for_the_entropys_gradient_where_it_has_a_weight(launches, entropy_coef):
    h, w, _, labels = make(torch.bfloat16)
    offsets = torch.tensor([0, 20, 37])
    linear_policy_loss(
        h.requires_grad_(), w.requires_grad_(), labels, None, torch.tensor([1.0, -0.5]), cu_seqlens=offsets,
        entropy_coef=entropy_coef, backend="triton",
    )  # fmt: skip
    asked = passes_asked(launches)
    assert asked["state_kernel"] == {(True, False)}
    assert asked["gradient_kernel"] == {(entropy_coef != 0, False)}


def native_calls(run):
    """Return what the native passes were asked for: the last two arguments but for `top`."""
    seen = {"tile_state_": set(), "tile_gradient_": set()}
    ops = torch.ops.mgrpo_native
    real = {name: getattr(ops, name) for name in seen}

    def spy(name):
        def call(*args):
            seen[name].add(args[-2:])
            return real[name](*args)

        return call

    with mock.patch.multiple(ops, **{name: spy(name) for name in seen}):
        run()
    return seen


@OF_NAMES
def test_native_kernels_are_told_what_is_asked_for(names):
    h, w, _, labels = make()
    h, w = h.requires_grad_(), w.requires_grad_()

    def both():
        found = head_stats(names, labels, backend="native")(h, w, None)
        torch.autograd.grad(sum(stat.sum() for stat in found), [h, w])

    flags = "entropy" in names, "self_certainty" in names
    assert native_calls(both) == {"tile_state_": {flags}, "tile_gradient_": {flags}}


@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
def test_the_native_fused_loss_asks_for_the_entropys_gradient_where_it_has_a_weight(entropy_coef):
    h, w, _, labels = make()
    offsets, advantages = torch.tensor([0, 20, 37]), torch.tensor([1.0, -0.5])
    h, w = h.requires_grad_(), w.requires_grad_()
    calls = native_calls(
        lambda: linear_policy_loss(
            h, w, labels, None, advantages, cu_seqlens=offsets, entropy_coef=entropy_coef, backend="native"
        )
    )
    assert calls == {"tile_state_": {(True, False)}, "tile_gradient_": {(entropy_coef != 0, False)}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_native_kernels_neither_read_nor_write_what_is_not_wanted(dtype):
    x, labels = torch.randn(3, 5000).to(dtype), torch.tensor([0, 2500, 4999])
    head = Head(torch.zeros(5000, 1, dtype=dtype), None, 0.7, 1.0, None, 0, None)
    for wanted in (Wanted(*flags) for flags in itertools.product([True], [False, True], [False, True])):
        state = tiled.empty_state(3, x.device)
        for row, want in ((_statistics.SUM_EXPZ, wanted.entropy), (_statistics.SUM, wanted.self_certainty)):
            state[row] = 0.0 if want else 123.0
        native.CpuPasses(wanted).state(x, head, labels, state)
        assert (state[_statistics.SUM_EXPZ] == 123).all() != wanted.entropy
        assert (state[_statistics.SUM] == 123).all() != wanted.self_certainty
        coefficients = torch.ones(4, 3)
        coefficients[1] = 1.0 if wanted.entropy else torch.nan
        coefficients[2] = 1.0 if wanted.self_certainty else torch.nan
        out = torch.empty_like(x)
        native.CpuPasses(wanted).gradient(x, head, labels, coefficients, torch.full((3,), 10.0), out)
        want = _statistics.row_gradient(
            x.float() / 0.7, labels, coefficients.nan_to_num(nan=0.0), torch.full((3,), 10.0)
        )
        torch.testing.assert_close(out.float(), want / 0.7, rtol=1e-2 if dtype.itemsize == 2 else 1e-5, atol=1e-4)


@pytest.mark.parametrize("passes", [native.CpuPasses, triton.GpuPasses])
@pytest.mark.parametrize("which", range(4), ids=["alpha", "beta", "gamma", "delta"])
def test_a_row_of_one_coefficient_is_not_taken_for_a_masked_one(passes, which):
    x, labels = torch.randn(3, 300), torch.tensor([0, 150, 299])
    head = Head(torch.zeros(300, 1), None, 1.0, 1.0, None, 0, None)
    coefficients = torch.zeros(4, 3)
    coefficients[which] = torch.tensor([1.0, -2.0, 0.5])
    out = torch.empty_like(x)
    passes().gradient(x, head, labels, coefficients, x.logsumexp(-1), out)
    want = _statistics.row_gradient(x, labels, coefficients, x.logsumexp(-1))
    assert (want != 0).any(-1).all()
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------- other paths that must follow


@pytest.mark.parametrize("names", [("logprob",), ("logprob", "entropy")], ids="+".join)
def test_a_gradient_tolerance_is_kept_to_whatever_is_asked_for(names):
    h, w, _, labels = make(rows=20, hidden=32, vocab=2000)
    w = w * 3
    weights = torch.rand(len(names), 20)
    exact, got = (
        run(head_stats(names, labels, backend="native", gradient_tolerance=tolerance), [h, w, None], weights)
        for tolerance in (None, 2.0**-6)
    )
    assert all(torch.equal(a, b) for a, b in zip(exact[0], got[0], strict=True))
    assert not torch.equal(exact[1][1], got[1][1])  # something was left out
    for mine, true in zip(got[1], exact[1], strict=True):
        assert (mine - true).norm() < 2.0**-5 * true.norm()


@each_backend(OP)
@pytest.mark.parametrize("names", [("logprob",), ("entropy",), ("logprob", "self_certainty")], ids="+".join)
def test_compiled_calls_agree(backend, names):
    torch._dynamo.reset()
    h, w, _, labels = make(rows=9)
    function = head_stats(names, labels, backend=backend)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    weights = torch.randn(len(names), 9)
    for part_a, part_b in zip(run(function, [h, w, None], weights), run(compiled, [h, w, None], weights), strict=True):
        for a, b in zip(part_a, part_b, strict=True):
            torch.testing.assert_close(a, b)


@each_backend(OP)
def test_a_second_derivative_of_the_logprob_alone_is_an_error(backend):
    h, w, _, labels = make(rows=4)
    stat = linear_token_stats(h.requires_grad_(), w, labels, stats=("logprob",), backend=backend).logprob
    (grad,) = torch.autograd.grad(stat.sum(), h, create_graph=True)
    with pytest.raises(RuntimeError, match="expected a first derivative only"):
        grad.sum().backward()


def _rank(rank, path, backend, results):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    h, w, b, labels = make(bias=True)
    shard = slice(0, 300) if rank == 0 else slice(300, 701)
    found = {}
    for names in SUBSETS:
        function = head_stats(names, labels, mask=MASK, backend=backend, tp_group=dist.group.WORLD)
        found[names] = run(function, [h, w[shard], b[shard]], torch.ones(len(names), 37))
    results[rank] = found
    dist.destroy_process_group()


@each_backend(OP)
def test_shards_give_each_subset_as_one_rank_does(backend, tmp_path):
    with mp.Manager() as manager:
        results = manager.dict()
        on_ranks(2, _rank, str(tmp_path / "store"), backend, results)
        parts = [results[rank] for rank in range(2)]
    h, w, b, labels = make(bias=True)
    for names in SUBSETS:
        want = run(head_stats(names, labels, mask=MASK, backend=backend), [h, w, b], torch.ones(len(names), 37))
        (stats, grads), (_, other) = (part[names] for part in parts)
        for a, c in zip(stats, want[0], strict=True):
            torch.testing.assert_close(a, c, rtol=1e-5, atol=1e-5)
        whole = grads[0], torch.cat([grads[1], other[1]]), torch.cat([grads[2], other[2]])
        for a, c in zip(whole, want[1], strict=True):
            torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@OF_NAMES
def test_the_native_statistics_of_logits_have_the_same_bits_whatever_is_asked_for(dtype, names):
    logits = torch.randn(5, 5000).to(dtype)
    labels = torch.arange(5)
    every = token_stats_from_logits(logits, labels, stats=ALL, backend="native")
    some = token_stats_from_logits(logits, labels, stats=names, backend="native")
    for name in names:
        assert torch.equal(getattr(some, name), getattr(every, name))
