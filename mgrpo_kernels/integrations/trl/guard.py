"""The collapse guard as a callback of TRL's trainers."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from mgrpo_kernels.integrations.guard import GuardHook


class GuardCallback(TrainerCallback):
    """Shows the collapse guard what a trainer logs, and warns or ends the run at signs of collapse.

    ::

        trainer.add_callback(GuardCallback("stop", gold=True, accuracy="eval_reward", prompts=len(eval_dataset), samples=8))

    The thresholds are means over steps, so set ``logging_steps=1``. With ``stop`` the trainer saves a checkpoint and ends. At the end,
    ``certificate.json`` in the output directory says which signs there were and when. A resumed run reads the log of its checkpoint again.

    Args:
        action, gold, accuracy, prompts, samples: as for :class:`GuardHook`.
    """

    def __init__(self, action: Any = "warn", **options: Any) -> None:
        self.hook = GuardHook(action, **options)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Check that each step is logged, and read the log of a run that is resumed.

        Raises:
            ValueError: it is not.
        """
        if args.logging_steps != 1:
            raise ValueError(
                f"logging_steps: expected 1 with GuardCallback, which reads every step, got {args.logging_steps}"
            )
        self.hook.replay(state.log_history)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Read the figures; end the run if that is the action."""
        signs = self.hook(state.global_step, logs or {})
        if signs and self.hook.action == "stop":
            control.should_training_stop = control.should_save = True

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write the certificate."""
        if state.is_world_process_zero:
            self.hook.write_certificate(args.output_dir)
