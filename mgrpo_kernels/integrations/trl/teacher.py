"""A teacher for TRL's trainers: GRPO's reference model, and the teacher of SDFT and SDPO, by a schedule of this library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from mgrpo_kernels.teacher import Teacher

TEACHER_FILE = "teacher.pt"


class TeacherCallback(TrainerCallback):
    """Moves a teacher after each optimizer step, and copies it into a model of TRL's whenever it has moved.

    ::

        trainer = SDFTTrainer(..., args=SDFTConfig(teacher_model_kind="base", ...))
        teacher = Teacher(trainer.model, schedule="hard", every=50)
        trainer.add_callback(TeacherCallback(teacher, trainer.teacher_model))

    The gate of the schedule ``gated`` reads what the trainer logs, under the names of :data:`mgrpo_kernels.teacher.SIGNS`, with or without
    ``mgrpo/`` before them; these are the figures of the step before. A trainer that logs only some of them needs a gate with these signs.

    Each checkpoint holds the teacher's state, in ``teacher.pt``, and a resumed run continues from it.

    Args:
        teacher: of the trainer's model.
        target: model of TRL's that is to have the teacher's weights, such as ``trainer.teacher_model`` or ``trainer.ref_model``; None: the
            caller uses the teacher itself.
        resume_from: directory of the checkpoint that the run is resumed from; None: the one of that step in the output directory.
    """

    def __init__(
        self, teacher: Teacher, target: nn.Module | None = None, resume_from: str | Path | None = None
    ) -> None:
        self.teacher, self.target, self.resume_from = teacher, target, resume_from
        self._metrics: dict[str, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Restore the teacher if the run is resumed.

        Raises:
            ValueError: the checkpoint has no teacher.
        """
        if state.global_step:
            path = Path(self.resume_from or _checkpoint(args, state)) / TEACHER_FILE
            if not path.exists():
                raise ValueError(f"resume_from: expected a checkpoint with {TEACHER_FILE}, got {path.parent}")
            self.teacher.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self._copy()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Take note of the figures that the gate reads."""
        # An evaluation logs a line of its own before the next step.
        self._metrics |= {name.removeprefix("mgrpo/"): value for name, value in (logs or {}).items()}

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Move the teacher if its schedule says so."""
        metrics, self._metrics = self._metrics, {}  # each line of the log counts once
        if self.teacher.advance(metrics):
            self._copy()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Save the teacher beside the trainer's own state."""
        if args.should_save:
            torch.save(self.teacher.state_dict(), _checkpoint(args, state) / TEACHER_FILE)

    def _copy(self) -> None:
        if self.target is not None:
            self.teacher.copy_to(self.target)


def _checkpoint(args: Any, state: Any) -> Path:
    """Return the directory of the checkpoint of the present step."""
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
