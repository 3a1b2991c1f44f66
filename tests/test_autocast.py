"""The linear ops under autocast: the dtype, the cast of the weight, and what is cached for how long."""

import contextlib

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from mgrpo_kernels import linear_policy_loss, linear_token_stats

V, H, N = 200, 8, 6


class Casts(TorchDispatchMode):
    """Counts the casts of tensors of the weight's shape."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += (
            func is torch.ops.aten._to_copy.default
            and args[0].shape == (V, H)
            and kwargs.get("dtype") == torch.bfloat16
        )
        return func(*args, **(kwargs or {}))


@pytest.fixture
def head():
    return torch.randn(N, H), nn.Parameter(torch.randn(V, H)), torch.randint(0, V, (N,))


def region(**options):
    return torch.autocast("cpu", torch.bfloat16, **options)


def stats(hidden, weight, labels):
    return linear_token_stats(hidden, weight, labels).logprob


def loss(hidden, weight, labels):
    return linear_policy_loss(hidden[None], weight, labels[None], None, torch.ones(1)).loss


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("first", ["op", "linear"])
def test_the_weight_is_cast_once_in_a_region(head, grad, first):
    hidden, weight, labels = head
    with Casts() as casts, torch.set_grad_enabled(grad), region():
        if first == "linear":
            nn.functional.linear(hidden, weight)
        stats(hidden, weight, labels)
        with region():
            loss(hidden, weight, labels)
        nn.functional.linear(hidden, weight)
        assert casts.count == 1
    with Casts() as casts, region():
        stats(hidden, weight, labels)
        assert casts.count == 1


@pytest.mark.parametrize(
    "weight_of", [lambda w: w.detach(), lambda w: w * 1.0, lambda w: w.view(V, H)], ids=["frozen", "computed", "view"]
)
def test_other_weights_are_cast_on_every_call_as_autocast_does(head, weight_of):
    hidden, weight, labels = head
    with Casts() as casts, region():
        other = weight_of(weight)
        for _ in range(2):
            stats(hidden, other, labels)
        assert casts.count == 2


def test_without_the_cache_nothing_is_kept(head):
    with Casts() as casts, region(cache_enabled=False):
        stats(*head)
        stats(*head)
        assert casts.count == 2


def test_gradients_are_those_of_separate_casts(head):
    hidden, weight, labels = head

    def gradient():
        return torch.autograd.grad(stats(hidden, weight, labels).sum() + 2 * loss(hidden, weight, labels), weight)[0]

    with region():
        got = gradient()
    with region(cache_enabled=False):
        want = gradient()
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
    with region():  # one backward pass after the other, through the same cast
        for each in (stats(hidden, weight, labels).sum(), stats(hidden, weight, labels).sum()):
            each.backward()
    alone = torch.autograd.grad(linear_token_stats(hidden.bfloat16(), weight.bfloat16(), labels).logprob.sum(), weight)[
        0
    ]
    assert torch.equal(weight.grad, alone * 2)


@pytest.mark.parametrize("inside", [False, True])
def test_the_weight_of_the_next_step_is_used(head, inside):
    hidden, weight, labels = head
    # A fused optimizer leaves no trace in the weight's version: within one region, its step is not seen by nn.functional.linear either.
    optimizer = torch.optim.AdamW([weight], lr=0.5, fused=not inside)
    outer = region() if inside else contextlib.nullcontext()
    with outer:
        for _ in range(3):
            with region():
                got = stats(hidden, weight, labels)
            want = linear_token_stats(hidden.bfloat16(), weight.detach().bfloat16(), labels).logprob
            assert torch.equal(got, want)
            got.sum().backward()
            optimizer.step()
            optimizer.zero_grad()


def test_scoring_first_leaves_the_graph_whole(head):
    hidden, weight, labels = head
    with region():
        with torch.no_grad():
            nn.functional.linear(hidden, weight)
            stats(hidden, weight, labels)
        with torch.inference_mode():
            stats(hidden, weight, labels)
        stats(hidden, weight, labels).sum().backward()
    assert weight.grad.abs().sum() > 0


def test_regions_of_two_dtypes(head):
    hidden, weight, labels = head
    with torch.autocast("cpu", torch.float16):
        stats(hidden, weight, labels)
        with region():
            got = stats(hidden, weight, labels)
    assert torch.equal(got, linear_token_stats(hidden.bfloat16(), weight.bfloat16(), labels).logprob)


def test_hooks_of_the_caller_do_not_see_the_cast(head):
    hidden, weight, labels = head
    hidden.requires_grad_()
    with region():
        checkpoint(stats, hidden, weight, labels, use_reentrant=False).sum().backward()
        got, hidden.grad = hidden.grad, None
        stats(hidden, weight, labels).sum().backward()
    assert torch.equal(got, hidden.grad)


def test_compiles_whole(head):
    def function(hidden, weight, labels):
        with region():
            return stats(hidden, weight, labels).sum() + loss(hidden, weight, labels)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    got, want = (torch.autograd.grad(each(*head), head[1])[0] for each in (compiled, function))
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
