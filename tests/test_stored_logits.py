"""Raw logits that the forward pass stores for the backward pass: within the workspace, only for a gradient, and for the same results."""

from unittest import mock

import pytest
import torch
from contract import poisoned_memory, watch_memory
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from mgrpo_kernels import linear_policy_loss, linear_token_stats
from mgrpo_kernels.ops import _head
from mgrpo_kernels.ops._triton import tuning
from mgrpo_kernels.ops.linear_token_stats import native, op, tiled
from mgrpo_kernels.ops.linear_token_stats import triton as gpu

ALL = ("logprob", "entropy", "self_certainty")
ROWS, WIDTH, VOCAB = 12, 8, 320
LOGITS = 4 * ROWS * VOCAB  # bytes
TILE = 6 * 8 * 128
both_backends = pytest.mark.parametrize("backend", ["native", "triton"])


@pytest.fixture(autouse=True)
def small_tiles():
    """Let tiles and default workspaces be small, as with a vocabulary of a hundred times the size."""
    with (
        mock.patch.object(_head, "MIN_WORKSPACE", TILE),
        mock.patch.object(native, "tile_shape", return_value=tiled.TileShape(8, 128)),
        mock.patch.object(tuning, "of", return_value=tuning.Tuning(forward_tile=(8, 128))),
    ):
        yield


def make(dtype=torch.float32, rows=ROWS):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(rows, WIDTH, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, WIDTH, generator=generator).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, VOCAB, (rows,), generator=generator)


def columns_multiplied_again(backend, run):
    """Return the columns whose logits the backward pass of `run` multiplies for once more, summed over rows."""
    passes = native.CpuPasses if backend == "native" else gpu.GpuPasses
    seen, fill = [], passes.fill_gradient

    def counted(self, x, hidden, head, *rest):
        seen.append(hidden.shape[0] * head.weight.shape[0])
        fill(self, x, hidden, head, *rest)

    with mock.patch.object(passes, "fill_gradient", counted):
        result = run()
    return sum(seen), result


def gradients(backend, tensors, workspace, *, live=None, mask=None, **options):
    hidden, weight, labels = tensors
    bias = torch.linspace(-1, 1, VOCAB).to(hidden.dtype).requires_grad_()
    stats = linear_token_stats(
        hidden, weight, labels, bias=bias, mask=mask, stats=ALL, workspace_bytes=workspace, backend=backend, **options
    )
    by = torch.linspace(0.5, 1.5, hidden.shape[0])
    loss = sum((stat * by * (1.0 if live is None else live)).sum() for stat in stats)
    return torch.autograd.grad(loss, [hidden, weight, bias])


EVERY = torch.arange(ROWS)
CASES = {
    "all rows": {},
    "masked rows": {"mask": EVERY % 3 != 0},
    "rows without a gradient": {"live": (EVERY % 4 == 1).float()},
    "masked rows, and rows without a gradient": {"mask": EVERY % 3 != 0, "live": (EVERY % 4 == 1).float()},
    "no row has a gradient": {"live": torch.zeros(ROWS)},
    "all rows are masked": {"mask": torch.zeros(ROWS, dtype=torch.bool)},
    "softcap, scale, temperature a row": {
        "softcap": 4.0,
        "logit_scale": -0.8,
        "temperature": torch.linspace(0.5, 2.0, ROWS),
    },
}


@both_backends
@pytest.mark.parametrize(
    ("dtype", "logits_dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_gradients_are_those_of_logits_computed_again(backend, dtype, logits_dtype, case, share):
    options = CASES[case] | {"logits_dtype": logits_dtype}
    tensors, workspace = make(dtype), TILE + int(share * 2 * LOGITS)
    with poisoned_memory():
        got = gradients(backend, tensors, workspace, **options)
    with mock.patch.object(op, "logits_room", return_value=0):
        again = gradients(backend, tensors, workspace, **options)
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    for each, other in zip(got, again, strict=True):
        torch.testing.assert_close(each, other, **tolerance)


@both_backends
def test_the_larger_the_workspace_the_fewer_logits_are_computed_again(backend):
    tensors = make()
    by_workspace = [
        columns_multiplied_again(backend, lambda workspace=workspace: gradients(backend, tensors, workspace))[0]
        for workspace in (TILE, TILE + LOGITS // 4, TILE + LOGITS // 2, TILE + 2 * LOGITS)
    ]
    assert by_workspace == sorted(by_workspace, reverse=True)
    assert by_workspace[0] >= 0.7 * ROWS * VOCAB
    assert 0.3 * ROWS * VOCAB <= by_workspace[2] <= 0.75 * ROWS * VOCAB
    assert by_workspace[3] == 0


@both_backends
@pytest.mark.parametrize("rows", [1, ROWS])
def test_by_default_few_logits_are_all_stored(backend, rows):
    tensors = make(torch.bfloat16, rows)
    assert columns_multiplied_again(backend, lambda: gradients(backend, tensors, None))[0] == 0


@both_backends
def test_the_composed_loss_stores_them_too(backend):
    hidden, weight, labels = make(torch.bfloat16)

    def run():
        offsets = torch.tensor([0, 5, ROWS], dtype=torch.int32)
        loss = linear_policy_loss(
            hidden,
            weight,
            labels,
            None,
            torch.ones(2),
            cu_seqlens=offsets,
            importance_level="sequence",
            backend=backend,
        ).loss
        return torch.autograd.grad(loss, [hidden, weight])

    assert columns_multiplied_again(backend, run)[0] == 0


def held_after_forward(backend, workspace, *, grad=True, **options):
    """Return the bytes that the result of the forward pass keeps alive, and the most that it took."""
    hidden, weight, labels = make()
    held = []
    with watch_memory() as memory:
        with torch.set_grad_enabled(grad):
            stats = linear_token_stats(hidden, weight, labels, workspace_bytes=workspace, backend=backend, **options)
        node = stats.logprob.grad_fn
        while node is not None and not hasattr(node, "saved_tensors"):
            node = node.next_functions[0][0]
        held.extend(tensor.nbytes for tensor in (node.saved_tensors if node is not None else ()) if tensor is not None)
    inputs = sum(t.nbytes for t in (hidden, weight, labels))
    return max(0, sum(held) - inputs), memory


@both_backends
@pytest.mark.parametrize("workspace", [TILE, TILE + LOGITS // 3, LOGITS, 2 * LOGITS])
def test_stored_logits_and_a_tile_fit_the_workspace(backend, workspace):
    held, memory = held_after_forward(backend, workspace)
    small = 100 * ROWS + 2**11  # statistics
    assert held <= workspace + small
    assert memory.largest <= workspace
    assert memory.peak <= workspace + small
    if workspace == 2 * LOGITS:
        assert held >= LOGITS


@both_backends
def test_nothing_is_stored_where_no_gradient_can_come(backend):
    assert held_after_forward(backend, None, grad=False)[0] == 0
    _, scored = held_after_forward(backend, None, grad=False)
    assert scored.largest < LOGITS  # a tile
    hidden, weight, labels = make()
    with watch_memory() as memory:
        linear_token_stats(hidden.detach(), weight.detach(), labels, backend=backend)
    assert memory.largest < LOGITS


@both_backends
def test_a_graph_is_used_twice(backend):
    hidden, weight, labels = make()
    stats = linear_token_stats(hidden, weight, labels, backend=backend)
    loss = stats.logprob.sum() + stats.entropy.sum()
    first = torch.autograd.grad(loss, [hidden, weight], retain_graph=True)
    second = torch.autograd.grad(loss, [hidden, weight])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@both_backends
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_head_gives_the_same_gradients(backend, reentrant):
    hidden, weight, labels = make()

    def loss(h, w):
        return linear_token_stats(h, w, labels, backend=backend).logprob.sum()

    want = torch.autograd.grad(loss(hidden, weight), [hidden, weight])
    checkpoint(loss, hidden, weight, use_reentrant=reentrant).backward()
    assert torch.equal(hidden.grad, want[0])
    assert torch.equal(weight.grad, want[1])


@both_backends
def test_compiled_code_does_not_depend_on_how_many_are_stored(backend):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def loss(h, w, labels):
        return linear_token_stats(h, w, labels, backend=backend, workspace_bytes=TILE + LOGITS // 2).logprob.sum()

    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    for rows in (3, 5, ROWS, 40):
        hidden, weight, labels = make(rows=rows)
        got, want = (torch.autograd.grad(f(hidden, weight, labels), hidden)[0] for f in (compiled, loss))
        torch.testing.assert_close(got, want)
    assert counter.frame_count <= 2


def test_none_are_stored_where_less_than_a_sixth_fits():
    head = op.Head(torch.empty(152064, 1, device="meta").bfloat16(), None, 1.0, 1.0, None, 0, None)
    full = 600 * tiled.padded(152064, tiled.ALIGNED)
    assert gpu.logits_room(600, head) == full  # all of them
    assert 0 < gpu.logits_room(3971, head) < full * 2
    assert gpu.logits_room(3972, head) == 0
    wide = op.Head(torch.empty(152064, 1, device="meta"), None, 1.0, 1.0, None, 0, None)
    room = (native.WORKSPACE_BYTES - 4 * 8 * 128) // 4  # beside a tile
    last = 6 * room // 152064  # rows
    assert native.logits_room(300, wide) == 300 * 152064  # all of them
    assert native.logits_room(last, wide) == room
    assert native.logits_room(last + 1, wide) == 0
    with mock.patch.object(tuning, "of", return_value=tuning.Tuning(matmul="fused")):
        assert gpu.logits_room(600, head) == 0


@both_backends
def test_the_number_of_tokens_stays_free_where_it_decides_whether_logits_are_stored(backend):
    """Stored with few tokens, not with many: neither torch.compile nor torch.export may see a difference."""
    _, weight, _ = make()

    class Model(torch.nn.Module):
        def forward(self, hidden, labels):
            stats = linear_token_stats(hidden, weight, labels, workspace_bytes=2**16, backend=backend)
            return stats.logprob, stats.entropy

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(Model(), fullgraph=True, backend=counter)
    hidden, _, labels = make(rows=3)
    dynamic = ({0: torch.export.Dim("tokens", min=2)},) * 2
    exported = torch.export.export(Model(), (hidden.detach(), labels), dynamic_shapes=dynamic).module()
    stored = set()
    for rows in (3, 700, 40, 2):
        hidden, _, labels = make(rows=rows)
        with mock.patch.object(op, "stored_rows", wraps=op.stored_rows) as found:
            got = torch.autograd.grad(sum(compiled(hidden, labels)).sum(), [hidden, weight])
        stored.add(found.called)
        want = torch.autograd.grad(sum(Model()(hidden, labels)).sum(), [hidden, weight])
        for one, other in zip(
            (*got, *exported(hidden.detach(), labels)), (*want, *Model()(hidden, labels)), strict=True
        ):
            torch.testing.assert_close(one, other)
    assert stored == {True, False}
    assert counter.frame_count <= 2
