"""What a run is going to do, in words and numbers, before it does it."""

from __future__ import annotations

from argparse import ArgumentTypeError
from typing import NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from mgrpo_kernels.train.config import Config, LoraConfig
from mgrpo_kernels.train.data.task import Task
from mgrpo_kernels.train.errors import UsageError
from mgrpo_kernels.train.model import attention
from mgrpo_kernels.train.model.lora import Adapter
from mgrpo_kernels.train.model.policy import unreadable
from mgrpo_kernels.train.plan.devices import (
    BANDWIDTH_SHARE,
    DEVICES,
    MATMUL_SHARE,
    Rates,
    known_device,
    measure,
    rates_of,
    room_of,
)
from mgrpo_kernels.train.plan.memory import Memory, memory_of
from mgrpo_kernels.train.plan.shape import Model, Work, count, model_of, work_of
from mgrpo_kernels.train.plan.time import seconds
from mgrpo_kernels.train.rollout.engines import engine_class


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
                f"expected a number of ranks N, or NxDEVICE with one of {', '.join(DEVICES)}, got {text!r}"
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
    return model_of(empty)


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
            f"prompts_per_step: expected at least one for each of the {ranks} ranks, got {config.rollout.prompts_per_step}"
        )
    samples = len(task.held_out) * (config.eval.eval_samples + 1) if config.eval.eval_every else 0
    epochs = config.optim.steps * config.rollout.prompts_per_step / len(task.train)
    work = work_of(config, prompt_tokens, len(task.held_out), ranks)
    kind = device.type if target.device is None else "cuda"
    flash = kind == "cuda" and config.model.dtype != "float32" and attention.has_flash_attention()
    memory = memory_of(config, model, work, ranks, kind, flash=flash)
    known = target.device or known_device(device)
    name = str(device) if target.device is None else target.device
    largest, trained = max(work.micro, key=work.tokens), count([model.trained])
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
    lines += engine_class(config).plan_lines(config, kind)
    if known is not None or probe:
        rates = measure(device, config.model.dtype, model) if known is None else rates_of(DEVICES[known], config)
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
    found = seconds(config, model, work, ranks, rates)
    phases = " + ".join(f"{name} {value:.3g}" for name, value in found.items() if value)
    total = sum(found.values())
    hours = config.optim.steps * total / 3600
    if known is None:
        probed = f"{rates.matmul / 1e9:,.0f} GFLOP/s, {rates.bandwidth / 1e9:,.0f} GB/s, {rates.operation * 1e6:.2g} us an operation"
        base = f"a probe of this device: {probed}"
    else:
        shares = f"{MATMUL_SHARE:.0%} of its FLOP/s and {BANDWIDTH_SHARE:.0%} of its bytes/s"
        base = f"the data sheet of {known}, of which {shares} are assumed; not measured"
    return [
        f"  time of a step: {total:.3g} s (estimate, at the longest responses) = {phases}",
        f"    {config.optim.steps} steps: {hours:.3g} h, without evaluations; from {base}",
    ]


def size(number: int) -> str:
    value = float(number)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:.3g} TiB"


def _text(value: object) -> str:
    return "none" if value is None else repr(value) if isinstance(value, str) and "\n" in value else str(value)
