"""The contract of the fused head's statistics, on every backend."""

import itertools

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from contract import assert_no_worse_than_plain, each_backend, on_ranks, poisoned_memory
from torch._dynamo.testing import CompileCounterWithBackend

from mgrpo_kernels import _native, linear_policy_loss, linear_token_stats
from mgrpo_kernels.ops import _rows, _statistics
from mgrpo_kernels.ops.linear_token_stats import native, tiled
from mgrpo_kernels.ops.linear_token_stats.op import OP, linear_token_stats_op
from mgrpo_kernels.ops.linear_token_stats.specs import Head

ALL = ("logprob", "entropy", "self_certainty")
SMALL = 2**16  # bytes of workspace: many tiles


def make(dtype=torch.float32, rows=37, hidden=16, vocab=701, *, bias=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(rows, hidden, generator=generator)
    w = torch.randn(vocab, hidden, generator=generator) * 0.5
    b = torch.randn(vocab, generator=generator) if bias else None
    labels = torch.randint(0, vocab, (rows,), generator=generator)
    return h.to(dtype), w.to(dtype), None if b is None else b.to(dtype), labels


def plain(hidden, weight, bias, labels, *, temperature=1.0, logit_scale=1.0, softcap=None):
    x = torch.nn.functional.linear(hidden, weight, bias)
    x = x if x.dtype == torch.float64 else x.float()
    y = x * logit_scale
    z = (y if softcap is None else softcap * torch.tanh(y / softcap)) / temperature
    logp = torch.log_softmax(z, -1)
    return logp.gather(-1, labels.unsqueeze(-1)).squeeze(-1), -(logp.exp() * logp).sum(-1), z.logsumexp(-1) - z.mean(-1)


def run(function, tensors, weights):
    """Return the statistics and the gradients of a weighted sum of them."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    stats = function(*leaves)
    loss = sum((stat * weight.to(stat.dtype)).sum() for stat, weight in zip(stats, weights, strict=True))
    return [stat.detach() for stat in stats], torch.autograd.grad(loss, [leaf for leaf in leaves if leaf is not None])


@each_backend(OP)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("bias", "options"),
    [
        (False, {}),
        (True, {"temperature": 0.7}),
        (False, {"softcap": 5.0, "logit_scale": 0.8}),
        (False, {"logit_scale": 0.3, "temperature": 1.2}),
        (False, {"logit_scale": -0.7}),
        (True, {"softcap": 3.0, "logit_scale": -1.2, "temperature": 1.5}),
    ],
)
@pytest.mark.parametrize("workspace", [None, SMALL])
def test_values_and_gradients(backend, dtype, bias, options, workspace):
    *tensors, labels = make(dtype, bias=bias)
    weights = torch.randn(3, labels.shape[0])
    truth = run(
        lambda h, w, b: plain(h, w, b, labels, **options), [None if t is None else t.double() for t in tensors], weights
    )
    usual = run(lambda h, w, b: plain(h, w, b, labels, **options), tensors, weights)
    with poisoned_memory():
        got = run(
            lambda h, w, b: linear_token_stats(
                h, w, labels, bias=b, stats=ALL, backend=backend, workspace_bytes=workspace, **options
            ),
            tensors,
            weights,
        )
    for mine, theirs, true in zip(got[0], usual[0], truth[0], strict=True):
        assert mine.dtype == torch.float32
        assert_no_worse_than_plain(mine, theirs, true, floor=2e-6)
    for mine, theirs, true in zip(got[1], usual[1], truth[1], strict=True):
        assert mine.dtype == dtype
        assert_no_worse_than_plain(mine, theirs, true, floor=1e-5)


def against_a_float32_head(backend, dtype, logits_dtype, options):
    """Return, for statistics and gradients, by how much the error against float64 exceeds that of a float32 head; logits reach 30."""
    bias = "softcap" not in options
    *tensors, labels = make(dtype, rows=50, hidden=64, vocab=900, bias=bias)
    tensors[1] = (tensors[1].float() * 2).to(dtype)
    weights = torch.randn(3, 50)

    def of_plain(wide):
        leaves = [None if t is None else t.to(wide) for t in tensors]
        return run(lambda h, w, b: plain(h, w, b, labels, **options), leaves, weights)

    truth, float32 = of_plain(torch.float64), of_plain(torch.float32)
    got = run(
        lambda h, w, b: linear_token_stats(
            h, w, labels, bias=b, stats=ALL, backend=backend, logits_dtype=logits_dtype, **options
        ),
        tensors,
        weights,
    )
    ratios = []
    for part in (0, 1):
        for mine, theirs, true in zip(got[part], float32[part], truth[part], strict=True):
            error, usual = ((each.double() - true).norm() / true.norm() for each in (mine, theirs.to(mine.dtype)))
            ratios.append((error / (usual + 2e-7)).item())
    return ratios


@each_backend(OP)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"softcap": 30.0, "logit_scale": -0.9}, {"temperature": 0.7}])
def test_the_logits_of_16_bit_operands_are_those_of_a_float32_head(backend, dtype, options):
    assert max(against_a_float32_head(backend, dtype, torch.float32, options)) < 2
    if dtype == torch.bfloat16:  # the bound would show logits that are rounded
        assert max(against_a_float32_head(backend, dtype, dtype, options)) > 100


@each_backend(OP)
def test_a_workspace_of_another_dtype_is_refused(backend):
    h, w, _, labels = make(torch.bfloat16)
    with pytest.raises(
        ValueError, match="logits_dtype: expected torch.float32 or hidden's dtype torch.bfloat16, got torch.float16"
    ):
        linear_token_stats(h, w, labels, logits_dtype=torch.float16, backend=backend)
    with pytest.raises(TypeError, match="logits_dtype: expected a torch.dtype, got str"):
        linear_token_stats(h, w, labels, logits_dtype="float32", backend=backend)


@each_backend(OP)
@pytest.mark.parametrize("need", [need for need in itertools.product([False, True], repeat=3) if any(need)])
def test_frozen_parts_get_nothing_and_change_nothing(backend, need):
    *tensors, labels = make(bias=True)

    def gradients(needed):
        leaves = [t.clone().requires_grad_(n) for t, n in zip(tensors, needed, strict=True)]
        h, w, b = leaves
        linear_token_stats(h, w, labels, bias=b, backend=backend).logprob.sum().backward()
        return [leaf.grad for leaf in leaves]

    whole, part = gradients((True, True, True)), gradients(need)
    for wanted, full, got in zip(need, whole, part, strict=True):
        assert (got is not None) == wanted
        assert got is None or torch.equal(full, got)


@each_backend(OP)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_blocks_of_rows(backend, dtype):
    *tensors, labels = make(dtype, rows=200, vocab=401, bias=True)
    weights = torch.randn(3, 200)
    truth = run(lambda h, w, b: plain(h, w, b, labels), [t.double() for t in tensors], weights)
    usual = run(lambda h, w, b: plain(h, w, b, labels), tensors, weights)
    got = run(
        lambda h, w, b: linear_token_stats(h, w, labels, bias=b, stats=ALL, backend=backend, workspace_bytes=SMALL),
        tensors,
        weights,
    )
    for part in (0, 1):
        for mine, theirs, true in zip(got[part], usual[part], truth[part], strict=True):
            assert_no_worse_than_plain(mine, theirs, true, floor=1e-5)


def test_a_native_tile_of_several_blocks_of_columns():
    """Wider than the library's own tiles: each block of 2048 columns has its own part of the bias."""
    assert _native.missing() is None
    x, bias, labels = torch.randn(3, 5000), torch.randn(5000), torch.tensor([0, 2500, 4999])
    head = Head(torch.zeros(5000, 1), bias, 0.7, 1.0, None, 0, None)
    state = tiled.empty_state(3, x.device)
    native.CpuPasses().state(x, head, labels, state)
    want = _statistics.finish(_statistics.row_state((x + bias) / 0.7, labels), labels)
    for got, each in zip(_statistics.finish(state, labels), want, strict=True):
        torch.testing.assert_close(got, each, rtol=1e-5, atol=1e-5)


@each_backend(OP)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_blocks_of_columns(backend, dtype):
    """Several tiles on the native backend, and several steps of a row in Triton's kernels."""
    *tensors, labels = make(dtype, rows=24, vocab=2 * 2048 + 100, bias=True)
    weights = torch.randn(3, 24)
    truth = run(lambda h, w, b: plain(h, w, b, labels), [t.double() for t in tensors], weights)
    usual = run(lambda h, w, b: plain(h, w, b, labels), tensors, weights)
    got = run(lambda h, w, b: linear_token_stats(h, w, labels, bias=b, stats=ALL, backend=backend), tensors, weights)
    for part in (0, 1):
        for mine, theirs, true in zip(got[part], usual[part], truth[part], strict=True):
            assert_no_worse_than_plain(mine, theirs, true, floor=1e-5)


@each_backend(OP)
@pytest.mark.parametrize("as_on_a_gpu", [False, True])  # where nobody knows how many rows are kept
def test_masked_rows_never_leak(backend, as_on_a_gpu, monkeypatch):
    if as_on_a_gpu:
        monkeypatch.setattr("mgrpo_kernels.ops._rows.can_read", lambda device: False)
        monkeypatch.setattr(
            native, "logits_room", lambda number, head: 0
        )  # its kernels never see stored logits of masked rows
    h, w, _, labels = make(rows=12)
    mask = torch.rand(12) > 0.4
    h[~mask] = torch.nan
    labels[~mask] = -100
    h, w = h.requires_grad_(), w.requires_grad_()
    stats = linear_token_stats(h, w, labels, stats=ALL, mask=mask, backend=backend)
    sum(stat.sum() for stat in stats).backward()
    assert all((stat[~mask] == 0).all() for stat in stats)
    assert (h.grad[~mask] == 0).all()
    want, (grad_h, grad_w) = run(
        lambda a, b, _: plain(a, b, None, labels[mask]), [h[mask], w, None], torch.ones(3, int(mask.sum()))
    )
    for got, each in zip(stats, want, strict=True):
        torch.testing.assert_close(got[mask], each)
    torch.testing.assert_close(h.grad[mask], grad_h, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(w.grad, grad_w, rtol=1e-4, atol=1e-5)


@each_backend(OP)
def test_rows_no_rows_and_all_masked(backend):
    for rows, mask in ((1, None), (0, None), (5, torch.zeros(5, dtype=torch.bool))):
        h, w, _, labels = make(rows=max(rows, 1))
        h, w, labels = h[:rows].clone().requires_grad_(), w.requires_grad_(), labels[:rows]
        stats = linear_token_stats(h, w, labels, mask=mask, backend=backend)
        (stats.logprob.sum() + stats.entropy.sum()).backward()
        assert stats.logprob.shape == (rows,)
        assert h.grad.isfinite().all()
        assert w.grad.isfinite().all()
        if rows != 1:
            assert (w.grad == 0).all()


@each_backend(OP)
def test_leading_dimensions_strides_and_temperature_per_row(backend):
    h, w, _, labels = make(rows=12)
    h, labels = h.view(3, 4, -1), labels.view(3, 4)
    temperature = torch.tensor([0.5, 1.0, 2.0]).unsqueeze(-1)
    want = plain(h, w, None, labels, temperature=temperature.unsqueeze(-1))
    got = linear_token_stats(h, w, labels, stats=ALL, temperature=temperature, backend=backend)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    strided = linear_token_stats(
        h.transpose(0, 1).contiguous().transpose(0, 1),
        w.t().contiguous().t(),
        labels,
        stats=ALL,
        temperature=temperature,
        backend=backend,
    )
    for a, b in zip(strided, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@each_backend(OP)
def test_same_bits_every_time(backend):
    h, w, _, labels = make()
    runs = [
        run(
            lambda a, b, _: linear_token_stats(a, b, labels, stats=ALL, backend=backend),
            [h, w, None],
            torch.ones(3, len(labels)),
        )
        for _ in range(2)
    ]
    for first, again in zip(runs[0][0] + list(runs[0][1]), runs[1][0] + list(runs[1][1]), strict=True):
        assert torch.equal(first, again)


@each_backend(OP)
def test_autocast_computes_in_its_dtype(backend):
    h, w, _, labels = make()
    h, w = h.requires_grad_(), w.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        got = linear_token_stats(h, w, labels, backend=backend)
    want = linear_token_stats(h.bfloat16(), w.bfloat16(), labels, backend=backend)
    assert torch.equal(got.logprob, want.logprob)
    got.logprob.sum().backward()
    assert h.grad.dtype == w.grad.dtype == torch.float32


def test_gradcheck_in_float64():
    h, w, b, labels = make(torch.float64, rows=3, hidden=4, vocab=9, bias=True)
    mask = torch.tensor([True, False, True])

    def function(h, w, b):
        return tuple(
            linear_token_stats(
                h, w, labels, bias=b, stats=ALL, softcap=2.0, logit_scale=0.9, temperature=1.1, mask=mask
            )
        )

    torch.autograd.gradcheck(function, [t.requires_grad_() for t in (h, w, b)])


@each_backend(OP)
def test_opcheck(backend):
    h, w, b, labels = make(rows=4, hidden=3, vocab=7, bias=True)
    h, w, b = (t.requires_grad_() for t in (h, w, b))
    some = torch.tensor([True, True, False, True])
    for mask, store, wanted, counts in (
        (some, False, ALL, (None, None)),
        (None, True, ALL, (None, None)),
        (some, True, ALL, (3, 3)),
        (some, False, ("logprob",), (3, None)),
        (None, False, ("entropy",), (None, None)),
        (some, False, ("logprob", "self_certainty"), (None, None)),
    ):
        of_labels = labels if "logprob" in wanted else None
        asked = "entropy" in wanted, "self_certainty" in wanted
        options = (0.9, 1.1, 5.0, None, 0, None, torch.float32, *counts, *asked, store, None, False, backend)
        torch.library.opcheck(linear_token_stats_op, (h, w, b, of_labels, mask, None, *options))


@each_backend(OP)
def test_compiles_whole_and_recompiles_once(backend):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def function(h, w, labels):
        stats = linear_token_stats(h, w, labels, backend=backend)
        return stats.logprob.sum() + stats.entropy.sum()

    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for rows in (4, 6, 9, 13):
        h, w, _, labels = make(rows=rows)
        h = h.requires_grad_()
        torch.testing.assert_close(*(torch.autograd.grad(f(h, w, labels), h)[0] for f in (compiled, function)))
    assert counter.frame_count <= 2


@pytest.mark.parametrize(("rows", "vocab"), [(64, 20000), (2000, 300)])
def test_16_bit_gradients_are_no_worse_than_plain_ones_over_many_tiles(rows, vocab):
    """Sums over tiles, of the vocabulary or of rows, must not round to bfloat16 more than one whole matmul does."""
    h, w, _, labels = make(torch.bfloat16, rows=rows, hidden=32, vocab=vocab)
    weights = torch.randn(3, rows)
    truth = run(lambda a, b, _: plain(a, b, None, labels), [h.double(), w.double(), None], weights)
    usual = run(lambda a, b, _: plain(a, b, None, labels), [h, w, None], weights)
    got = run(
        lambda a, b, _: linear_token_stats(a, b, labels, stats=ALL, backend="native", workspace_bytes=SMALL),
        [h, w, None],
        weights,
    )
    for mine, theirs, true in zip(got[1], usual[1], truth[1], strict=True):
        rms = [(x.double() - true).square().mean().sqrt().item() for x in (mine, theirs)]
        assert rms[0] <= 1.5 * rms[1]


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_several_blocks_of_rows_are_summed_in_float32(backend, monkeypatch):
    """An error that logits in bfloat16 hide from the test above: each block would round the sum once more."""
    h, w, _, labels = make(torch.bfloat16, rows=200, vocab=300)
    dtypes, accumulate = [], tiled.accumulate
    monkeypatch.setattr(
        tiled, "accumulate", lambda total, *rest, **how: dtypes.append(total.dtype) or accumulate(total, *rest, **how)
    )
    weight = w.requires_grad_()
    linear_token_stats(h, weight, labels, backend=backend, workspace_bytes=SMALL).logprob.sum().backward()
    assert len(dtypes) >= 4  # two blocks of rows and two of columns
    assert set(dtypes) == {torch.float32}


def test_a_label_outside_the_vocabulary_has_no_logprob():
    """On a GPU nobody looks before: an op on a CPU raises."""
    z = torch.randn(4, 9)
    labels = torch.tensor([0, -1, 9, 8])
    statistics = _statistics.finish(_statistics.row_state(z, labels), labels)
    assert statistics.logprob.isnan().tolist() == [False, True, True, False]
    assert not statistics.entropy.isnan().any()


def test_shards_whose_logits_are_all_impossible_merge():
    state = tiled.empty_state(2, torch.device("cpu"))
    state[_statistics.COUNT] = 3
    merged = _statistics.merge(torch.stack([state, state]))
    assert _statistics.finish(merged, None).logsumexp.tolist() == [-torch.inf, -torch.inf]


def test_the_native_workspace_keeps_to_its_bound():
    for size in (SMALL, 2**20, 2**24):
        shape = native.tile_shape(torch.float32).within(size, 4)
        assert shape.rows * shape.columns * 4 <= size
        assert shape.rows * shape.columns * 4 > size // 2 or shape == native.tile_shape(torch.float32)


def policy(hidden, weight, labels, **options):
    """A loss of two sequences on top of the head."""
    advantages, offsets = torch.tensor([1.0, -0.5]), torch.tensor([0, 20, len(labels)])
    return linear_policy_loss(hidden, weight, labels, None, advantages, cu_seqlens=offsets, **options).loss


def _rank(rank, world, path, backend, results):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    h, w, b, labels = make(bias=True)
    edges = [0, 300, 450, 701]  # uneven
    shard = slice(edges[rank], edges[rank + 1])
    mask = torch.arange(len(labels)) % 5 != 0
    counts: dict = {}
    for start in (None, edges[rank]):
        leaves = [t.clone().requires_grad_() for t in (h, w[shard], b[shard])]
        stats = linear_token_stats(
            leaves[0],
            leaves[1],
            labels,
            bias=leaves[2],
            stats=ALL,
            mask=mask,
            softcap=6.0,
            tp_group=dist.group.WORLD,
            vocab_start=start,
            backend=backend,
            **counts,
        )
        sum(stat.sum() * (i + 1) for i, stat in enumerate(stats)).backward()
        _rows.can_read = lambda device: False  # the second time as on a GPU: every rank gives the same count
        counts = {"unmasked_tokens": int(mask.sum()), "tokens_with_gradient": int(mask.sum())}
    loss = policy(leaves[0], leaves[1], labels, tp_group=dist.group.WORLD, backend=backend)
    results[rank] = [stat.detach() for stat in stats] + [leaf.grad for leaf in leaves] + [loss.detach()]
    results[rank] += list(torch.autograd.grad(loss, leaves[:2]))
    bad = labels.clone()
    bad[1] = 701
    try:
        linear_token_stats(h, w[shard], bad, tp_group=dist.group.WORLD, backend=backend)
    except ValueError as error:
        assert "[0, 701)" in str(error)  # noqa: PT017 - in another process
    else:
        raise AssertionError("a label outside the whole vocabulary must raise")
    dist.destroy_process_group()


@each_backend(OP)
def test_three_ranks_equal_one(backend, tmp_path):
    with mp.Manager() as manager:
        results = manager.dict()
        on_ranks(3, _rank, 3, str(tmp_path / "store"), backend, results)
        parts = [results[rank] for rank in range(3)]
    h, w, b, labels = make(bias=True)
    leaves = [t.clone().requires_grad_() for t in (h, w, b)]
    mask = torch.arange(len(labels)) % 5 != 0
    stats = linear_token_stats(
        leaves[0], leaves[1], labels, bias=leaves[2], stats=ALL, mask=mask, softcap=6.0, backend=backend
    )
    sum(stat.sum() * (i + 1) for i, stat in enumerate(stats)).backward()
    for part in parts:
        for got, want in zip(part[:3], stats, strict=True):
            torch.testing.assert_close(got, want.detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(part[3], leaves[0].grad, rtol=1e-4, atol=1e-5)
    for i in (4, 5):
        torch.testing.assert_close(torch.cat([part[i] for part in parts]), leaves[i - 3].grad, rtol=1e-4, atol=1e-5)

    loss = policy(leaves[0], leaves[1], labels, backend=backend)
    grad_hidden, grad_weight = torch.autograd.grad(loss, leaves[:2])
    for part in parts:
        torch.testing.assert_close(part[6], loss.detach())
        torch.testing.assert_close(part[7], grad_hidden, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(torch.cat([part[8] for part in parts]), grad_weight, rtol=1e-4, atol=1e-6)


GOOD = {"hidden": torch.zeros(2, 3), "weight": torch.zeros(5, 3), "labels": torch.zeros(2, dtype=torch.int64)}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"weight": torch.zeros(5, 4)},
            ValueError,
            r"weight: expected shape \(V, 3\) with V >= 1 to match hidden, got \(5, 4\)",
        ),
        ({"weight": torch.zeros(3)}, ValueError, r"weight: expected 2 dimension\(s\), got shape \(3,\)"),
        (
            {"weight": torch.zeros(5, 3).bfloat16()},
            TypeError,
            "weight: expected hidden's dtype torch.float32, got torch.bfloat16",
        ),
        ({"bias": torch.zeros(4)}, ValueError, r"bias: expected shape \(5,\), got \(4,\)"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, ValueError, r"labels: expected shape \(2,\), got \(3,\)"),
        (
            {"labels": torch.tensor([0, 5])},
            ValueError,
            r"labels: expected values in \[0, 5\) where the mask is True, got 5 at \[1\]",
        ),
        ({"labels": None}, ValueError, 'labels: expected a tensor when stats has "logprob"'),
        ({"softcap": 0.0}, ValueError, "softcap: expected more than 0.0, got 0.0"),
        ({"logit_scale": float("inf")}, ValueError, "logit_scale: expected a finite number, got inf"),
        ({"workspace_bytes": 10}, ValueError, "workspace_bytes: expected at least 65536, got 10"),
        ({"workspace_bytes": 1e8}, TypeError, "workspace_bytes: expected an int, got 100000000.0"),
        ({"vocab_start": 3}, ValueError, "vocab_start: expected None or 0 without a tp_group, got 3"),
        ({"stats": ("x",)}, ValueError, "stats: expected"),
        ({"temperature": -1}, ValueError, "temperature: expected more than 0"),
        ({"mask": torch.ones(2, 1, dtype=torch.bool)}, ValueError, r"mask: expected shape \(2,\), got \(2, 1\)"),
    ],
)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        linear_token_stats(**{**GOOD, **change})
