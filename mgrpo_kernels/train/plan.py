"""What a run is going to do, in words and numbers, before it does it."""

from __future__ import annotations

import os
import re
import statistics
import time
from argparse import ArgumentTypeError
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from mgrpo_kernels.train import attention, estimate
from mgrpo_kernels.train.config import Config, LoraConfig, UsageError
from mgrpo_kernels.train.data import Task
from mgrpo_kernels.train.estimate import DEVICES, Memory, Model, Rates, Work
from mgrpo_kernels.train.lora import Adapter
from mgrpo_kernels.train.policy import unreadable


class Target(NamedTuple):
    """What a plan is for, where it is not what the run finds."""

    ranks: int
    device: str | None = None  # a key of DEVICES; None: the one at hand

    @classmethod
    def parse(cls, text: str) -> Target:
        """Read N or NxDEVICE.

        Raises:
            ArgumentTypeError: neither.
        """
        number, cross, device = text.lower().partition("x")
        if not number.isdecimal() or int(number) < 1 or (cross and device not in DEVICES):
            raise ArgumentTypeError(
                f"want a number of ranks N, or NxDEVICE with one of {', '.join(DEVICES)}, got {text!r}"
            )
        return cls(int(number), device or None)


def describe(config: Config) -> list[str]:
    """Return every option, and what follows from them, a line each."""
    lines = []
    for title, options in config.sections():
        lines += [f"{title}:", *(f"  {name}: {_text(value)}" for name, value in options.items())]
    return [*lines, "derived:", *(f"  {name}: {value}" for name, value in config.derived().items())]


def read_model(model: str | PretrainedConfig, lora: LoraConfig | None = None) -> Model:
    """Return a model's shape, from its configuration or its name, without its weights; with LoRA, its adapter in it.

    Raises:
        UsageError: it cannot be read, or does not take the adapter.
    """
    try:
        config = AutoConfig.from_pretrained(model) if isinstance(model, str) else model
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(unreadable(str(model), error)) from error
    if lora is not None and lora.lora_rank is not None:
        Adapter(empty, lora, seed=0)
    return estimate.model_of(empty)


def plan(
    config: Config, task: Task, model: Model, prompt_tokens: int, device: torch.device, target: Target, *, probe: bool
) -> list[str]:
    """Return what a run takes, a line each.

    Args:
        config, task, model: of the run.
        prompt_tokens: of the longest prompt.
        device: the one at hand.
        target: ranks, and another device than that one.
        probe: measure the device's rates, which takes a second, where it is in no table.

    Raises:
        UsageError: fewer prompts in a step than ranks.
    """
    ranks = target.ranks
    if config.rollout.prompts_per_step < ranks:
        raise UsageError(
            f"prompts_per_step: want at least one for each of the {ranks} ranks, got {config.rollout.prompts_per_step}"
        )
    samples = len(task.held_out) * (config.eval.eval_samples + 1) if config.eval.eval_every else 0
    epochs = config.optim.steps * config.rollout.prompts_per_step / len(task.train)
    work = estimate.work_of(config, prompt_tokens, len(task.held_out), ranks)
    kind = device.type if target.device is None else "cuda"
    flash = kind == "cuda" and config.model.dtype != "float32" and attention.has_flash_attention()
    memory = estimate.memory(config, model, work, ranks, kind, flash=flash)
    known = target.device or known_device(device)
    name = str(device) if target.device is None else target.device
    largest, trained = max(work.micro, key=work.tokens), estimate.count([model.trained])
    lines = [
        "plan:",
        f"  device: {name}" if ranks == 1 else f"  devices: {ranks} x {name}, one a rank",
        f"  parameters: {model.parameters:,}",
        *(
            []
            if model.whole
            else [f"  trained: {trained:,} parameters of the adapter, {trained / model.parameters:.2%} of all"]
        ),
        f"  prompts: {len(task.train):,} to train on ({epochs:.2g} epochs), {len(task.held_out):,} held out",
        f"  responses of one evaluation: {samples:,}",
        f"  micro-batches of a step: {len(work.micro)} a rank, the largest of {work.tokens(largest):,} tokens, at the longest responses",
        *memory_lines(memory, room_of(device) if target.device is None else round(DEVICES[target.device].memory * 1e9)),
    ]
    if config.run.async_checkpoints:
        weights = memory.held["AdamW"] // 2  # those that train: with LoRA a checkpoint has no others
        copies = weights + sum(memory.held.get(name, 0) for name in ("AdamW", "momentum model", "KL reference"))
        lines.append(
            f"  a checkpoint that is written in the background: {size(copies)} more of the CPU's memory, meanwhile"
        )
    if config.rollout.engine == "vllm" and kind == "cuda":
        sleeps = "kept all along" if config.vllm.vllm_sleep is False else "given back between rollouts"
        lines.append(f"  vLLM: {config.vllm.vllm_memory:.0%} of the device's memory beside that, {sleeps}")
    if known is not None or probe:
        rates = (
            measure(device, config.model.dtype, model) if known is None else estimate.rates_of(DEVICES[known], config)
        )
        lines += time_lines(config, model, work, ranks, rates, known)
    return lines


def memory_lines(memory: Memory, room: int | None) -> list[str]:
    """Return a rank's memory, the held parts and then each moment's."""

    def parts(sizes: dict[str, int]) -> str:
        return " + ".join(f"{name} {size(each)}" for name, each in sizes.items())

    lines = [f"  memory: {size(memory.total)} a rank (estimate), the most in {memory.moment}"]
    if room is not None:
        lines[0] += f"; there are {size(room)}" + (", which is TOO LITTLE" if room < memory.total else "")
    lines.append(f"    held: {size(sum(memory.held.values()))} = {parts(memory.held)}")
    lines += [
        f"    {name}: {size(sum(each.values()))} = {parts(each)}" for name, each in memory.moments.items() if each
    ]
    return lines


def time_lines(config: Config, model: Model, work: Work, ranks: int, rates: Rates, known: str | None) -> list[str]:
    """Return the seconds of a step, and what they rest on."""
    found = estimate.seconds(config, model, work, ranks, rates)
    phases = " + ".join(f"{name} {value:.3g}" for name, value in found.items() if value)
    total = sum(found.values())
    hours = config.optim.steps * total / 3600
    if known is None:
        probed = f"{rates.matmul / 1e9:,.0f} GFLOP/s, {rates.bandwidth / 1e9:,.0f} GB/s, {rates.operation * 1e6:.2g} us an operation"
        base = f"a probe of this device: {probed}"
    else:
        shares = f"{estimate.MATMUL_SHARE:.0%} of its FLOP/s and {estimate.BANDWIDTH_SHARE:.0%} of its bytes/s"
        base = f"the data sheet of {known}, of which {shares} are assumed; not measured"
    return [
        f"  time of a step: {total:.3g} s (estimate, at the longest responses) = {phases}",
        f"    {config.optim.steps} steps: {hours:.3g} h, without evaluations; from {base}",
    ]


def known_device(device: torch.device) -> str | None:
    """Return the name in the table of the device at hand, or None."""
    if device.type != "cuda":
        return None
    words = set(re.findall(r"[a-z0-9]+", torch.cuda.get_device_name(device).lower()))
    return next((key for key in DEVICES if words.issuperset(key.split("-"))), None)


def room_of(device: torch.device) -> int | None:
    """Return the bytes of memory that the device has, where the system says so."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def measure(device: torch.device, dtype: str, model: Model, clock: Callable[[], float] = time.perf_counter) -> Rates:
    """Return what a device does in a second, with products of the model's width; the median of a few tries, about a second in all.

    Where ranks share a machine's memory a byte goes to another through it, and is read and written some eight times: gloo's rate.
    """
    kind = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    on_gpu = device.type == "cuda"
    rows, numbers = (8192, 2**28) if on_gpu else (1024, 2**24)

    def typical(work: Callable[[], Any], tries: int = 5) -> float:
        def once() -> float:
            if on_gpu:
                torch.cuda.synchronize(device)
            begin = clock()
            work()
            if on_gpu:
                torch.cuda.synchronize(device)
            return clock() - begin

        until = time.perf_counter() + 0.2  # where others take the cores, few must do
        found = [once(), once()]  # the first warms up
        while len(found) <= tries and time.perf_counter() < until:
            found.append(once())
        return max(statistics.median(found[1:]), 1e-9)

    with torch.no_grad():
        a, b = (torch.ones(n, model.width, device=device, dtype=kind) for n in (rows, model.inner))
        matmul = 2 * rows * model.width * model.inner / typical(lambda: torch.mm(a, b.t()))
        block, other = (torch.ones(numbers, device=device) for _ in range(2))
        bandwidth = 2 * 4 * numbers / typical(lambda: other.copy_(block), 3)
        few = block[: numbers // 64]
        draws = len(few) / typical(lambda: few.exponential_().clamp_min_(1e-30).log_().neg_())
        x, w = torch.ones(16, 64, device=device), torch.ones(64, 64, device=device)
        operation = typical(lambda: [_operations(x, w) for _ in range(5)], 20) / (5 * 8)
    return Rates(matmul, bandwidth, operation, draws, bandwidth / 8, passes=1 if on_gpu else 3)


def _operations(x: Tensor, w: Tensor) -> Tensor:
    """Run eight operations of a decoder's layer on a few tokens."""
    y = torch.mm(x, w)
    y = torch.nn.functional.silu(y) * x
    y = torch.cat([y[:, :32], y[:, 32:]], dim=-1)
    return (y + x).softmax(-1)


def size(number: int) -> str:
    value = float(number)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:.3g} TiB"


def _text(value: object) -> str:
    return "none" if value is None else repr(value) if isinstance(value, str) and "\n" in value else str(value)
