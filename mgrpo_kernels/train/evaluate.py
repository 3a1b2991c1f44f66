"""Accuracy on held-out prompts. Its random numbers are its own: evaluating does not change training.

``python -m mgrpo_kernels.train.evaluate --model DIR_OR_HUB_NAME --eval-data FILE`` is an evaluation by itself.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import transformers
import yaml

from mgrpo_kernels import majority_vote
from mgrpo_kernels.method import equal_to_gold
from mgrpo_kernels.train import extras
from mgrpo_kernels.train.config import (
    SECTIONS,
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    UsageError,
    build,
    fields_of,
    read_yaml,
)
from mgrpo_kernels.train.data import Example, Task, load_task
from mgrpo_kernels.train.metrics import Lines, metrics_line
from mgrpo_kernels.train.policy import Policy, load_policy, pick_device, read_tokenizer
from mgrpo_kernels.train.rollout import Engine, Rollouts
from mgrpo_kernels.train.streams import stream


class Question(NamedTuple):
    """What a model makes of one held-out prompt: n samples, their majority, and the greedy answer."""

    example: Example
    responses: list[str]  # n
    answers: list[str | None]  # n; None where none was found
    right: list[bool]  # n
    majority: str | None
    majority_right: bool
    greedy_response: str
    greedy: str | None
    greedy_right: bool

    def line(self) -> dict[str, Any]:
        """Return a line for questions.jsonl."""
        return {**self.example._asdict(), **{key: value for key, value in self._asdict().items() if key != "example"}}


def evaluate(policy: Policy, engine: Engine, task: Task, config: Config, step: int) -> dict[str, float]:
    """Sample every held-out prompt, and greedily once; return the eval_ metrics of :data:`mgrpo_kernels.train.metrics.KEYS`."""
    return figures(examine(policy, engine, task, config, step), config.pass_k)


def examine(policy: Policy, engine: Engine, task: Task, config: Config, step: int) -> list[Question]:
    """Sample every held-out prompt, and greedily once; return what came, prompt by prompt."""
    n = config.eval.eval_samples
    prompts = policy.encode([example.prompt for example in task.held_out])
    gold = [example.gold for example in task.held_out]

    def texts(rollouts: Rollouts) -> list[str]:
        return policy.decode(rollouts.tokens, rollouts.mask)

    def right(answers: Sequence[str | None], true: Sequence[str | None]) -> list[bool]:
        return equal_to_gold(answers, true, task.equivalence).eq(1).tolist()

    generator = stream(config.run.seed, "evaluation", step, policy.device)
    sampled = texts(engine.sample(prompts, n, temperature=config.eval.eval_temperature, generator=generator))
    greedy = texts(engine.sample(prompts, 1, temperature=0.0, generator=generator))
    answers, best = [task.extract(text) for text in sampled], [task.extract(text) for text in greedy]
    labels = majority_vote(answers, n, equivalence=task.equivalence).labels
    hits = right(answers, [each for each in gold for _ in range(n)])
    labels_right, greedy_right = right(labels, gold), right(best, gold)
    return [
        Question(
            example, sampled[i * n : (i + 1) * n], answers[i * n : (i + 1) * n], hits[i * n : (i + 1) * n],
            labels[i], labels_right[i], greedy[i], best[i], greedy_right[i],
        )
        for i, example in enumerate(task.held_out)
    ]  # fmt: skip


def figures(questions: Sequence[Question], k: int) -> dict[str, float]:
    """Return the eval_ metrics: means over the questions."""

    def mean(values: Iterable[float]) -> float:
        return math.fsum(values) / len(questions)

    return {
        "eval_accuracy": mean(sum(each.right) / len(each.right) for each in questions),
        "eval_greedy": mean(each.greedy_right for each in questions),
        "eval_pass_at_k": mean(pass_at_k(len(each.right), sum(each.right), k) for each in questions),
        "eval_maj_at_k": mean(each.majority_right for each in questions),
    }


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Return the unbiased estimate, from n samples of which `correct` are right, that at least one of k is (arXiv 2107.03374)."""
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


# --- An evaluation by itself

KNOWN = {name: each for section in SECTIONS.values() for name, each in fields_of(section).items()}
UNUSED = ("data", "eval_every", "gradient_checkpointing")
OPTIONS = (
    *(name for section in (ModelConfig, DataConfig, EvalConfig) for name in fields_of(section) if name not in UNUSED),
    *("engine", *fields_of(SECTIONS["vllm"]), "max_response_tokens", "tokens_per_microbatch", "seed"),
)  # fmt: skip
"""The trainer's options that an evaluation has; it passes over the others in a file."""


def make_parser() -> argparse.ArgumentParser:
    """Return a parser of :data:`OPTIONS`. An option that is not given is absent from its result."""
    parser = argparse.ArgumentParser(
        prog="python -m mgrpo_kernels.train.evaluate",
        usage="%(prog)s --model DIR_OR_HUB_NAME --eval-data FILE [options]",
        description="Evaluate a model: avg@k, pass@k, maj@k and greedy accuracy. Writes metrics.jsonl and questions.jsonl.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of options by name, as a run's config.yaml")
    parser.add_argument("--output", metavar="DIR", help="where the results go (default: runs/evaluation-<date-time>)")
    for name in OPTIONS:
        field, kinds = KNOWN[name]
        kind = next(kind for kind in kinds if kind is not type(None))
        default = "none" if field.default is None else repr(field.default)
        text = f"{field.metadata['help']} (default: {default})".replace("%", "%%")
        how: dict[str, Any] = (
            {"action": argparse.BooleanOptionalAction}
            if kind is bool
            else {
                "type": kind,
                "choices": field.metadata["choices"],
                "metavar": None if field.metadata["choices"] else {int: "N", float: "X", str: "TEXT"}[kind],
            }
        )
        parser.add_argument("--" + name.replace("_", "-"), help=text, **how)
    return parser


def read_command_line(arguments: Sequence[str] | None) -> tuple[Config, Path]:
    """Return configuration and output directory.

    Raises:
        UsageError: an option that is unknown, of the wrong type or out of range, or no model or data.
    """
    given = vars(make_parser().parse_args(arguments))
    file, output = given.pop("config", None), given.pop("output", None)
    layers = [{} if file is None else read_yaml(file), given]
    values = {name: value for layer in layers for name, value in layer.items()}
    values = {name: value for name, value in values.items() if name in OPTIONS or name not in KNOWN}
    for name in ("model", "eval_data"):
        if values.get(name) is None:
            raise UsageError(f"{name}: want a value, got none")
    config = build(values, {"data": values["eval_data"]})  # a model comes with data to train on; these are not read
    return config, Path(output) if output is not None else Path("runs") / f"evaluation-{time.strftime('%Y%m%d-%H%M%S')}"


def run(config: Config, output: Path) -> dict[str, float]:
    """Evaluate the model that the configuration names as a training run does before its first step; write and return the figures.

    Raises:
        UsageError: something that the user can put right; nothing has been written then.
    """
    from mgrpo_kernels.train.trainer import check_lengths, check_output, dtype_of, make_engine, write_text

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(
            f"torchrun: want one process, got {os.environ['WORLD_SIZE']}: an evaluation by itself is not divided over ranks"
        )
    check_output(output, resume=False)
    extras.check_packages(config, training=False)
    transformers.utils.logging.disable_progress_bar()
    assert config.model.model is not None
    device, task = pick_device(config.model.device), load_task(config, training=False)
    task = task._replace(held_out=task.held_out[: config.eval.eval_prompts])
    check_lengths(*read_tokenizer(config.model.model), task, config)
    policy = load_policy(config.model.model, device, dtype_of(config))
    engine = make_engine(config, task, policy)
    n = config.eval.eval_samples
    print(f"{len(task.held_out):,} prompts x ({n} samples + 1 greedy response) on {device} ...", flush=True)
    questions = examine(policy, engine, task, config, step=0)
    found = figures(questions, config.pass_k)
    output.mkdir(parents=True, exist_ok=True)
    for name, lines in (
        ("questions.jsonl", [each.line() for each in questions]),
        ("metrics.jsonl", [metrics_line({"step": 0}, found)]),
    ):
        file = Lines(output / name, 0)
        for line in lines:
            file.write(line)
        file.close()
    write_text(
        output / "config.yaml", yaml.safe_dump({name: config.values()[name] for name in OPTIONS}, sort_keys=False)
    )
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate; return the exit status: 0, or 2 for wrong usage."""
    try:
        config, output = read_command_line(arguments)
        found = run(config, output)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, value in found.items():
        print(f"{name}: {value:.4f}")
    print(f"written: {output}/metrics.jsonl, questions.jsonl, config.yaml")
    return 0


if __name__ == "__main__":
    sys.exit(main())
