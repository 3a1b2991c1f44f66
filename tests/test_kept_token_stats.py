"""The contract of the fused head over kept sets, on every backend. The oracle is a softmax over all logits, -inf outside of the set."""

import itertools

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from contract import assert_no_worse_than_plain, each_backend, on_ranks, poisoned_memory, watch_memory
from torch._dynamo.testing import CompileCounterWithBackend

from mgrpo_kernels import backend as backends
from mgrpo_kernels import linear_policy_loss, linear_token_stats, policy_loss
from mgrpo_kernels.ops import kept_token_stats
from mgrpo_kernels.ops.kept_token_stats import OP, kept_token_stats_op, reference
from mgrpo_kernels.ops.kept_token_stats.specs import local_ids

ALL = ("logprob", "entropy", "self_certainty")
SMALL = 2**16  # bytes of workspace: several blocks of rows


def make(dtype=torch.float32, rows=19, hidden=70, vocab=131, most=11, *, bias=False, seed=0):
    """Return hidden, weight, bias, labels and kept sets of 1 to `most` ids in any order, some of them given twice, each with its label."""
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(rows, hidden, generator=generator)
    w = torch.randn(vocab, hidden, generator=generator) * 0.3
    b = torch.randn(vocab, generator=generator) if bias else None
    kept = torch.rand(rows, vocab, generator=generator).topk(most).indices
    kept[torch.rand(rows, most, generator=generator) < 0.3] = -1
    labels = torch.randint(0, vocab, (rows,), generator=generator)
    kept[::3, 1] = labels[::3]
    kept[:, 2] = labels
    kept = kept.gather(1, torch.rand(rows, most, generator=generator).argsort(-1))
    return h.to(dtype), w.to(dtype), None if b is None else b.to(dtype), labels, kept


def in_set(kept, vocab):
    """Return which entries of the vocabulary each row keeps, ``(N, V)``."""
    return (kept.unsqueeze(-1) == torch.arange(vocab)).any(-2)


def plain(hidden, weight, bias, labels, kept, *, temperature=1.0, logit_scale=1.0, softcap=None):
    x = torch.nn.functional.linear(hidden, weight, bias)
    x = x if x.dtype == torch.float64 else x.float()
    y = x * logit_scale
    z = (y if softcap is None else softcap * torch.tanh(y / softcap)) / temperature
    there = in_set(kept, weight.shape[0])
    logp = torch.log_softmax(z.masked_fill(~there, -torch.inf), -1)
    entropy = -(logp.exp() * logp.masked_fill(~there, 0.0)).sum(-1)
    mean = z.masked_fill(~there, 0.0).sum(-1) / there.sum(-1)
    logsumexp = z.masked_fill(~there, -torch.inf).logsumexp(-1)
    return logp.gather(-1, labels.unsqueeze(-1)).squeeze(-1), entropy, logsumexp - mean


def run(function, tensors, weights):
    """Return the statistics and the gradients of a weighted sum of them."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    stats = function(*leaves)
    loss = sum((stat * weight.to(stat.dtype)).sum() for stat, weight in zip(stats, weights, strict=True))
    return [stat.detach() for stat in stats], torch.autograd.grad(loss, [leaf for leaf in leaves if leaf is not None])


def fused(labels, kept, **options):
    return lambda h, w, b: linear_token_stats(h, w, labels, bias=b, kept=kept, stats=ALL, **options)


@each_backend(OP)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("bias", "options"),
    [
        (False, {}),
        (True, {"temperature": 0.7}),
        (False, {"softcap": 5.0, "logit_scale": 0.8}),
        (True, {"softcap": 3.0, "logit_scale": -1.2, "temperature": 1.5}),
    ],
)
@pytest.mark.parametrize("workspace", [None, SMALL])
def test_values_and_gradients(backend, dtype, bias, options, workspace):
    """16-bit operands too: against a head that was cast to float32, since products and sums are float32."""
    *tensors, labels, kept = make(dtype, bias=bias)
    weights = torch.randn(3, labels.shape[0])

    def of_plain(wide):
        leaves = [None if t is None else t.to(wide) for t in tensors]
        return run(lambda h, w, b: plain(h, w, b, labels, kept, **options), leaves, weights)

    truth, usual = of_plain(torch.float64), of_plain(torch.float32)
    with poisoned_memory():
        got = run(fused(labels, kept, workspace_bytes=workspace, backend=backend, **options), tensors, weights)
    for mine, theirs, true in zip(got[0], usual[0], truth[0], strict=True):
        assert mine.dtype == torch.float32
        assert_no_worse_than_plain(mine, theirs, true, floor=2e-6)
    for mine, theirs, true in zip(got[1], usual[1], truth[1], strict=True):
        assert mine.dtype == dtype
        assert_no_worse_than_plain(mine, theirs.to(dtype), true, floor=1e-5)


@each_backend(OP)
def test_many_tokens_of_one_entry_and_many_entries_of_one_token(backend):
    """Every token keeps entry 7, and a token keeps up to 400: sums of several blocks of the kernels, in float32."""
    rows, most = (40, 20) if backend == "triton" else (600, 400)  # the interpreter is slow
    h, w, _, labels, kept = make(torch.bfloat16, rows=rows, hidden=40, vocab=most + 50, most=most)
    kept[:, 0] = 7
    labels = kept[:, 0].clone()
    weights = torch.randn(3, rows)
    leaves = [h.double(), w.double(), None]
    truth = run(lambda a, b, _: plain(a, b, None, labels, kept), leaves, weights)
    usual = run(lambda a, b, _: plain(a, b, None, labels, kept), [h.float(), w.float(), None], weights)
    got = run(fused(labels, kept, backend=backend), [h, w, None], weights)
    for part in (0, 1):
        for mine, theirs, true in zip(got[part], usual[part], truth[part], strict=True):
            assert_no_worse_than_plain(mine, theirs.to(mine.dtype), true, floor=2e-6)


@each_backend(OP)
def test_order_repetition_and_dtype_of_the_ids_change_nothing(backend):
    h, w, _, labels, kept = make()
    weights = torch.ones(3, len(labels))
    sets = [sorted(set(row.tolist()) - {-1}) for row in kept]
    plain_ids = torch.tensor([row + [-1] * (11 - len(row)) for row in sets])
    doubled = torch.cat([plain_ids.flip(1), plain_ids], 1).int()
    runs = [run(fused(labels, ids, backend=backend), [h, w, None], weights) for ids in (kept, plain_ids, doubled)]
    for other in runs[1:]:
        for mine, theirs in zip([*runs[0][0], *runs[0][1]], [*other[0], *other[1]], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@each_backend(OP)
def test_the_whole_vocabulary_as_the_set_gives_the_statistics_of_the_head(backend):
    h, w, b, labels, _ = make(bias=True)
    kept, weights = torch.arange(131).expand(19, -1), torch.randn(3, 19)
    got, want = (run(fused(labels, ids, backend=backend, softcap=6.0), [h, w, b], weights) for ids in (kept, None))
    for part in (0, 1):
        for mine, theirs in zip(got[part], want[part], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@each_backend(OP)
def test_masked_rows_and_rows_of_the_weight_that_nobody_keeps_never_leak(backend):
    h, w, _, labels, kept = make(rows=12)
    mask = torch.rand(12) > 0.4
    kept[kept == 0] = -1
    labels[labels == 0] = 1
    kept = torch.cat([kept, labels.unsqueeze(-1)], 1)
    h[~mask], labels[~mask], kept[~mask, 0] = torch.nan, -100, 10**9
    kept_by_none = ~in_set(kept[mask], 131).any(0)
    assert kept_by_none[0]
    w[kept_by_none] = torch.nan
    h, w = h.requires_grad_(), w.requires_grad_()
    with poisoned_memory():
        stats = linear_token_stats(h, w, labels, stats=ALL, mask=mask, kept=kept, backend=backend)
        sum(stat.sum() for stat in stats).backward()
    assert all((stat[~mask] == 0).all() for stat in stats)
    assert (h.grad[~mask] == 0).all()
    assert (w.grad[kept_by_none] == 0).all()
    clean = torch.where(kept_by_none.unsqueeze(-1), 0.0, w.detach())
    want, (grad_h, grad_w) = run(
        lambda a, b, _: plain(a, b, None, labels[mask], kept[mask]),
        [h[mask], clean, None],
        torch.ones(3, int(mask.sum())),
    )
    for got, each in zip(stats, want, strict=True):
        torch.testing.assert_close(got[mask], each, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(h.grad[mask], grad_h, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(w.grad, grad_w, rtol=1e-4, atol=1e-5)


@each_backend(OP)
def test_a_label_outside_its_set_and_an_empty_set_are_nan_in_their_rows_alone(backend):
    h, w, _, labels, kept = make(rows=6)
    kept[kept == 5], labels[1] = 6, 5
    kept[2] = -1
    h, w = h.requires_grad_(), w.requires_grad_()
    stats = linear_token_stats(h, w, labels, stats=ALL, kept=kept, backend=backend)
    assert stats.logprob.isnan().tolist() == [False, True, True, False, False, False]
    for stat in stats[1:]:
        assert stat.isnan().tolist() == [False, False, True, False, False, False]
    entropy = linear_token_stats(h, w, None, stats=("entropy",), kept=kept, backend=backend, debug=True).entropy
    grad_h, grad_w = torch.autograd.grad(entropy.sum(), (h, w))
    assert bool(grad_h.isfinite().all())
    assert bool(grad_w.isfinite().all())
    assert bool((grad_h[2] == 0).all())
    message = r"labels: expected an id that the token's row of `kept` holds, where the mask is True, got 5 at \[1\]"
    with pytest.raises(ValueError, match=message):
        linear_token_stats(h, w, labels, kept=kept, backend=backend, debug=True)
    mask = torch.tensor([True, False, False, True, True, True])
    masked = linear_token_stats(h, w, labels, kept=kept, mask=mask, backend=backend, debug=True)
    assert bool(masked.logprob.isfinite().all())


@each_backend(OP)
@pytest.mark.parametrize("bad", [131, -2, 2**31 - 1])
def test_an_id_outside_the_vocabulary_raises_on_a_cpu_and_is_nan_elsewhere(backend, bad, monkeypatch):
    h, w, _, labels, kept = make(rows=5)
    kept[3, 4] = bad
    labels[3] = kept[3][(kept[3] >= 0) & (kept[3] < 131)][0]
    for ids in (kept, kept.int()):
        message = rf"kept: expected values in \[0, 131\), or -1 .*, got {bad} at \[3, 4\]"
        with pytest.raises(ValueError, match=message):
            linear_token_stats(h, w, labels, kept=ids, backend=backend)
        linear_token_stats(h, w, labels, kept=ids, mask=torch.arange(5) != 3, backend=backend)
    monkeypatch.setattr(kept_token_stats, "_check_values", lambda *args, **options: None)  # as on a GPU
    stats = linear_token_stats(h.requires_grad_(), w, labels, kept=kept, stats=ALL, backend=backend)
    for stat in stats:
        assert stat.isnan().tolist() == [False, False, False, True, False]
    assert torch.autograd.grad(stats.entropy.sum(), h)[0].isnan().any(-1).tolist() == [False, False, False, True, False]


def test_ids_near_the_ends_of_their_dtype_are_no_ids_of_a_shard():
    for dtype in (torch.int32, torch.int64):
        ends = torch.tensor([[torch.iinfo(dtype).min, torch.iinfo(dtype).max, -1, 300, 301, 302]], dtype=dtype)
        assert local_ids(ends, None, 300, 2).tolist() == [[-1, -1, -1, -1, 0, 1]]


@each_backend(OP)
def test_an_impossible_entry_of_the_set_counts_as_probability_0(backend):
    h, w, b, labels, kept = make(rows=4, bias=True)
    other = next(each for each in kept[0].tolist() if each not in (-1, labels[0].item()))
    b[other] = -torch.inf
    h, w, b = (each.requires_grad_() for each in (h, w, b))
    stats = linear_token_stats(h, w, labels, bias=b, kept=kept, stats=ALL, backend=backend)
    without = kept.clone()
    without[0][without[0] == other] = -1
    want = linear_token_stats(h, w, labels, bias=b, kept=without, stats=ALL, backend=backend)
    torch.testing.assert_close(stats.logprob, want.logprob)
    torch.testing.assert_close(stats.entropy, want.entropy)
    assert stats.self_certainty[0] == torch.inf
    gradients = torch.autograd.grad(stats.logprob.sum() + stats.entropy.sum(), (h, w, b))
    assert all(bool(each.isfinite().all()) for each in gradients)
    labels[0] = other
    assert linear_token_stats(h, w, labels, bias=b, kept=kept, backend=backend).logprob[0] == -torch.inf


@each_backend(OP)
@pytest.mark.parametrize("need", [need for need in itertools.product([False, True], repeat=3) if any(need)])
def test_frozen_parts_get_nothing_and_change_nothing(backend, need, monkeypatch):
    *tensors, labels, kept = make(bias=True)
    module = kept_token_stats.backends.implementation(OP, backend)
    calls = []
    for name in ("hidden_gradient", "weight_gradient"):
        kernel = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, name=name, kernel=kernel: calls.append(name) or kernel(*a))

    def gradients(needed):
        h, w, b = (t.clone().requires_grad_(n) for t, n in zip(tensors, needed, strict=True))
        linear_token_stats(h, w, labels, bias=b, kept=kept, backend=backend).logprob.sum().backward()
        return [leaf.grad for leaf in (h, w, b)]

    whole = gradients((True, True, True))
    calls.clear()
    for wanted, full, got in zip(need, whole, gradients(need), strict=True):
        assert (got is not None) == wanted
        assert got is None or torch.equal(full, got)
    assert calls == ["hidden_gradient"] * need[0] + ["weight_gradient"] * (need[1] or need[2])


@each_backend(OP)
def test_leading_dimensions_strides_and_temperature_per_row(backend):
    h, w, _, labels, kept = make(rows=12)
    h, labels, kept = h.view(3, 4, -1), labels.view(3, 4), kept.view(3, 4, -1)
    temperature = torch.tensor([0.5, 1.0, 2.0]).unsqueeze(-1)
    want = plain(h, w, None, labels, kept, temperature=temperature.unsqueeze(-1))
    strided = (
        h.transpose(0, 1).contiguous().transpose(0, 1),
        w.t().contiguous().t(),
        labels,
        kept.transpose(0, 2).contiguous().transpose(0, 2),
    )
    for hidden, weight, label, ids in ((h, w, labels, kept), strided):
        got = linear_token_stats(hidden, weight, label, kept=ids, stats=ALL, temperature=temperature, backend=backend)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@each_backend(OP)
def test_no_rows_and_all_masked(backend):
    for rows, mask in ((0, None), (5, torch.zeros(5, dtype=torch.bool))):
        h, w, _, labels, kept = make(rows=max(rows, 1))
        h, w = h[:rows].clone().requires_grad_(), w.requires_grad_()
        stats = linear_token_stats(h, w, labels[:rows], kept=kept[:rows], mask=mask, backend=backend)
        (stats.logprob.sum() + stats.entropy.sum()).backward()
        assert stats.logprob.shape == (rows,)
        assert (h.grad == 0).all()
        assert (w.grad == 0).all()


@each_backend(OP)
@pytest.mark.parametrize("threads", [1, 2])
def test_same_bits_every_time(backend, threads):
    h, w, b, labels, kept = make(torch.bfloat16, bias=True)
    before = torch.get_num_threads()
    try:
        runs = []
        for count in (threads, threads, 1):
            torch.set_num_threads(count)
            runs.append(run(fused(labels, kept, backend=backend), [h, w, b], torch.ones(3, len(labels))))
    finally:
        torch.set_num_threads(before)
    for again in runs[1:]:
        for first, second in zip([*runs[0][0], *runs[0][1]], [*again[0], *again[1]], strict=True):
            assert torch.equal(first, second)


@each_backend(OP)
def test_autocast_computes_in_its_dtype(backend):
    h, w, _, labels, kept = make()
    h, w = h.requires_grad_(), w.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        got = linear_token_stats(h, w, labels, kept=kept, backend=backend)
    want = linear_token_stats(h.bfloat16(), w.bfloat16(), labels, kept=kept, backend=backend)
    assert torch.equal(got.logprob, want.logprob)
    got.logprob.sum().backward()
    assert h.grad.dtype == w.grad.dtype == torch.float32


@each_backend(OP)
def test_logits_in_16_bits_are_rounded_once_before_the_bias(backend):
    h, w, b, labels, kept = make(torch.bfloat16, bias=True)
    stats = linear_token_stats(h, w, labels, bias=b, kept=kept, logits_dtype=torch.bfloat16, backend=backend)
    x = (h.float() @ w.float().t()).bfloat16().float() + b.float()
    logp = x.masked_fill(~in_set(kept, 131), -torch.inf).log_softmax(-1)
    rounded = logp.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    exact = linear_token_stats(h, w, labels, bias=b, kept=kept, backend=backend).logprob
    assert (stats.logprob - rounded).abs().mean() < 0.1 * (exact - rounded).abs().mean()  # a few sums round another way


def test_gradcheck_in_float64():
    h, w, b, labels, kept = make(torch.float64, rows=3, hidden=4, vocab=9, most=5, bias=True)
    mask = torch.tensor([True, False, True])
    options = {"softcap": 2.0, "logit_scale": 0.9, "temperature": 1.1, "mask": mask}
    torch.autograd.gradcheck(
        lambda h, w, b: tuple(fused(labels, kept, **options)(h, w, b)), [t.requires_grad_() for t in (h, w, b)]
    )


@each_backend(OP)
def test_opcheck(backend):
    h, w, b, labels, kept = make(rows=4, hidden=3, vocab=7, most=5, bias=True)
    h, w, b = (t.requires_grad_() for t in (h, w, b))
    mask = torch.tensor([True, True, False, True])
    torch.library.opcheck(
        kept_token_stats_op,
        (h, w, b, labels, mask, None, kept, 0.9, 1.1, 5.0, None, 0, None, torch.float32, False, backend),
    )


@each_backend(OP)
def test_compiles_whole_and_recompiles_once(backend):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def function(h, w, labels, kept):
        stats = linear_token_stats(h, w, labels, kept=kept, backend=backend)
        return stats.logprob.sum() + stats.entropy.sum()

    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for rows in (4, 6, 9, 13):
        h, w, _, labels, kept = make(rows=rows)
        h = h.requires_grad_()
        torch.testing.assert_close(*(torch.autograd.grad(f(h, w, labels, kept), h)[0] for f in (compiled, function)))
    assert counter.frame_count <= 2


# ------------------------------------------------------------------------------------------------------------- memory


PER_ENTRY = 4 + 4 + 4 + 8 + 8 + 4  # logits, their gradient, ids; while sorting, indices and copies of the ids
PER_TOKEN = 40 * 16 + 64  # gradients of hidden, statistics


@each_backend(OP)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_is_the_workspace_and_a_few_numbers_for_each_kept_entry(backend, dtype):
    """N x V logits, and gathered rows (N, K, H), would be several times as large as what is allowed."""
    width, vocab, most = 256, 20000 if backend != "triton" else 1000, 32  # the interpreter is slow
    workspace = max(SMALL, reference.COPIES * most * width * 4) if backend == "reference" else SMALL
    for rows in (32, 96):
        h, w, _, labels, kept = make(dtype, rows=rows, hidden=width, vocab=vocab, most=most)
        h, w = h.requires_grad_(), w.requires_grad_()
        allowed = workspace + rows * (PER_ENTRY * 4 * most + 8 * width + 64) + 8192
        with watch_memory() as memory:
            stats = linear_token_stats(h, w, labels, kept=kept, stats=ALL, backend=backend, workspace_bytes=SMALL)
        assert memory.peak <= allowed, f"{memory.peak} bytes, allowed {allowed}"
        loss = sum(stat.sum() for stat in stats)
        with watch_memory() as memory:
            loss.backward()
        gradient = vocab * width * (dtype.itemsize + (4 if backend == "reference" and dtype.itemsize == 2 else 0))
        allowed += gradient + (8 * (vocab + 1) + 4 * vocab if backend != "reference" else 0)
        assert memory.peak <= allowed, f"{memory.peak} bytes, allowed {allowed}"


# -------------------------------------------------------------------------------------------------- ranks, and the loss


def policy(hidden, weight, labels, kept, **options):
    advantages, offsets = torch.tensor([1.0, -0.5]), torch.tensor([0, 8, len(labels)])
    return linear_policy_loss(
        hidden, weight, labels, None, advantages, kept=kept, cu_seqlens=offsets, entropy_coef=0.1, **options
    ).loss


def _rank(rank, world, path, backend, results):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    h, w, b, labels, kept = make(bias=True)
    kept[5] = -1
    kept[5, 0] = labels[5]  # the others have nothing of it
    edges = [0, 50, 70, 131]  # uneven
    shard = slice(edges[rank], edges[rank + 1])
    mask = torch.arange(len(labels)) % 5 != 1
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
            kept=kept,
            tp_group=dist.group.WORLD,
            vocab_start=start,
            backend=backend,
        )
        sum(stat.sum() * (i + 1) for i, stat in enumerate(stats)).backward()
    loss = policy(leaves[0], leaves[1], labels, kept, tp_group=dist.group.WORLD, backend=backend)
    results[rank] = [stat.detach() for stat in stats] + [leaf.grad for leaf in leaves] + [loss.detach()]
    results[rank] += list(torch.autograd.grad(loss, leaves[:2]))
    bad = kept.clone()
    bad[2, 1] = 131
    with pytest.raises(ValueError, match=r"kept: expected values in \[0, 131\)"):
        linear_token_stats(h, w[shard], labels, kept=bad, tp_group=dist.group.WORLD, backend=backend)
    dist.destroy_process_group()


@each_backend(OP)
def test_three_ranks_equal_one(backend, tmp_path):
    with mp.Manager() as manager:
        results = manager.dict()
        on_ranks(3, _rank, 3, str(tmp_path / "store"), backend, results)
        parts = [results[rank] for rank in range(3)]
    h, w, b, labels, kept = make(bias=True)
    kept[5] = -1
    kept[5, 0] = labels[5]
    leaves = [t.clone().requires_grad_() for t in (h, w, b)]
    mask = torch.arange(len(labels)) % 5 != 1
    stats = linear_token_stats(
        leaves[0], leaves[1], labels, bias=leaves[2], stats=ALL, mask=mask, softcap=6.0, kept=kept, backend=backend
    )
    sum(stat.sum() * (i + 1) for i, stat in enumerate(stats)).backward()
    loss = policy(leaves[0], leaves[1], labels, kept, backend=backend)
    grad_hidden, grad_weight = torch.autograd.grad(loss, leaves[:2])
    whole = [*(stat.detach() for stat in stats), leaves[0].grad, None, None, loss.detach(), grad_hidden]
    for part in parts:
        for got, want in zip(part, whole, strict=False):
            assert want is None or torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5) is None
    for i, want in ((4, leaves[1].grad), (5, leaves[2].grad), (8, grad_weight)):
        torch.testing.assert_close(torch.cat([part[i] for part in parts]), want, rtol=1e-4, atol=1e-5)


@each_backend(OP)
def test_the_policy_loss_is_that_of_the_statistics(backend):
    h, w, _, labels, kept = make(rows=20)
    h, labels, kept = h.view(2, 10, -1), labels.view(2, 10), kept.view(2, 10, -1)
    advantages, old = torch.tensor([1.0, -0.5]), torch.full((2, 10), -2.0)
    mask = torch.rand(2, 10) > 0.3
    losses = []
    for direct in (True, False):
        leaves = [each.clone().requires_grad_() for each in (h, w)]
        options = {"mask": mask, "entropy_coef": 0.2, "loss_type": "dapo", "backend": backend}
        if direct:
            result = linear_policy_loss(*leaves, labels, old, advantages, kept=kept, temperature=0.8, **options)
        else:
            stats = linear_token_stats(*leaves, labels, kept=kept, mask=mask, temperature=0.8, backend=backend)
            result = policy_loss(stats.logprob, old, advantages, entropy=stats.entropy, **options)
        losses.append((result.loss.detach(), result.metrics["entropy_sum"], *torch.autograd.grad(result.loss, leaves)))
    for mine, theirs in zip(*losses, strict=True):
        torch.testing.assert_close(mine, theirs)


GOOD = {
    "hidden": torch.zeros(2, 3),
    "weight": torch.zeros(5, 3),
    "labels": torch.zeros(2, dtype=torch.int64),
    "kept": torch.zeros(2, 4, dtype=torch.int32),
}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"kept": torch.zeros(2, 4)}, TypeError, "kept: expected dtype int32 or int64, got float32"),
        ({"kept": torch.zeros(3, 4).int()}, ValueError, r"kept: expected shape \(2, K\) with K >= 1, got \(3, 4\)"),
        ({"kept": torch.zeros(2, 0).int()}, ValueError, r"kept: expected shape \(2, K\) with K >= 1, got \(2, 0\)"),
        ({"kept": torch.zeros(2).int()}, ValueError, r"kept: expected shape \(2, K\) with K >= 1, got \(2,\)"),
        ({"kept": [[0], [0]]}, TypeError, "kept: expected a tensor, got list"),
        (
            {"kept": torch.zeros(2, 4, device="meta").int()},
            ValueError,
            "kept: expected a tensor on cpu, got one on meta",
        ),
        (
            {"labels": torch.tensor([0, 5])},
            ValueError,
            r"labels: expected values in \[0, 5\) where the mask is True, got 5",
        ),
    ],
)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        linear_token_stats(**{**GOOD, **change})
    if "labels" not in change:
        given = {**GOOD, **change}
        with pytest.raises(error, match=message):
            linear_policy_loss(
                given["hidden"],
                given["weight"],
                given["labels"],
                None,
                torch.ones(1),
                kept=given["kept"],
                cu_seqlens=torch.tensor([0, 2]),
            )


def test_a_single_id_is_no_set_of_a_single_token():
    with pytest.raises(ValueError, match=r"kept: expected shape \(K,\) with K >= 1, got \(\)"):
        linear_token_stats(torch.zeros(4), torch.zeros(5, 4), torch.tensor(1), kept=torch.tensor(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("add", [False, True])
def test_native_sums_over_any_number_of_tokens(dtype, add):
    """Few tokens are summed in registers, more in memory, and in parts from 256 on. Entries of no token are zeros, or keep what they are."""
    backends.choose(OP, "native", torch.device("cpu"), dtype)  # which loads the extension
    tokens = [0, 1, 2, 3, 4, 5, 8, 9, 255, 256, 257, 600]  # that keep each entry
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(600, 70, generator=generator).to(dtype)
    grad = torch.randn(600, len(tokens), generator=generator)
    ids = torch.full(grad.shape, -1, dtype=torch.int32)
    for entry, number in enumerate(tokens):
        ids[600 - number :, entry] = entry
    before = torch.randn(len(tokens), 70, generator=generator).to(dtype)
    total = before.clone() if add else torch.full_like(before, torch.nan)
    bias = torch.ops.mgrpo_native.kept_weight_gradient_(grad, hidden, ids, total, add)
    there = torch.where(ids >= 0, grad, 0.0).double()
    want = there.t() @ hidden.double() + (before.double() if add else 0.0)
    torch.testing.assert_close(total, want.to(dtype), rtol=1e-5 if dtype == torch.float32 else 2**-7, atol=1e-4)
    torch.testing.assert_close(bias, there.sum(0).float(), rtol=1e-5, atol=1e-5)
