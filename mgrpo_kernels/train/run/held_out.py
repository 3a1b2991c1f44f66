"""The evaluations of a run: each is kept in ``held_out/step_N.jsonl``, and compared with those before it, prompt by prompt."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from mgrpo_kernels.train.config import Config
from mgrpo_kernels.train.run.evaluation import Question, derived, figures, values_of
from mgrpo_kernels.train.run.files import reason, write_bytes
from mgrpo_kernels.train.watch.lines import as_line, read_lines
from mgrpo_kernels.train.watch.uncertainty import is_beyond, paired_change

DIRECTORY = "held_out"
Values = dict[str, list[float]]  # by the key of the metric, one value per prompt


class HeldOut:
    """What a run's model has made of the held-out prompts, evaluation by evaluation.

    Args:
        directory: directory of the files.
        config: configuration of the run.
        steps: steps that a resumed run has evaluated. One whose file is missing, or that had another number of samples, is not compared.
        warn: receives a message when a file cannot be written.
    """

    def __init__(self, directory: Path, config: Config, steps: Iterable[int], warn: Callable[[str], None]) -> None:
        self.directory, self._k, self._warn = directory, config.pass_k, warn
        self._values: dict[int, Values] = {}
        self._prompts: dict[int, list[str]] = {}
        for step in steps:
            questions = [Question.from_line(row) for row in self._read(step)]
            if questions and len(questions[0].right) == config.eval.eval_samples:
                self._add(step, questions)

    def _file(self, step: int) -> Path:
        return self.directory / f"step_{step}.jsonl"

    def _read(self, step: int) -> list[dict[str, Any]]:
        try:
            return read_lines(self._file(step))
        except (OSError, json.JSONDecodeError):
            return []

    def _add(self, step: int, questions: Sequence[Question]) -> None:
        self._values[step] = values_of(questions, self._k)
        self._prompts[step] = [each.example.prompt for each in questions]

    def record(self, step: int, questions: Sequence[Question]) -> dict[str, float | None]:
        """Keep an evaluation; return its metrics, with the change since the first one and the step of the best."""
        self._add(step, questions)
        try:
            self.directory.mkdir(exist_ok=True)
            write_bytes(self._file(step), b"".join(as_line(each.line()) for each in questions))
        except OSError as error:
            self._warn(f"warning: {self._file(step)} could not be written: {reason(error)}")
        return {**figures(questions, self._k), **self._changes(step), "eval_best_step": self.best_step(step)}

    def _comparable(self, step: int) -> list[int]:
        """Return the steps of the evaluations of the same prompts."""
        return [other for other in sorted(self._values) if self._prompts[other] == self._prompts[step]]

    def _changes(self, step: int) -> dict[str, float | None]:
        first = self._comparable(step)[0]
        found: dict[str, float | None] = {}
        for key in self._values[step] if first == 0 else ():
            change, error = paired_change(self._values[0][key], self._values[step][key])
            found |= {derived(key, "change"): change, derived(key, "change_error"): error}
        return found

    def best_of_all(self) -> int | None:
        """Return :meth:`best_step` of the last evaluation, None without one."""
        return self.best_step(max(self._values)) if self._values else None

    def best_step(self, step: int) -> int | None:
        """Return the step of the evaluation with the highest accuracy, or None if that is not beyond the error above the one of `step`."""
        accuracy = {each: self._values[each]["eval_accuracy"] for each in self._comparable(step)}
        best = max(accuracy, key=lambda each: (sum(accuracy[each]), each))
        change, error = paired_change(accuracy[step], accuracy[best])
        return best if is_beyond(change, error) else None
