"""The command line of the trainer: ``python -m mgrpo_kernels.train``."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mgrpo_kernels.method import METHODS
from mgrpo_kernels.train import command_line
from mgrpo_kernels.train.config import Config, build, preset_descriptions, read_yaml
from mgrpo_kernels.train.ending import exit_status, leave
from mgrpo_kernels.train.errors import UsageError
from mgrpo_kernels.train.parser import Parser, Spelling
from mgrpo_kernels.train.run.record import Record

FIRST = ("model", "data", "method", "steps", "prompts_per_step", "rollouts", "learning_rate", "engine")
"""The options that most users need first, besides --config and --output."""

EPILOG = """presets, for --config:
{presets}

methods, for --method, and the reward of a rollout in each:
{methods}

examples:
  python -m mgrpo_kernels.train
      run the built-in demonstration: a small model learns to add
  python -m mgrpo_kernels.train --config paper --model DIR_OR_HUB_NAME \\
      --data FILE.jsonl --eval-data FILE.jsonl --output runs/mine
      train your model on your questions with the settings of the paper
  python -m mgrpo_kernels.train --output runs/mine --resume
      continue that run from its latest checkpoint

Options on the command line override those of --config, which override the
defaults. The output directory holds report.html, curves.png, metrics.jsonl,
samples.jsonl, certificate.json (signs of collapse), checkpoints/, and the
trained model in final/.
Exit status: 0 finished, 1 failed (loss, gradient or weights not finite, out of
memory, a full disk, a rollout engine), 2 invalid options, 3 stopped by the
guard, 130 interrupted.
"""


def make_parser() -> Parser:
    """Return a parser whose first group has the most used options, followed by a group for each section."""
    parser = command_line.make_parser(
        "mgrpo_kernels.train",
        "%(prog)s [options]",
        "Train a language model with M-GRPO or a related method, without labels. Without --model and --data, train a small built-in "
        "model on arithmetic problems.",
        EPILOG.format(
            presets=command_line.table(preset_descriptions()),
            methods=command_line.table({name: row.text for name, row in METHODS.items()}),
        ),
    )
    first = parser.add_argument_group(command_line.MOST_USED)
    command_line.add_config(first)
    for name in FIRST[:3]:
        command_line.add_option(first, name)
    first.add_argument(
        "--output", metavar="DIR", help="output directory of the run (default: runs/<method>-<date-time>)"
    )
    for name in FIRST[3:]:
        command_line.add_option(first, name)
    start = parser.add_argument_group("start of the run")
    start.add_argument(
        "--resume",
        action="store_true",
        help="continue the run in --output from its latest checkpoint, with the run's own options unless others are given "
        "(default: off)",
    )
    start.add_argument(
        "--allow-changed-data",
        action="store_true",
        help="resume the run although the content of its data, its base model or its tokenizer has changed since it began (default: off)",
    )
    start.add_argument(
        "--dry-run",
        nargs="?",
        const=True,
        type=target,
        metavar="RANKS",
        help="check the options, print the plan with estimates of memory and time, and exit; RANKS plans for that many ranks (8), or "
        "for ranks of another device (8xh100-80gb), instead of those at hand (default: off)",
    )
    start.add_argument(
        "--probe",
        nargs="?",
        const=64,
        type=int,
        metavar="N",
        help="instead of training, sample N training prompts (64 without a number), print whether the vote of the model as it is would "
        "improve it, and exit; nothing is written (default: off)",
    )
    command_line.add_options(parser, (name for name in command_line.OPTIONS if name not in FIRST))
    command_line.add_help(parser)
    return parser


def target(text: str) -> Any:
    """Return the target that the value of --dry-run names."""
    from mgrpo_kernels.train.plan.describe import Target  # imports transformers, which would slow --help down

    return Target.parse(text)


class CommandLine(NamedTuple):
    """What the command line asks for."""

    config: Config
    output: Path
    resume: bool
    dry_run: Any  # True, or the target that it names
    allow_changed: bool
    probe: int | None  # number of prompts


def read_command_line(arguments: Sequence[str] | None, spelling: Spelling | None = None) -> CommandLine:
    """Return what the command line asks for; `spelling` learns which options it has.

    Raises:
        UsageError: an option is unknown, has the wrong type or is out of range.
    """
    parser = make_parser()
    given = vars(parser.parse_args(arguments))
    spelling = spelling or Spelling()
    spelling.read(parser, (), given)
    file, output = given.pop("config", None), given.pop("output", None)
    allow_changed, probe = given.pop("allow_changed_data", False), given.pop("probe", None)
    resume, dry_run = given.pop("resume", False) or is_restart(output), given.pop("dry_run", False)
    if probe is not None and (resume or dry_run):
        raise UsageError(f"probe: expected it without --{'resume' if resume else 'dry-run'}, got both")
    layers: list[Mapping[str, Any]] = []
    if resume:
        if output is None:
            raise UsageError("resume: expected --output DIR, the directory of the run to resume, got none")
        if not (Path(output) / "config.yaml").exists():
            raise UsageError(f"resume: expected the directory of a run, with its config.yaml, got {output}")
        layers.append(read_yaml(Path(output) / "config.yaml"))
    layers += [command_line.read_config(file), given]
    spelling.read(parser, {name for layer in layers[:-1] for name in layer}, given)
    if not any(layer.get(name) is not None for layer in layers for name in ("model", "data")):
        from mgrpo_kernels.train.data.demo import OPTIONS

        layers.insert(0, OPTIONS)
    config = build(*layers)
    if probe is not None and config.method.row.reads == "nothing":
        raise UsageError(
            "probe: expected a method whose rewards follow from the vote, which is what a probe judges, got "
            f"{config.method.method}"
        )
    default = f"{config.method.method}-{time.strftime('%Y%m%d-%H%M%S')}"
    return CommandLine(config, command_line.output_directory(output, default), resume, dry_run, allow_changed, probe)


def is_restart(output: str | None) -> bool:
    """Return whether torchrun has restarted this process after a failure, and the run in `output` can be resumed.

    Raises:
        UsageError: this is a restart, and `output` is not given.
    """
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) == 0:
        return False
    if output is None:
        raise UsageError("output: expected --output DIR, in which a restart by torchrun finds the run, got none")
    return (Path(output) / "config.yaml").exists()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the trainer; return the exit status, as the end of ``--help`` lists them."""
    spelling = Spelling()
    with Record() as record:
        try:
            found = read_command_line(arguments, spelling)
            # transformers takes seconds to import, and --help shall not wait for it
            from mgrpo_kernels.train.run.start import run

            return run(
                found.config,
                found.output,
                resume=found.resume,
                dry_run=found.dry_run,
                allow_changed=found.allow_changed,
                probe=found.probe,
                record=record,
            )
        except BaseException as error:
            status = exit_status(error, spell=spelling)
            if status is None:
                raise
            return status


if __name__ == "__main__":
    leave(main())
