"""The start of a run: everything is checked and planned before anything is written."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

from mgrpo_kernels.train import extras, parallel
from mgrpo_kernels.train.config import Config
from mgrpo_kernels.train.data import demo
from mgrpo_kernels.train.data.task import Task, check_lengths, load_task
from mgrpo_kernels.train.model.policy import Policy, context_of, pick_device, read_tokenizer
from mgrpo_kernels.train.plan.describe import Target, describe, plan, read_model
from mgrpo_kernels.train.run.learner import demo_policy, load, make_learner
from mgrpo_kernels.train.run.loop import Run
from mgrpo_kernels.train.run.output import check_output, check_resume, write_text
from mgrpo_kernels.train.run.stopping import interruptible
from mgrpo_kernels.train.watch.live import Plain, make_view
from mgrpo_kernels.train.watch.loggers import log_in


def run(config: Config, output: Path, *, resume: bool = False, dry_run: bool | Target = False) -> int:
    """Train; return the exit status: 0, 3 where the guard stopped the run, or 130 where it was interrupted.

    With `dry_run` the plan is printed, and that is all: for the ranks and the device there are, or for a target.

    Raises:
        UsageError: something that the user can put right; nothing has been written then.
        FloatingPointError: the training is no longer finite; the last checkpoint stands.
        CheckpointError: the last checkpoint of the run could not be written, or none can be read.
    """
    device = pick_device(config.model.device)
    with parallel.processes(device, config.run.rank_timeout):
        output, resume = parallel.from_first(output), parallel.on_any(resume)  # one machine knows of a restart
        with parallel.together():
            task, lines = check(config, output, resume, device, dry_run)
        if parallel.is_first():
            print(*lines, sep="\n", flush=True)
        if dry_run:
            return 0
        with parallel.together():
            policy = None if config.model.model is None else load(config, config.model.model, device)
        with parallel.together():
            if parallel.is_first():
                open_output(config, output)
        title = f"{config.method.method}  {output}"
        with make_view(config, title) if parallel.is_first() else Quiet(config) as view:
            if policy is None:
                policy = demo_policy(config, output / "base", device, view)
            return train(config, task, policy, output, view)


def train(config: Config, task: Task, policy: Policy, output: Path, view: Plain) -> int:
    """Train a policy in an output directory that is ready; return the exit status."""
    learner = make_learner(config, task, policy)
    view.write_line(f"sequences: {policy.how()}")  # sharded weights go another way
    with interruptible(view.stopping) as interrupt:
        return Run(learner, output, interrupt, view).train()


class Quiet(Plain):
    """The view of a rank that shows nothing."""

    def write_line(self, text: str) -> None:
        """Leave it to the first rank."""

    def stopping(self) -> None:
        """Leave it to the first rank."""


def open_output(config: Config, output: Path) -> None:
    """Log in where a logger asks for it, then make the output directory and write config.yaml."""
    log_in(config.run)
    print(f"output: {output}", flush=True)
    (output / "checkpoints").mkdir(parents=True, exist_ok=True)
    write_text(output / "config.yaml", config.to_yaml())


def check(
    config: Config, output: Path, resume: bool, device: torch.device, dry_run: bool | Target = False
) -> tuple[Task, list[str]]:
    """Return the task, and the lines that say what the run will do. Nothing is written.

    Raises:
        UsageError: something that the user can put right.
    """
    check_output(output, resume=resume)
    changes = check_resume(config, output) if resume else []
    transformers.utils.logging.disable_progress_bar()
    extras.check_packages(config)
    task = demo.make_task(config.run.seed) if config.data.data is None else load_task(config)
    task = task._replace(held_out=task.held_out[: config.eval.eval_prompts], equivalence=config.method.equivalence)
    model = read_model(config.model.model or demo.model_config(), config.lora)
    built_in = demo.make_tokenizer(), context_of(demo.model_config())
    tokenizer, context = built_in if config.model.model is None else read_tokenizer(config.model.model)
    longest = check_lengths(tokenizer, context, task, config.rollout.max_response_tokens)
    target = dry_run if isinstance(dry_run, Target) else Target(parallel.world())
    lines = plan(config, task, model, longest, device, target, probe=bool(dry_run) and parallel.is_first())
    return task, [*describe(config), *lines, *changes]
