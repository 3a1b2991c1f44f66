"""The text of the plan: every option, and the estimates of memory and time."""

from __future__ import annotations

import dataclasses
from argparse import ArgumentTypeError
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from mgrpo_kernels import _native
from mgrpo_kernels.ops.linear_token_stats import tiled
from mgrpo_kernels.train.config import Config, LoraConfig
from mgrpo_kernels.train.config.whole import DEFAULTS
from mgrpo_kernels.train.data.task import Task
from mgrpo_kernels.train.errors import UsageError
from mgrpo_kernels.train.model import attention
from mgrpo_kernels.train.model.lora import Adapter
from mgrpo_kernels.train.model.policy import NO_KEYWORDS, unreadable
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
from mgrpo_kernels.train.plan.units import duration, size
from mgrpo_kernels.train.rollout.engines import engine_class


class Target(NamedTuple):
    """The ranks and the device that a plan is for."""

    ranks: int
    device: str | None = None  # a key of DEVICES; None: the device of this machine

    @classmethod
    def parse(cls, text: str) -> Target:
        """Return the target that `text` names, as N or NxDEVICE.

        Raises:
            ArgumentTypeError: the text has another form, or the device is unknown.
        """
        number, cross, device = text.lower().partition("x")
        if not number.isdecimal() or int(number) < 1 or (cross and device not in DEVICES):
            raise ArgumentTypeError(
                f"expected a number of ranks N, or NxDEVICE with one of {', '.join(DEVICES)}, got {text!r}"
            )
        return cls(int(number), device or None)


def changed(config: Config) -> list[str]:
    """Return the options that differ from their defaults, in the order of the sections, as NAME VALUE."""
    return [f"{name} {_text(value)}" for name, value in config.values().items() if value != DEFAULTS[name]]


def describe(config: Config) -> list[str]:
    """Return a line for every option, what differs from the defaults first, and for every value derived from them."""
    lines = [
        "changed from the defaults:",
        *(f"  {each.replace(' ', ': ', 1)}" for each in changed(config) or ["nothing"]),
    ]
    for title, options in config.sections():
        lines += [f"{title}:", *(f"  {name}: {_text(value)}" for name, value in options.items())]
    return [*lines, "derived:", *(f"  {name}: {value}" for name, value in config.derived().items())]


def read_model(
    model: str | PretrainedConfig, lora: LoraConfig | None = None, loading: Mapping[str, Any] = NO_KEYWORDS
) -> Model:
    """Return a model's shape from its configuration or its name, without loading weights; with LoRA, the adapter is included.

    Raises:
        UsageError: the configuration cannot be read or lacks a size that the plan needs, or the adapter does not fit the model.
    """
    try:
        config = AutoConfig.from_pretrained(model, **loading) if isinstance(model, str) else model
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(config, trust_remote_code=loading.get("trust_remote_code", False))
    except Exception as error:  # the code of an architecture may raise any error
        raise UsageError(unreadable(str(model), error)) from error
    if lora is not None and lora.lora_rank is not None:
        Adapter(empty, lora, seed=0)
    sizes = empty.config.get_text_config()
    missing = [name for name in ("hidden_size", "num_hidden_layers", "vocab_size") if not hasattr(sizes, name)]
    if missing:
        raise UsageError(
            f"model: expected a configuration with hidden_size, num_hidden_layers and vocab_size, got {type(sizes).__name__}, "
            f"which lacks {' and '.join(missing)}: choose a model of another architecture"
        )
    return model_of(empty)


class Plan(NamedTuple):
    """The size, the memory and the time of a run."""

    lines: list[str]  # all of it
    short: list[str]  # what the screen shows at the start of the run


def plan(
    config: Config, task: Task, model: Model, prompt_tokens: int, device: torch.device, target: Target, *, probe: bool
) -> Plan:
    """Return the lines that describe the size, the memory and the time of a run.

    Args:
        config: options of the run.
        task: data of the run.
        model: shape of the model.
        prompt_tokens: length of the longest prompt.
        device: device of this machine.
        target: number of ranks, and optionally another device.
        probe: measure the rates of a device that is not in the table, which takes about a second.

    Raises:
        UsageError: there are too few prompts in a step for the ranks.
    """
    ranks = target.ranks
    if config.rollout.prompts_per_step < ranks:
        raise UsageError(
            f"prompts_per_step: expected at least {ranks}, one for each rank, got {config.rollout.prompts_per_step}"
        )
    if config.method.vote_by == "excess" and config.rollout.prompts_per_step < 2 * ranks:
        raise UsageError(
            f"prompts_per_step: expected at least {2 * ranks}, two for each rank, with vote_by excess, which compares the answers to "
            f"different prompts, got {config.rollout.prompts_per_step}"
        )
    samples = len(task.held_out) * (config.eval.eval_samples + 1) if config.eval.eval_every else 0
    epochs = config.optim.steps * config.rollout.prompts_per_step / len(task.train)
    passes = f"{epochs:,.0f} epochs" if epochs >= 10 else f"{epochs:.2g} epochs"
    work = work_of(config, prompt_tokens, len(task.held_out), ranks)
    kind = device.type if target.device is None else "cuda"
    flash = kind == "cuda" and config.model.dtype != "float32" and attention.has_flash_attention()
    memory = memory_of(config, model, work, ranks, kind, flash=flash)
    known = target.device or known_device(device)
    name = str(device) if target.device is None else target.device
    room = room_of(device) if target.device is None else round(DEVICES[target.device].memory * 1e9)
    lowering = []
    if room is not None and memory.total > room:
        lowering = lower(config, model, prompt_tokens, len(task.held_out), ranks, kind, flash, room)
    disk, dtype = disk_line(config, model), dtype_lines(config, kind)
    largest, trained = max(work.micro, key=work.tokens), count([model.trained])
    adapter = f"  trained parameters: {trained:,} of the adapter, {trained / model.parameters:.2%} of all"
    lines = [
        "plan (upper bounds: every response has the maximum length):",
        f"  device: {name}" if ranks == 1 else f"  devices: {ranks} x {name}, one per rank",
        f"  parameters: {model.parameters:,}",
        *([] if model.whole else [adapter]),
        *dtype,
        f"  prompts: {len(task.train):,} for training ({passes}), {len(task.held_out):,} held out",
        f"  responses per evaluation: {samples:,}",
        f"  micro-batches per step and rank: {len(work.micro)}, with at most {work.tokens(largest):,} tokens",
        *memory_lines(memory, room),
        *lowering,
        disk,
    ]
    if config.run.async_checkpoints:
        weights = memory.held["AdamW"] // 2  # of the trained parameters only: with LoRA, a checkpoint holds no others
        copies = weights + sum(memory.held.get(name, 0) for name in ("AdamW", "momentum model", "KL reference"))
        lines.append(f"  additional CPU memory while a checkpoint is written in the background: {size(copies)}")
    lines += engine_class(config).plan_lines(config, kind)
    if known is not None or probe:
        rates = measure(device, config.model.dtype, model) if known is None else rates_of(DEVICES[known], config.model)
        lines += time_lines(config, model, work, ranks, rates, known)
    rollout, kept = config.rollout, "none" if not task.held_out else f"{len(task.held_out):,}"
    needed = f"{size(memory.total)} of memory" + ("" if ranks == 1 else " per rank")
    batch = f"{rollout.prompts_per_step} prompts x {rollout.rollouts} rollouts, at most {rollout.max_response_tokens:,} tokens each"
    short = [
        f"{config.optim.steps:,} steps of {batch}; {len(task.train):,} prompts ({passes}), held out: {kept}",
        f"{model.parameters:,} parameters on {name if ranks == 1 else f'{ranks} x {name}'}; about {needed}"
        + ("" if room is None else f" of {size(room)}")
        + (": TOO LITTLE" if lowering else ""),
        *lowering,
        *(each.strip() for each in dtype),
        disk.strip(),
    ]
    return Plan(lines, short)


def dtype_lines(config: Config, kind: str) -> list[str]:
    """Return a line if the matrix products of `dtype` are slower than float32's on a device of this kind."""
    if config.model.dtype == "float32" or kind != "cpu" or _native.missing() is not None:
        return []
    if tiled.multiplies_16_bits(torch.device(kind), torch.bfloat16):
        return []
    return [
        f"  --dtype {config.model.dtype} saves memory on this CPU, not time: it has no instructions for it, and float32 is faster"
    ]


def disk_line(config: Config, model: Model) -> str:
    """Return a line for the size of the checkpoints and of final/ on the disk, all weights in float32."""
    trained = count([model.trained])
    copies = 3 + config.needs_momentum + (not model.whole and config.copies_base)  # weights and two averages of AdamW
    each, final = 4 * trained * copies, 4 * model.parameters
    kept = config.run.keep_checkpoints
    return f"  disk: {size(each)} for each checkpoint, {kept or 'all'} of which are kept (--keep-checkpoints), and {size(final)} for final/"


def lower(
    config: Config, model: Model, prompt_tokens: int, held_out: int, ranks: int, kind: str, flash: bool, room: int
) -> list[str]:
    """Return lines with the options that lower the memory of a run that needs too much, and the memory with each."""

    def total(changed: Config) -> int:
        return memory_of(
            changed, model, work_of(changed, prompt_tokens, held_out, ranks), ranks, kind, flash=flash
        ).total

    before, found = total(config), {}
    tokens = config.rollout.tokens_per_microbatch
    if not config.model.gradient_checkpointing:
        found["--gradient-checkpointing"] = total(replaced(config, "model", gradient_checkpointing=True))
    while tokens > prompt_tokens + config.rollout.max_response_tokens:
        tokens //= 2
        found[f"--tokens-per-microbatch {tokens}"] = after = total(
            replaced(config, "rollout", tokens_per_microbatch=tokens)
        )
        if after <= room:
            break
    if config.copies_base:
        found["--kl-coef 0 (no reference model)"] = total(replaced(config, "loss", kl_coef=0.0))
    if kind == "cuda" and config.method.momentum_device == "auto" and (config.needs_momentum or config.copies_base):
        found["--momentum-device cpu"] = total(replaced(config, "method", momentum_device="cpu"))
    helps = sorted((after, name) for name, after in found.items() if after < 0.97 * before)
    enough = [each for each in helps if each[0] <= room]
    text = ", or ".join(f"{name} ({size(after)})" for after, name in (enough or helps)[:3])
    more = "" if enough else "; --lora-rank 16 trains an adapter instead of all weights; more ranks share the weights"
    return [f"  less memory: {text or 'none of the options alone'}{more}"]


def replaced(config: Config, section: str, **changes: Any) -> Config:
    """Return a configuration with some options of a section changed."""
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **changes)})


def memory_lines(memory: Memory, room: int | None) -> list[str]:
    """Return lines for a rank's memory: the total, the parts that are always held, and those of each phase."""

    def parts(sizes: dict[str, int]) -> str:
        return " + ".join(f"{name} {size(each)}" for name, each in sizes.items())

    available = "" if room is None else f"; available: {size(room)}"
    if room is not None and room < memory.total:
        available += ", which is TOO LITTLE"
    lines = [f"  memory per rank (estimate): {size(memory.total)} at its peak, in the phase {memory.moment}{available}"]
    for name, each in {"always": memory.held, **memory.moments}.items():
        if each:
            lines.append(f"    {name}: {size(sum(each.values()))} = {parts(each)}")
    return lines


def time_lines(config: Config, model: Model, work: Work, ranks: int, rates: Rates, known: str | None) -> list[str]:
    """Return lines for the time of a step and of the run, and the source of the rates behind them."""
    found = seconds(config, model, work, ranks, rates)
    phases = " + ".join(f"{name} {duration(value)}" for name, value in found.items() if value)
    total = sum(found.values())
    if known is None:
        probed = f"{rates.matmul / 1e9:,.0f} GFLOP/s, {rates.bandwidth / 1e9:,.0f} GB/s, {rates.operation * 1e6:.2g} us per operation"
        base = f"computed from a probe of this device: {probed}"
    else:
        shares = f"{MATMUL_SHARE:.0%} of its FLOP/s and {BANDWIDTH_SHARE:.0%} of its bytes/s"
        base = f"computed from the data sheet of {known}, assuming {shares}; not measured"
    return [
        f"  time per step (estimate): {duration(total)} = {phases}",
        f"    {config.optim.steps} steps without evaluations: {duration(config.optim.steps * total)}; {base}",
    ]


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return "none" if value is None else repr(value) if isinstance(value, str) and "\n" in value else str(value)
