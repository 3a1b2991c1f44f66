"""Many processes, as torchrun starts them: FSDP2 shards the weights, and each rank takes its share of a step's prompts.

The trainer calls these functions whether there are many processes or one; with one they do nothing, or hand back what they were given.

Sampling and scoring run on whole weights, gathered once for both, so that ranks may take as many tokens as their prompts need. The
update runs on shards, a layer gathered at a time. Random numbers follow from a prompt's place in the step, and every count in the loss is
the step's: how many ranks share the work changes rounding only.
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
    """Another rank has shown the message."""

    shown_elsewhere = True


@contextmanager
def processes(device: torch.device, timeout: float) -> Iterator[None]:
    """Join the other processes that torchrun has started, if any, inside the block.

    Args:
        device: where this run computes; each process of a machine takes a GPU of its own.
        timeout: seconds that a rank waits for the others before it ends with an error.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # The CPU's backend too: small facts travel by it, and checkpoints are agreed on by it in the background.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    wait = timedelta(seconds=timeout)
    store, number, size = next(rendezvous("env://", timeout=wait))
    if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
        # torchrun keeps its store when it starts the ranks again, and in it where those before could be reached. (Of many machines, only
        # that of the failure counts the restart; docs/long_runs.md has the variable that gives each round a store of its own.)
        store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group(backend, store=store, rank=number, world_size=size, timeout=wait)
    try:
        yield
    finally:
        dist.destroy_process_group()


def world() -> int:
    """Return how many ranks there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def is_first() -> bool:
    """Return whether this rank writes and prints."""
    return rank() == 0


def my_share(size: int) -> range:
    """Return which of `size` things are this rank's: neighbours, as many as the others have, or one less."""
    return range(size * rank() // world(), size * (rank() + 1) // world())


# --- Agreeing


def all_gather(value: T) -> list[T]:
    """Return every rank's value, in the ranks' order, on all ranks. Tensors should be on the CPU."""
    if world() == 1:
        return [value]
    values: list[Any] = [None] * world()
    dist.all_gather_object(values, value)
    return values


def from_first(value: T) -> T:
    """Return the first rank's value on all ranks."""
    if world() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def total(*numbers: float) -> list[float]:
    """Return the sum over the ranks of each number."""
    return _reduced(numbers, dist.ReduceOp.SUM)


def largest(number: float) -> float:
    """Return the largest of the ranks' numbers."""
    return _reduced([number], dist.ReduceOp.MAX)[0]


def on_any(flag: bool) -> bool:
    """Return whether it is so on any rank."""
    return bool(largest(float(flag)))


def _reduced(numbers: Sequence[float], operation: Any) -> list[float]:
    if world() == 1:
        return list(numbers)
    values = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(values, operation)
    return values.tolist()


def added(values: dict[str, float]) -> dict[str, float]:
    """Return the sum over the ranks of each value, of which a rank may lack some."""
    parts = all_gather(values)
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: sum(part.get(name, 0.0) for part in parts) for name in names}


@contextmanager
def together() -> Iterator[None]:
    """Run the block, without collectives in it, on every rank, and wait for all: an error on one is raised on all.

    Raises:
        UsageError: as the first rank that failed raised it.
        FailedElsewhereError: any other error of another rank, with its text.
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
    """Run the block on every rank; where one was abandoned, because its process is to end, all are.

    Raises:
        Abandoned: on all ranks.
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
    """Shard a policy's weights over the ranks, in place: a group for each decoder layer, and one for the rest (head, embeddings, norm).

    Weights must be the same on every rank. They stay in float32; where the policy computes in bfloat16, they are gathered in bfloat16, and
    gradients summed in float32. Gradients are summed over the ranks, not averaged: a loss is divided by the count of all ranks.

    Raises:
        UsageError: a model whose layers transformers does not name.
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
        unit.set_force_sum_reduction_for_comms(True)  # gloo has no product in a sum
    # The decoder runs without the head, which the loss takes as a weight: the root's hooks must run around that, not around forward().
    model.run = MethodType(_run, model)
    register_fsdp_forward_method(model, "run")
    policy.hidden = partial(model.run, policy.hidden)  # type: ignore[method-assign]
    policy.packed_hidden = partial(model.run, policy.packed_hidden)  # type: ignore[method-assign]


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Hold the whole weights on every rank inside the block, which may run the model as often as it likes, without gradients."""
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
    return out.clone() if out._is_view() else out  # FSDP's hook on a view would be lost if that were written to


def checkpoint_activations(model: nn.Module) -> None:
    """Let the backward pass compute each decoder layer's activations again, from the layer's input, which alone is kept."""
    for layer in _layers(model):
        inner = layer.forward

        def forward(*args: Any, inner: Any = inner, **options: Any) -> Any:
            if not torch.is_grad_enabled():  # sampling and scoring keep nothing, and sampling fills a cache, once
                return inner(*args, **options)
            # Nothing in a layer is random.
            return checkpoint(inner, *args, use_reentrant=False, preserve_rng_state=False, **options)

        layer.forward = forward
        # Who would run the layers in another way must know. (transformers' own checkpointing takes training mode too.)
        layer.gradient_checkpointing = True


def _layers(model: Any) -> list[Any]:
    """Return the decoder's layers.

    Raises:
        UsageError: transformers does not name them.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        raise UsageError(f"model: expected one whose layers are named in _no_split_modules, got {type(model).__name__}")
    return layers


def idle_pass(policy: Policy) -> None:
    """Take part in the other ranks' forward and backward pass with nothing of one's own: the gradient is 0."""
    with policy.autocast():
        hidden = policy.hidden(torch.zeros(1, 1, dtype=torch.int64, device=policy.device))
        weight, bias = policy.head()
        nothing = nn.functional.linear(hidden, weight, bias).sum() * 0.0
    nothing.backward()


def _units(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor of which this rank may hold a shard. Every rank must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


# --- Results


def from_all(value: T) -> T:
    """Return the ranks' values, one after the other, on all ranks and on the CPU.

    A value is a named tuple of such values, a list, None, or a tensor: ``(B,)``, or ``(B, R)``, which is padded to the longest.
    """
    return value if world() == 1 else _joined(all_gather(on_cpu(value)))


def on_cpu(value: Any) -> Any:
    """Return a tensor, or a named tuple's tensors, on the CPU; anything else as it is."""
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
    """A file of a rank that writes none."""

    unwritten: ClassVar[list[str]] = []

    def write(self, values: Any) -> None:
        """Leave it to the first rank."""

    def sync(self) -> int:
        return 0  # the first rank's number counts

    def close(self) -> None:
        """There is nothing to close."""
