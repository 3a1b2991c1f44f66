"""A run from start to end: output directory, model, steps, evaluations, checkpoints, and what is left behind."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import transformers

from mgrpo_kernels import MomentumModel
from mgrpo_kernels.method import equal_to_gold
from mgrpo_kernels.train import checkpoint, demo, extras, parallel
from mgrpo_kernels.train.config import Config, UsageError, build, read_yaml
from mgrpo_kernels.train.data import Task, load_task, prompts_of_step
from mgrpo_kernels.train.estimate import CACHE_SHARE
from mgrpo_kernels.train.evaluate import evaluate
from mgrpo_kernels.train.export import save_final
from mgrpo_kernels.train.guard import Guard, message
from mgrpo_kernels.train.live import Plain, make_view
from mgrpo_kernels.train.loggers import log_in, open_loggers
from mgrpo_kernels.train.metrics import Lines, metrics_line
from mgrpo_kernels.train.plan import Target, describe, plan, read_model
from mgrpo_kernels.train.policy import (
    Policy,
    context_of,
    load_policy,
    pick_device,
    read_tokenizer,
)
from mgrpo_kernels.train.report import read_lines, write_report
from mgrpo_kernels.train.rollout import Engine
from mgrpo_kernels.train.rollout.transformers import TransformersEngine
from mgrpo_kernels.train.step import Learner, train_step, wanted_stats
from mgrpo_kernels.train.stopping import Abandoned, Interrupt, interruptible
from mgrpo_kernels.train.tracing import Trace
from mgrpo_kernels.train.update import Batch, NotFiniteError, make_optimizer

COLLAPSED = 3
INTERRUPTED = 130


THEN = {
    "warn": "The run goes on (--guard stop or rollback would not)",
    "stop": "The run ends here",
    "rollback": "The run goes on from there",
}
"""What the guard's message ends with."""


def say(text: str) -> None:
    print(text, flush=True)


def check_output(output: Path, resume: bool) -> None:
    """Raise UsageError where `output` holds another run, or cannot be resumed."""
    holds_a_run = (output / "config.yaml").exists()
    if output.exists() and not output.is_dir():
        raise UsageError(f"output: want a directory, got the file {output}")
    if holds_a_run and not resume:
        raise UsageError(f"output: want a directory without a run, or --resume to go on with it, got {output}")
    if resume and not holds_a_run:
        raise UsageError(f"resume: want a directory with a run (config.yaml), got {output}")


def check_resume(config: Config, output: Path) -> list[str]:
    """Return what has changed since the run in `output` began, a line each.

    Raises:
        UsageError: something that the steps already taken depend on.
    """
    before, now = build(read_yaml(output / "config.yaml")).values(), config.values()
    for name in ("model", "seed", "lora_rank", "lora_alpha", "lora_targets"):
        if now[name] != before[name]:
            raise UsageError(f"{name}: want {before[name]}, which the run in {output} began with, got {now[name]}")
    return [f"changed: {name}: {before[name]} -> {now[name]}" for name in now if now[name] != before[name]]


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
            for line in lines:
                say(line)
        if dry_run:
            return 0
        with parallel.together():
            policy = None if config.model.model is None else load(config, config.model.model, device)
        with parallel.together():
            if parallel.is_first():
                log_in(config.run)
                say(f"output: {output}")
                (output / "checkpoints").mkdir(parents=True, exist_ok=True)
                write_text(output / "config.yaml", config.to_yaml())
        title = f"{config.method.method}  {output}"
        with make_view(config, title) if parallel.is_first() else Quiet(config) as view:
            if policy is None:
                policy = demo_policy(config, output / "base", device, view)
            learner = make_learner(config, task, policy)
            view.say(f"sequences: {policy.how()}")  # sharded weights go another way
            with interruptible(view.stopping) as interrupt:
                return train(learner, output, interrupt, view)


class Quiet(Plain):
    """The view of a rank that shows nothing."""

    def say(self, text: str) -> None:
        """Leave it to the first rank."""

    def stopping(self) -> None:
        """Leave it to the first rank."""


def check(
    config: Config, output: Path, resume: bool, device: torch.device, dry_run: bool | Target = False
) -> tuple[Task, list[str]]:
    """Return the task, and the lines that tell what is going to be done, before any of it.

    Raises:
        UsageError: something that the user can put right.
    """
    check_output(output, resume)
    changes = check_resume(config, output) if resume else []
    transformers.utils.logging.disable_progress_bar()
    extras.check_packages(config)
    task = demo.make_task(config.run.seed) if config.data.data is None else load_task(config)
    task = task._replace(held_out=task.held_out[: config.eval.eval_prompts], equivalence=config.method.equivalence)
    model = read_model(config.model.model or demo.model_config(), config.lora)
    if config.model.model is None:
        longest = check_lengths(demo.make_tokenizer(), context_of(demo.model_config()), task, config)
    else:
        longest = check_lengths(*read_tokenizer(config.model.model), task, config)
    target = dry_run if isinstance(dry_run, Target) else Target(parallel.world())
    lines = plan(config, task, model, longest, device, target, probe=bool(dry_run) and parallel.is_first())
    return task, [*describe(config), *lines, *changes]


def load(config: Config, name: str, device: torch.device) -> Policy:
    """Return a policy; where ranks will share its weights, in the CPU's memory."""
    place = device if parallel.world() == 1 else torch.device("cpu")
    return load_policy(name, place, dtype_of(config), config.lora, config.run.seed)


def dtype_of(config: Config) -> torch.dtype:
    return torch.bfloat16 if config.model.dtype == "bfloat16" else torch.float32


def demo_policy(config: Config, place: Path, device: torch.device, view: Plain) -> Policy:
    """Return the built-in model, warm-started once for each output directory."""
    with parallel.together():
        if parallel.is_first() and not place.exists():
            view.say(
                f"built-in task: sums modulo 10. Warm start: at most {demo.WARM_STEPS} supervised steps, "
                f"until {demo.WARM_ACCURACY:.0%} of the samples are right ..."
            )
            demo.make_model(place, config.run.seed, device, demo.WARM_STEPS, view.warm_start)
    return load(config, str(place), device)


def check_lengths(tokenizer: Any, context: int | None, task: Task, config: Config) -> int:
    """Return the tokens of the longest prompt.

    Raises:
        UsageError: an empty prompt, or one that leaves too little of the context for the longest response.
    """
    longest, prompts = config.rollout.max_response_tokens, [example.prompt for example in (*task.train, *task.held_out)]
    tokens = tokenizer(prompts)["input_ids"]
    for prompt, ids in zip(prompts, tokens, strict=True):
        if not ids:
            raise UsageError(f"data: want prompts of at least one token, got {prompt!r}")
        if context is not None and len(ids) + longest > context:
            raise UsageError(
                f"max_response_tokens: want at most {context - len(ids)}, since a prompt of {len(ids)} tokens and its response "
                f"share a context of {context}, got {longest} (prompt {prompt[:40]!r} ...); --long-prompts skip leaves such prompts out"
            )
    return max(map(len, tokens))


def make_engine(config: Config, task: Task, policy: Policy) -> Engine:
    """Return what samples."""
    longest = config.rollout.max_response_tokens
    if config.rollout.engine == "vllm":
        from mgrpo_kernels.train.rollout.vllm import VllmEngine
        from mgrpo_kernels.train.rollout.vllm_server import VllmServers

        kind = VllmServers if config.vllm.server_urls else VllmEngine
        prompts = policy.encode([example.prompt for example in (*task.train, *task.held_out)])
        return kind(policy, longest, max(map(len, prompts)), config.vllm)
    return TransformersEngine(policy, longest, CACHE_SHARE * config.rollout.tokens_per_microbatch, wanted_stats(config))


def make_learner(config: Config, task: Task, policy: Policy) -> Learner:
    """Build everything that a step works on, as it is before the first."""
    engine = make_engine(config, task, policy)
    if config.model.gradient_checkpointing:
        parallel.checkpoint_activations(policy.model)
    parallel.shard(policy)
    device = None if config.method.momentum_device == "auto" else config.method.momentum_device
    momentum = reference = None
    if config.needs_momentum:
        momentum = MomentumModel(policy.model, config.method.decay, device=device, frozen=policy.adapter is None)
    if config.needs_reference is not None:
        reference = momentum if config.needs_reference == "momentum" else policy.adapter
        reference = reference or MomentumModel(policy.model, 1.0, device=device)
    return Learner(config, task, policy, engine, make_optimizer(policy, config), momentum, reference)


def train(learner: Learner, output: Path, interrupt: Interrupt, view: Plain) -> int:
    """Take the steps that are left, and leave final/ and the report behind; or stop early, with a checkpoint."""
    config, checkpoints = learner.config, output / "checkpoints"
    steps, every = config.optim.steps, config.run.checkpoint_every
    found = checkpoint.resume(checkpoints, learner, view.warn)
    start, metrics_bytes, samples_bytes, pending = 0, 0, 0, None
    if found is not None:
        start, metrics_bytes, samples_bytes = (found[key] for key in ("step", "metrics_bytes", "samples_bytes"))
        pending = found["pending"]
        view.say(f"resuming after step {start}")
    keep, background = config.run.keep_checkpoints, config.run.async_checkpoints
    writer = checkpoint.Writer(checkpoints, keep, background=background, say=view.warn)
    learner.engine.check = interrupt.check
    files = {"metrics.jsonl": metrics_bytes, "samples.jsonl": samples_bytes}
    metrics, samples = (lines_of_first(output / name, size) for name, size in files.items())
    guard = Guard(len(learner.task.held_out), config.eval.eval_samples)
    past = parallel.from_first(read_lines(output / "metrics.jsonl") if parallel.is_first() else [])
    learner.skipped = past[-1]["skipped_steps"] or 0 if past else 0
    guard.replay(past)
    view.begin(past)
    loggers = open_loggers(config, output, past) if parallel.is_first() else []
    trace = Trace(config.profiled, output, parallel.rank(), view.say)

    def save(step: int, *, wait: bool = False, unevaluated: Any = None) -> Path:
        best = None if config.run.guard == "off" else guard.best([*checkpoint.saved_steps(checkpoints), step])
        return writer.save(learner, step, metrics.sync(), samples.sync(), best, pending=unevaluated, wait=wait)

    def stop(step: int, unevaluated: Any = None) -> int:
        """Save what follows from the steps so far; `unevaluated` is the last one's, where its evaluation is still to come."""
        place = save(step, wait=True, unevaluated=unevaluated)
        leave(f"stopped after step {step} of {steps}; saved {place}; go on with --output {output} --resume")
        return INTERRUPTED

    def leave(text: str) -> None:
        view.stop()
        with parallel.together():  # the others wait: torchrun would end the first as soon as one ends with a status
            if parallel.is_first():
                write_report(output, learner.policy.device)
                say(text)

    def take(step: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Take a step, or skip it where its loss or gradient is not finite."""
        chosen = prompts_of_step(len(learner.task.train), config.rollout.prompts_per_step, step, config.run.seed)
        try:
            with trace.during(step):
                return parallel.from_first(train_step(learner, [learner.task.train[each] for each in chosen], step))
        except NotFiniteError as error:
            place, most = save_batch(output / "skipped", step, error.batch), config.run.max_skipped_steps
            if learner.skipped == most:
                save(step - 1, wait=True)
                raise FloatingPointError(
                    f"{error}, in step {step}, after {most} steps that were skipped (max_skipped_steps); its batch is in {place}"
                ) from error
            learner.skipped += 1
            view.warn(f"step {step} is skipped, {learner.skipped} of at most {most}: {error}; its batch is in {place}")
            return {"step": step, "skipped_steps": learner.skipped}, []

    def watch(line: dict[str, Any]) -> str | None:
        """Show the line to the guard, write it, and do what the guard says; return what that was."""
        signs = [] if config.run.guard == "off" else guard.look(line)
        if signs:
            writer.settle()
            best = guard.best(parallel.from_first(checkpoint.saved_steps(checkpoints)))
            line["guard"] = guard.decide(config.run.guard, config.run.guard_rollbacks, best)
            place = "none yet" if best is None else str(checkpoints / f"step_{best}")
            line["guard_signs"] = "; ".join(signs)
            view.warn(message(line["step"], signs, place, THEN[line["guard"]]))
            guard.note(line["guard"])
            if line["guard"] == "rollback":  # steps go on, and with them the random numbers: the fall is not repeated
                checkpoint.restore(checkpoint.load(Path(place)), learner)
        metrics.write(line)
        for logger in loggers:
            logger.write(line)
        return line["guard"]

    def measure(step: int) -> dict[str, float] | None:
        due = config.eval.eval_every and (step in (0, steps) or step % config.eval.eval_every == 0)
        if not (due and learner.task.held_out):
            return None
        with parallel.gathered(learner.policy.model):
            engine = parallel.divided(learner.engine)
            return parallel.from_first(evaluate(learner.policy, engine, learner.task, config, step))

    try:
        if found is None:
            try:
                evaluation = measure(0)
            except Abandoned:
                leave(f"stopped before the first step; start with --output {output} --resume")
                return INTERRUPTED
            if evaluation is not None:
                watch(metrics_line({"step": 0}, evaluation))
                view.step({"step": 0}, evaluation, [])
                if config.run.guard == "rollback":
                    save(0)
        for step in range(start + (pending is None), steps + 1):
            writer.tell()
            if parallel.on_any(interrupt.asked):
                return stop(step if pending else step - 1, pending)
            try:
                values, shown = pending or take(step)
            except Abandoned:
                return stop(step - 1)
            try:
                evaluation = measure(step)
            except Abandoned:
                return stop(step, (values, shown))
            pending = None
            shown = with_truth(shown, learner.task)
            view.step(values, evaluation, shown)
            done = watch(metrics_line(values, evaluation))
            for each in shown:
                samples.write(each)
            new_best = config.run.guard == "rollback" and guard.is_best(step)
            if done == "stop" or step == steps or new_best or (every and step % every == 0):
                place = save(step, wait=done == "stop" or step == steps)
            if done == "stop":
                leave(
                    f"stopped after step {step} of {steps}; saved {place}; --guard warn --resume goes on all the same"
                )
                return COLLAPSED
    finally:
        writer.settle()
        for sink in (metrics, samples, *loggers, trace):
            sink.close()
    view.stop()
    save_final(learner.policy, output / "final")
    if parallel.is_first():
        write_report(output, learner.policy.device)
        for line in closing(output, config):
            say(line)
    return 0


def lines_of_first(path: Path, size: int) -> Lines | parallel.Nowhere:
    """Open a JSONL file, cut back to its first `size` bytes, where this rank writes it."""
    return Lines(path, size) if parallel.is_first() else parallel.Nowhere()


def save_batch(directory: Path, step: int, batch: Batch) -> Path:
    """Save the batch of a step that was skipped, each rank its own, for torch.load; return its path."""
    directory.mkdir(exist_ok=True)
    rank = f"_rank_{parallel.rank()}" if parallel.world() > 1 else ""
    place = directory / f"step_{step}{rank}.pt"
    torch.save(dict(batch._asdict()), place)
    return place


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    new = path.with_name(path.name + ".new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)


def with_truth(samples: list[dict[str, Any]], task: Task) -> list[dict[str, Any]]:
    """Return lines for samples.jsonl with "correct": whether the answer equals the true one, None where that is not known."""
    correct = equal_to_gold([each["answer"] for each in samples], [each["gold"] for each in samples], task.equivalence)
    return [
        {**each, "correct": None if math.isnan(value) else value == 1.0}
        for each, value in zip(samples, correct.tolist(), strict=True)
    ]


def closing(output: Path, config: Config) -> list[str]:
    """Return the last lines: what came out, where it is, and what to try next."""
    accuracy = [
        line["eval_accuracy"] for line in read_lines(output / "metrics.jsonl") if line.get("eval_accuracy") is not None
    ]
    result = (
        [f"held-out accuracy {accuracy[0]:.3f} -> {accuracy[-1]:.3f} (best {max(accuracy):.3f})"] if accuracy else []
    )
    lines = [
        *result,
        f"written: {output}/report.html, curves.png, metrics.jsonl, samples.jsonl; the model is in {output}/final",
    ]
    if config.model.model is None:
        command = "python -m mgrpo_kernels.train"
        lines += [
            "try next:",
            f"  {command} --method srt --steps 1500  # the vote alone",
            f"  {command} --method gold              # the true answers",
            f"  {command} --model DIR --data FILE    # yours; see --help",
        ]
    return lines
