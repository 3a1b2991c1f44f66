"""What a run is going to do, in words and numbers, before it does it."""

from __future__ import annotations

from mgrpo_kernels.train.config import Config
from mgrpo_kernels.train.data import Task


def describe(config: Config) -> list[str]:
    """Return every option, and what follows from them, a line each."""
    lines = []
    for title, options in config.sections():
        lines += [f"{title}:", *(f"  {name}: {_text(value)}" for name, value in options.items())]
    return [*lines, "derived:", *(f"  {name}: {value}" for name, value in config.derived().items())]


def plan(config: Config, task: Task, parameters: int, device: str) -> list[str]:
    """Return sizes and memory of a run on one device."""
    samples = len(task.held_out) * (config.eval.eval_samples + 1) if config.eval.eval_every else 0
    epochs = config.optim.steps * config.rollout.prompts_per_step / len(task.train)
    copies = {  # float32, in bytes a parameter
        "weights": 4,
        "gradients": 4,
        "AdamW": 8,
        "momentum model": 4 if config.needs_momentum else 0,
        "KL reference": 4 if config.needs_reference == "base" else 0,
    }
    total = sum(copies.values()) * parameters
    parts = " + ".join(f"{name} {size(each * parameters)}" for name, each in copies.items() if each)
    return [
        "plan:",
        f"  device: {device}",
        f"  parameters: {parameters:,}",
        f"  prompts: {len(task.train):,} to train on ({epochs:.2g} epochs), {len(task.held_out):,} held out",
        f"  responses of one evaluation: {samples:,}",
        f"  memory: {size(total)} = {parts}; activations and the key-value cache come on top",
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
