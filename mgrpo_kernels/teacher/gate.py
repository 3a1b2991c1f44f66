"""The gate of a teacher's refresh: whether the policy's label-free signs allow it to become the teacher."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Mapping
from typing import Any

from mgrpo_kernels import checks
from mgrpo_kernels.train.watch.guard import LABELS_LEFT, START, TOP_ANSWER_RISE, WINDOW

SIGNS = ("vote_share", "top_answer_share", "distinct_labels", "teacher_agreement")
"""The metrics that a gate reads, by their names in metrics.jsonl. None of them needs a true answer."""


class Gate:
    """Says whether a refresh may copy the policy into the teacher.

    CGTR (arXiv 2606.03532) refreshes a frozen teacher only where the reward has improved and the lengths of the responses are safe. Here
    the evidence is label-free, with the thresholds of the collapse guard: the vote share has not fallen since the last refresh, the share
    of the top answer and the number of distinct labels are still those of a healthy run, and policy and teacher agree. The last three are
    compared with the first steps of the run, not with the last refresh, so that many small changes do not pass one after the other.

    Args:
        least_agreement: smallest agreement of policy and teacher, in [0, 1], with which the gate opens.
        signs: the metrics that the gate requires; a required metric without a value keeps it closed.
    """

    def __init__(self, least_agreement: float = 0.5, signs: Collection[str] = SIGNS) -> None:
        checks.check_number("least_agreement", least_agreement, at_least=0.0, at_most=1.0)
        for name in signs:
            checks.check_choice("signs", name, SIGNS)
        self.least_agreement, self.signs = least_agreement, tuple(name for name in SIGNS if name in signs)
        self._start: dict[str, list[float]] = {name: [] for name in SIGNS}
        self._recent = {name: deque[float](maxlen=WINDOW) for name in SIGNS}
        self._level: float | None = None  # vote share at the last refresh

    def look(self, metrics: Mapping[str, Any]) -> None:
        """Read the metrics of a step; one that is None, NaN or missing leaves its moving average as it is."""
        for name in SIGNS:
            value = metrics.get(name)
            if value is not None and not math.isnan(value):
                self._recent[name].append(float(value))
                if len(self._start[name]) < START:
                    self._start[name].append(float(value))

    def mean(self, name: str) -> float | None:
        """Return the mean of a sign over the last steps; None before the first."""
        values = self._recent[name]
        return sum(values) / len(values) if values else None

    def reasons(self) -> list[str]:
        """Return what keeps the gate closed, with values; empty if it is open."""
        found = [
            f"{name} has values of {len(self._recent[name])} steps, of the {WINDOW} that the gate needs"
            for name in self.signs
            if len(self._recent[name]) < WINDOW
        ]
        if found:
            return found
        now = {name: self.mean(name) or 0.0 for name in self.signs}
        start = {name: sum(self._start[name]) / len(self._start[name]) for name in self.signs}
        if self._level is not None and "vote_share" in now and now["vote_share"] < self._level:
            found.append(f"vote share {now['vote_share']:.3f}, below the {self._level:.3f} of the last refresh")
        if "top_answer_share" in now and now["top_answer_share"] > start["top_answer_share"] + TOP_ANSWER_RISE:
            found.append(f"share of the top answer {start['top_answer_share']:.3f} -> {now['top_answer_share']:.3f}")
        if "distinct_labels" in now and now["distinct_labels"] < LABELS_LEFT * start["distinct_labels"]:
            found.append(f"distinct labels {start['distinct_labels']:.3f} -> {now['distinct_labels']:.3f}")
        if "teacher_agreement" in now and now["teacher_agreement"] < self.least_agreement:
            found.append(
                f"agreement of policy and teacher {now['teacher_agreement']:.3f}, below {self.least_agreement:.3f}"
            )
        return found

    def passed(self) -> None:
        """Take note of a refresh, below whose vote share the gate stays closed from now on."""
        self._level = self.mean("vote_share")

    def state_dict(self) -> dict[str, Any]:
        """Return the state in values that JSON can hold."""
        recent = {name: list(values) for name, values in self._recent.items()}
        return {
            "start": {name: list(each) for name, each in self._start.items()},
            "recent": recent,
            "level": self._level,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned.

        Raises:
            TypeError, ValueError: it is not the state of a gate.
        """
        numbers = [state[each] for each in ("start", "recent")] if set(state) == {"start", "recent", "level"} else []
        if not numbers or any(not isinstance(each, dict) or set(each) != set(SIGNS) for each in numbers):
            raise ValueError(f"state_dict: expected the state of a gate, got {state!r:.100}")
        values = [value for each in numbers for values in each.values() for value in values]
        for value in values if state["level"] is None else [*values, state["level"]]:
            checks.check_number("state_dict", value)
        self._start = {name: list(state["start"][name]) for name in SIGNS}
        self._recent = {name: deque(state["recent"][name], maxlen=WINDOW) for name in SIGNS}
        self._level = state["level"]
