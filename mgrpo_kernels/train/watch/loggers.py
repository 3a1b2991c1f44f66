"""Loggers of a run's metrics besides metrics.jsonl: TensorBoard, Weights & Biases, Trackio.

metrics.jsonl is the reference. A resumed run repeats the steps since its last checkpoint, but no logger gets a step twice: TensorBoard's
files are rewritten from metrics.jsonl, and for the two others ``loggers.json`` holds the last step that was sent. That file is written
before the step is sent, so a step is missing from the logger if the run is killed in between.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from mgrpo_kernels.train.config import Config, RunConfig
from mgrpo_kernels.train.errors import UsageError
from mgrpo_kernels.train.run.files import write_text
from mgrpo_kernels.train.text import print_line
from mgrpo_kernels.train.watch.metrics import plain

Line = Mapping[str, Any]
LOGGERS = ("tensorboard", "wandb", "trackio")


class Logger(Protocol):
    """Receives each line of metrics.jsonl."""

    def write(self, line: Line) -> None: ...

    def catch_up(self) -> None:
        """Called when the lines of the run so far have been written."""

    def close(self) -> None: ...


def log_in(run: RunConfig) -> None:
    """Let Weights & Biases check its key, or ask for one, before anything is written and before the live view starts.

    Raises:
        UsageError: there is no key and no terminal to ask for it, or the server rejects the key.
    """
    if run.wandb is None:
        return
    import wandb

    def online() -> bool:
        return wandb.setup().settings.mode in ("online", "shared", "run")

    try:
        able = not online() or wandb.login() or not online()  # the user may choose offline mode when asked
    except (wandb.errors.Error, ValueError) as error:
        raise UsageError(f"wandb: expected a login (wandb login) or WANDB_MODE=offline, got: {error}") from error
    if not able:
        raise UsageError("wandb: expected a login (wandb login) or WANDB_MODE=offline, got neither")


def open_loggers(
    config: Config, output: Path, past: Iterable[Line], warn: Callable[[str], None] = print_line
) -> list[Logger]:
    """Open the configured loggers for the run in `output`; `past` are the lines in its metrics.jsonl, and `warn` reports failures."""
    check_projects(config, output)
    made: list[Logger] = []
    past, run = list(past), config.run
    if run.tensorboard:
        made.append(SafeLogger("tensorboard", TensorBoard(config, output / "tensorboard"), warn))
    if run.wandb is not None:
        made.append(SafeLogger("wandb", Once(output, "wandb", run.wandb, config, open_wandb), warn))
    if run.trackio is not None:
        made.append(SafeLogger("trackio", Once(output, "trackio", run.trackio, config, open_trackio), warn))
    for logger in made:
        for line in past:
            logger.write(line)
        logger.catch_up()
    return made


def check_projects(config: Config, output: Path) -> None:
    """Raise UsageError if the run in `output` was started in another project of a logger, or if loggers.json is damaged."""
    known = read_state(output)
    for kind, project in (("wandb", config.run.wandb), ("trackio", config.run.trackio)):
        if project is not None and kind in known and known[kind]["project"] != project:
            raise UsageError(
                f"{kind}: expected {known[kind]['project']}, the project in which the run was started, got {project}"
            )


def read_state(output: Path) -> dict[str, Any]:
    """Return the content of loggers.json: for each logger, its project, the name of the run, and the last step that was sent.

    Raises:
        UsageError: the file is damaged.
    """
    file = output / "loggers.json"
    if not file.exists():
        return {}
    try:
        found: Any = json.loads(file.read_text(encoding="utf-8"))
        fine = isinstance(found, dict) and all(
            isinstance(each, dict) and each.keys() >= {"project", "run", "step"} for each in found.values()
        )
    except (OSError, ValueError) as error:
        raise UsageError(
            f"loggers: expected a readable {file}, got {error}: delete it to let the loggers start a new run"
        ) from error
    state: dict[str, Any] = found
    if not fine:
        raise UsageError(f"loggers: expected the project, run and step of each logger in {file}, got something else")
    return state


class SafeLogger:
    """A logger whose failure does not end the run: it is reported, and the logger gets no more lines until the run is resumed."""

    def __init__(self, name: str, logger: Logger, warn: Callable[[str], None]) -> None:
        self.name, self._logger, self._warn, self._failed = name, logger, warn, False

    def write(self, line: Line) -> None:
        self._attempt(lambda: self._logger.write(line))

    def catch_up(self) -> None:
        self._attempt(self._logger.catch_up)

    def close(self) -> None:
        self._attempt(self._logger.close)

    def _attempt(self, call: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            call()
        except Exception as error:  # a disk, a network or a service may raise any error
            self._failed = True
            self._warn(
                f"warning: {self.name} failed and is now disabled: {type(error).__name__}: {error}. metrics.jsonl has all lines; "
                "--resume enables it again"
            )


def scalars(line: Line) -> dict[str, float]:
    """Return a line's numbers under grouped names: eval/accuracy, time/rollout, train/loss, guard/warn. Null values are omitted."""
    named = {}
    for key, raw in line.items():
        value = plain(raw)
        group, _, rest = key.partition("_")
        if key == "guard" and value is not None:
            named[f"guard/{value}"] = 1.0
        elif isinstance(value, (int, float)) and key != "step":
            named[f"{group}/{rest}" if group in ("eval", "time") else f"train/{key}"] = value
    return named


class TensorBoard:
    """Writes TensorBoard event files; the newest file holds all steps of the run."""

    def __init__(self, config: Config, directory: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._older = list(directory.glob("events.out.tfevents.*"))
        # With purge_step, a TensorBoard that has read the older file discards its steps.
        self._writer = SummaryWriter(str(directory), purge_step=0)
        self._writer.add_text("config", f"```yaml\n{config.to_yaml()}\n```")

    def write(self, line: Line) -> None:
        for name, value in scalars(line).items():
            self._writer.add_scalar(name, value, line["step"])
        if line.get("guard_signs"):
            self._writer.add_text("guard", f"{line['guard']}: {line['guard_signs']}", line["step"])
        self._writer.flush()

    def catch_up(self) -> None:
        """Truncate the files of earlier parts of the run, whose steps the newest file holds too.

        A TensorBoard that is reading a truncated file continues with the next one; it would not if the file were deleted.
        """
        for each in self._older:
            each.write_bytes(b"")

    def close(self) -> None:
        self._writer.close()


Send = Callable[[dict[str, float], int], None]
Open = Callable[[str, str, Config, Path], tuple[Send, Callable[[], None]]]


class Once:
    """A logger with its own storage, which must not get a step twice. The run's name and last step are kept in loggers.json."""

    def __init__(self, output: Path, kind: str, project: str, config: Config, open_run: Open) -> None:
        self._file, self._kind = output / "loggers.json", kind
        self._state = read_state(output).get(kind) or {
            "project": project,
            "run": f"{output.name}-{uuid.uuid4().hex[:8]}",
            "step": -1,
        }
        self._save()
        self._send, self._end = open_run(project, self._state["run"], config, output)

    def _save(self) -> None:
        write_text(self._file, json.dumps({**read_state(self._file.parent), self._kind: self._state}))

    def catch_up(self) -> None:
        """The service has the lines already."""

    def write(self, line: Line) -> None:
        if line["step"] <= self._state["step"]:
            return
        self._state["step"] = line["step"]
        self._save()
        self._send(scalars(line), line["step"])

    def close(self) -> None:
        self._end()


def open_wandb(project: str, name: str, config: Config, output: Path) -> tuple[Send, Callable[[], None]]:
    """Start or resume a run of Weights & Biases, whose files are written to ``wandb/`` in `output`."""
    import wandb

    run = wandb.init(
        project=project,
        id=name,
        name=name,
        resume="allow",
        config=config.values(),
        dir=str(output),
        settings=wandb.Settings(console="off"),  # the live view owns the terminal
    )
    return lambda values, step: run.log(values, step=step), run.finish


def open_trackio(project: str, name: str, config: Config, output: Path) -> tuple[Send, Callable[[], None]]:
    """Start or resume a run of Trackio, which stores it in TRACKIO_DIR."""
    import trackio

    run = trackio.init(project=project, name=name, resume="allow", config=config.values())
    return lambda values, step: run.log(values, step=step), run.finish
