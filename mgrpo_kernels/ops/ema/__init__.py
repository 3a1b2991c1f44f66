"""The momentum update: an exponential moving average over thousands of tensors at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mgrpo_kernels import backend as backends
from mgrpo_kernels import checks
from mgrpo_kernels.ops.ema import native, reference, triton
from mgrpo_kernels.ops.ema.memory import first_of_tied, local_of
from mgrpo_kernels.ops.ema.specs import Batch, Span, key
from mgrpo_kernels.sharded import is_dtensor

OP = "ema"
backends.register(OP, reference=reference, native=native, triton=triton)


def ema_update_(
    ema: Sequence[Tensor],
    params: Sequence[Tensor],
    decay: float | Tensor,
    *,
    emit: Sequence[Tensor] | None = None,
    stochastic_rounding: bool = False,
    seed: int | None = None,
    backend: str | None = None,
) -> None:
    """Set ``ema = decay * ema + (1 - decay) * param`` for every pair, in place, in one launch for each device.

    On a GPU, tensors that do not begin at a multiple of 16 bytes get a second launch, so that the others keep their wide loads.
    Computed in float32 (float64 for a float64 EMA). Where an EMA equals its parameter it stays so, bit for bit. Everything is
    checked before anything is written.

    Args:
        ema: tensors of any floating dtypes and shapes. DTensors: each rank updates its own shard, with no communication.
        params: as many, each of its EMA's shape, device and placement, of any floating dtype. Nothing here gets a gradient.
        decay: in [0, 1]; or a 0-d tensor (on the GPU it is not read by the host, and so not checked).
        emit: as many tensors again, which get the new EMA rounded to their dtype in the same pass.
        stochastic_rounding: round bfloat16 and float16 EMAs up or down at random, in proportion, so that steps below half a
            unit in the last place are not lost. Other dtypes are not touched by it.
        seed: int, needed with `stochastic_rounding`; use a new one for each update. The random bits depend on (seed, position in
            the list, element index in the whole tensor) alone, on every backend: shards round as the whole would.
        backend: ``reference``, ``native`` or ``triton``; None picks.

    A tensor that appears twice (tied parameters) is updated once, with its first position; each of its `emit` is written. A tensor may also
    be the EMA or the parameter of its own `emit`. Other tensors that are written to must not share memory.
    Of tensors with gaps in memory, such as slices of columns, only overlap with themselves is found.

    Raises:
        TypeError: wrong type or dtype.
        ValueError: lists of different lengths; a pair of different shape, device or placement; memory that overlaps itself or is shared
            in another way; one EMA for two parameters; decay out of range; no seed.
        BackendUnavailable: `backend` cannot run here.
    """
    checks.check_flag("stochastic_rounding", stochastic_rounding)
    if stochastic_rounding and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise ValueError(f"seed: expected an int with stochastic_rounding, got {seed!r}")
    _check_decay(decay)
    lists = {"ema": list(ema), "params": list(params)} | ({} if emit is None else {"emit": list(emit)})
    for name, tensors in lists.items():
        if len(tensors) != len(lists["ema"]):
            raise ValueError(f"{name}: expected as many tensors as ema, {len(lists['ema'])}, got {len(tensors)}")
    for name, tensors in lists.items():
        for i, ema_i in enumerate(lists["ema"]):
            _check_pair(f"{name}[{i}]", tensors[i], f"ema[{i}]", ema_i)
    # While compiling there is no memory to look at; each of two tied tensors is then updated in a copy, with the same result.
    positions = range(len(lists["ema"]))
    first = list(positions) if torch.compiler.is_compiling() else first_of_tied(lists)
    kept = [i for i in positions if first[i] == i and lists["ema"][i].numel()]
    spans = {i: _span(f"ema[{i}]", lists["ema"][i]) if stochastic_rounding else Span(0, 1, 1) for i in kept}
    local = {name: [local_of(tensor).detach() for tensor in tensors] for name, tensors in lists.items()}

    by_device: dict[torch.device, list[int]] = {}
    for i in kept:
        if local["ema"][i].numel():  # a rank may hold nothing of a sharded tensor
            by_device.setdefault(local["ema"][i].device, []).append(i)
    chosen = {device: backends.choose(OP, backend, device, torch.float32) for device in by_device}
    for device, members in by_device.items():
        keys = [word for i in members for word in key(seed, i)] if stochastic_rounding and seed is not None else []
        ema_update_op(
            [local["ema"][i] for i in members],
            [local["params"][i] for i in members],
            [local["emit"][i] for i in members] if emit is not None else [],
            _on(device, decay),
            keys,
            [number for i in members for number in spans[i]],
            chosen[device],
        )
    for i in positions:
        if emit is not None and first[i] != i:
            local["emit"][i].copy_(local["ema"][i])


def _on(device: torch.device, decay: float | Tensor) -> Tensor:
    """Return the decay as 0-d float64 on the device: a number travels with a kernel, not by a copy that the host waits for."""
    if isinstance(decay, Tensor) and decay.device.type != "cpu":
        return decay.to(device, torch.float64)
    return torch.full((), float(decay), dtype=torch.float64, device=device)


def _check_decay(decay: float | Tensor) -> None:
    if isinstance(decay, Tensor):
        checks.check_tensor("decay", decay, dim=0)
        if decay.device.type != "cpu":
            return
        decay = decay.item()
    checks.check_number("decay", decay, at_least=0.0, at_most=1.0)


def _check_pair(name: str, tensor: Any, of: str, ema: Tensor) -> None:
    checks.check_tensor(name, tensor)
    if tensor.shape != ema.shape:
        raise ValueError(
            f"{name}: expected the shape of {of}, {checks.shape_text(ema.shape)}, got {checks.shape_text(tensor.shape)}"
        )
    placed, wanted = _placement(tensor), _placement(ema)
    if placed != wanted:
        raise ValueError(f"{name}: expected the placement of {of}, {wanted}, got {placed}")
    if is_dtensor(tensor) and any(placement.is_partial() for placement in tensor.placements):
        raise ValueError(
            f"{name}: expected a DTensor that is sharded or replicated, got placements {tensor.placements}"
        )
    if tensor.device != ema.device:
        raise ValueError(f"{name}: expected a tensor on {of}'s device {ema.device}, got one on {tensor.device}")


def _placement(tensor: Tensor) -> Any:
    return (tensor.device_mesh, tensor.placements) if is_dtensor(tensor) else "a plain tensor"


def _span(name: str, tensor: Tensor) -> Span:
    """Return the place of this rank's part in the whole tensor."""
    if not is_dtensor(tensor):
        return Span(0, max(1, tensor.numel()), 0)
    if any(type(placement).__name__ == "_StridedShard" for placement in tensor.placements):
        raise ValueError(f"{name}: expected plain Shard placements with stochastic_rounding, got {tensor.placements}")
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    cut = [dim for dim in range(tensor.dim()) if shape[dim] != tensor.shape[dim]]
    if len(cut) > 1:
        raise ValueError(
            f"{name}: expected a tensor sharded along one dimension with stochastic_rounding, got {tensor.placements}"
        )
    if not cut:
        return Span(0, max(1, tensor.numel()), 0)
    behind = tensor.shape[cut[0] + 1 :].numel()
    return Span(offset[cut[0]] * behind, max(1, shape[cut[0]] * behind), tensor.shape[cut[0]] * behind)


@torch.library.custom_op("mgrpo_kernels::ema_update_", mutates_args=("ema", "emit"))
def ema_update_op(
    ema: list[Tensor],
    params: list[Tensor],
    emit: list[Tensor],  # as many, or none
    decay: Tensor,  # 0-d float64
    keys: list[int],  # two for each tensor, or none
    spans: list[int],  # three for each tensor
    backend: str,
) -> None:
    """Update every tensor of `ema`, all of one device, and write every one of `emit`."""
    _check_batch(ema, params, emit, decay, keys, spans)
    written = [tensor.contiguous() for tensor in ema], [tensor.contiguous() for tensor in emit]
    backends.implementation(OP, backend).update_(
        Batch(
            written[0],
            [tensor.contiguous() for tensor in params],
            written[1],
            decay,
            list(zip(keys[::2], keys[1::2], strict=True)),
            [Span(*spans[i : i + 3]) for i in range(0, len(spans), 3)],
        )
    )
    for targets, results in zip((ema, emit), written, strict=True):
        for target, result in zip(targets, results, strict=True):
            if result is not target:
                target.copy_(result)


def _check_batch(
    ema: list[Tensor], params: list[Tensor], emit: list[Tensor], decay: Tensor, keys: list[int], spans: list[int]
) -> None:
    """Check the op's lists against each other."""
    number = len(ema)
    for name, got, lengths in (
        ("params", len(params), {number}),
        ("emit", len(emit), {number, 0}),
        ("keys", len(keys), {2 * number, 0}),
        ("spans", len(spans), {3 * number}),
    ):
        if got not in lengths:
            raise ValueError(f"{name}: expected length {' or '.join(map(str, lengths))}, got {got}")
    if any(inner < 1 for inner in spans[1::3]):
        raise ValueError(f"spans: expected at least 1 inner element each, got {spans[1::3]}")
    checks.check_tensor("decay", decay, dtypes=(torch.float64,), dim=0)
    for i, each in enumerate(ema):
        checks.check_tensor(f"ema[{i}]", each, device=decay.device)
        for name, tensors in (("params", params), ("emit", emit)):
            if tensors:
                checks.check_inside(decay.device, (name, tensors[i], each.shape, checks.FLOATS))


@ema_update_op.register_fake
def _(*args: Any) -> None:
    return None
