"""The Triton kernels against the reference, under the interpreter: what the contract tests' small shapes do not reach."""

import contextlib
import importlib
import itertools
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from mgrpo_kernels.ops import _statistics
from mgrpo_kernels.ops._triton import launch, tuning
from mgrpo_kernels.ops.ema import reference as ema_reference
from mgrpo_kernels.ops.ema import triton as ema_triton
from mgrpo_kernels.ops.ema.specs import Batch, Span
from mgrpo_kernels.ops.iqr_filter import reference as iqr_reference
from mgrpo_kernels.ops.iqr_filter import triton as iqr_triton
from mgrpo_kernels.ops.kept_token_stats import reference as kept_reference
from mgrpo_kernels.ops.kept_token_stats import triton as kept_triton
from mgrpo_kernels.ops.kept_token_stats.specs import ABSENT, local_ids
from mgrpo_kernels.ops.linear_token_stats import triton as linear_triton
from mgrpo_kernels.ops.linear_token_stats.specs import Head, transform, transform_gradient
from mgrpo_kernels.ops.policy_loss import reference as loss_reference
from mgrpo_kernels.ops.policy_loss import specs
from mgrpo_kernels.ops.policy_loss import triton as loss_triton
from mgrpo_kernels.ops.token_stats import reference as stats_reference
from mgrpo_kernels.ops.token_stats import triton as stats_triton
from mgrpo_kernels.ops.token_stats.specs import Wanted

INF, NAN = torch.inf, torch.nan
ALL = Wanted(True, True, True)


def close(got, want, rtol=2e-5, atol=2e-5):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol, equal_nan=True)


def same_bits(got, want):
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a.nan_to_num(nan=1234.5), b.nan_to_num(nan=1234.5))


# --------------------------------------------------------------------------------------------------------------- shapes


def test_a_masked_row_of_a_tile_is_not_read_by_the_heads_gradient():
    x, coefficients, out = torch.randn(3, 40), torch.randn(4, 3), torch.full((3, 40), 7.0)
    x[1], coefficients[:, 1] = torch.nan, 0.0
    head = Head(torch.empty(40, 1), None, 1.0, 1.0, None, 0, None)
    labels = torch.zeros(3, dtype=torch.int64)
    linear_triton.GpuPasses().gradient(x, head, labels, coefficients, torch.zeros(3), out)
    assert (out[1] == 0).all()
    assert out[[0, 2]].isfinite().all()
    assert (out[[0, 2]] != 7.0).all()


@pytest.mark.parametrize("element_size", [2, 4])
@pytest.mark.parametrize("threads", [128, 256])
def test_row_tiles(element_size, threads):
    for columns in (1, 2, 31, 200, 5000, 151936):
        tile = launch.row_tile(columns, element_size, threads, 4)
        assert tile.lanes == tile.num_warps * 32 * 16 // element_size  # 16 bytes for each thread
        assert tile.num_warps * 32 <= threads
        assert tile.elements < max(2 * columns, 2 * 32 * 16 // element_size)


def test_rows_are_shared_only_where_they_are_few():
    tile = launch.row_tile(151936, 2, 256, 4)
    with mock.patch.object(launch, "processors", return_value=132):
        assert launch.parts_of_row(8192, 151936, tile, torch.device("cpu")) == (1, -(-151936 // 8192) * 8192)
        for rows in (1, 7, 100, 527):
            parts, part = launch.parts_of_row(rows, 151936, tile, torch.device("cpu"))
            assert part % tile.elements == 0
            assert (parts - 1) * part < 151936 <= parts * part
            assert rows * parts <= 4 * 132


# --------------------------------------------------------------------------------------------------------- token stats


def logits_with_everything(vocab, dtype):
    """Return logits (7, vocab) whose rows hold each kind of trouble."""
    logits = torch.randn(7, vocab) * 3
    logits[1] = NAN  # masked
    logits[2, vocab // 2] = NAN
    logits[3, ::2] = -INF
    logits[4, -1] = INF
    logits[5] = -INF
    logits[6, 0] = -1e30
    return logits.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("processors", [1, 8])
@pytest.mark.parametrize("vocab", ["1", "tile-1", "tile", "tile+1", "2 tiles+3"])
def test_token_stats_around_tiles(dtype, processors, vocab):
    tile = launch.row_tile(10**6, dtype.itemsize, 256, 4).elements
    vocab = {"1": 1, "tile-1": tile - 1, "tile": tile, "tile+1": tile + 1, "2 tiles+3": 2 * tile + 3}[vocab]
    logits = logits_with_everything(vocab, dtype)
    mask = torch.ones(7, dtype=torch.bool)
    mask[1] = False
    labels = torch.randint(0, vocab, (7, 3), dtype=torch.int32)
    labels[0] = torch.tensor([vocab - 1, vocab - 1, 0])
    labels[3, 0] = 0  # a label at -inf
    temperature = torch.rand(7) + 0.5
    arguments = (logits, labels, mask, temperature)
    with mock.patch.object(launch, "processors", return_value=processors):
        got, again = (stats_triton.forward(*arguments, ALL) for _ in range(2))
        want = stats_reference.forward(*arguments, ALL)
        close(got, want)
        same_bits(got, again)
        grads = [torch.randn_like(stat) for stat in want[:3]]
        results = []
        for backend in (stats_reference, stats_triton):
            out = torch.full_like(logits, NAN)
            backend.backward(out, *grads, logits, labels, mask, temperature, want[3], want[1])
            results.append(out)
        close(results[1:], results[:1], rtol=1e-2 if dtype == torch.bfloat16 else 2e-5)
        assert (results[1][1] == 0).all()
        in_place = logits.clone()
        stats_triton.backward(in_place, *grads, in_place, labels, mask, temperature, want[3], want[1])
        same_bits([in_place], results[1:])


@pytest.mark.parametrize(
    "wanted", [Wanted(*flags) for flags in itertools.product([False, True], repeat=3) if any(flags)]
)
def test_token_stats_wanted_alone(wanted):
    logits, labels = torch.randn(3, 50), torch.randint(0, 50, (3, 1)) if wanted.logprob else None
    got = stats_triton.forward(logits, labels, None, 0.8, wanted)
    want = stats_reference.forward(logits, labels, None, 0.8, wanted)
    close(got, want)
    assert [stat.numel() > 0 for stat in got] == [*wanted, True]


def test_token_stats_strides():
    base = torch.randn(3, 5, 2, 70)
    for logits in (base[:, :-1], base[:, ::2, 0], base.transpose(0, 2), base[..., ::2], base[0, 0, :1].expand(4, 70)):
        labels = torch.randint(0, logits.shape[-1], (*logits.shape[:-1], 1))
        got = stats_triton.forward(logits, labels, None, 1.0, ALL)
        same_bits(got, stats_triton.forward(logits.contiguous(), labels, None, 1.0, ALL))
        out = logits.clone(memory_format=torch.preserve_format)
        wide = torch.zeros(*logits.shape[:-1], logits.shape[-1] + 5)[..., : logits.shape[-1]]  # rows with gaps
        for target in (out, wide):
            stats_triton.backward(target, None, got[1], None, logits, labels, None, 1.0, got[3], got[1])
        same_bits([out], [wide])


def test_a_label_outside_gives_nan_and_reads_nothing_outside():
    logits, labels = torch.randn(3, 1, 40), torch.tensor([[[-5]], [[40]], [[2**31 + 7]]])
    got = stats_triton.forward(logits, labels, None, 1.0, ALL)
    assert got[0].isnan().all()
    assert got[1].isfinite().all()
    outs = [torch.zeros_like(logits) for _ in range(2)]
    for backend, out in zip((stats_reference, stats_triton), outs, strict=True):
        backend.backward(out, torch.ones(3, 1, 1), None, None, logits, labels, None, 1.0, got[3], None)
    close(outs[:1], outs[1:])


# ------------------------------------------------------------------------------------------------------- dimensions of 1


def test_the_interpreter_treats_an_argument_of_1_as_the_compiler_does():
    import faulty_kernels
    from triton.runtime.errors import InterpreterError

    x = torch.ones(4)
    faulty_kernels.sound_kernel[(4,)](x, None, 1)
    assert (x == 0).all()
    faulty_kernels.stride_of_1_kernel[(1,)](x, 2)
    with pytest.raises(InterpreterError, match="no attribute 'to'"):
        faulty_kernels.stride_of_1_kernel[(1,)](x, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("labels_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("shape", "strides"),
    [
        ((5, 1), (1, 1)),
        ((1, 1), (1, 1)),
        ((1, 50), (50, 1)),
        ((4, 50), (0, 1)),
        ((4, 50), (1, 1)),
        ((4, 1), (0, 1)),
        ((2, 1, 3), (3, 3, 1)),
        ((2, 3, 1), (7, 1, 1)),
        ((3, 2, 4), (1, 9, 1)),
    ],
)
def test_token_stats_where_a_size_or_stride_is_1(dtype, labels_dtype, shape, strides):
    logits = torch.randn(100).to(dtype).as_strided(shape, strides)
    rows = shape[:-1]
    labels = torch.randint(0, shape[-1], (*rows, 1), dtype=labels_dtype)
    mask, temperature = torch.arange(labels.numel()).view(rows) != 1, 1
    got = stats_triton.forward(logits, labels, mask, temperature, ALL)
    want = stats_reference.forward(logits, labels, mask, temperature, ALL)
    close(got, want)
    grads = [torch.randn(stat.shape) for stat in want[:3]]
    results = [torch.full(shape, NAN, dtype=dtype) for _ in range(2)]
    for backend, out in zip((stats_triton, stats_reference), results, strict=True):
        backend.backward(out, *grads, logits, labels, mask, temperature, want[3], want[1])
    close(
        results[:1],
        results[1:],
        rtol=2e-5 if dtype == torch.float32 else 1e-2,
        atol=1e-3 if dtype != torch.float32 else 2e-5,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "vocab"), [(1, 1), (1, 40), (6, 1)])
@pytest.mark.parametrize("first", [0, 1])
def test_head_passes_where_a_size_is_1(dtype, rows, vocab, first):
    x = torch.randn(rows, vocab).to(dtype)
    head = Head(torch.zeros(vocab, 1), torch.randn(vocab).to(dtype), 1, 1, 1, first, None)
    labels = torch.full((rows,), first + vocab - 1, dtype=torch.int32)
    raw = x.float() + head.bias.float()
    z = transform(raw, head, 1)
    state = torch.zeros(_statistics.STATE_ROWS, rows)
    state[_statistics.MAX] = -INF
    linear_triton.GpuPasses().state(x, head, labels, state)
    close(_statistics.finish(state, None)[:4], _statistics.finish(_statistics.row_state(z, labels, first), None)[:4])
    coefficients, logsumexp = torch.randn(4, rows), z.logsumexp(1)
    want = transform_gradient(_statistics.row_gradient(z, labels, coefficients, logsumexp, first), raw, head, 1)
    linear_triton.GpuPasses().gradient(x, head, labels, coefficients, logsumexp, x)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(x.float(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rows", "kept", "vocab", "width"), [(1, 1, 1, 1), (1, 5, 9, 40), (6, 1, 9, 40), (6, 5, 1, 40), (6, 5, 9, 1)]
)
def test_kept_sets_where_a_size_is_1(dtype, rows, kept, vocab, width):
    ids = local_ids(torch.randint(-1, vocab, (rows, kept)), None, 0, vocab)
    kept_kernels_meet_their_reference(torch.randn(rows, width).to(dtype), torch.randn(vocab, width).to(dtype), ids)


def test_one_token_one_group_one_element():
    one, offsets = torch.randn(1), torch.tensor([0, 1])
    tokens = specs.Tokens(one, one + 0.1, one, None, offsets, one, one, None, None, None)
    options = specs.LossOptions(kl_coef=1, entropy_coef=1)
    close(loss_triton.forward(tokens, None, options), loss_reference.forward(tokens, None, options))
    groups = specs.Groups(one, offsets, None, "mean", "std", 1)
    close([loss_triton.group_advantages(groups)], [loss_reference.group_advantages(groups)])
    for kind in (torch.int32, torch.int64):
        same_bits(
            iqr_triton.forward(one, offsets.to(kind), None, 1), iqr_reference.forward(one, offsets.to(kind), None, 1)
        )
    updated = [one.clone(), one.clone()]
    for backend, ema in zip((ema_reference, ema_triton), updated, strict=True):
        backend.update_(Batch([ema], [one * 2], [], torch.tensor(0.5, dtype=torch.float64), [], [Span(0, 1, 0)]))
    same_bits(updated[:1], updated[1:])


# --------------------------------------------------------------------------------------------------------- linear passes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("logit_scale", "softcap", "per_row"), [(1.0, None, False), (-0.5, 30.0, True), (-0.5, None, True), (0.1, 2, False)]
)
def test_head_passes_over_uneven_tiles(dtype, bias, logit_scale, softcap, per_row):
    torch.manual_seed(1)
    rows, vocab, shard = 5, 4300, 100  # this shard begins at vocabulary entry 100
    x = (torch.randn(rows, vocab) * 4).to(dtype)
    x[1, 4000] = NAN
    added = torch.randn(vocab).to(dtype) if bias else None
    if bias and softcap is None and logit_scale > 0:
        added[::7] = -INF
    temperature = torch.rand(rows) + 0.5 if per_row else 0.7
    head = Head(torch.zeros(vocab, 1), added, temperature, logit_scale, softcap, shard, None)
    labels = torch.tensor([100, 4399, 4200, 0, 99_999])
    raw = x.float() if added is None else x.float() + added.float()
    z = transform(raw, head, temperature)
    want = _statistics.row_state(z, labels, shard)

    cuts = [0, 1, 200, 4250, vocab]
    states = []
    for _ in range(2):
        state = torch.zeros(_statistics.STATE_ROWS, rows + 2)[:, 1:-1]
        state[_statistics.MAX] = -INF
        for a, b in itertools.pairwise(cuts):
            tile = head._replace(bias=None if added is None else added[a:b], vocab_start=shard + a)
            linear_triton.GpuPasses().state(x[:, a:b].contiguous(), tile, labels, state)
        states.append(state)
    same_bits(states[:1], states[1:])
    got = _statistics.finish(states[0], None)
    close(got[:4], _statistics.finish(want, None)[:4], rtol=1e-4, atol=1e-4)
    assert (states[0][_statistics.COUNT] == vocab).all()

    coefficients = torch.randn(4, 2 * rows)[:, ::2]
    coefficients[:, 2] = 0  # masked
    grad_z = _statistics.row_gradient(z, labels, coefficients, got.logsumexp, shard)
    expected = transform_gradient(grad_z, raw, head, temperature)
    for a, b in itertools.pairwise(cuts):
        tile = head._replace(bias=None if added is None else added[a:b], vocab_start=shard + a)
        part = x[:, a:b].contiguous()
        linear_triton.GpuPasses().gradient(part, tile, labels, coefficients, got.logsumexp, part)
        tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-4}
        torch.testing.assert_close(part.float(), expected[:, a:b], equal_nan=True, **tolerance)


# ------------------------------------------------------------------------------------------------------------ kept sets


def kept_kernels_meet_their_reference(hidden, weight, ids):
    """Compare the logits and both gradients, twice; return them."""
    grad = torch.randn(ids.shape).masked_fill(ids == ABSENT, 0.0)
    results = []
    for backend in (kept_reference, kept_triton, kept_triton):
        x = backend.logits(hidden, weight, ids, None)
        of_hidden = backend.hidden_gradient(grad, weight, ids, None)
        of_weight, of_bias = backend.weight_gradient(grad, hidden, ids, weight, True, None)
        assert of_weight.dtype == weight.dtype
        results.append([x, of_hidden, of_bias, of_weight])
    want, got, again = results
    same_bits(got, again)
    alone, absent = kept_triton.weight_gradient(grad, hidden, ids, weight, False, None)
    assert absent is None
    same_bits([alone], got[3:])
    assert (got[0][ids == ABSENT] == 0).all()
    want[0] = want[0].masked_fill(ids == ABSENT, 0.0)  # the reference may leave any number there
    close(got[:3], want[:3], rtol=1e-5, atol=1e-4)
    close(got[3:], want[3:], rtol=1e-5 if weight.dtype == torch.float32 else 1e-2, atol=1e-4)
    return got


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [31, 32, 33, kept_triton.COLUMNS, kept_triton.COLUMNS + 1])
@pytest.mark.parametrize("kept", [kept_triton.ENTRIES - 1, kept_triton.ENTRIES, 2 * kept_triton.ENTRIES + 1])
def test_kept_sets_around_tiles(dtype, width, kept):
    """Rows of a matrix with gaps, a row without ids, an entry that more tokens keep than a program has in flight, one that none keeps."""
    rows, vocab = kept_triton.ENTRIES + 2, 24
    hidden = torch.randn(rows, width + 5).to(dtype)[:, 2:-3]
    weight = torch.randn(vocab, width + 3).to(dtype)[:, :-3]
    kept_ids = torch.rand(rows, vocab).topk(kept).indices
    kept_ids[kept_ids == 0] = ABSENT
    kept_ids[:, 0], kept_ids[3] = 5, ABSENT
    weight[0], hidden[3] = NAN, NAN  # nothing reads them
    ids = local_ids(kept_ids, None, 0, vocab)
    x, of_hidden, of_bias, of_weight = kept_kernels_meet_their_reference(hidden, weight, ids)
    assert all(each.isfinite().all() for each in (x, of_hidden, of_bias, of_weight))
    assert (of_hidden[3] == 0).all()
    assert (of_weight[0] == 0).all()
    assert of_bias[0] == 0


def test_kept_sets_of_matrices_whose_rows_are_not_contiguous():
    hidden, weight = torch.randn(40, 7).t(), torch.randn(40, 11).t()
    ids = local_ids(torch.randint(-1, 11, (7, 9)), torch.arange(7) != 2, 0, 11)
    kept_kernels_meet_their_reference(hidden, weight, ids)


def test_an_id_past_the_weight_is_not_read():
    """On a GPU ids are not checked before the kernels run."""
    hidden, weight, grad = torch.randn(2, 40), torch.randn(11, 40), torch.randn(2, 3)
    ids = torch.tensor([[4, 11, 2**31 - 1], [-1, -(2**31), 3]], dtype=torch.int32)
    inside = torch.where((ids >= 0) & (ids < 11), ids, ABSENT)
    same_bits([kept_triton.logits(hidden, weight, ids, None)], [kept_triton.logits(hidden, weight, inside, None)])
    results = [kept_triton.hidden_gradient(grad, weight, each, None) for each in (ids, inside)]
    results += kept_triton.weight_gradient(grad, hidden, ids, weight, True, None)
    results += kept_triton.weight_gradient(grad, hidden, inside, weight, True, None)
    same_bits([results[0], *results[2:4]], [results[1], *results[4:]])


# --------------------------------------------------------------------------------------------------- rows of infinities


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_head_rows_of_infinities(temperature):
    x = torch.randn(4, 300)
    x[0] = -INF
    x[1, :200] = -INF  # the first tile
    x[2, 5] = INF
    head = Head(torch.zeros(300, 1), None, temperature, 1.5, None, 0, None)
    labels = torch.tensor([3, 250, 6, 0])
    state = torch.zeros(_statistics.STATE_ROWS, 4)
    state[_statistics.MAX] = -INF
    for a, b in ((0, 200), (200, 300)):
        linear_triton.GpuPasses().state(x[:, a:b].contiguous(), head._replace(vocab_start=a), labels, state)
    got = _statistics.finish(state, labels)
    want = _statistics.finish(_statistics.row_state(transform(x, head, temperature), labels), labels)
    assert got.logsumexp[0] == -INF
    torch.testing.assert_close(got.logsumexp[[1, 3]], want.logsumexp[[1, 3]])
    for mine, theirs in zip(got[:3], want[:3], strict=True):
        torch.testing.assert_close(mine[[1, 3]], theirs[[1, 3]], rtol=1e-5, atol=1e-5)
        assert mine[2].isnan()


def test_tanh_is_exact_to_rounding():
    points = torch.linspace(-12, 12, 121), torch.linspace(-0.6, 0.6, 61), torch.linspace(-1, 1, 401)
    x = torch.cat([*points, torch.tensor([1e-3, 1e-9, INF, -INF, NAN])])
    head = Head(torch.zeros(1, 1), None, 1.0, 1.0, 1.0, 0, None)
    state = torch.zeros(6, x.shape[0])
    state[0] = -INF
    linear_triton.GpuPasses().state(x.unsqueeze(1).contiguous(), head, torch.zeros_like(x, dtype=torch.int64), state)
    torch.testing.assert_close(state[_statistics.LABEL].double(), x.double().tanh(), rtol=3e-7, atol=0, equal_nan=True)


def test_16_bit_results_are_rounded_to_nearest():
    x = torch.zeros(300, 1, dtype=torch.bfloat16)
    head = Head(torch.zeros(1, 1), None, 1.0, 1.0, None, 0, None)
    coefficients = torch.zeros(4, 300)
    coefficients[2] = torch.randn(300)  # gamma: the gradient itself
    linear_triton.GpuPasses().gradient(x, head, None, coefficients, torch.full((300,), 50.0), x)
    assert torch.equal(x.squeeze(1), coefficients[2].bfloat16())


# ----------------------------------------------------------------------------------------------------------- policy loss


def long_tokens(options, seed=0):
    """Return packed sequences that need several steps of a program, an empty one among them."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([700, 0, 513, 1, 1300])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    number = int(offsets[-1])

    def random(scale):
        return torch.randn(number, generator=generator) * scale

    logprob = random(0.5) - 2
    mask = torch.rand(number, generator=generator) > 0.2
    scale = 0.002 if options.importance_level == "sequence" or options.behaviour_mode.startswith("sequence") else 0.3
    old, ref, behaviour = (logprob + random(scale) for _ in range(3))
    tokens = specs.Tokens(logprob, old, random(1.0), mask, offsets, ref, random(1.0), behaviour, None, None)
    poisoned = {
        name: torch.where(mask, getattr(tokens, name), NAN)
        for name in ("logprob", "old", "ref", "entropy", "behaviour")
    }
    return tokens._replace(**poisoned)


OPTIONS = [
    specs.LossOptions(
        loss_type,
        level,
        clip_delta=delta,
        kl_coef=0.1,
        kl_estimator=estimator,
        kl_bias_correction=bias,
        entropy_coef=0.01,
        behaviour_mode=mode,
        off_policy_delta=0.001 if loss_type in ("sapo", "vespo", "gmpo") else None,
        max_response_tokens=900,
    )
    for (loss_type, level), (delta, estimator, bias), mode in zip(
        itertools.product(specs.LOSS_TYPES, specs.IMPORTANCE_LEVELS),
        itertools.cycle([(None, "k3", False), (1.1, "k2", True), (None, "k1", True)]),
        itertools.cycle(["token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "geometric_mask"]),
        strict=False,
    )
    if not (loss_type == "vespo" and mode.startswith(("sequence", "geometric")))
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: f"{options.loss_type}-{options.importance_level}")
def test_policy_loss_of_long_sequences(options):
    tokens = long_tokens(options)
    got, again = (loss_triton.forward(tokens, None, options) for _ in range(2))
    same_bits(got, again)
    close(got, loss_reference.forward(tokens, None, options), rtol=1e-4, atol=1e-5)

    groups = specs.Groups(
        torch.tensor([1.0, 0.0, 0.5, 1.0, 0.0], dtype=torch.float64),
        torch.tensor([0, 3, 3, 5]),
        torch.tensor([True, True, True, False, True]),
        "mean",
        "batch",
        1e-6,
    )
    tokens = tokens._replace(
        advantages=None, old=None, behaviour=None, normalizer=torch.tensor(3.0), entropy_normalizer=torch.tensor(70.0)
    )
    close(
        loss_triton.forward(tokens, groups, options),
        loss_reference.forward(tokens, groups, options),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("level", specs.IMPORTANCE_LEVELS)
def test_policy_loss_shows_a_nan_that_counts(level):
    options = specs.LossOptions(importance_level=level, max_response_tokens=900)
    tokens = long_tokens(options)
    first = int(tokens.mask.nonzero()[0])
    tokens.logprob[first] = NAN
    got = loss_triton.forward(tokens, None, options)
    assert got[1][specs.METRICS.index("ratio_max")].isnan()
    close(got, loss_reference.forward(tokens, None, options), rtol=1e-4, atol=1e-5)


def test_policy_loss_of_nothing():
    nothing = torch.zeros(0)
    tokens = specs.Tokens(nothing, None, nothing, None, torch.zeros(1, dtype=torch.int64), None, None, None, None, None)
    for options in (specs.LossOptions(), specs.LossOptions("dapo", entropy_coef=0.5)):
        same_bits(loss_triton.forward(tokens, None, options), loss_reference.forward(tokens, None, options))


def test_policy_loss_of_more_sequences_than_a_step():
    options = specs.LossOptions("sapo")
    logprob = torch.randn(140)
    weights = torch.rand(140)
    tokens = specs.Tokens(
        logprob, logprob + 0.1, torch.randn(140), None, torch.arange(141), None, logprob, None, None, None, weights
    )
    close(loss_triton.forward(tokens, None, options), loss_reference.forward(tokens, None, options), rtol=1e-4)


@pytest.mark.parametrize(("baseline", "scale"), [("mean", "std"), ("leave_one_out", "batch")])
def test_group_advantages_of_many_and_of_large_groups(baseline, scale):
    torch.manual_seed(2)
    sizes = torch.cat([torch.randint(0, 2, (130,)), torch.tensor([2, 130, 1])])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    rewards = torch.randn(int(offsets[-1])).round()
    mask = torch.rand(rewards.shape) > 0.2
    if scale == "std":
        rewards[-30], mask[-30] = NAN, True
    groups = specs.Groups(rewards, offsets, mask, baseline, scale, 1e-6)
    close([loss_triton.group_advantages(groups)], [loss_reference.group_advantages(groups)])


# ----------------------------------------------------------------------------------------------------- momentum, filter


@pytest.mark.parametrize(("stochastic", "aligned"), [(False, True), (True, True), (True, False)])
def test_the_momentum_update_has_the_reference_bits(stochastic, aligned):
    torch.manual_seed(3)
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    sizes = (1, 2047, 2048, 4097, 33_001)
    shift = 0 if aligned else 1
    ema, params, emit = [], [], []
    for (a, b, c), size in zip(itertools.product(dtypes, repeat=3), itertools.cycle(sizes), strict=False):
        for tensors, dtype in ((ema, a), (params, b), (emit, c)):
            tensors.append((torch.randn(size + shift) * 2.0 ** torch.randint(-20, 3, ())).to(dtype)[shift:])
    spans = [Span(10**12, tensor.numel(), 0) if i % 2 else Span(5, 3, 2**33) for i, tensor in enumerate(ema)]
    keys = [(2**32 - 1 - i, 77 * i) for i in range(len(ema))] if stochastic else []
    results = []
    for backend in (ema_reference, ema_triton):
        copies, outs = [tensor.clone() for tensor in ema], [torch.zeros_like(tensor) for tensor in emit]
        if not aligned:  # clones start anew
            copies = [torch.cat([tensor[:1], tensor])[1:] for tensor in copies]
        backend.update_(Batch(copies, params, outs, torch.tensor(0.97, dtype=torch.float64), keys, spans))
        results.append(copies + outs)
    same_bits(*results)
    assert not torch.equal(results[0][0], ema[0])


@pytest.mark.parametrize("list_name", ["ema", "params", "emit"])
@pytest.mark.parametrize("stochastic", [False, True])
def test_a_tensor_that_is_not_aligned_gets_a_launch_of_its_own(list_name, stochastic):
    """The others keep their wide loads, and the random bits stay those of the tensor's place in the list."""
    lists = {
        name: [torch.randn(100 + i).to(dtype) for i in range(24)]
        for name, dtype in (("ema", torch.bfloat16), ("params", torch.float32), ("emit", torch.float16))
    }
    odd = 7
    tensor = lists[list_name][odd]
    lists[list_name][odd] = torch.cat([tensor[:1], tensor])[1:]
    assert [i for i in range(24) if lists[list_name][i].data_ptr() % 16] == [odd]
    keys = [(2**31 + i, 77 * i) for i in range(24)] if stochastic else []
    spans = [Span(i * 1000, tensor.numel(), 0) for i, tensor in enumerate(lists["ema"])]
    batch = Batch(**lists, decay=torch.tensor(0.97, dtype=torch.float64), keys=keys, spans=spans)
    copies = {name: [tensor.clone() for tensor in lists[name]] for name in ("ema", "emit")}
    ema_reference.update_(batch._replace(**copies))
    with mock.patch.object(ema_triton, "launch", side_effect=launch.launch) as launched:
        ema_triton.update_(batch)
    same_bits(lists["ema"] + lists["emit"], copies["ema"] + copies["emit"])
    found = {call.kwargs["ALIGNED"]: call.args[3][:, 0].tolist() for call in launched.call_args_list}
    addresses = [tensor.data_ptr() for tensor in lists["ema"]]
    assert launched.call_count == 2
    assert found == {True: addresses[:odd] + addresses[odd + 1 :], False: [addresses[odd]]}


@pytest.mark.parametrize(("shift", "aligned"), [(0, True), (1, False)])
def test_tensors_that_are_all_aligned_or_all_not_get_one_launch(shift, aligned):
    tensors = [torch.randn(50 + shift)[shift:] for _ in range(3)]
    batch = Batch(tensors, tensors, [], torch.tensor(0.5, dtype=torch.float64), [], [Span(0, 50, 0)] * 3)
    with mock.patch.object(ema_triton, "launch") as launched:
        ema_triton.update_(batch)
    assert [call.kwargs["ALIGNED"] for call in launched.call_args_list] == [aligned]


def test_the_filter_of_large_groups():
    torch.manual_seed(4)
    sizes = torch.tensor([100, 0, 1, 33, 32, 2, 64])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    entropy = (torch.randn(int(offsets[-1])) * 4).round() / 4  # with ties
    entropy[[3, 50, 120]] = NAN
    entropy[5] = -INF
    for mask in (None, torch.rand(entropy.shape) > 0.3):
        for k in (0.0, 0.75):
            arguments = (entropy, offsets, mask, k)
            same_bits(iqr_triton.forward(*arguments), iqr_reference.forward(*arguments))


# ----------------------------------------------------------------------------------------------------------- every kernel


def test_gradients_are_scaled_in_place():
    from mgrpo_kernels.ops.linear_policy_loss import triton as fused_loss

    for dtype in (torch.float32, torch.bfloat16):
        grads = [torch.randn(70, 100).to(dtype), torch.randn(3).to(dtype), torch.empty(0, dtype=dtype)]
        want = [(grad.float() * 0.3).to(dtype) for grad in grads]
        fused_loss.scale_(grads, torch.tensor(0.3))
        close(grads, want, rtol=0, atol=0)
        fused_loss.scale_(grads, torch.tensor(1.0))
        close(grads, want, rtol=0, atol=0)


def test_every_kernel_meets_its_reference_in_the_interpreter():
    """The tests named here compare with the reference; between them they must launch all kernels that the package holds."""
    import compiled_launches
    import test_fused_head
    import test_staircase

    launched = set()

    def note(kernel, *args, **options):
        launched.add(compiled_launches.name_of(kernel.fn.__module__, kernel.fn.__name__))
        launch.launch(kernel, *args, **options)

    with contextlib.ExitStack() as stack:
        for op in compiled_launches.LAUNCHES:
            backend = importlib.import_module(f"mgrpo_kernels.ops.{op}.triton")
            stack.enter_context(mock.patch.object(backend, "launch", note))
        test_token_stats_around_tiles(torch.float32, 8, "tile+1")
        test_head_passes_over_uneven_tiles(torch.float32, True, -0.5, 30.0, True)
        test_policy_loss_of_more_sequences_than_a_step()
        test_group_advantages_of_many_and_of_large_groups("mean", "std")
        test_the_momentum_update_has_the_reference_bits(True, True)
        test_the_filter_of_large_groups()
        test_gradients_are_scaled_in_place()
        test_kept_sets_around_tiles(torch.bfloat16, 33, 9)
        test_staircase.test_rows_that_are_sure_of_their_token_need_few_entries()
        stack.enter_context(mock.patch.object(tuning, "of", return_value=test_fused_head.SMALL))
        stack.enter_context(mock.patch.object(linear_triton, "FUSED_FROM", 1))
        test_fused_head.test_passes(torch.bfloat16, 17, 24, 33, {})
    assert launched == compiled_launches.kernels_in_source()


# ------------------------------------------------------------------------------------------------------- without triton


def test_the_library_works_without_triton():
    program = """
import sys
sys.modules["triton"] = None
import torch, mgrpo_kernels
reason = mgrpo_kernels.backends()["token_stats"]["triton"]
assert reason.startswith("triton cannot be imported"), reason
stats = mgrpo_kernels.token_stats_from_logits(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64))
assert torch.allclose(stats.entropy, torch.tensor(3.0).log())
"""
    repository = Path(__file__).resolve().parents[1]
    subprocess.run([sys.executable, "-c", program], check=True, cwd=repository, timeout=120)
