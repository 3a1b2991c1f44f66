"""Evaluates a model on its own: ``python -m mgrpo_kernels.train.evaluate --model DIR_OR_HUB_NAME --eval-data FILE``."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import transformers
import yaml

from mgrpo_kernels.train import command_line, extras
from mgrpo_kernels.train.config import Config, DataConfig, EvalConfig, ModelConfig, VllmConfig, build, fields_of
from mgrpo_kernels.train.data.task import check_lengths, load_task
from mgrpo_kernels.train.ending import exit_status
from mgrpo_kernels.train.errors import OutputError, UsageError
from mgrpo_kernels.train.model.location import trust_warning
from mgrpo_kernels.train.model.policy import load_policy, pick_device, read_tokenizer
from mgrpo_kernels.train.parser import Parser, Spelling
from mgrpo_kernels.train.plan.units import duration
from mgrpo_kernels.train.run.evaluation import MEASURES, derived, examine, figures
from mgrpo_kernels.train.run.files import write_text
from mgrpo_kernels.train.run.learner import dtype_of, make_engine
from mgrpo_kernels.train.run.output import check_output
from mgrpo_kernels.train.text import print_line
from mgrpo_kernels.train.watch.lines import Lines
from mgrpo_kernels.train.watch.metrics import metrics_line
from mgrpo_kernels.train.watch.uncertainty import with_error

UNUSED = ("data", "max_examples", "shuffle_data", "eval_every", "gradient_checkpointing")
REQUIRED = ("model", "eval_data")
OPTIONS = (
    *(name for section in (ModelConfig, DataConfig, EvalConfig) for name in fields_of(section) if name not in UNUSED),
    "engine",
    *fields_of(VllmConfig),
    "max_response_tokens",
    "tokens_per_microbatch",
    "seed",
)
"""The trainer's options that an evaluation uses; others in a file or a preset are ignored."""
FIRST = ("eval_samples", "eval_temperature", "max_response_tokens", "engine")
"""The options that most users need first, besides --config, --model, --eval-data and --output."""

SECONDS = 5.0
"""Time from one line of progress to the next."""

EPILOG = """examples:
  python -m mgrpo_kernels.train.evaluate --model DIR_OR_HUB_NAME \\
      --eval-data FILE.jsonl
      evaluate a model on the questions of a file
  python -m mgrpo_kernels.train.evaluate --config runs/mine/config.yaml \\
      --model runs/mine/final
      evaluate the model of a training run on that run's held-out questions

Exit status: 0 finished, 1 failed, 2 invalid options, 130 interrupted."""


def make_parser() -> Parser:
    """Return a parser of :data:`OPTIONS`, in groups."""
    parser = command_line.make_parser(
        "mgrpo_kernels.train.evaluate",
        "%(prog)s --model DIR_OR_HUB_NAME --eval-data FILE_OR_NAME [options]",
        "Evaluate a language model on held-out questions: avg@k, pass@k, maj@k and greedy accuracy. Writes metrics.jsonl, "
        "questions.jsonl and config.yaml.",
        EPILOG,
    )
    first = parser.add_argument_group(command_line.MOST_USED)
    for name in REQUIRED:
        command_line.add_option(first, name, required=True)
    command_line.add_config(first)
    first.add_argument(
        "--output", metavar="DIR", help="output directory of the results (default: runs/evaluation-<date-time>)"
    )
    for name in FIRST:
        command_line.add_option(first, name)
    command_line.add_options(parser, (name for name in OPTIONS if name not in (*REQUIRED, *FIRST)))
    command_line.add_help(parser)
    return parser


def read_command_line(arguments: Sequence[str] | None, spelling: Spelling | None = None) -> tuple[Config, Path]:
    """Return the configuration and the output directory; `spelling` learns which options the command line has.

    Raises:
        UsageError: an option is unknown, has the wrong type or is out of range, or the model or the data are missing.
    """
    parser = make_parser()
    given = vars(parser.parse_args(arguments))
    spelling = spelling or Spelling()
    spelling.read(parser, (), given)
    file, output = given.pop("config", None), given.pop("output", None)
    in_file = command_line.read_config(file)
    spelling.read(parser, in_file, given)
    values = {**in_file, **given}
    values = {name: value for name, value in values.items() if name in OPTIONS or name not in command_line.OPTIONS}
    command_line.require(values, *REQUIRED)
    config = build(values, {"data": values["eval_data"]})  # a model requires training data, which are not read here
    return config, command_line.output_directory(output, f"evaluation-{time.strftime('%Y%m%d-%H%M%S')}")


def run(config: Config, output: Path) -> dict[str, float | None]:
    """Evaluate the configured model as a training run does before its first step; write and return the metrics.

    Raises:
        UsageError: an option, a file or a directory is unusable; nothing has been written.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(
            f"torchrun: expected one process, got {os.environ['WORLD_SIZE']}: start this evaluation without torchrun"
        )
    check_output(output, resume=False)
    extras.check_packages(config, training=False)
    transformers.utils.logging.disable_progress_bar()
    assert config.model.model is not None
    if config.model.trust_remote_code:
        print_line(trust_warning(config.model.model))
    device, task = pick_device(config.model.device), load_task(config, training=False)
    task = task.evaluating(config.eval.eval_prompts)
    check_lengths(*read_tokenizer(config.model.model, config.model.loading), task, config.rollout.max_response_tokens)
    policy = load_policy(config.model.model, device, dtype_of(config), loading=config.model.loading)
    engine = make_engine(config, task, policy)
    n = config.eval.eval_samples
    print_line(f"{len(task.held_out):,} prompts x ({n} samples + 1 greedy response) on {device} ...")
    engine.progress = Progress()
    questions = examine(policy, engine, task, config)
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
        if file.unwritten:
            raise OutputError(
                f"output: expected room for {output / name}, of which {len(file.unwritten)} lines could not be written"
            )
    write_text(
        output / "config.yaml", yaml.safe_dump({name: config.values()[name] for name in OPTIONS}, sort_keys=False)
    )
    return found


class Progress:
    """Prints how much of an evaluation is done, every few seconds: first of the samples, then of the greedy responses."""

    def __init__(self) -> None:
        self._start = self._shown = time.monotonic()
        self._phase, self._last = "samples", 0.0

    def __call__(self, share: float) -> None:
        now = time.monotonic()
        if share < self._last:
            self._phase = "greedy responses"
        self._last = share
        if now - self._shown >= SECONDS:
            self._shown = now
            print_line(f"  {self._phase}: {share:.0%} after {duration(now - self._start)}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the evaluation; return the exit status: 0, 1 for a failure, or 2 for invalid options."""
    spelling = Spelling()
    try:
        config, output = read_command_line(arguments, spelling)
        found = run(config, output)
    except BaseException as error:
        status = exit_status(error, hint="", spell=spelling)
        if status is None:
            raise
        return status
    for name, value in found.items():
        if name.partition("/")[0] in MEASURES and value is not None:
            print_line(f"{name}: {with_error(value, found[derived(name, 'error')], 4)}")
    print_line("after each ±: the standard error over the prompts")
    print_line(f"written: {output}/metrics.jsonl, questions.jsonl, config.yaml")
    return 0


if __name__ == "__main__":
    sys.exit(main())
