"""The display of a running training: a live view in a terminal, else lines of text."""

from __future__ import annotations

import os
import signal
import sys
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from mgrpo_kernels.train.config import Config
from mgrpo_kernels.train.text import PRINTED, one_line, print_line, printable
from mgrpo_kernels.train.watch.guard import START, WINDOW
from mgrpo_kernels.train.watch.names import NAMES
from mgrpo_kernels.train.watch.uncertainty import with_error

STOPPING = "stopping after this step; interrupt again to stop at once, without a checkpoint"
WARM_EVERY = 100
"""Steps of the warm start from one line of plain text to the next."""
POINTS = 256
"""Largest number of points of a curve; beyond it, two neighbours are replaced by their mean."""
BLOCKS = "▁▂▃▄▅▆▇█"
FIGURES = (
    "eval_accuracy",
    "eval_greedy",
    "eval_maj_at_k",
    "vote_share",
    "label_accuracy",
    "distinct_labels",
    "top_answer_share",
    "entropy",
    "pruned_fraction",
    "momentum_distance",
    "tokens_per_second",
)
DIGITS = {"tokens_per_second": 0, "momentum_distance": 4, "kl": 4}
MORE = ("reward_mean", "kl", "response_tokens", "grad_norm")
"""Metrics that are shown if the terminal is high enough."""


class Plain:
    """Prints lines of text: for a pipe, a file, or --plain."""

    def __init__(self, config: Config) -> None:
        self.steps, self.log_every = config.optim.steps, config.run.log_every

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def write_line(self, text: str) -> None:
        print_line(text)

    def warn(self, text: str) -> None:
        """Print a warning; the live view keeps it visible."""
        self.write_line(text)

    def warm_start(self, step: int, steps: int, accuracy: float, goal: float) -> None:
        """Show the progress of the built-in model's warm start."""
        if step % WARM_EVERY == 0 or accuracy >= goal:
            self.write_line(f"warm start, step {step} of at most {steps:,}: accuracy {accuracy:.2f} of {goal:.2f}")

    def begin(self, past: Iterable[Mapping[str, Any]]) -> None:
        """Prepare for the steps; `past` are the lines of the steps that a resumed run has done."""

    def step(
        self,
        values: Mapping[str, Any],
        evaluation: Mapping[str, float | None] | None,
        samples: Sequence[Mapping[str, Any]],
    ) -> None:
        """Show a step, or the evaluation before the first step, which is step 0."""
        if evaluation is not None or values["step"] % self.log_every == 0:
            self.write_line(progress(values, evaluation, self.steps))

    def stopping(self) -> None:
        """Announce that the run will stop. This is called in a signal handler, which may interrupt print() and must not call it."""
        os.write(2, STOPPING.encode() + b"\n")

    def stop(self) -> None:
        """Restore the terminal; later messages are plain lines."""


def progress(values: Mapping[str, Any], evaluation: Mapping[str, float | None] | None, steps: int) -> str:
    """Return a step as a line of text."""
    names = {
        "reward_mean": "reward",
        "vote_share": "vote share",
        "label_accuracy": "label accuracy",
        "entropy": "entropy",
        "pruned_fraction": "pruned",
        "response_tokens": "length",
        "tokens_per_second": "tokens/s",
    }
    there = {text: values[key] for key, text in names.items() if values.get(key) is not None}
    parts = [f"{text} {value:,.0f}" if value >= 1000 else f"{text} {value:.3g}" for text, value in there.items()]
    if evaluation is not None:
        parts.append(
            f"| held-out accuracy {shown(evaluation, 'eval_accuracy')}  greedy {shown(evaluation, 'eval_greedy')}"
        )
    return f"step {values['step']:>{len(str(steps))}}/{steps}  {'  '.join(parts)}"


def shown(evaluation: Mapping[str, float | None], key: str) -> str:
    """Return a held-out accuracy with its standard error."""
    value = evaluation.get(key)
    return "-" if value is None else with_error(value, evaluation.get(f"{key}_error"))


class Curve:
    """One metric over a run: its initial and current value, and the curve between them.

    With `smooth`, for a metric of single steps, the initial and the current value are means over steps, as in the guard.
    """

    def __init__(self, smooth: bool) -> None:
        self._points: list[float] = []
        self._each, self._sum, self._count = 1, 0.0, 0  # values per point; sum and count of the incomplete point
        self._first: list[float] = []
        self._recent: deque[float] = deque(maxlen=WINDOW if smooth else 1)
        self._starts = START if smooth else 1

    def add(self, value: float) -> None:
        if len(self._first) < self._starts:
            self._first.append(value)
        self._recent.append(value)
        self._sum, self._count = self._sum + value, self._count + 1
        if self._count == self._each:
            self._points.append(self._sum / self._count)
            self._sum, self._count = 0.0, 0
        if len(self._points) == 2 * POINTS:
            self._points = [0.5 * (a + b) for a, b in zip(self._points[::2], self._points[1::2], strict=True)]
            self._each *= 2

    def __bool__(self) -> bool:
        return bool(self._first)

    @property
    def start(self) -> float:
        return sum(self._first) / len(self._first)

    @property
    def now(self) -> float:
        return sum(self._recent) / len(self._recent)

    def __len__(self) -> int:
        """Number of points of the curve."""
        return len(self._points)

    def drawn(self, width: int) -> str:
        """Return the curve as `width` block characters, scaled to its lowest and highest value; fewer points are repeated."""
        points, means = self._points, []
        for i in range(width if points else 0):
            first = i * len(points) // width
            part = points[first : max(first + 1, (i + 1) * len(points) // width)]
            means.append(sum(part) / len(part))
        if not means:
            return ""
        low, span = min(means), max(means) - min(means)
        return "".join(BLOCKS[round((each - low) / span * (len(BLOCKS) - 1)) if span else 0] for each in means)


class Live(Plain):
    """A display below the messages: progress, metrics, the latest samples, and the guard's latest warning."""

    def __init__(self, config: Config, title: str, console: Any) -> None:
        from rich import live
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        super().__init__(config)
        self._title, self._console = one_line(title), console
        self._evaluations: dict[int, Mapping[str, Any]] = {}  # by step
        self._curves = {key: Curve(smooth=not key.startswith("eval_")) for key in FIGURES + MORE}
        self._samples: deque[Sequence[Mapping[str, Any]]] = deque(maxlen=4)  # the latest steps' first prompts
        self._warning, self._stopping, self._signal = "", False, signal.SIG_DFL
        self._bar = Progress(
            TextColumn("{task.description}"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            auto_refresh=False,
            expand=True,
        )
        self._task: Any = None
        self._live = live.Live(
            get_renderable=self._view,
            console=console,
            refresh_per_second=4,
            vertical_overflow="crop",
            auto_refresh=True,
        )

    def __enter__(self) -> Self:
        # Outside the steps there is no handler for SIGTERM, and its default would leave the cursor hidden.
        self._signal = signal.signal(signal.SIGTERM, signal.default_int_handler)  # type: ignore[assignment]
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        signal.signal(signal.SIGTERM, self._signal)

    def stop(self) -> None:
        self._live.stop()

    def write_line(self, text: str) -> None:
        PRINTED.info(printable(text))
        self._console.print(printable(text), markup=False, highlight=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        self._warning = one_line(text)
        self.write_line(text)

    def stopping(self) -> None:
        self._stopping = True

    def warm_start(self, step: int, steps: int, accuracy: float, goal: float) -> None:
        if self._task is None:
            self._task = self._bar.add_task("warm start", total=steps, note="")
        self._bar.update(self._task, completed=step, note=f"accuracy {accuracy:.2f} of {goal:.2f}")

    def begin(self, past: Iterable[Mapping[str, Any]]) -> None:
        last = 0
        for line in past:
            self._take(line)
            last = line["step"]
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task("step", total=self.steps, completed=last, note="")

    def step(
        self,
        values: Mapping[str, Any],
        evaluation: Mapping[str, float | None] | None,
        samples: Sequence[Mapping[str, Any]],
    ) -> None:
        self._take({**values, **(evaluation or {})})
        if evaluation is not None or values["step"] % self.log_every == 0:
            PRINTED.info(progress(values, evaluation, self.steps))
        if samples:
            self._samples.appendleft(samples)
        self._bar.update(self._task, completed=values["step"])

    def _take(self, line: Mapping[str, Any]) -> None:
        if line.get("eval_accuracy") is not None:
            self._evaluations[line["step"]] = line
        for key, curve in self._curves.items():
            value = line.get(key)
            if value is not None and float("-inf") < value < float("inf"):
                curve.add(float(value))

    def _view(self) -> Any:
        """Return the renderable of the display, which is no higher than the terminal."""
        from rich.console import Group
        from rich.rule import Rule
        from rich.text import Text

        parts: list[Any] = [Rule(Text(self._title), align="left", style="dim"), self._bar]
        notes = []
        if self._warning:
            notes.append(Text(self._warning, style="bold red", no_wrap=True, overflow="ellipsis"))
        if self._stopping:
            notes.append(Text(STOPPING, style="bold yellow", no_wrap=True, overflow="ellipsis"))
        room = self._console.height - len(parts) - len(notes) - 2  # the cursor's line, and one for typed characters
        figures = [key for key in FIGURES if self._curves[key]]
        samples = [_sample_rows(each) for each in list(self._samples)]
        first = 1 + len(samples[0]) if samples else 0
        if figures:
            spare = room - 1 - len(figures) - first
            figures += [key for key in MORE[: max(0, spare)] if self._curves[key]]
            parts.append(self._figures(figures))
            room -= 1 + len(figures)
        for rows in samples:
            if len(rows) + 1 > room:
                break
            parts += [Text(""), *rows]
            room -= len(rows) + 1
        return Group(*parts, *notes)

    def _figures(self, keys: Sequence[str]) -> Any:
        from rich.table import Table

        narrow = self._console.width < 60
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        for head in ("", "now") if narrow else ("", "start", "best", "now"):
            table.add_column(head, justify="right" if head else "left", no_wrap=True)
        table.add_column("", no_wrap=True, style="cyan")
        latest: Mapping[str, Any] = list(self._evaluations.values())[-1] if self._evaluations else {}
        best = self._evaluations.get(latest.get("eval_best_step", -1), {})
        # Evaluations are fewer than steps, and their curves are as wide, so that one column is the same time in all of them.
        width = min(self._console.width - (40 if narrow else 58), max(len(self._curves[key]) for key in keys))
        for key in keys:
            curve, digits = self._curves[key], DIGITS.get(key, 3)
            start, now = f"{curve.start:,.{digits}f}", f"{curve.now:,.{digits}f}"
            if key.startswith("eval_"):
                now = shown(latest, key)
            top = f"{best[key]:.{digits}f}" if key == "eval_accuracy" and best else ""
            table.add_row(NAMES[key], *([now] if narrow else [start, top, now]), curve.drawn(width))
        return table


def _sample_rows(samples: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Return a row for a step's prompt and one for each sample, marked correct by the true answer if it is known, else by the label."""
    from rich.text import Text

    def row(*parts: tuple[str, str]) -> Text:
        return Text.assemble(*parts, no_wrap=True, overflow="ellipsis")

    prompt, label, gold = (samples[0][key] for key in ("prompt", "label", "gold"))
    truth = "" if gold is None else f"  true answer {one_line(gold)}"
    rows = [
        row(
            (f"step {samples[0]['step']}  ", "dim"),
            (f"label {one_line(label)}{truth}  ", "bold"),
            (one_line(prompt), ""),
        )
    ]
    for each in samples:
        right = each["answer"] == label if each["correct"] is None else each["correct"]
        mark = ("  ○ ", "yellow") if each["answer"] is None else ("  ✓ ", "green") if right else ("  ✗ ", "red")
        marks = [
            name
            for name, is_set in (("momentum", each["sampled_by"] == "momentum"), ("pruned", each["pruned"]))
            if is_set
        ]
        rows.append(
            row(
                mark,
                (f"{one_line(each['answer']):>6}  reward {each['reward']:.3g}  ", ""),
                (f"{', '.join(marks)}  " if marks else "", "dim"),
                (one_line(each["response"]), ""),
            )
        )
    return rows


def make_view(config: Config, title: str) -> Plain:
    """Return the live view if standard output is a terminal that can show it and --plain was not given, else plain lines."""
    if config.run.plain or not sys.stdout.isatty():
        return Plain(config)
    from rich.console import Console

    console = Console()
    able = console.is_terminal and not console.is_dumb_terminal and console.encoding.startswith("utf")
    return Live(config, title, console) if able else Plain(config)
