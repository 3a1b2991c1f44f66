"""The statistics ops under a caller's settings: default dtype, dtype of the temperature, meta tensors, hidden states without width."""

import math

import pytest
import torch
import torch.distributed as dist
from contract import BACKENDS, each_backend
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

from mgrpo_kernels import linear_policy_loss, linear_token_stats, token_stats_from_logits

OP = "linear_token_stats"
N, H, V = 9, 6, 40
VARIANTS = ("exact", "tolerance", "kept")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
variants = pytest.mark.parametrize("variant", VARIANTS)


def options(variant: str, labels: torch.Tensor, vocab: int = V) -> dict:
    if variant == "kept":
        others = (labels.unsqueeze(-1) + torch.tensor([0, 3, 5])) % vocab
        return {"kept": others}
    return {"gradient_tolerance": 2**-8} if variant == "tolerance" else {}


def make(dtype, vocab: int = V):
    generator = torch.Generator().manual_seed(0)
    shapes = (N, H), (vocab, H), (vocab,)
    leaves = [torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype) for shape in shapes]
    return [each.requires_grad_() for each in leaves], torch.arange(N) * 3 % vocab


@pytest.fixture
def float64_by_default():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def everything(variant: str, backend: str, dtype: torch.dtype) -> list[torch.Tensor]:
    (hidden, weight, bias), labels = make(dtype)
    given = {"bias": bias, "backend": backend, **options(variant, labels)}
    stats = linear_token_stats(hidden, weight, labels, stats=("logprob", "entropy", "self_certainty"), **given)
    grads = torch.autograd.grad(sum(each.sum() for each in stats), (hidden, weight, bias))
    advantages = torch.linspace(-1, 1, N, dtype=torch.float32)
    loss = linear_policy_loss(
        hidden, weight, labels, None, advantages, cu_seqlens=torch.tensor([0, 4, N]), entropy_coef=0.1, **given
    )
    return [*stats, *grads, loss.loss, *loss.metrics.values(), *torch.autograd.grad(loss.loss, (hidden, weight, bias))]


@each_backend(OP)
@variants
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_default_dtype_changes_nothing(backend, variant, dtype, request):
    want = everything(variant, backend, dtype)
    request.getfixturevalue("float64_by_default")
    for one, other in zip(everything(variant, backend, dtype), want, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@each_backend(OP)
@variants
def test_a_temperature_in_float64_gives_statistics_in_float32(backend, variant):
    (hidden, weight, _), labels = make(torch.float32)
    given = {"stats": ("logprob", "entropy", "self_certainty"), "backend": backend, **options(variant, labels)}
    temperature = torch.linspace(0.5, 2, N)
    results = []
    for each in (temperature, temperature.double()):
        stats = linear_token_stats(hidden, weight, labels, temperature=each, **given)
        results.append([*stats, *torch.autograd.grad(sum(each.sum() for each in stats), (hidden, weight))])
    for one, other in zip(*results, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@variants
def test_meta_tensors_give_shapes_and_dtypes(variant):
    tokens, vocab = 70_000, 152_064  # whose logits are more than 2^31
    hidden, weight = (
        torch.empty(rows, 8, dtype=torch.bfloat16, device="meta", requires_grad=True) for rows in (tokens, vocab)
    )
    labels = torch.empty(tokens, dtype=torch.int64, device="meta")
    given = options(variant, labels, vocab) if variant != "kept" else {"kept": labels.unsqueeze(-1).expand(-1, 512)}
    stats = linear_token_stats(hidden, weight, labels, backend="reference", **given)
    assert stats.logprob.shape == stats.entropy.shape == (tokens,)
    assert stats.logprob.dtype == torch.float32
    for leaf, grad in zip((hidden, weight), torch.autograd.grad(stats.logprob.sum(), (hidden, weight)), strict=True):
        assert (grad.shape, grad.dtype, grad.device) == (leaf.shape, leaf.dtype, leaf.device)


@pytest.mark.parametrize("backend", [each for each in BACKENDS if each != "triton"])
@variants
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hidden_states_without_width_give_equal_logits(backend, variant, dtype):
    hidden, weight = (torch.zeros(V, 0, dtype=dtype, requires_grad=True) for _ in range(2))
    labels = torch.arange(V)  # more than the kernel for few rows takes
    given = {"backend": backend, **options(variant, labels)}
    stats = linear_token_stats(hidden, weight, labels, **given)
    of = 3 if variant == "kept" else V
    torch.testing.assert_close(stats.logprob, torch.full((V,), -math.log(of)))
    loss = linear_policy_loss(hidden, weight, labels, None, torch.ones(V), cu_seqlens=torch.tensor([0, V]), **given)
    for grad in torch.autograd.grad(stats.logprob.sum() + loss.loss, (hidden, weight)):
        assert grad.shape[1] == 0


@each_backend("token_stats")
def test_statistics_of_logits_too_are_in_float32_with_a_temperature_in_float64(backend):
    logits, labels = torch.randn(N, V, requires_grad=True), torch.arange(N)
    results = []
    for temperature in (torch.linspace(0.5, 2, N), torch.linspace(0.5, 2, N).double()):
        stats = token_stats_from_logits(logits, labels, temperature=temperature, backend=backend)
        results.append([*stats[:2], *torch.autograd.grad(stats.logprob.sum() + stats.entropy.sum(), logits)])
    for one, other in zip(*results, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("workspace_bytes", [2**16, 2**21, 3 * 2**21, None])
def test_statistics_on_a_cpu_are_the_same_bits_without_a_gradient_and_with_a_tolerance(dtype, workspace_bytes):
    torch.manual_seed(0)
    hidden, weight, labels = torch.randn(70, 64).to(dtype), torch.randn(5003, 64).to(dtype), torch.arange(70)
    given = {"stats": ("logprob", "entropy", "self_certainty"), "workspace_bytes": workspace_bytes, "backend": "native"}
    want = linear_token_stats(hidden, weight, labels, **given)
    for tolerance in (None, 2**-8):
        got = linear_token_stats(hidden.requires_grad_(), weight, labels, gradient_tolerance=tolerance, **given)
        assert all(map(torch.equal, got, want))


@variants
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_exported_graph_takes_any_number_of_tokens(variant, dtype):
    (hidden, weight, _), labels = make(dtype)
    hidden, weight = hidden.detach().view(3, 3, H), weight.detach()
    given = options(variant, labels.view(3, 3))

    class Model(torch.nn.Module):
        def forward(self, hidden, labels, kept):
            keywords = {**given, "kept": kept} if "kept" in given else given
            stats = linear_token_stats(hidden, weight, labels, **keywords)
            loss = linear_policy_loss(hidden, weight, labels, None, stats.entropy[:, 0], **keywords).loss
            return stats.logprob, stats.entropy, loss

    arguments = hidden, labels.view(3, 3), given.get("kept", labels.view(3, 3, 1))
    exported = torch.export.export(Model(), arguments, dynamic_shapes=({0: torch.export.Dim.DYNAMIC},) * 3)
    for number in (2, 3, 7):
        more = [each.repeat(3, *[1] * (each.dim() - 1))[:number] for each in arguments]
        for one, other in zip(exported.module()(*more), Model()(*more), strict=True):
            torch.testing.assert_close(one, other)


@variants
def test_a_sharded_weight_is_refused_at_once(variant):
    (hidden, weight, _), labels = make(torch.float32)
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        sharded = distribute_tensor(weight.detach(), init_device_mesh("cpu", (1,)), [Shard(0)]).requires_grad_()
        for call in (
            lambda: linear_token_stats(hidden, sharded, labels, **options(variant, labels)),
            lambda: linear_policy_loss(
                hidden,
                sharded,
                labels,
                None,
                torch.ones(N),
                cu_seqlens=torch.tensor([0, N]),
                **options(variant, labels),
            ),
        ):
            with pytest.raises(TypeError, match="weight: expected a plain tensor, got a DTensor"):
                call()
    finally:
        dist.destroy_process_group()
