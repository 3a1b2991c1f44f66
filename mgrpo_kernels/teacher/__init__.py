"""The teacher: a momentum model with a schedule, and with a share of the votes."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mgrpo_kernels import checks
from mgrpo_kernels.momentum import MomentumModel
from mgrpo_kernels.teacher.gate import SIGNS, Gate

Schedule = Literal["ema", "hard", "gated"]
SCHEDULES: tuple[Schedule, ...] = typing.get_args(Schedule)


class Teacher(MomentumModel):
    """A copy of a policy that follows it by a schedule.

    =========  ================================================================================================
    schedule   what :meth:`advance` does at the end of a step
    =========  ================================================================================================
    ``ema``    ``teacher = decay * teacher + (1 - decay) * policy``
    ``hard``   every `every` steps it copies the policy; between two copies the teacher is frozen
    ``gated``  like ``hard``, but only while the label-free signs of the policy are healthy (:class:`Gate`);
               a copy that is due waits until the gate opens
    =========  ================================================================================================

    Everything else is :class:`MomentumModel`: shards of FSDP2, a place in CPU memory, LoRA, :meth:`swapped_into`.

    Args:
        model, decay, dtype, device, frozen: as for :class:`MomentumModel`.
        schedule: ema, hard or gated.
        every: number of steps from one copy to the next, with ``hard``; the smallest such number with ``gated``.
        gate: of the schedule ``gated``; None: one with default thresholds.
        most_votes: share of the votes that the teacher has where it agrees with the policy on no prompt; between that and the share that
            its rollouts have by themselves, the share is linear in the agreement of the last steps. None: each rollout has one vote.

    Raises:
        TypeError, ValueError: as :class:`MomentumModel`; an unknown schedule; a number out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float = 0.99,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        *,
        frozen: bool = True,
        schedule: Schedule = "ema",
        every: int = 10,
        gate: Gate | None = None,
        most_votes: float | None = None,
    ) -> None:
        checks.check_choice("schedule", schedule, SCHEDULES)
        checks.check_number("every", every, at_least=1)
        if gate is not None and schedule != "gated":
            raise ValueError(f"gate: expected None with schedule {schedule}, which does not read it, got a Gate")
        if most_votes is not None:
            checks.check_number("most_votes", most_votes, above=0.0, at_most=1.0)
        super().__init__(model, decay, dtype, device=device, frozen=frozen)
        self.schedule, self.every, self.most_votes = schedule, every, most_votes
        self.gate = Gate() if gate is None else gate
        self.age = 0
        """Number of steps since the teacher last moved."""
        self.waits_for: list[str] = []
        """What kept the gate closed at the end of the last step, if a refresh was due."""

    def advance(
        self, metrics: Mapping[str, Any] | None = None, decay: float | Tensor | None = None, *, overlap: bool = False
    ) -> bool:
        """End a step of the policy: read its metrics, and move the teacher if the schedule says so.

        With several ranks, each must give the same metrics: all of them move their shards, or none does.

        Args:
            metrics: of the step, under the names of :data:`SIGNS`. Required by ``gated``, and by `most_votes`.
            decay: overrides the teacher's own, with ``ema``.
            overlap: as for :meth:`MomentumModel.update`.

        Returns:
            True if the teacher has moved.

        Raises:
            ValueError: metrics are required and missing; a decay that the schedule does not use.
        """
        if metrics is None and (self.schedule == "gated" or self.most_votes is not None):
            why = "schedule gated" if self.schedule == "gated" else "most_votes"
            raise ValueError(f"metrics: expected the metrics of the step ({', '.join(SIGNS)}) with {why}, got None")
        if decay is not None and self.schedule != "ema":
            raise ValueError(
                f"decay: expected None with schedule {self.schedule}, which copies the policy, got {decay}"
            )
        self.gate.look(metrics or {})
        self.age += 1
        self.waits_for = []
        if self.schedule == "gated" and self.age >= self.every:
            self.waits_for = self.gate.reasons()
        if self.schedule != "ema" and (self.age < self.every or self.waits_for):
            return False
        self.update(decay if self.schedule == "ema" else 0.0, overlap=overlap)
        self.gate.passed()
        self.age = 0
        return True

    @property
    def refreshes(self) -> int | None:
        """Number of times that the teacher has copied the policy; None with ``ema``."""
        return None if self.schedule == "ema" else self.updates

    def vote_share(self, policy_rollouts: int, teacher_rollouts: int) -> float:
        """Return the teacher's share of the votes on a prompt in the next step, before the filter."""
        share = teacher_rollouts / (policy_rollouts + teacher_rollouts)
        agreement = self.gate.mean("teacher_agreement")
        if self.most_votes is None or agreement is None:
            return share
        return max(share, share + (self.most_votes - share) * (1.0 - agreement))

    def policy_voters(self, policy_rollouts: int, teacher_rollouts: int) -> int:
        """Return how many of the policy's rollouts of a prompt vote, so that the teacher has its share of the votes."""
        share = self.vote_share(policy_rollouts, teacher_rollouts)
        return policy_rollouts if share == 0.0 else round(teacher_rollouts * (1.0 - share) / share)

    def progress(self) -> dict[str, Any]:
        """Return the state of the schedule, in values that JSON can hold: everything but the weights and their number of updates."""
        return {"age": self.age, "gate": self.gate.state_dict()}

    def load_progress(self, progress: Mapping[str, Any]) -> None:
        """Take over what :meth:`progress` returned.

        Raises:
            ValueError: it is not the state of a schedule.
        """
        check_progress(progress)
        self.gate.load_state_dict(progress["gate"])
        self.age, self.waits_for = progress["age"], []

    def state_dict(self) -> dict[str, Any]:
        """Return the state of :meth:`MomentumModel.state_dict`, and that of the schedule under ``"schedule"``."""
        return {**super().state_dict(), "schedule": self.progress()}

    def load_state_dict(self, sd: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned, or :meth:`MomentumModel.state_dict`, whose schedule begins anew.

        Raises:
            ValueError: missing or unexpected entries, or a tensor of another shape.
        """
        progress = sd.get("schedule", {"age": 0, "gate": Gate().state_dict()})
        check_progress(progress)  # before anything is written
        super().load_state_dict({name: value for name, value in sd.items() if name != "schedule"})
        self.load_progress(progress)


def check_progress(progress: Any) -> None:
    """Raise ValueError if a value, such as one read from a file, is not what :meth:`Teacher.progress` returns."""
    if not isinstance(progress, dict) or set(progress) != {"age", "gate"}:
        raise ValueError(f"state_dict: expected the keys age, gate, got {progress!r:.100}")
    if type(progress["age"]) is not int or progress["age"] < 0:
        raise ValueError(f"state_dict: expected an age >= 0, got {progress['age']!r}")
    Gate().load_state_dict(progress["gate"])


__all__ = ["SCHEDULES", "SIGNS", "Gate", "Schedule", "Teacher"]
