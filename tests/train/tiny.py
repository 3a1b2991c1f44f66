"""Helpers of the trainer's tests: small models, short runs, and their files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mgrpo_kernels import MomentumModel
from mgrpo_kernels.train.config import Config, build
from mgrpo_kernels.train.data import demo
from mgrpo_kernels.train.data.task import Task
from mgrpo_kernels.train.model.policy import Policy
from mgrpo_kernels.train.run.learner import make_learner
from mgrpo_kernels.train.step import Learner
from mgrpo_kernels.train.watch.metrics import VARYING

WARM_STEPS = 60
OPTIONS = {
    **demo.OPTIONS,
    "prompts_per_step": 3,
    "rollouts": 8,
    "steps": 4,
    "learning_rate": 1e-3,
    "eval_every": 2,
    "eval_samples": 3,
    "eval_prompts": 6,
    "checkpoint_every": 2,
    "log_every": 1,
    "kl_coef": 0.05,
}
FLAGS = [part for name, value in OPTIONS.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def make_base(place: Path) -> None:
    """Leave a model that sometimes ends its response in time, and sometimes answers right: of short sums too, then."""
    lesson = partial(demo.lesson, lengthened_share=0.0)
    demo.make_model(place, seed=0, device=torch.device("cpu"), warm_steps=WARM_STEPS, teach=lesson)


def config(**changes: Any) -> Config:
    """Return a configuration in which mgrpo has a quarter of its rollouts from the momentum model, as in its paper."""
    quarter = {"momentum_rollouts": max(1, changes.get("rollouts", OPTIONS["rollouts"]) // 4)}
    return build({**OPTIONS, **(quarter if changes.get("method", "mgrpo") == "mgrpo" else {}), **changes})


def learner(policy: Policy, task: Task | None = None, **changes: Any) -> Learner:
    task = demo.make_task(0) if task is None else task
    settings = config(**changes)
    return make_learner(settings, task._replace(held_out=task.held_out[: settings.eval.eval_prompts]), policy)


def output_with(base: Path, place: Path) -> Path:
    """Return an output directory in which the built-in model is already made."""
    place.mkdir(parents=True)
    shutil.copytree(base, place / "base")
    return place


def start(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    """Start the trainer in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "mgrpo_kernels.train", *arguments],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        **options,
    )


def lines(output: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """Return a run's lines, without what varies from run to run."""
    text = (output / name).read_bytes().decode()
    assert "NaN" not in text
    return [
        {key: value for key, value in json.loads(line).items() if key not in VARYING} for line in text.split("\n")[:-1]
    ]


def weights(source: Policy | MomentumModel) -> dict[str, torch.Tensor]:
    tensors = source.ema if isinstance(source, MomentumModel) else source.model.state_dict()
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}
