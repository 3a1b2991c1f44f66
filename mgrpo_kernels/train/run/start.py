"""The start of a run: everything is checked and planned before anything is written."""

from __future__ import annotations

import tempfile
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

from mgrpo_kernels.train import extras, parallel
from mgrpo_kernels.train import probe as probing
from mgrpo_kernels.train.config import Config
from mgrpo_kernels.train.data import demo
from mgrpo_kernels.train.data.answers import describe_extractor
from mgrpo_kernels.train.data.task import Task, check_lengths, load_task
from mgrpo_kernels.train.errors import UsageError
from mgrpo_kernels.train.functions import make_reward
from mgrpo_kernels.train.model.location import trust_warning
from mgrpo_kernels.train.model.policy import Policy, context_of, end_tokens, pick_device, read_tokenizer
from mgrpo_kernels.train.plan.describe import Plan, Target, changed, describe, plan, read_model
from mgrpo_kernels.train.run import checkpoint, files, fingerprint
from mgrpo_kernels.train.run.hub import check_login
from mgrpo_kernels.train.run.learner import demo_policy, load, make_engine, make_learner
from mgrpo_kernels.train.run.loop import Run
from mgrpo_kernels.train.run.output import check_output, check_resume
from mgrpo_kernels.train.run.record import Record
from mgrpo_kernels.train.run.stopping import interruptible
from mgrpo_kernels.train.text import PRINTED, print_line
from mgrpo_kernels.train.watch.live import Plain, make_view
from mgrpo_kernels.train.watch.loggers import check_projects, log_in

LINES = 11
"""Lines of the start of a run on the screen. With what is noted of the data, and the output directory, that makes 15."""
WIDTH = 120
"""Columns of such a line; a longer one is cut, and is in plan.txt as a whole."""


class Start(NamedTuple):
    """What a run begins with, when its options and files have been checked."""

    task: Task
    plan: list[str]  # what the run will do, in full
    screen: list[str]  # and what of it the screen shows, in at most LINES lines
    checkpoint: checkpoint.Facts | None  # the newest complete one, where the run is resumed
    fingerprints: dict[str, str]  # of data and tokenizer, and later of the model
    allow_changed: bool  # whether they may differ from those of the checkpoint


def run(
    config: Config,
    output: Path,
    *,
    resume: bool = False,
    dry_run: bool | Target = False,
    allow_changed: bool = False,
    record: Record | None = None,
    probe: int | None = None,
) -> int:
    """Train; return the exit status: 0, 3 where the guard stopped the run, or 130 where it was interrupted.

    With `dry_run` the plan is printed, and that is all: for the ranks and the device there are, or for a target. With `allow_changed` a
    run is resumed although its data, base model or tokenizer has changed. With `probe` so many prompts are sampled, the verdict is printed,
    and that is all. `record` writes what is printed to log.txt.

    Raises:
        UsageError: something that the user can put right; what a run had written before is as it was.
        FloatingPointError: the training is no longer finite; the last checkpoint remains.
        CheckpointError: the last checkpoint of the run could not be written, or none can be read.
        OutputError: final/ or another file could not be written at the end.
    """
    device = pick_device(config.model.device)
    with parallel.processes(device, config.run.rank_timeout):
        output, resume = parallel.from_first(output), parallel.on_any(resume)  # one machine knows of a restart
        with parallel.together():
            start = check(config, output, resume, device, dry_run, allow_changed)
        fingerprint.agree(start.fingerprints)
        if parallel.is_first():
            for line in start.plan if dry_run else start.screen:
                print_line(line)
        if dry_run:
            return 0
        if probe is not None:
            return run_probe(config, start.task, device, probe)
        with parallel.together():
            policy = None if config.model.model is None else load(config, config.model.model, device)
        with parallel.together():
            if parallel.is_first():
                log_in(config.run)
                check_login(config.run.push_to_hub)
                print_line(f"output: {output} (the whole plan: plan.txt; everything printed: log.txt)")
        title = f"{config.method.method}  {output}"
        with make_view(config, title) if parallel.is_first() else Quiet(config) as view:
            if policy is None:
                with parallel.together():
                    if parallel.is_first() and not resume:
                        open_output(
                            config, output, start.plan, record, fresh=True
                        )  # the built-in model is written there
                policy = demo_policy(config, output / "base", device, view)
            return train(config, start, policy, output, view, record)


def run_probe(config: Config, task: Task, device: torch.device, number: int) -> int:
    """Sample `number` prompts, or all if there are fewer, print the figures and the verdict, and return the exit status 0.

    Raises:
        UsageError: there are several processes, or no prompts are to be sampled.
    """
    if parallel.world() > 1:
        raise UsageError(f"probe: expected one process, got {parallel.world()}: start it without torchrun")
    if number < 1:
        raise UsageError(f"probe: expected at least 1 prompt, got {number}")
    with tempfile.TemporaryDirectory() as place:
        name = config.model.model
        with Plain(config) as view:
            policy = (
                demo_policy(config, Path(place) / "base", device, view) if name is None else load(config, name, device)
            )
        figures = probing.sample(config, task, policy, make_engine(config, task, policy), min(number, len(task.train)))
    for line in probing.lines(figures, probing.judge(figures)):
        print_line(line)
    return 0


def train(config: Config, start: Start, policy: Policy, output: Path, view: Plain, record: Record | None = None) -> int:
    """Train a policy, from the newest checkpoint where there is one; return the exit status."""
    check_model(start, policy, view)
    learner = make_learner(config, start.task, policy)
    PRINTED.info(f"sequences: {policy.how()}")  # sharded weights go another way; it is in log.txt alone
    sampling = f"sampling: {learner.engine.how()}"
    (view.write_line if learner.engine.slow else PRINTED.info)(sampling)
    found = None
    if start.checkpoint is not None:
        found = checkpoint.resume(output / "checkpoints", learner, view.warn)
        assert found is not None
        view.write_line(f"resuming after step {found['step']}, from {found['path']}")
    with parallel.together():
        if parallel.is_first():
            open_output(config, output, start.plan, record, fresh=found is None)
    with interruptible(view.stopping) as interrupt:
        return Run(learner, output, interrupt, view, found, start.fingerprints).train()


class Quiet(Plain):
    """The view of a rank that shows nothing."""

    def write_line(self, text: str) -> None:
        """Leave it to the first rank."""

    def stopping(self) -> None:
        """Leave it to the first rank."""


def open_output(config: Config, output: Path, plan: list[str], record: Record | None, *, fresh: bool) -> None:
    """Make the output directory, and write config.yaml where it changes, and plan.txt. A run that is `fresh` has no checkpoint yet.

    Raises:
        UsageError: it cannot be written.
    """
    file, text = output / "config.yaml", config.to_yaml()
    try:
        (output / "checkpoints").mkdir(parents=True, exist_ok=True)
        if fresh:
            (output / "checkpoints" / checkpoint.NONE_YET).touch()
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            files.write_text(file, text)
        files.write_text(output / "plan.txt", "".join(f"{line}\n" for line in plan))
        if record is not None:
            record.open(output)
    except OSError as error:
        raise UsageError(f"output: expected a directory that can be written, got {files.reason(error)}") from error


def check(
    config: Config,
    output: Path,
    resume: bool,
    device: torch.device,
    dry_run: bool | Target = False,
    allow_changed: bool = False,
) -> Start:
    """Return what the run begins with. Nothing is written.

    Raises:
        UsageError: something that the user can put right.
        CheckpointError: the run is to be resumed, and none of its checkpoints is complete.
    """
    found = check_output(output, resume=resume)
    changes = check_resume(config, output) if resume else []
    check_projects(config, output)
    transformers.utils.logging.disable_progress_bar()
    extras.check_packages(config)
    task = demo.make_task(config.run.seed) if config.data.data is None else load_task(config)
    built_in = demo.make_tokenizer(), context_of(demo.model_config())
    tokenizer, context = (
        built_in if config.model.model is None else read_tokenizer(config.model.model, config.model.loading)
    )
    prints = {**fingerprint.of_task(task), "tokenizer": fingerprint.of_tokenizer(tokenizer)}
    if found is not None:
        changes += fingerprint.compare(found["fingerprints"], prints, allowed=allow_changed)
    elif resume:
        changes.append("no checkpoint of this run was complete yet: it starts again from its first step")
    task = task.evaluating(config.eval.eval_prompts)._replace(
        equivalence=config.method.equivalence, reward=make_reward(config.method.reward)
    )
    model = read_model(config.model.model or demo.model_config(), config.lora, config.model.loading)
    longest = check_lengths(tokenizer, context, task, config.rollout.max_response_tokens)
    target = dry_run if isinstance(dry_run, Target) else Target(parallel.world())
    probe = bool(dry_run) and parallel.is_first()
    planned = plan(config, task, model, longest, device, target, probe=probe)
    first = reading(config, task, tokenizer)
    whole = [*describe(config), *first, *planned.lines, *changes]
    return Start(task, whole, screen(config, planned, first, changes), found, prints, allow_changed)


def reading(config: Config, task: Task, tokenizer: Any) -> list[str]:
    """Return the warning that code is trusted, how responses end and are read, and the first prompt with its true answer."""
    model = config.model.model
    ends = [tokenizer.eos_token_id] if model is None else end_tokens(model, tokenizer, config.model.loading)
    names = " or ".join(map(repr, tokenizer.convert_ids_to_tokens(ends)))
    how = "the digit after #" if config.data.data is None else describe_extractor(config.data)
    gold = task.train[0].gold
    known = "not known" if gold is None else gold if isinstance(gold, str) else " or ".join(gold)
    return [
        *([trust_warning(model)] if model is not None and config.model.trust_remote_code else []),
        f"a response ends with {names}; its answer: {how}",
        f"first prompt, as the model gets it; its true answer: {known}",
        *(f"  | {line}" for line in task.train[0].prompt.splitlines()),
    ]


def screen(config: Config, planned: Plan, first: list[str], changes: list[str]) -> list[str]:
    """Return the start of a run in at most :data:`LINES` lines: what differs from the defaults, size, memory, disk, a prompt.

    The lines of the prompt stand beside each other, with ⏎ between them.
    """

    def wrapped(text: str, lines: int, indent: str = "") -> list[str]:
        return textwrap.wrap(
            text, WIDTH, max_lines=lines, placeholder=" ...", initial_indent=indent, subsequent_indent=indent
        )

    trusted = [line for line in first if line.startswith("warning: ")]
    noted = [line for line in first if not line.startswith(("warning: ", "  | "))]
    prompt = " ⏎ ".join(line.removeprefix("  | ") for line in first if line.startswith("  | "))
    differs = wrapped(f"changed from the defaults: {', '.join(changed(config)) or 'nothing'}", 2)
    lines = [
        *trusted,
        f"{config.method.method}: {config.model.model or 'the built-in model'}",
        *differs,
        *planned.short,
    ]
    room = LINES - len(lines) - len(noted) - 1
    if len(changes) > room:
        changes = [*changes[: max(0, room - 1)], f"and {len(changes) - max(0, room - 1)} more changes: plan.txt"]
    rest = LINES - len(lines) - len(changes) - len(noted)
    lines = [line if len(line) <= WIDTH else f"{line[: WIDTH - 4]} ..." for line in (*lines, *changes, *noted)]
    return [*lines, *wrapped(prompt, max(1, rest), "  | ")]


def check_model(start: Start, policy: Policy, view: Plain) -> None:
    """Enter the fingerprint of the base model, and raise UsageError where it is not the one that the run began with."""
    with parallel.together():
        start.fingerprints["model"] = model = fingerprint.of_model(policy.model)
    fingerprint.agree({"model": model})
    with parallel.together():
        if start.checkpoint is not None:
            for line in fingerprint.compare(
                start.checkpoint["fingerprints"], {"model": model}, allowed=start.allow_changed
            ):
                view.write_line(line)
