"""From hidden states to the loss: the fused form, the composed form and plain PyTorch give the same."""

import logging
import traceback
from unittest import mock

import pytest
import torch
from contract import assert_no_worse_than_plain, each_backend, poisoned_memory
from torch._dynamo.testing import CompileCounterWithBackend

from mgrpo_kernels import backend as backends
from mgrpo_kernels import checks, linear_policy_loss, linear_token_stats, policy_loss
from mgrpo_kernels.ops import linear_policy_loss as op_module  # noqa: F401 - the package, not the function
from mgrpo_kernels.ops.linear_policy_loss import OP, three_matmuls
from mgrpo_kernels.ops.linear_token_stats import tiled
from mgrpo_kernels.ops.policy_loss.specs import LOSS_TYPES, METRICS

B, L, H, V = 4, 7, 16, 501
SMALL = 2**16  # bytes: a few rows at a time
MULTIPLIES_16_BITS = pytest.mark.skipif(
    not tiled.multiplies_16_bits(torch.device("cpu"), torch.bfloat16),
    reason="this CPU has no matmul of bfloat16: the native backend composes the general ops",
)


@pytest.fixture
def products_of_16_bits():
    """Let Triton's interpreter take a GPU's layout on every CPU; one without such products converts the factors."""
    with mock.patch.object(tiled, "multiplies_16_bits", return_value=True):
        yield


def batch(seed=0, *, bias=True, L=L):
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape, scale=1.0):
        return torch.randn(*shape, generator=generator) * scale

    mask = torch.rand(B, L, generator=generator) > 0.3
    mask[2] = False
    hidden, weight = noise(B, L, H), noise(V, H, scale=0.3)
    labels = torch.randint(0, V, (B, L), generator=generator)
    hidden[~mask], labels[~mask] = torch.nan, -100
    old = noise(B, L, scale=0.2) - 6
    return {
        "head": [hidden, weight, noise(V) if bias else None],
        "labels": labels,
        "mask": mask,
        "old": old,
        "ref_logprobs": old + noise(B, L, scale=0.1),
        "behaviour": old + noise(B, L, scale=0.5),
        "advantages": noise(B),
    }


def run(data, *, times=1.0, fused=True, behaviour=True, **options):
    leaves = [None if t is None else t.clone().requires_grad_() for t in data["head"]]
    hidden, weight, bias = leaves
    common = {
        "mask": data["mask"],
        "ref_logprobs": data["ref_logprobs"],
        "kl_coef": 0.1,
        "max_response_tokens": L,
        "behaviour_logprobs": data["behaviour"] if behaviour else None,
    }
    head = {"bias": bias, "temperature": 0.9, "softcap": 8.0}
    workspace = options.pop("workspace_bytes", None)
    if fused:
        result = linear_policy_loss(
            hidden,
            weight,
            data["labels"],
            data["old"],
            data["advantages"],
            **head,
            **common,
            **options,
            workspace_bytes=workspace,
        )
    else:
        stats = linear_token_stats(
            hidden, weight, data["labels"], **head, mask=data["mask"], backend=options["backend"]
        )
        result = policy_loss(stats.logprob, data["old"], data["advantages"], entropy=stats.entropy, **common, **options)
    (result.loss * times).backward()
    return [result.loss.detach(), *result.metrics.values()], [leaf.grad for leaf in leaves if leaf is not None]


@each_backend(OP)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize(
    ("behaviour", "mode"), [(False, "token_mask"), (True, "token_mask"), (True, "sequence_truncate")]
)
@pytest.mark.parametrize("entropy_coef", [0.0, 0.02])
def test_is_its_two_parts(backend, loss_type, behaviour, mode, entropy_coef):
    if loss_type == "vespo" and mode.startswith("sequence"):
        mode = "token_truncate"  # the other has no meaning there
    data = batch(bias=entropy_coef == 0)
    options = {"loss_type": loss_type, "behaviour_mode": mode, "behaviour": behaviour, "entropy_coef": entropy_coef}
    want = run(data, fused=False, backend="reference", **options)
    with poisoned_memory():
        got = run(data, backend=backend, **options)
        tiled = run(data, backend=backend, workspace_bytes=SMALL, times=3.0, **options)
    for mine, theirs in zip(got[0], want[0], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    for mine, small, theirs in zip(got[1], tiled[1], want[1], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(small / 3.0, theirs, rtol=1e-3, atol=1e-5)
        assert (mine[data["mask"].logical_not()] == 0).all() if mine.shape == (B, L, H) else True


@each_backend(OP)
@pytest.mark.parametrize(
    "options",
    [
        {"behaviour_floor": 0.8, "behaviour_cap": 1.3, "behaviour_mode": "token_mask"},
        {"geometric_cap": 1.1, "behaviour_mode": "none"},
        {"geometric_floor": 0.95},
        {"off_policy_delta": 0.01, "behaviour": False},
    ],
)
def test_masks_are_those_of_its_two_parts(backend, options):
    """Of tokens, where the gradient may be formed in the forward pass, and of sequences, which need all of their tokens first."""
    data = batch()
    want = run(data, fused=False, backend="reference", loss_type="dapo", **options)
    got = run(data, backend=backend, loss_type="dapo", **options)
    assert 0 < want[0][1 + METRICS.index("masked_count")] < data["mask"].sum()
    for mine, theirs in zip([*got[0], *got[1]], [*want[0], *want[1]], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


@each_backend(OP)
def test_packed_is_padded(backend):
    data = batch()
    keep = data["mask"]
    hidden, weight, _bias = data["head"]
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), keep.sum(1).cumsum(0)])
    padded = linear_policy_loss(
        hidden,
        weight.clone().requires_grad_(),
        data["labels"],
        data["old"],
        data["advantages"],
        mask=keep,
        backend=backend,
    )
    packed = linear_policy_loss(
        hidden[keep],
        weight.clone().requires_grad_(),
        data["labels"][keep],
        data["old"][keep],
        data["advantages"],
        cu_seqlens=offsets,
        backend=backend,
    )
    torch.testing.assert_close(padded.loss, packed.loss)
    for name in METRICS:
        torch.testing.assert_close(padded.metrics[name], packed.metrics[name])


@each_backend(OP)
@pytest.mark.parametrize("loss_type", ["grpo", "vespo"])
def test_masked_rows_do_not_leak_where_their_number_is_unknown(backend, loss_type, monkeypatch):
    data, options = batch(), {"backend": backend, "loss_type": loss_type, "entropy_coef": 0.02}
    want, grads = run(data, **options)
    monkeypatch.setattr("mgrpo_kernels.ops._rows.can_read", lambda device: False)  # as on a GPU
    monkeypatch.setattr(
        "mgrpo_kernels.ops.linear_token_stats.native.logits_room", lambda number, head: 0
    )  # of masked rows: never
    got, mine = run(data, **options)
    torch.testing.assert_close(torch.stack(got), torch.stack(want), rtol=1e-4, atol=1e-5)
    for one, two in zip(mine, grads, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)
    assert (mine[0][~data["mask"]] == 0).all()


@each_backend(OP)
def test_as_many_tokens_as_sequences(backend):
    """Advantages are then of the sequences, as in policy_loss."""
    hidden, weight = torch.randn(4, H), torch.randn(V, H, requires_grad=True)
    labels, old = torch.randint(0, V, (4,)), torch.full((4,), -6.0)
    advantages, cu_seqlens = torch.tensor([1.0, -2.0, 3.0, -4.0]), torch.tensor([0, 3, 3, 4, 4])
    options = {"cu_seqlens": cu_seqlens, "loss_type": "bnpo", "backend": backend}
    linear_policy_loss(hidden, weight, labels, old, advantages, **options).loss.backward()
    got, weight.grad = weight.grad, None
    stats = linear_token_stats(hidden, weight, labels, stats=("logprob",), backend=backend)
    policy_loss(stats.logprob, old, advantages, **options).loss.backward()
    torch.testing.assert_close(got, weight.grad, rtol=1e-4, atol=1e-6)


@each_backend(OP)
@pytest.mark.parametrize("frozen", [0, 1])
def test_frozen_parts_get_nothing(backend, frozen):
    data = batch(bias=False)
    whole = run(data, backend=backend)[1]
    leaves = [t.clone().requires_grad_(i != frozen) for i, t in enumerate(data["head"][:2])]
    linear_policy_loss(
        *leaves,
        data["labels"],
        data["old"],
        data["advantages"],
        mask=data["mask"],
        ref_logprobs=data["ref_logprobs"],
        kl_coef=0.1,
        behaviour_logprobs=data["behaviour"],
        temperature=0.9,
        softcap=8.0,
        backend=backend,
    ).loss.backward()
    assert leaves[frozen].grad is None
    assert torch.equal(leaves[1 - frozen].grad, whole[1 - frozen])


@each_backend(OP)
def test_without_gradients_it_is_only_a_loss(backend):
    data = batch()
    hidden, weight, bias = data["head"]
    with torch.no_grad():
        result = linear_policy_loss(
            hidden,
            weight,
            data["labels"],
            data["old"],
            data["advantages"],
            bias=bias,
            mask=data["mask"],
            backend=backend,
        )
    assert result.loss.isfinite()
    assert not result.loss.requires_grad


@each_backend(OP)
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "cispo", "dr_grpo"])
@pytest.mark.parametrize("behaviour", [False, True])
def test_blocks_of_rows_add_up(backend, loss_type, behaviour):
    data = batch(L=50)  # more rows than the least workspace holds: several blocks, each of them a loss of its own
    assert data["mask"].sum() > 2 * SMALL // (4 * V)
    data["old"][0, :8] -= 3.0  # some ratios are far out, in one block only
    options = {"loss_type": loss_type, "behaviour": behaviour, "behaviour_mode": "token_truncate", "entropy_coef": 0.02}
    want = run(data, fused=False, backend="reference", **options)
    got = run(data, backend=backend, workspace_bytes=SMALL, **options)
    for mine, theirs in zip(got[0], want[0], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(got[1], want[1], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


@each_backend(OP)
def test_a_retained_graph_gives_the_same_gradient_again(backend):
    hidden, weight = torch.randn(6, H), torch.randn(V, H, requires_grad=True)
    loss = linear_policy_loss(
        hidden, weight, torch.arange(6), None, torch.randn(2), cu_seqlens=torch.tensor([0, 4, 6]), backend=backend
    ).loss
    two = torch.tensor(2.0)
    grads = [torch.autograd.grad(loss, weight, two, retain_graph=True)[0].clone() for _ in range(3)]
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], grads[2])


@each_backend(OP)
def test_all_masked_and_retained_graph(backend):
    data = batch()
    data["mask"] = torch.zeros(B, L, dtype=torch.bool)
    (loss, *_), grads = run(data, backend=backend)
    assert loss == 0
    assert all((grad == 0).all() for grad in grads)

    data = batch()
    weight = data["head"][1].clone().requires_grad_()
    loss = linear_policy_loss(
        data["head"][0], weight, data["labels"], data["old"], data["advantages"], mask=data["mask"], backend=backend
    ).loss
    first = torch.autograd.grad(loss, weight, retain_graph=True)[0].clone()
    assert torch.equal(first * 2, torch.autograd.grad(loss, weight, torch.tensor(2.0))[0])


@pytest.mark.parametrize(
    "at_once", [three_matmuls.GRADIENT_COLUMNS, 128]
)  # columns of the 16-bit gradient: all, or in parts
@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.usefixtures("products_of_16_bits")
@pytest.mark.parametrize("backend", ["triton", pytest.param("native", marks=MULTIPLIES_16_BITS)])
def test_the_gradient_to_be_returned_holds_the_logits(backend, scale, at_once, monkeypatch):
    monkeypatch.setattr(three_matmuls, "GRADIENT_COLUMNS", at_once)
    rows, width, vocab = 200, 80, 501
    assert 2 * rows * vocab > 2 * width * vocab > SMALL  # bytes of all logits, of the gradient, of the workspace
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, rows // 4, width, generator=generator).bfloat16()
    weight = (torch.randn(vocab, width, generator=generator) * 0.2).bfloat16()
    labels = torch.randint(0, vocab, (4, rows // 4), generator=generator)
    old, advantages = torch.randn(4, rows // 4, generator=generator) * 0.1 - 6, torch.tensor([1.0, -1.0, 0.5, 2.0])

    def gradients(dtype, function):
        leaves = [t.to(dtype).requires_grad_() for t in (hidden, weight)]
        return torch.autograd.grad(function(*leaves) * scale, leaves)

    def eager(hidden, weight):
        logprob = torch.log_softmax(hidden @ weight.T, -1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        return policy_loss(logprob, old.to(logprob.dtype), advantages.to(logprob.dtype), loss_type="dapo").loss

    def fused(hidden, weight):
        return linear_policy_loss(
            hidden, weight, labels, old, advantages, loss_type="dapo", workspace_bytes=SMALL, backend=backend
        ).loss

    made, workspace = [], tiled.make_workspace
    with (
        poisoned_memory(),
        mock.patch.object(tiled, "make_workspace", lambda *arguments: made.append(workspace(*arguments)) or made[-1]),
    ):
        got = gradients(torch.bfloat16, fused)
    assert {each.dtype for each in made} == {torch.bfloat16}  # for the 16-bit gradient of the logits alone
    assert all(each.nbytes <= SMALL for each in made)
    plain, truth = gradients(torch.bfloat16, eager), gradients(torch.float64, eager)
    for mine, theirs, true in zip(got, plain, truth, strict=True):
        assert_no_worse_than_plain(mine, theirs, true)


@MULTIPLIES_16_BITS
def test_many_rows_in_a_small_workspace_take_as_many_columns_at_once_as_fit():
    rows, vocab = 1024, 300
    hidden, weight = torch.randn(rows, rows).bfloat16(), torch.randn(vocab, rows).bfloat16().requires_grad_()
    given = hidden, weight, torch.arange(rows) % vocab, None, torch.ones(1)
    with mock.patch.object(tiled, "accumulate", wraps=tiled.accumulate) as accumulate:
        linear_policy_loss(*given, cu_seqlens=torch.tensor([0, rows]), workspace_bytes=SMALL, backend="native")
    columns = SMALL // (2 * rows)
    assert {call.args[1].shape[0] for call in accumulate.call_args_list} == {rows, columns, vocab % columns}


@pytest.mark.usefixtures("products_of_16_bits")
@pytest.mark.parametrize(
    "rows, logits_dtype, blocks",
    [(80, torch.float32, 1), (81, torch.float32, 3), (208, torch.bfloat16, 1), (240, torch.bfloat16, 3)],
)
def test_one_block_where_the_logits_take_no_more_than_a_sum_of_the_weights_gradient(rows, logits_dtype, blocks):
    """Up to H rows in float32, and in 16 bits 2 H and as many as the workspace holds: no sum of float32 is read or written."""
    width, vocab = 80, 512
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, rows, width, generator=generator).bfloat16().requires_grad_()
    weight = (torch.randn(vocab, width, generator=generator) * 0.2).bfloat16().requires_grad_()
    labels = torch.randint(0, vocab, (1, rows), generator=generator)
    sums, empty, calls = [], torch.empty, three_matmuls.forward_backward

    def note(size, *arguments, **options):
        wide = options.get("dtype") in (None, torch.float32)
        sums.append(wide and isinstance(size, torch.Size) and size == weight.shape)
        return empty(size, *arguments, **options)

    seen = []

    def counted(given, head, labels, coefficients_of, *more):
        return calls(given, head, labels, lambda *of: seen.append(of[0]) or coefficients_of(*of), *more)

    with (
        mock.patch.object(three_matmuls.torch, "empty", note),
        mock.patch.object(three_matmuls, "forward_backward", counted),
    ):
        loss = linear_policy_loss(
            hidden,
            weight,
            labels,
            None,
            torch.tensor([1.0]),
            workspace_bytes=SMALL,
            logits_dtype=logits_dtype,
            backend="triton",
        ).loss
    assert len(seen) == blocks
    assert any(sums) == (blocks > 1)
    got = torch.autograd.grad(loss, (hidden, weight))
    wide = [each.detach().double().requires_grad_() for each in (hidden, weight)]
    truth = torch.autograd.grad(
        linear_policy_loss(*wide, labels, None, torch.tensor([1.0]), backend="reference").loss, wide
    )
    for mine, true in zip(got, truth, strict=True):
        assert (mine - true).norm() < 0.01 * true.norm()


@each_backend(OP)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_inputs_are_checked_once_and_the_backend_is_chosen_once(backend, level):
    """At the public boundary; what an op checks in case that it is called directly comes besides."""
    data, names, check_tensor = batch(), [], checks.check_tensor

    def check(name, *arguments, **options):
        if not any(frame.name.endswith("_op") for frame in traceback.extract_stack()):
            names.append(name)
        return check_tensor(name, *arguments, **options)

    with (
        mock.patch.object(checks, "check_tensor", check),
        mock.patch.object(backends, "choose", wraps=backends.choose) as choose,
    ):
        run(data, backend=backend, importance_level=level)
    once = "hidden weight bias labels old_logprobs mask advantages ref_logprobs behaviour_logprobs entropy"
    # "labels" stands for themselves, and for the log-probs that they are going to have.
    assert sorted(names) == sorted([*once.split(), "labels"])
    assert choose.call_count == 1


@each_backend(OP)
def test_compiles_whole_and_agrees(backend):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def function(hidden, weight, labels, advantages):
        return linear_policy_loss(hidden, weight, labels, None, advantages, backend=backend).loss * 2

    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for length in (4, 6, 9, 13):
        hidden, weight = torch.randn(3, length, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
        labels, advantages = torch.randint(0, V, (3, length)), torch.randn(3)
        pairs = [
            torch.autograd.grad(f(hidden, weight, labels, advantages), (hidden, weight)) for f in (compiled, function)
        ]
        for a, b in zip(*pairs, strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("in_16_bits", [True, False])
def test_which_dtypes_a_cpu_fuses_and_why(caplog, monkeypatch, in_16_bits):
    from mgrpo_kernels.ops.linear_policy_loss import _logged

    _logged.clear()
    monkeypatch.setattr(tiled, "multiplies_16_bits", lambda device, dtype: in_16_bits)
    data = batch(bias=False)
    with caplog.at_level(logging.INFO, "mgrpo_kernels"):
        for dtype in (torch.float16, torch.bfloat16):
            leaves = [t.to(dtype).requires_grad_() for t in data["head"][:2]]
            linear_policy_loss(
                *leaves, data["labels"], data["old"], data["advantages"], mask=data["mask"], backend="native"
            ).loss.backward()
    said = [record.message for record in caplog.records if record.message.startswith("linear_policy_loss ")]
    assert "composes the general ops: float16 gradients are formed after" in said[0]
    assert ("forms the gradient in the forward pass" if in_16_bits else "composes the general ops: this CPU") in said[1]


def test_second_derivative_is_refused():
    data = batch(bias=False)
    weight = data["head"][1].clone().requires_grad_()
    loss = linear_policy_loss(
        data["head"][0], weight, data["labels"], data["old"], data["advantages"], mask=data["mask"]
    ).loss
    (grad,) = torch.autograd.grad(loss.square(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivative only"):
        grad.sum().backward()


GOOD = {
    "hidden": torch.zeros(2, 3, 4, requires_grad=True),
    "weight": torch.zeros(5, 4),
    "labels": torch.zeros(2, 3, dtype=torch.int64),
    "old_logprobs": None,
    "advantages": torch.zeros(2),
}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"labels": torch.zeros(2, dtype=torch.int64)}, ValueError, r"labels: expected shape \(2, 3\), got \(2,\)"),
        ({"labels": None}, TypeError, "labels: expected a tensor, got NoneType"),
        (
            {"labels": torch.full((2, 3), 5)},
            ValueError,
            r"labels: expected values in \[0, 5\) where the mask is True, got 5",
        ),
        (
            {"hidden": torch.zeros(6, 4), "labels": torch.zeros(6, dtype=torch.int64)},
            ValueError,
            r"labels: expected padded \(B, L\), or packed",
        ),
        ({"weight": torch.zeros(5, 3)}, ValueError, r"weight: expected shape \(V, 4\)"),
        ({"advantages": torch.zeros(3)}, ValueError, r"advantages: expected shape \(2,\) or \(2, 3\), got \(3,\)"),
        ({"kl_coef": 1.0}, ValueError, "ref_logprobs: expected a tensor with kl_coef 1.0, got None"),
        ({"loss_type": "x"}, ValueError, "loss_type: expected one of"),
        ({"softcap": -1.0}, ValueError, "softcap: expected more than 0"),
        ({"workspace_bytes": 1}, ValueError, "workspace_bytes: expected at least 65536"),
        ({"vocab_start": 1}, ValueError, "vocab_start: expected None or 0 without a tp_group"),
        ({"temperature": 0}, ValueError, "temperature: expected more than 0"),
    ],
)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        linear_policy_loss(**{**GOOD, **change})
