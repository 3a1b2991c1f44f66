"""Training with several processes started by torchrun: FSDP2 shards the weights, and each rank processes its share of a step's prompts.

The trainer calls these functions with one process too. They then do nothing, or return their argument.

Sampling and scoring use the whole weights, which are gathered once for both, because ranks generate different numbers of tokens. The update
runs on shards and gathers one layer at a time. Random numbers depend on a prompt's position in the step, and counts in the loss are those
of the whole step, so the number of ranks changes only rounding.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from types import MethodType
from typing import Any, ClassVar, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from mgrpo_kernels.train.errors import FailedElsewhereError, UsageError
from mgrpo_kernels.train.model.policy import Policy
from mgrpo_kernels.train.run.stopping import Abandoned

T = TypeVar("T")


class ShownElsewhereError(UsageError):
    """A UsageError of another rank, which has shown the message."""

    shown_elsewhere = True


@contextmanager
def processes(device: torch.device, timeout: float) -> Iterator[None]:
    """Run the block as one rank of the processes that torchrun has started, if any.

    Args:
        device: device of this run; with cuda, each process on a machine uses the GPU of its local rank.
        timeout: seconds that a rank waits for the others before it raises an error.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # gloo as well, for small values, and for the agreement on checkpoints in the background.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    wait = timedelta(seconds=timeout)
    store, number, size = next(rendezvous("env://", timeout=wait))
    if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
        # When torchrun restarts the ranks, it keeps its store with the addresses of the previous ranks. (With several machines,
        # only the one with the failure counts the restart; docs/long_runs.md names a variable that gives each restart a new store.)
        store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group(backend, store=store, rank=number, world_size=size, timeout=wait)
    try:
        yield
    finally:
        dist.destroy_process_group()


def world() -> int:
    """Return the number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return the rank of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_first() -> bool:
    """Return True for the rank that writes files and prints."""
    return rank() == 0


def my_share(size: int) -> range:
    """Return which of `size` items belong to this rank: a contiguous range. The sizes of all ranks differ by at most one."""
    return range(size * rank() // world(), size * (rank() + 1) // world())


# --- Exchange of values


def all_gather(value: T) -> list[T]:
    """Return the values of all ranks in order, on every rank. Tensors should be on the CPU."""
    if world() == 1:
        return [value]
    values: list[Any] = [None] * world()
    dist.all_gather_object(values, value)
    return values


def from_first(value: T) -> T:
    """Return the first rank's value on every rank."""
    if world() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def total(*numbers: float) -> list[float]:
    """Return the sum of each number over the ranks."""
    return _reduced(numbers, dist.ReduceOp.SUM)


def largest(number: float) -> float:
    """Return the largest number of all ranks."""
    return _reduced([number], dist.ReduceOp.MAX)[0]


def on_any(flag: bool) -> bool:
    """Return whether the flag is set on any rank."""
    return bool(largest(float(flag)))


def _reduced(numbers: Sequence[float], operation: Any) -> list[float]:
    if world() == 1:
        return list(numbers)
    values = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(values, operation)
    return values.tolist()


def added(values: dict[str, float]) -> dict[str, float]:
    """Return the sum of each value over the ranks; a value that a rank does not have counts as 0."""
    parts = all_gather(values)
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: sum(part.get(name, 0.0) for part in parts) for name in names}


@contextmanager
def together() -> Iterator[None]:
    """Run the block, which must not communicate, on every rank, and wait for all. An error on one rank is raised on all.

    Raises:
        UsageError: the first rank that failed raised a UsageError.
        FailedElsewhereError: another rank raised any other error, whose text is in the message.
    """
    if world() == 1:
        yield
        return
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    errors = all_gather(None if error is None else (isinstance(error, UsageError), f"{type(error).__name__}: {error}"))
    failed = next((number for number, each in enumerate(errors) if each is not None), None)
    if failed is None:
        return
    if error is not None and failed == rank():
        raise error
    is_usage, text = errors[failed] or (False, "")
    raise (ShownElsewhereError if is_usage else FailedElsewhereError)(f"rank {failed}: {text}") from error


@contextmanager
def sampling() -> Iterator[None]:
    """Run the block on every rank. If it is abandoned on one, because that process is asked to end, it is abandoned on all.

    Raises:
        Abandoned: the block was abandoned on some rank; raised on all of them.
    """
    abandoned = False
    try:
        yield
    except Abandoned:
        abandoned = True
    if on_any(abandoned):
        raise Abandoned


# --- Weights


def shard(policy: Policy) -> None:
    """Shard a policy's weights over the ranks, in place: one group per decoder layer, and one for head, embeddings and norm.

    The weights must be the same on every rank. They stay in float32. If the policy computes in bfloat16, they are gathered in bfloat16, and
    gradients are summed in float32. Gradients are summed over the ranks, not averaged, because a loss is divided by the count of all ranks.

    Raises:
        UsageError: transformers does not name the model's layers.
    """
    if world() == 1:
        return
    model = policy.model
    layers = _layers(model)
    mesh = init_device_mesh(policy.device.type, (world(),))
    half = policy.dtype if policy.dtype != torch.float32 else None
    precision = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32)
    for module in [*layers, model]:
        fully_shard(module, mesh=mesh, mp_policy=precision)
    for unit in _units(model):
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)  # gloo cannot multiply within a sum
    # The loss uses the head as a weight, so the decoder runs without it: the root's hooks must wrap that run instead of forward().
    model.run = MethodType(_run, model)
    register_fsdp_forward_method(model, "run")
    policy.hidden = partial(model.run, policy.hidden)  # type: ignore[method-assign]
    policy.packed_hidden = partial(model.run, policy.packed_hidden)  # type: ignore[method-assign]


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Keep the whole weights on every rank inside the block, which may run the model any number of times, without gradients."""
    if not isinstance(model, FSDPModule):
        yield
        return
    model.set_reshard_after_forward(False)
    for unit in _units(model):
        unit.unshard()
    try:
        yield
    finally:
        for unit in _units(model):
            unit.reshard()
        model.set_reshard_after_forward(True)
        model.set_reshard_after_forward(False, recurse=False)  # the head is used after the decoder


def _run(model: nn.Module, work: Callable[..., Tensor], *args: Any, **options: Any) -> Tensor:
    out = work(*args, **options)
    return out.clone() if out._is_view() else out  # FSDP's hook on a view would be lost if the view were written to


def checkpoint_activations(model: nn.Module) -> None:
    """Keep only the input of each decoder layer, and let the backward pass recompute its activations."""
    for layer in _layers(model):
        inner = layer.forward

        def forward(*args: Any, inner: Any = inner, **options: Any) -> Any:
            if not torch.is_grad_enabled():  # sampling and scoring have no backward pass
                return inner(*args, **options)
            # No layer draws random numbers.
            return checkpoint(inner, *args, use_reentrant=False, preserve_rng_state=False, **options)

        layer.forward = forward
        # The lean decoder reads this. (transformers' own checkpointing would also require training mode.)
        layer.gradient_checkpointing = True


def _layers(model: Any) -> list[Any]:
    """Return the decoder's layers.

    Raises:
        UsageError: transformers does not name the layers.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        raise UsageError(f"model: expected one whose layers are named in _no_split_modules, got {type(model).__name__}")
    return layers


def idle_pass(policy: Policy) -> None:
    """Take part in the forward and backward pass of the other ranks with a gradient of 0."""
    with policy.autocast():
        hidden = policy.hidden(torch.zeros(1, 1, dtype=torch.int64, device=policy.device))
        weight, bias = policy.head()
        zero = nn.functional.linear(hidden, weight, bias).sum() * 0.0
    zero.backward()


def _units(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def whole(tensor: Tensor) -> Tensor:
    """Return the whole tensor if this rank holds a shard of it. Every rank must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


# --- Results of all ranks


def from_all(value: T) -> T:
    """Return the concatenated values of all ranks, on every rank and on the CPU.

    A value is a tensor ``(B,)`` or ``(B, R)``, which is padded to the longest R, or a list, None, or a named tuple of such values.
    """
    return value if world() == 1 else _joined(all_gather(on_cpu(value)))


def on_cpu(value: Any) -> Any:
    """Return a tensor, or the tensors of a named tuple, on the CPU; return anything else unchanged."""
    if isinstance(value, Tensor):
        return value.cpu()
    return type(value)(*map(on_cpu, value)) if hasattr(value, "_fields") else value


def _joined(parts: Sequence[Any]) -> Any:
    first = parts[0]
    if isinstance(first, Tensor):
        width = max(part.shape[-1] for part in parts)
        return torch.cat(
            [nn.functional.pad(part, (0, width - part.shape[1])) if part.dim() == 2 else part for part in parts]
        )
    if hasattr(first, "_fields"):
        return type(first)(*map(_joined, zip(*parts, strict=True)))
    if isinstance(first, list):
        return [each for part in parts for each in part]
    assert all(part is None for part in parts), f"from_all: {type(first).__name__}"
    return None


class Nowhere:
    """Replaces the files of a rank that writes none."""

    unwritten: ClassVar[list[str]] = []

    def write(self, values: Any) -> None:
        """Do nothing; the first rank writes."""

    def sync(self) -> int:
        return 0  # only the first rank's value is used

    def close(self) -> None:
        """Do nothing."""
