"""The command line of the trainer."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mgrpo_kernels.method import METHODS
from mgrpo_kernels.train import command_line
from mgrpo_kernels.train.config import SECTIONS, Config, build, fields_of, read_yaml
from mgrpo_kernels.train.errors import CheckpointError, EngineError, UsageError

EPILOG = """methods:
{methods}

examples:
  python -m mgrpo_kernels.train
      the built-in demonstration: sums, no labels
  python -m mgrpo_kernels.train --config paper --model DIR_OR_HUB_NAME \\
      --data FILE.jsonl --eval-data FILE.jsonl --output runs/mine
      the paper's setting on your model and questions
  python -m mgrpo_kernels.train --output runs/mine --resume

Command line over --config over the defaults. --output holds report.html,
curves.png, metrics.jsonl, samples.jsonl, checkpoints/ and final/, the model.
Exit status: 0 done, 1 not finite, 2 wrong use, 3 stopped by the guard, 130
interrupted.
"""


def make_parser() -> argparse.ArgumentParser:
    """Return a parser with a group for each concern."""
    width = max(map(len, METHODS))
    parser = command_line.make_parser(
        "mgrpo_kernels.train",
        "%(prog)s [options]",
        "Train a language model by M-GRPO or a relative. Without a model it trains a small built-in one on sums.",
        EPILOG.format(methods="\n".join(f"  {name:<{width}} {row.text}" for name, row in METHODS.items())),
    )
    files = parser.add_argument_group("files")
    command_line.add_config(files)
    files.add_argument("--output", metavar="DIR", help="where the run goes (default: runs/<method>-<date-time>)")
    files.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run in --output, with its own options where none are given",
    )
    files.add_argument(
        "--dry-run",
        nargs="?",
        const=True,
        type=target,
        metavar="RANKS",
        help="print the plan, memory and time estimated, and stop; for what there is, for so many ranks (8), or by a device's data "
        "sheet (8xh100-80gb)",
    )
    for section in SECTIONS.values():
        group = parser.add_argument_group((section.__doc__ or "").rstrip("."))
        for name in fields_of(section):
            command_line.add_option(group, name)
    return parser


def target(text: str) -> Any:
    """Return what --dry-run plans for; the module takes seconds to import, and --help shall not wait for it."""
    from mgrpo_kernels.train.plan.describe import Target

    return Target.parse(text)


def read_command_line(arguments: Sequence[str] | None) -> tuple[Config, Path, bool, Any]:
    """Return configuration, output directory, resume and dry-run: whether, or for what target.

    Raises:
        UsageError: an option that is unknown, of the wrong type or out of range.
    """
    given = vars(make_parser().parse_args(arguments))
    file, output = given.pop("config", None), given.pop("output", None)
    resume, dry_run = given.pop("resume", False) or is_restart(output), given.pop("dry_run", False)
    layers: list[Mapping[str, Any]] = []
    if resume:
        if output is None:
            raise UsageError("resume: expected --output DIR, the run to go on with, got none")
        if not (Path(output) / "config.yaml").exists():
            raise UsageError(f"resume: expected a directory with a run (config.yaml), got {output}")
        layers.append(read_yaml(Path(output) / "config.yaml"))
    layers += [command_line.read_config(file), given]
    if not any(layer.get(name) is not None for layer in layers for name in ("model", "data")):
        from mgrpo_kernels.train.data.demo import OPTIONS

        layers.insert(0, OPTIONS)
    config = build(*layers)
    default = f"{config.method.method}-{time.strftime('%Y%m%d-%H%M%S')}"
    return config, command_line.output_directory(output, default), resume, dry_run


def is_restart(output: str | None) -> bool:
    """Return whether torchrun has started this process again, after a failure, and there is a run to go on with.

    Raises:
        UsageError: started again, without a directory to look in.
    """
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) == 0:
        return False
    if output is None:
        raise UsageError("output: expected --output DIR, where torchrun's restart finds the run, got none")
    return (Path(output) / "config.yaml").exists()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the trainer; return the exit status: 0, 1 not finite, 2 wrong usage, 3 stopped by the guard, 130 interrupted.

    Not finite, or a checkpoint that could not be written: 1.
    """
    try:
        config, output, resume, dry_run = read_command_line(arguments)
        from mgrpo_kernels.train.run.start import (
            run,
        )  # transformers takes seconds to import, and --help shall not wait for it

        return run(config, output, resume=resume, dry_run=dry_run)
    except UsageError as error:
        if not error.shown_elsewhere:
            print(f"error: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(
            f"error: {error}. Nothing was saved after that; --resume goes on from the last checkpoint", file=sys.stderr
        )
        return 1
    except (CheckpointError, EngineError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped at once; --resume goes on from the last checkpoint, or from the start", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
