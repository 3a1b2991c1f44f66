"""Builds what a step works on: policy, rollout engine, optimizer, momentum model and KL reference."""

from __future__ import annotations

from pathlib import Path

import torch

from mgrpo_kernels import MomentumModel, Teacher
from mgrpo_kernels.method import METHODS
from mgrpo_kernels.train import parallel
from mgrpo_kernels.train.config import Config
from mgrpo_kernels.train.data import demo
from mgrpo_kernels.train.data.task import Task
from mgrpo_kernels.train.model.lora import Adapter
from mgrpo_kernels.train.model.policy import Policy, load_policy
from mgrpo_kernels.train.rollout import RolloutEngine
from mgrpo_kernels.train.rollout.agreement import check_scoring
from mgrpo_kernels.train.rollout.engines import engine_class
from mgrpo_kernels.train.step import Learner
from mgrpo_kernels.train.update import make_optimizer
from mgrpo_kernels.train.watch.live import Plain


def load(config: Config, name: str, device: torch.device) -> Policy:
    """Return a policy; where ranks will share its weights, in the CPU's memory."""
    placed = device if parallel.world() == 1 else torch.device("cpu")
    return load_policy(name, placed, dtype_of(config), config.lora, config.run.seed, config.model.loading)


def dtype_of(config: Config) -> torch.dtype:
    """Return the dtype of the matrix products."""
    return torch.bfloat16 if config.model.dtype == "bfloat16" else torch.float32


def demo_policy(config: Config, directory: Path, device: torch.device, view: Plain) -> Policy:
    """Return the built-in model, warm-started once for each output directory."""
    with parallel.together():
        if parallel.is_first() and not directory.exists():
            for line in demo.EXPLANATION:
                view.write_line(line)
            demo.make_model(directory, config.run.seed, device, demo.WARM_STEPS, view.warm_start)
            reward = METHODS[config.method.method]
            learns = (
                "the true answers are the reward"
                if reward.needs_gold or config.method.gold_labels
                else "there are no labels, and the true answers only measure it"
            )
            view.write_line(f"end of the warm start. From here on {learns}; the reward of a rollout: {reward.text}")
    return load(config, str(directory), device)


def make_engine(config: Config, task: Task, policy: Policy) -> RolloutEngine:
    """Return the rollout engine that the configuration names, ready to sample the task's prompts.

    Raises:
        UsageError: the trainer's scores, or the engine's samples, are not what the model itself gives.
    """
    check_scoring(policy)
    prompts = policy.encode([example.prompt for example in (*task.train, *task.held_out)])
    return engine_class(config).build(config, policy, max(map(len, prompts)))


def make_learner(config: Config, task: Task, policy: Policy) -> Learner:
    """Build everything that a step works on, as it is before the first."""
    engine = make_engine(config, task, policy)
    if config.model.gradient_checkpointing:
        parallel.checkpoint_activations(policy.model)
    parallel.shard(policy)
    device = None if config.method.momentum_device == "auto" else config.method.momentum_device
    momentum: Teacher | None = None
    reference: MomentumModel | Adapter | None = None
    if config.needs_momentum:
        momentum = config.method.make_teacher(policy.model, device=device, frozen=policy.adapter is None)
    if config.needs_reference is not None:
        reference = momentum if config.needs_reference == "momentum" else policy.adapter
        reference = reference or MomentumModel(policy.model, 1.0, device=device)
    return Learner(config, task, policy, engine, make_optimizer(policy, config.optim), momentum, reference)
