"""The collapse guard for another library's trainer: it reads what that trainer logs, and warns or ends the run."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from mgrpo_kernels import checks
from mgrpo_kernels.train.watch.certificate import CERTIFICATE, certificate
from mgrpo_kernels.train.watch.guard import STEP_KEYS, Guard

logger = logging.getLogger("mgrpo_kernels")

ACTIONS = ("warn", "stop")
ALIASES = {"actor/entropy": "entropy", "critic/score/mean": "gold_reward", "reward": "gold_reward"}
"""Names of TRL and verl for the guard's metrics. A reward counts only if the caller says that it is a gold reward."""
FLAT_GROUPS = "frac_reward_zero_std"
"""TRL's fraction of the prompts whose rollouts have equal rewards: the others have a signal."""


class CollapseError(RuntimeError):
    """The guard has ended a run."""


class GuardHook:
    """Shows the guard what a trainer logs, step by step.

    Args:
        action: warn, or stop. A rollback is up to the trainer.
        gold: the rewards are those of true answers or of a verifier, so that a falling reward is a sign, too.
        accuracy: name of the held-out accuracy in the log, a figure in [0, 1] such as ``eval_reward`` of one reward function that returns 0
            or 1; None: there is none.
        prompts: number of held-out prompts in an evaluation; with `accuracy`.
        samples: number of responses sampled for each of these prompts.

    Raises:
        ValueError: another action; an accuracy without the number of its prompts, or the reverse.
    """

    def __init__(
        self,
        action: Literal["warn", "stop"] = "warn",
        *,
        gold: bool = False,
        accuracy: str | None = None,
        prompts: int = 0,
        samples: int = 1,
    ) -> None:
        checks.check_choice("action", action, ACTIONS)
        if (accuracy is None) != (prompts == 0):
            raise ValueError(
                f"prompts: expected the number of held-out prompts of accuracy {accuracy!r}, got {prompts}"
            )
        self.action, self.gold, self.accuracy = action, gold, accuracy
        self.guard = Guard(prompts, samples)
        self.lines: list[dict[str, Any]] = []
        """What the guard has read, one line for each call."""

    def __call__(self, step: int, logs: Mapping[str, Any]) -> list[str]:
        """Read what was logged after a step; return the signs if there is a new warning, else [].

        A log without any of the guard's metrics, such as the summary at the end of a run, is left out.
        """
        line = self.line(step, logs)
        if len(line) == 1:
            return []
        signs = self.guard.look(line)
        if signs:
            self.guard.record(self.action)
            line |= {"guard": self.action, "guard_signs": "; ".join(signs)}
            logger.warning("collapse guard, step %d: %s", step, line["guard_signs"])
        self.lines.append(line)
        return signs

    def line(self, step: int, logs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the guard's metrics among what was logged, under the names of metrics.jsonl; one that is not finite is left out.

        Raises:
            ValueError: the held-out accuracy is not in [0, 1].
        """
        found: dict[str, Any] = {}
        for name, value in logs.items():
            key = ALIASES.get(name, name.removeprefix("mgrpo/"))
            if key in STEP_KEYS and (key != "gold_reward" or self.gold):
                found.setdefault(key, float(value))
        if FLAT_GROUPS in logs:
            found.setdefault("groups_with_signal", 1.0 - float(logs[FLAT_GROUPS]))
        if self.accuracy is not None and self.accuracy in logs:
            found["eval_accuracy"] = float(logs[self.accuracy])
        found = {name: value for name, value in found.items() if math.isfinite(value)}
        if not 0.0 <= found.get("eval_accuracy", 0.0) <= 1.0:
            raise ValueError(
                f"accuracy: expected a figure in [0, 1], the share of right responses, got {self.accuracy} "
                f"{found['eval_accuracy']:.3g}; a sum of rewards is none"
            )
        return {"step": step, **found}

    def replay(self, logs: Iterable[Mapping[str, Any]]) -> None:
        """Read the lines of a run that is resumed, each with its ``step``; no warning is repeated."""
        for each in logs:
            line = self.line(int(each["step"]), each)
            if len(line) > 1:
                if self.guard.look(line):
                    self.guard.record(self.action)
                self.lines.append(line)

    def certificate(self) -> dict[str, Any]:
        """Return the certificate of the run so far."""
        return certificate(self.lines, *self.guard.sizes, self.action)

    def write_certificate(self, directory: str | Path) -> None:
        """Write certificate.json to a directory."""
        text = json.dumps(self.certificate(), indent=1, allow_nan=False)
        (Path(directory) / CERTIFICATE).write_text(text + "\n", encoding="utf-8")
