"""The numbers of tokens that a caller gives, so that a GPU too leaves rows out: the same results, fewer rows, no wait, no silent error."""

from unittest import mock

import pytest
import torch
from contract import each_backend
from torch._dynamo.testing import CompileCounterWithBackend

from mgrpo_kernels import backend as backends
from mgrpo_kernels import linear_policy_loss, linear_token_stats
from mgrpo_kernels.ops import _rows
from mgrpo_kernels.ops import linear_policy_loss as loss_module
from mgrpo_kernels.ops.kept_token_stats import kept_token_stats_op
from mgrpo_kernels.ops.linear_policy_loss import linear_policy_loss_op, three_matmuls
from mgrpo_kernels.ops.linear_token_stats import native, reference, triton
from mgrpo_kernels.ops.linear_token_stats.op import linear_token_stats_backward_op, linear_token_stats_op
from mgrpo_kernels.ops.policy_loss import options as loss_options

OP = "linear_token_stats"
HEADS = {"reference": reference, "native": native, "triton": triton}
N, H, V = 20, 16, 67
UNMASKED, WITH_GRADIENT = 15, 6
DEVICES = pytest.mark.parametrize("on_gpu", [False, True], ids=["cpu", "as on a gpu"])


def make(masked_nan=True):
    """Return hidden and weight, with a gradient; labels; a mask; and tokens with a gradient, all of them unmasked."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(rows, H, generator=generator) for rows in (N, V))
    mask = torch.arange(N) % 4 != 2
    live = mask & (torch.arange(N) % 3 == 1)
    assert (int(mask.sum()), int(live.sum())) == (UNMASKED, WITH_GRADIENT)
    # The native backend, which runs on a CPU alone, is never given masked rows whose logits are stored.
    hidden[~mask] = torch.nan if masked_nan else 3.0
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(0, V, (N,), generator=generator), mask, live


@pytest.fixture
def device(on_gpu, monkeypatch):
    """Send the CPU down a GPU's path, where the host counts nothing."""
    if on_gpu:
        monkeypatch.setattr(_rows, "can_read", lambda device: False)


def statistics(case, backend, **counts):
    hidden, weight, labels, mask, live = case
    stats = linear_token_stats(hidden, weight, labels, mask=mask, backend=backend, **counts)
    by = torch.where(live, 0.5, 0.0)
    gradients = torch.autograd.grad(((stats.logprob - 0.2 * stats.entropy) * by).sum(), [hidden, weight])
    return [stats.logprob, stats.entropy, *gradients]


@DEVICES
@each_backend(OP)
@pytest.mark.parametrize("stored", [True, False])
def test_rows_that_a_count_leaves_out_are_not_multiplied(backend, stored, on_gpu, device, monkeypatch):
    if not stored:
        for module in (native, triton):
            monkeypatch.setattr(module, "logits_room", lambda number, head: 0)
    case = make(masked_nan=not (on_gpu and backend == "native"))
    want = statistics(case, "reference")
    forward = mock.patch.object(HEADS[backend], "forward", wraps=HEADS[backend].forward)
    backward = mock.patch.object(HEADS[backend], "backward", wraps=HEADS[backend].backward)
    for counts, rows in (
        ({"unmasked_tokens": UNMASKED, "tokens_with_gradient": WITH_GRADIENT}, (UNMASKED, WITH_GRADIENT)),
        ({"unmasked_tokens": UNMASKED, "tokens_with_gradient": WITH_GRADIENT + 3}, (UNMASKED, WITH_GRADIENT + 3)),
        ({"unmasked_tokens": UNMASKED}, (UNMASKED, UNMASKED)),
        ({"tokens_with_gradient": WITH_GRADIENT}, (N, WITH_GRADIENT)),
        ({"tokens_with_gradient": N}, (N, N)),
        ({}, (N, N)),
    ):
        with forward as forwards, backward as backwards:
            got = statistics(case, backend, **counts)
        seen = tuple(each.call_args.args[0].shape[0] for each in (forwards, backwards))
        assert seen == (rows if on_gpu else (UNMASKED, WITH_GRADIENT))
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        assert all(bool((each[~case[3]] == 0).all()) for each in got[:3])


@DEVICES
@each_backend(OP)
def test_the_bits_are_those_without_a_count(backend, on_gpu, device):
    """Statistics of float32 always; gradients where the same rows are multiplied, because the sum of the weight's runs over rows."""
    case = make(masked_nan=not (on_gpu and backend == "native"))
    want = statistics(case, backend)
    with mock.patch.object(_rows, "can_read", return_value=True):
        exact = statistics(case, backend)
    got = statistics(case, backend, unmasked_tokens=UNMASKED, tokens_with_gradient=WITH_GRADIENT)
    assert all(torch.equal(one, other) for one, other in zip(got, exact, strict=True))
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@DEVICES
@each_backend(OP)
def test_no_rows_and_all_rows(backend, device):
    hidden, weight, labels, *_ = make()
    mask = torch.zeros(N, dtype=torch.bool)
    hidden = hidden.detach().nan_to_num()
    for leaf in (hidden.requires_grad_(), hidden[:0].detach().requires_grad_()):
        rows = leaf.shape[0]
        stats = linear_token_stats(
            leaf, weight, labels[:rows], mask=mask[:rows], unmasked_tokens=0, tokens_with_gradient=0, backend=backend
        )
        grads = torch.autograd.grad(stats.logprob.sum(), [leaf, weight])
        assert all(bool((each == 0).all()) for each in (stats.logprob, stats.entropy, *grads))
    with mock.patch.object(HEADS[backend], "forward", wraps=HEADS[backend].forward) as forward:
        linear_token_stats(hidden, weight, labels, mask=~mask, unmasked_tokens=N, backend=backend)
    assert forward.call_args.args[0].data_ptr() == hidden.data_ptr()  # not copied
    linear_token_stats(hidden, weight, labels, unmasked_tokens=N, backend=backend)


@each_backend(OP)
@pytest.mark.parametrize("count", [UNMASKED - 1, UNMASKED + 1, 0, N])
def test_a_wrong_number_of_unmasked_tokens_raises_on_a_cpu(backend, count):
    match = f"unmasked_tokens: expected {UNMASKED}, the number of True in mask, got {count}"
    with pytest.raises(ValueError, match=match):
        statistics(make(), backend, unmasked_tokens=count)
    with pytest.raises(ValueError, match=match):
        loss_of(make(), backend, unmasked_tokens=count)


@each_backend(OP)
@pytest.mark.parametrize("count", [UNMASKED - 1, UNMASKED + 1, 0, N])
@pytest.mark.parametrize("on_gpu", [True])
def test_a_wrong_number_of_unmasked_tokens_is_nan_on_a_gpu(backend, count, device):
    case = make()
    assert all(bool(each.isnan().all()) for each in statistics(case, backend, unmasked_tokens=count))
    result, gradients = loss_of(case, backend, unmasked_tokens=count)
    assert all(bool(each.isnan().any()) for each in (result.loss, *gradients))
    hidden, weight, labels, mask, _ = case
    with pytest.raises(ValueError, match=f"unmasked_tokens: expected {UNMASKED}"):
        linear_token_stats(hidden, weight, labels, mask=mask, unmasked_tokens=count, debug=True, backend=backend)


@DEVICES
@each_backend(OP)
@pytest.mark.parametrize("count", [WITH_GRADIENT - 1, 0])
@pytest.mark.parametrize("compute", ["statistics", "token loss", "sequence loss", "with a KL penalty"])
def test_too_few_tokens_with_a_gradient_are_no_silent_error(backend, count, compute, on_gpu, device):
    case, counts = make(), {"tokens_with_gradient": count, "unmasked_tokens": UNMASKED}
    options = {"sequence loss": {"importance_level": "sequence"}, "with a KL penalty": {"kl_coef": 0.1}}.get(
        compute, {}
    )
    if compute == "with a KL penalty":
        options["ref_logprobs"] = torch.full((N,), -9.0)
        counts["tokens_with_gradient"] = WITH_GRADIENT  # enough for the advantages
    run = statistics if compute == "statistics" else loss_of

    def gradients():
        result = run(case, backend, **counts, **options)
        return result[-2:] if compute == "statistics" else result[1]

    if on_gpu:
        assert all(bool(each.isnan().any()) for each in gradients())
    else:
        with pytest.raises(ValueError, match="tokens_with_gradient: expected at least"):
            gradients()


def loss_of(case, backend, **options):
    hidden, weight, labels, mask, _ = case
    advantages = torch.where(torch.arange(N) % 3 == 1, torch.linspace(-1, 2, N) + 0.05, 0.0)  # also of masked tokens
    if options.get("importance_level") == "sequence":  # of whole sequences, with 8 unmasked tokens, but two have none
        advantages = torch.tensor([0.0, 1.0, 0.0, -1.0])
    offsets = torch.arange(0, N + 1, 5)
    result = linear_policy_loss(
        hidden, weight, labels, None, advantages, cu_seqlens=offsets, mask=mask, backend=backend, **options
    )
    return result, torch.autograd.grad(result.loss, [hidden, weight])


@DEVICES
@each_backend("linear_policy_loss")
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_loss_multiplies_the_rows_that_are_counted(backend, level, on_gpu, device):
    """Of a loss of tokens all unmasked rows forward, and for the gradient those with an advantage; of sequences in two passes."""
    case = make(masked_nan=not (on_gpu and backend == "native"))
    live = WITH_GRADIENT if level == "token" else int(case[3][5:10].sum() + case[3][15:].sum())
    want, want_gradients = loss_of(case, "reference", importance_level=level)
    fused = mock.patch.object(three_matmuls, "forward_backward", wraps=three_matmuls.forward_backward)
    composed = mock.patch.object(HEADS[backend], "backward", wraps=HEADS[backend].backward)
    for counts, rows in (({"unmasked_tokens": UNMASKED, "tokens_with_gradient": live}, (UNMASKED, live)), ({}, (N, N))):
        with fused as fuses, composed as composes:
            result, gradients = loss_of(case, backend, importance_level=level, **counts)
        rows = rows if on_gpu else (UNMASKED, live)
        if fuses.called:
            assert (fuses.call_args.args[0].shape[0], fuses.call_args.args[-1]) == rows
        else:
            assert backend == "reference" or level == "sequence"
            assert composes.call_args.args[0].shape[0] == rows[1]
        torch.testing.assert_close(result.loss, want.loss)
        for name, value in want.metrics.items():
            torch.testing.assert_close(result.metrics[name], value, msg=name)
        for one, other in zip(gradients, want_gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["unmasked_tokens", "tokens_with_gradient"])
@pytest.mark.parametrize(
    ("count", "error", "text"),
    [
        (-1, ValueError, "expected 0 to 20, the number of tokens, got -1"),
        (N + 1, ValueError, "expected 0 to 20, the number of tokens, got 21"),
        (True, TypeError, "expected an int or None, got bool"),
        (3.0, TypeError, "expected an int or None, got float"),
        (torch.tensor(3), TypeError, "expected an int or None, got Tensor"),
    ],
)
def test_what_is_no_number_of_tokens(name, count, error, text):
    for run in (statistics, loss_of):
        with pytest.raises(error, match=f"{name}: {text}"):
            run(make(), "reference", **{name: count})
    hidden, weight, labels, *_ = make()
    with pytest.raises(ValueError, match="unmasked_tokens: expected 20, the number of tokens, without a mask, got 3"):
        linear_token_stats(hidden, weight, labels, unmasked_tokens=3)


@DEVICES
def test_compiles_whole_and_a_count_recompiles_once(device):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def function(hidden, weight, labels, mask, live, unmasked, with_gradient):
        stats = linear_token_stats(
            hidden,
            weight,
            labels,
            mask=mask,
            backend="reference",
            unmasked_tokens=unmasked,
            tokens_with_gradient=with_gradient,
        )
        return torch.where(live, stats.logprob, 0.0).sum()

    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for rows in (9, 13, 17, 20):
        hidden, weight, labels, mask, live = (each[:rows] if each.shape[0] == N else each for each in make())
        hidden = hidden.detach().requires_grad_()
        arguments = (hidden, weight, labels, mask, live, int(mask.sum()), int(live.sum()))
        one, other = (torch.autograd.grad(run(*arguments), [hidden, weight]) for run in (compiled, function))
        torch.testing.assert_close(one, other)
    assert counter.frame_count <= 3


@DEVICES
def test_counts_under_autocast_and_no_second_derivative(device):
    hidden, weight, labels, mask, live = make()
    counts = {"unmasked_tokens": UNMASKED, "tokens_with_gradient": WITH_GRADIENT}
    results = []
    for keywords in ({}, counts):
        with torch.autocast("cpu", torch.bfloat16):
            stats = linear_token_stats(hidden, weight, labels, mask=mask, backend="reference", **keywords)
        loss = torch.where(live, stats.logprob, 0.0).sum()
        results.append([stats.logprob.detach(), *torch.autograd.grad(loss, [hidden, weight], create_graph=True)])
        with pytest.raises(RuntimeError, match="expected a first derivative only, got a second"):
            results[-1][2].sum().backward()
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)


def test_tokens_without_a_gradient_multiply_no_kept_entries():
    """With kept sets nothing has to be counted: a row without a gradient has no entries in the backward pass."""
    hidden, weight, labels, mask, live = make()
    kept = torch.stack([labels, (labels + 1) % V], -1)
    module = backends.implementation("kept_token_stats", "native")
    with mock.patch.object(module, "hidden_gradient", wraps=module.hidden_gradient) as spied:
        stats = linear_token_stats(hidden, weight, labels, mask=mask, kept=kept, backend="native")
        torch.autograd.grad(torch.where(live, stats.logprob, 0.0).sum(), hidden)
    assert ((spied.call_args.args[2] >= 0).any(-1) == live).all()


# ------------------------------------------------------------------------------------------------------- without a wait
# Tensors on the meta device hold no values: what reads one, or has a size that depends on values, raises.


def fake(**shapes):
    dtypes = {"labels": torch.int64, "mask": torch.bool, "offsets": torch.int64, "kept": torch.int64}
    return {
        name: torch.empty(shape, dtype=dtypes.get(name, torch.float32), device="meta") for name, shape in shapes.items()
    }


def statistics_of_fakes(backend, counts):
    """Run the bodies of the forward and the backward op, as the GPU runs them, except for the kernels."""
    given = fake(hidden=(N, H), weight=(V, H), labels=N, mask=N)
    tensors = (given["hidden"], given["weight"], None, given["labels"], given["mask"], None)
    options = (1.0, 1.0, None, None, 0, None, torch.float32, *counts)
    logprob, entropy, _, *saved = linear_token_stats_op._init_fn(
        *tensors, *options, True, False, True, None, False, backend
    )
    linear_token_stats_backward_op._init_fn(
        torch.ones_like(logprob), None, None, *tensors, *options, None, entropy, *saved, True, True, False, backend
    )


def loss_of_fakes(backend, counts):
    given = dict.fromkeys(loss_module.ARGUMENTS.names) | loss_options.to_arguments(
        loss_options.LossOptions(loss_type="grpo")
    )
    given |= fake(hidden=(N, H), weight=(V, H), labels=N, mask=N, offsets=5, advantages=4, old=N)
    given |= {"temperature": 1.0, "logit_scale": 1.0, "logits_dtype": torch.float32, "backend": backend}
    given |= dict(zip(loss_module.COUNTS, counts, strict=True))
    given |= {"need_hidden": True, "need_weight": True, "need_bias": False}
    linear_policy_loss_op._init_fn(*loss_module.ARGUMENTS.pack(given))


def kept_of_fakes(backend, counts):
    given = fake(hidden=(N, H), weight=(V, H), labels=N, mask=N, kept=(N, 4))
    tensors = (given["hidden"], given["weight"], None, given["labels"], given["mask"], None, given["kept"])
    kept_token_stats_op._init_fn(*tensors, 1.0, 1.0, None, None, 0, None, torch.float32, False, backend)


@pytest.fixture
def no_kernels(monkeypatch):
    """Let no kernel be launched, and a GPU have 132 multiprocessors."""
    for name in ("linear_token_stats", "linear_policy_loss", "kept_token_stats", "policy_loss"):
        module = backends.implementation(name, "triton")
        monkeypatch.setattr(module, "launch", lambda *args, **options: None)
        monkeypatch.setattr(module, "processors", lambda device: 132, raising=False)


RUNS = {"statistics": statistics_of_fakes, "loss": loss_of_fakes, "kept": kept_of_fakes}
COUNTS = [(None, None), (UNMASKED, None), (None, WITH_GRADIENT), (UNMASKED, WITH_GRADIENT), (N, N), (0, 0)]


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize(
    ("run", "backend"), [("statistics", "reference"), ("statistics", "triton"), ("loss", "triton"), ("kept", "triton")]
)
def test_the_host_never_waits_for_a_gpu(run, backend, counts, no_kernels):
    RUNS[run](backend, counts)


MUTANTS = {
    "can_read": (lambda device: True, RuntimeError),
    "first_rows": (lambda count, *sets: sets[0].nonzero().squeeze(-1), NotImplementedError),
    "take": (lambda value, rows: value[rows >= 0], NotImplementedError),
}


@pytest.mark.parametrize("run", ["statistics", "loss"])
@pytest.mark.parametrize("name", MUTANTS)
def test_the_guard_sees_a_wait(run, name, no_kernels):
    mutant, error = MUTANTS[name]
    with mock.patch.object(_rows, name, mutant), pytest.raises(error):
        RUNS[run]("triton", (UNMASKED, WITH_GRADIENT))
