"""The collapse guard: reads a run's metrics as they are written, and says when they look like collapse.

Self-supervised training collapses in two ways, and the signs differ. The policy may agree on one answer whatever the prompt: the vote
grows while labels become alike, long before anything else is known. Or it may agree on wrong answers that still depend on the
prompt: then only held-out prompts tell, and their majority falls before the mean accuracy does, because sharpening lifts the mean.

It sees no more than there is to see: a fall between two evaluations is told at the second, so evaluate as often as a fall may take.

A guard's state follows from the lines of metrics.jsonl alone, so resuming replays them.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Iterable, Mapping
from itertools import pairwise
from typing import Any

WINDOW = 10
"""Steps of the moving averages: one odd step is no sign."""
START = 5
"""Steps whose mean is the start that they are compared with. Collapse on a planted answer takes some tens of steps."""
LEAST_FALL = 0.03
"""Fall of a held-out figure below its best, in accuracy, that is a sign where there are many held-out samples."""
ACCURACY_SIGMAS, MAJORITY_SIGMAS = 3.7, 2.0
"""With few samples: the fall in standard errors of one evaluation. 3.7 are 3 of the difference between one and the mean of two. The
majority's error is bounded as if each evaluation drew its prompts anew, which it does not, so 2 of it are more than 2 real ones."""
VOTE_RISE, LABELS_LEFT = 0.1, 0.7
"""Vote share above its start, while distinct labels are below this share of theirs."""
TOP_ANSWER_RISE = 0.2
"""Share of the most frequent answer above its start."""
ENTROPY_LEFT = 0.1
"""Entropy below this share of its start. Healthy runs come down to a fifth, and alone this is no warning."""
PRUNED_RISE = 0.1
"""Pruned share above its start."""
STEP_KEYS = ("vote_share", "distinct_labels", "top_answer_share", "entropy", "pruned_fraction")
ACCURACY, MAJORITY = "held-out accuracy", "held-out majority"


class Guard:
    """Watches one run.

    Args:
        prompts: held-out prompts of an evaluation; 0 where there is none.
        samples: samples of each.
    """

    def __init__(self, prompts: int, samples: int) -> None:
        self.rollbacks = 0
        self._prompts, self._samples = prompts, samples
        self._start: dict[str, list[float]] = {key: [] for key in STEP_KEYS}
        self._recent = {key: deque[float](maxlen=WINDOW) for key in STEP_KEYS}
        self._accuracy: dict[int, float] = {}  # by step
        self._held_out: dict[str, list[float]] = {ACCURACY: [], MAJORITY: []}
        self._fell: dict[str, str] = {}  # held-out signs of the latest evaluation
        self._up: dict[str, str] = {}
        self._told: set[str] = set()
        self._calm = 0  # the last step without a sign

    def look(self, line: Mapping[str, Any]) -> list[str]:
        """Take the next line of metrics.jsonl; return the signs with their figures where there is something new to warn of, else [].

        A warning takes two signs, or one of the held-out ones, and is given once for each sign that joins.
        """
        for key in STEP_KEYS:
            value = line.get(key)
            if value is not None:
                self._recent[key].append(value)
                if len(self._start[key]) < START:
                    self._start[key].append(value)
        if line.get("eval_accuracy") is not None:
            self._evaluated(line)
        self._up = {**self._fell, **self._step_signs()}
        if not self._up:
            self._calm = line["step"]
        serious = bool(self._fell) or len(self._up) >= 2
        return list(self._up.values()) if serious and self._up.keys() - self._told else []

    def decide(self, mode: str, allowed: int, best: int | None) -> str:
        """Return what to do about a warning: warn, stop or rollback, of which there are at most `allowed`, and none without a `best`."""
        if mode != "rollback":
            return mode
        return "rollback" if self.rollbacks < allowed and best is not None else "stop"

    def record(self, action: str) -> None:
        """Take note of what was done: the signs have been told; after a rollback the averages begin anew, their start stays."""
        self._told |= self._up.keys()
        if action == "rollback":
            self.rollbacks += 1
            self._told, self._fell, self._up = set(), {}, {}
            for values in self._recent.values():
                values.clear()

    def replay(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Take a run's lines up to where it goes on; their "guard" says what was done."""
        for line in lines:
            self.look(line)
            if line.get("guard") is not None:
                self.record(line["guard"])

    def is_best(self, step: int) -> bool:
        """Return whether there was an evaluation after `step`, none was better, and nothing looks like collapse."""
        return step in self._accuracy and not self._fell and self._accuracy[step] >= max(self._accuracy.values())

    def best(self, saved: Collection[int]) -> int | None:
        """Return which of these checkpoints is the best, or None.

        By held-out accuracy at the first evaluation that is no earlier; before there is one, the last without a sign of collapse.
        """
        scored = []
        for step in saved:
            after = [each for each in self._accuracy if each >= step]
            if after:
                scored.append((self._accuracy[min(after)], step))
        calm = [step for step in saved if step <= self._calm]
        return max(scored)[1] if scored else max(calm, default=None)

    def _evaluated(self, line: Mapping[str, Any]) -> None:
        accuracy = line["eval_accuracy"]
        self._accuracy[line["step"]] = accuracy
        self._fell = {}
        majority = [line[key] for key in ("eval_greedy", "eval_maj_at_k") if line.get(key) is not None]
        figures = {ACCURACY: accuracy, MAJORITY: sum(majority) / len(majority) if majority else None}
        draws = {ACCURACY: self._prompts * self._samples, MAJORITY: self._prompts}
        sigmas = {ACCURACY: ACCURACY_SIGMAS, MAJORITY: MAJORITY_SIGMAS}
        for name, value in figures.items():
            if value is None:
                continue
            seen = self._held_out[name]
            seen.append(value)
            # The best of the means of two evaluations in a row: the best of many single ones is mostly luck.
            reference = max([seen[0], *(0.5 * (a + b) for a, b in pairwise(seen))])
            error = math.sqrt(reference * (1.0 - reference) / max(1, draws[name]))
            if reference - value > max(LEAST_FALL, sigmas[name] * error):
                self._fell[name] = f"{name} {value:.3f}, {reference - value:.3f} below its best {reference:.3f}"

    def _step_signs(self) -> dict[str, str]:
        now, start = {}, {}
        for key in STEP_KEYS:
            if len(self._recent[key]) == WINDOW:
                now[key] = sum(self._recent[key]) / WINDOW
                start[key] = sum(self._start[key]) / len(self._start[key])
        signs = {}

        def has(*keys: str) -> bool:
            return all(key in now for key in keys)

        def figures(key: str, name: str) -> str:
            return f"{name} {start[key]:.3f} -> {now[key]:.3f}"

        if (
            has("vote_share", "distinct_labels")
            and now["vote_share"] > start["vote_share"] + VOTE_RISE
            and now["distinct_labels"] < LABELS_LEFT * start["distinct_labels"]
        ):
            signs["alike"] = (
                f"{figures('vote_share', 'vote share')} while {figures('distinct_labels', 'distinct labels')}"
            )
        if has("top_answer_share") and now["top_answer_share"] > start["top_answer_share"] + TOP_ANSWER_RISE:
            signs["top answer"] = figures("top_answer_share", "share of the top answer")
        if has("entropy") and now["entropy"] < ENTROPY_LEFT * start["entropy"]:
            signs["entropy"] = figures("entropy", "entropy")
        if has("pruned_fraction") and now["pruned_fraction"] > start["pruned_fraction"] + PRUNED_RISE:
            signs["pruned"] = figures("pruned_fraction", "pruned share")
        return signs


def message(step: int, signs: Collection[str], best: str, then: str) -> str:
    """Return a warning as a line of text."""
    return f"collapse guard, step {step}: {'; '.join(signs)}. Best checkpoint: {best}. {then}"
