"""The collapse guard: reads a run's metrics as they are written, and warns if they show signs of collapse.

Self-supervised training collapses in two ways with different signs. The policy may converge to one answer for all prompts: the vote share
rises while the labels become alike, long before other metrics change. Or it may converge to wrong answers that still depend on the prompt.
Only held-out prompts reveal that, and their majority accuracy falls before the mean accuracy does, because sharpening raises the mean.

A fall between two evaluations is detected at the second one, so the interval between evaluations bounds the delay of a warning.

The state of a guard depends only on the lines of metrics.jsonl, so a resumed run replays them.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Iterable, Mapping
from itertools import pairwise
from typing import Any

WINDOW = 10
"""Steps of the moving averages, so that a single unusual step is not a sign."""
START = 5
"""Steps whose mean is the initial value for comparisons. Collapse to a planted answer takes a few tens of steps."""
LEAST_FALL = 0.03
"""Fall of a held-out accuracy below its best value that is a sign if there are many held-out samples."""
ACCURACY_SIGMAS, MAJORITY_SIGMAS = 3.7, 2.0
"""With few samples: the fall that is a sign, in standard errors of one evaluation. 3.7 standard errors of one evaluation are 3 of the
difference between one evaluation and the mean of two. The majority's error is bounded as if each evaluation drew new prompts, although the
prompts stay the same, so 2 of these errors are more than 2 actual ones."""
VOTE_RISE, LABELS_LEFT = 0.1, 0.7
"""Rise of the vote share above its initial value, and the fraction of their initial number below which distinct labels fall."""
TOP_ANSWER_RISE = 0.2
"""Rise of the share of the most frequent answer above its initial value."""
ENTROPY_LEFT = 0.1
"""Fraction of its initial value below which the entropy falls. Healthy runs fall to a fifth; this sign alone causes no warning."""
PRUNED_RISE = 0.1
"""Rise of the pruned fraction above its initial value."""
UNPARSED = 0.5
"""Fraction of the responses without an answer above which it is a sign if it has also risen by :data:`PRUNED_RISE`."""
REWARD_FALL = 0.1
"""Fall of a gold reward below its best mean over :data:`WINDOW` steps. A reward of the method's own does not measure what a run is for."""
NEARLY_ALL = 0.9
"""Fraction of the responses without an answer that alone causes a warning, because the vote elects whatever is left."""
STEP_KEYS = (
    "vote_share",
    "distinct_labels",
    "top_answer_share",
    "entropy",
    "pruned_fraction",
    "unparsed_fraction",
    "groups_with_signal",
    "gold_reward",
)
ACCURACY, MAJORITY = "held-out accuracy", "held-out majority"
LABEL_FREE = frozenset({"alike", "top answer", "entropy", "pruned", "no answers", "fewer answers", "no signal"})
"""The signs that need no true answer."""


class Guard:
    """Watches the metrics of one run.

    Args:
        prompts: number of held-out prompts in an evaluation; 0 without evaluation.
        samples: number of responses sampled for each of these prompts.
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
        self._reported: set[str] = set()
        self._calm = 0  # the latest step without a sign
        self._best_reward: float | None = None  # mean over a window

    def look(self, line: Mapping[str, Any]) -> list[str]:
        """Read the next line of metrics.jsonl; return the signs with their values if there is a new warning, else [].

        One held-out sign is enough for a warning; of the others, two are needed. There is one warning for each new sign.
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
        serious = bool(self._fell) or len(self._up) >= 2 or "no answers" in self._up
        return list(self._up.values()) if serious and self._up.keys() - self._reported else []

    @property
    def sizes(self) -> tuple[int, int]:
        """The number of held-out prompts and of responses to each of them."""
        return self._prompts, self._samples

    @property
    def signs(self) -> dict[str, str]:
        """The signs at the last line, by name, with their values; also those that cause no warning."""
        return dict(self._up)

    def decide(self, mode: str, allowed: int, best: int | None) -> str:
        """Return the action for a warning: warn, stop or rollback. There are at most `allowed` rollbacks, each to a `best` checkpoint."""
        if mode != "rollback":
            return mode
        return "rollback" if self.rollbacks < allowed and best is not None else "stop"

    def record(self, action: str) -> None:
        """Record the action that was taken. After a rollback, the moving averages start again; the initial values are kept."""
        self._reported |= self._up.keys()
        if action == "rollback":
            self.rollbacks += 1
            self._reported, self._fell, self._up = set(), {}, {}
            for values in self._recent.values():
                values.clear()

    def replay(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Read the lines of a run that is resumed; their key "guard" holds the actions that were taken."""
        for line in lines:
            self.look(line)
            if line.get("guard") is not None:
                self.record(line["guard"])

    def is_best(self, step: int) -> bool:
        """Return True if step `step` was evaluated, no evaluation was better, and there is no held-out sign of collapse."""
        return step in self._accuracy and not self._fell and self._accuracy[step] >= max(self._accuracy.values())

    def best(self, saved: Collection[int]) -> int | None:
        """Return the step of the best of these checkpoints, or None.

        The best has the highest held-out accuracy at the next evaluation. Before there is one, it is the latest without a sign of collapse.
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
            # Means of two consecutive evaluations, because the best of many single evaluations is mostly luck.
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
        if has("gold_reward"):
            self._best_reward = max(
                now["gold_reward"], now["gold_reward"] if self._best_reward is None else self._best_reward
            )
            if now["gold_reward"] < self._best_reward - REWARD_FALL:
                signs["reward"] = f"gold reward {now['gold_reward']:.3f}, below its best {self._best_reward:.3f}"
        if has("pruned_fraction") and now["pruned_fraction"] > start["pruned_fraction"] + PRUNED_RISE:
            signs["pruned"] = figures("pruned_fraction", "pruned share")
        if has("unparsed_fraction") and now["unparsed_fraction"] > NEARLY_ALL:
            signs["no answers"] = figures("unparsed_fraction", "share of responses without an answer")
        elif has("unparsed_fraction") and now["unparsed_fraction"] > max(
            UNPARSED, start["unparsed_fraction"] + PRUNED_RISE
        ):
            signs["fewer answers"] = figures("unparsed_fraction", "share of responses without an answer")
        if has("groups_with_signal") and now["groups_with_signal"] == 0.0:
            signs["no signal"] = f"no advantage other than 0 in the last {WINDOW} steps: nothing is learned"
        return signs


def message(step: int, signs: Collection[str], best: str, then: str) -> str:
    """Return a warning of the guard as a line of text."""
    return f"collapse guard, step {step}: {'; '.join(signs)}. Best checkpoint: {best}. {then}"
