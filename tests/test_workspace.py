"""The memory that the linear ops take: a bounded workspace, whatever the number of tokens. Every allocation counts, inside the ops too."""

import contextlib
from unittest import mock

import pytest
import torch
import transformers
from contract import Memory, each_backend, watch_memory

from mgrpo_kernels import fuse_lm_head, linear_policy_loss, linear_token_stats, use_backend
from mgrpo_kernels.ops._triton import tuning
from mgrpo_kernels.ops.linear_token_stats import OP, native, reference, tiled, triton
from mgrpo_kernels.ops.linear_token_stats.specs import Head

H, V = 16, 2048
WORKSPACE = 2**16  # the least that is allowed
FEW, MANY = 32, 96  # tokens
DTYPES = [torch.float32, torch.bfloat16]
PER_TOKEN = (
    40 * H
)  # bytes for each token: gradient of hidden in float32 and as returned, states, statistics and the like
SMALL = 2**13  # scalars, and what is as long as the vocabulary


@contextlib.contextmanager
def small_defaults():
    """Let every backend's own workspace be as small as `WORKSPACE`."""
    sizes = tuning.Tuning(forward_tile=(128, 256), workspace_bytes=WORKSPACE)
    with (
        mock.patch.object(reference, "WORKSPACE_BYTES", WORKSPACE),
        mock.patch.object(native, "tile_shape", return_value=tiled.TileShape(64, 256)),
        mock.patch.object(native, "WORKSPACE_BYTES", WORKSPACE),
        mock.patch.object(tuning, "of", return_value=sizes),
    ):
        yield


def workspace_of(backend: str, *, whole_rows: bool = False) -> int:
    """Return the bound: at least one row's logits fit where whole rows are taken, on the reference backend with their copies."""
    if backend == "reference":
        return max(WORKSPACE, reference.COPIES * 4 * V)
    return max(WORKSPACE, 4 * V) if whole_rows else WORKSPACE


def make(number, dtype):
    generator = torch.Generator().manual_seed(number)
    hidden = torch.randn(number, H, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(V, H, generator=generator).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, V, (number,), generator=generator)


def hold(few: Memory, many: Memory, *, single: int, total: int) -> None:
    """Hold the largest allocation, the peak, and its growth from `FEW` to `MANY` tokens, which may fill the workspace but no more."""
    assert many.largest <= single, f"an allocation of {many.largest} bytes, allowed {single}"
    for memory, number in ((few, FEW), (many, MANY)):
        allowed = total + PER_TOKEN * number + SMALL
        assert memory.peak <= allowed, f"a peak of {memory.peak} bytes with {number} tokens, allowed {allowed}"
    growth, allowed = many.peak - few.peak, WORKSPACE + PER_TOKEN * (MANY - FEW)
    assert allowed < 2 * V * (MANY - FEW) / 2  # half of what 16-bit logits would add
    assert growth <= allowed, f"{growth} bytes more with {MANY} tokens than with {FEW}, allowed {allowed}"


def gradients_of_weight(backend: str, dtype: torch.dtype, *, fused: bool = False) -> tuple[int, int]:
    """Return (largest, all) bytes that the weight's gradient takes while it is formed, the returned one included."""
    returned, in_float32 = V * H * dtype.itemsize, 4 * V * H
    if dtype == torch.float32:
        return returned, returned
    whole = backend == "reference" or fused  # a float32 accumulator of all of it, or of a span of columns
    return (in_float32 if whole else returned), returned + (in_float32 if whole else in_float32 // 4)


def of_matmul(backend: str, dtype: torch.dtype, columns: int = 256) -> int:
    """Return what 16-bit matmuls over a tile's columns of logits take: a rearranged, or a widened, part of their factors.

    Triton's backward pass has as many columns in a tile as the workspace holds for all rows, the others at most `columns`.
    """
    if backend == "triton":
        columns = max(columns, WORKSPACE // (dtype.itemsize * FEW))
    return 0 if dtype == torch.float32 else max(2 * 128 * max(columns, MANY), 4 * V * H)


@each_backend(OP)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_token_stats(backend, dtype, masked):
    forwards, backwards = [], []
    for number in (FEW, MANY):
        hidden, weight, labels = make(number, dtype)
        mask = torch.arange(number) % 4 != 0 if masked else None
        with watch_memory() as memory:
            stats = linear_token_stats(
                hidden,
                weight,
                labels,
                mask=mask,
                backend=backend,
                workspace_bytes=WORKSPACE,
                stats=("logprob", "entropy", "self_certainty"),
            )
        forwards.append(memory)
        loss = sum(stat.sum() for stat in stats)
        with watch_memory() as memory:
            loss.backward()
        backwards.append(memory)
    workspace, matmul = workspace_of(backend), of_matmul(backend, dtype)
    hold(*forwards, single=max(workspace, matmul), total=workspace + matmul)
    largest, returned = gradients_of_weight(backend, dtype)
    hold(*backwards, single=max(workspace, largest, matmul), total=workspace + returned + matmul)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sharpness", [1.0, 0.1])
def test_token_stats_to_a_tolerance(dtype, sharpness):
    """With sharp rows few columns are copied; flat ones take the dense way."""
    forwards, backwards = [], []
    for number in (FEW, MANY):
        hidden, weight, labels = make(number, dtype)
        hidden = (sharpness * hidden.detach()).requires_grad_()
        with watch_memory() as memory:
            stats = linear_token_stats(
                hidden, weight, labels, backend="triton", workspace_bytes=WORKSPACE, gradient_tolerance=2.0**-6
            )
        forwards.append(memory)
        with watch_memory() as memory:
            (stats.logprob.sum() + stats.entropy.sum()).backward()
        backwards.append(memory)
    entries, matmul = 8 * triton.entries_room(V), of_matmul("triton", dtype)
    of_columns = 64 * V  # their order, and what it is found with
    copies = 256 * H * (dtype.itemsize + 4)
    largest, returned = gradients_of_weight("triton", dtype)
    for memories, single, total in (
        (forwards, max(WORKSPACE, matmul), WORKSPACE + matmul),
        (backwards, max(WORKSPACE, matmul, largest), WORKSPACE + matmul + returned + of_columns + copies),
    ):
        for memory, number in zip(memories, (FEW, MANY), strict=True):
            assert memory.largest <= max(single, number * entries)
            assert memory.peak <= total + (PER_TOKEN + entries) * number + SMALL
        few, many = memories
        assert many.peak - few.peak <= WORKSPACE + (PER_TOKEN + entries) * (MANY - FEW)


@each_backend(OP)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_policy_loss(backend, dtype, level):
    """By token the gradient is formed in the forward pass where the backend gains by it; by sequence the ops are composed."""
    forwards, backwards = [], []
    for number in (FEW, MANY):
        hidden, weight, labels = make(number, dtype)
        hidden, labels = hidden.detach().view(4, -1, H).requires_grad_(), labels.view(4, -1)
        with watch_memory() as memory:
            loss = linear_policy_loss(
                hidden,
                weight,
                labels,
                None,
                torch.tensor([1.0, -1.0, 0.5, 0.0]),
                importance_level=level,
                entropy_coef=0.1,
                workspace_bytes=WORKSPACE,
                backend=backend,
            ).loss
        forwards.append(memory)
        with watch_memory() as memory:
            loss.backward()
        backwards.append(memory)
    fused = level == "token" and (backend, dtype) in {
        ("native", torch.float32),
        ("triton", torch.float32),
        ("triton", torch.bfloat16),
        *([("native", torch.bfloat16)] if tiled.multiplies_16_bits(torch.device("cpu"), torch.bfloat16) else []),
    }
    workspace = workspace_of(backend, whole_rows=fused)
    largest, returned = gradients_of_weight(backend, dtype, fused=fused)
    matmul = of_matmul(backend, dtype, V if fused else 256)
    formed = {"single": max(workspace, largest, matmul), "total": workspace + returned + matmul}
    none = {"single": workspace, "total": workspace}
    scored = {"single": max(workspace, matmul), "total": workspace + matmul}
    hold(*forwards, **(formed if fused else scored))
    hold(*backwards, **(none if fused else formed))


@each_backend(OP)
def test_fused_head_of_a_model(backend):
    """Forward and backward of the whole model; a second and a third model of twice the size show what else it takes."""
    config = transformers.LlamaConfig(
        vocab_size=V,
        hidden_size=H,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    seen = []
    for number in (FEW, MANY):
        torch.manual_seed(0)
        with use_backend(backend), small_defaults():
            model = fuse_lm_head(transformers.AutoModelForCausalLM.from_config(config))
            tokens = torch.randint(0, V, (4, number // 4))
            with watch_memory() as memory:
                sum(stat.sum() for stat in model(input_ids=tokens, labels=tokens)[:2]).backward()
        seen.append(memory)
    few, many = seen
    workspace, parameters = workspace_of(backend), 4 * sum(p.numel() for p in model.parameters())
    activations = 200 * H  # bytes a token of the layers: a fifth of its logits
    assert many.largest <= max(workspace, 4 * V * H)
    assert many.peak <= workspace + parameters + 4 * V * H + activations * MANY
    assert many.peak - few.peak <= activations * (MANY - FEW) < 4 * V * (MANY - FEW) / 2


def test_the_defaults_are_those_of_the_documentation():
    in_16_bits = (8, 12) if tiled.multiplies_16_bits(torch.device("cpu"), torch.bfloat16) else (4, 4)
    for dtype, forward, backward in ((torch.float32, 4, 4), (torch.bfloat16, *in_16_bits)):
        head, shape = Head(torch.zeros(1, 1, dtype=dtype), None, 1.0, 1.0, None, 0, None), native.tile_shape(dtype)
        assert shape.rows * shape.columns * head.raw_dtype.itemsize == forward * 2**20
        assert shape.rows * shape.columns * tiled.backward_bytes(head, native.CpuPasses()) == backward * 2**20
    assert native.WORKSPACE_BYTES == 224 * 2**20
    assert reference.WORKSPACE_BYTES == 64 * 2**20
    sizes = tuning.Tuning()
    assert sizes.workspace_bytes == 512 * 2**20
    assert sizes.forward_tile[0] * sizes.forward_tile[1] * 4 <= 256 * 2**20
