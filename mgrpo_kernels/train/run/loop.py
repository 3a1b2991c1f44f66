"""The loop of a run: a step, its evaluation, the collapse guard and the checkpoints, from where the run is to its last step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mgrpo_kernels.train import parallel
from mgrpo_kernels.train.data.task import prompts_of_step
from mgrpo_kernels.train.export import save_final
from mgrpo_kernels.train.rollout.divided import divided
from mgrpo_kernels.train.run import checkpoint
from mgrpo_kernels.train.run.evaluation import evaluate
from mgrpo_kernels.train.run.output import closing, lines_of_first, save_batch, with_truth
from mgrpo_kernels.train.run.stopping import Abandoned, Interrupt
from mgrpo_kernels.train.step import Learner, train_step
from mgrpo_kernels.train.update import NotFiniteError
from mgrpo_kernels.train.watch.guard import Guard, message
from mgrpo_kernels.train.watch.live import Plain
from mgrpo_kernels.train.watch.loggers import open_loggers
from mgrpo_kernels.train.watch.metrics import metrics_line
from mgrpo_kernels.train.watch.report import read_lines, write_report
from mgrpo_kernels.train.watch.tracing import Trace

COLLAPSED = 3
INTERRUPTED = 130
"""Exit statuses of a run that ended before its last step."""

CONSEQUENCE = {
    "warn": "The run continues (it would not with --guard stop or rollback)",
    "stop": "The run ends here",
    "rollback": "The run continues from there",
}
"""The last sentence of the guard's message, by what the guard does."""

StepResult = tuple[dict[str, Any], list[dict[str, Any]]]  # metrics, and samples to show


class Run:
    """A learner's training in an output directory. Building it resumes from the newest checkpoint, if there is one.

    Args:
        learner: what trains.
        output: the output directory.
        interrupt: says when the user or the machine asks the run to stop.
        view: shows progress.
    """

    def __init__(self, learner: Learner, output: Path, interrupt: Interrupt, view: Plain) -> None:
        self.learner, self.output, self.interrupt, self.view = learner, output, interrupt, view
        self.config = config = learner.config
        self.checkpoints = output / "checkpoints"
        found = checkpoint.resume(self.checkpoints, learner, view.warn)
        self.is_new = found is None
        found = found or {"step": 0, "metrics_bytes": 0, "samples_bytes": 0, "pending": None}
        self.start: int = found["step"]
        self.pending: StepResult | None = found["pending"]  # the last step's, whose evaluation is still to come
        if not self.is_new:
            view.write_line(f"resuming after step {self.start}")
        self.writer = checkpoint.Writer(
            self.checkpoints, config.run.keep_checkpoints, background=config.run.async_checkpoints, write_line=view.warn
        )
        learner.engine.check = interrupt.check
        self.metrics = lines_of_first(output / "metrics.jsonl", found["metrics_bytes"])
        self.samples = lines_of_first(output / "samples.jsonl", found["samples_bytes"])
        past = parallel.from_first(read_lines(output / "metrics.jsonl") if parallel.is_first() else [])
        learner.skipped = past[-1]["skipped_steps"] or 0 if past else 0
        self.guard = Guard(len(learner.task.held_out), config.eval.eval_samples)
        self.guard.replay(past)
        view.begin(past)
        self.loggers = open_loggers(config, output, past) if parallel.is_first() else []
        self.trace = Trace(config.profiled, output, parallel.rank(), view.write_line)

    def train(self) -> int:
        """Take the steps that are left and write final/ and the report; return the exit status.

        A run that is asked to stop, or that the guard stops, saves a checkpoint and returns early.
        """
        steps = range(self.start + (self.pending is None), self.config.optim.steps + 1)
        try:
            status = self._before_first_step() if self.is_new else None
            for step in steps if status is None else ():
                if (status := self._step(step)) is not None:
                    break
        finally:
            self.writer.settle()
            for sink in (self.metrics, self.samples, *self.loggers, self.trace):
                sink.close()
        if status is not None:
            return status
        self.view.stop()
        save_final(self.learner.policy, self.output / "final")
        if parallel.is_first():
            write_report(self.output, self.learner.policy.device)
            for line in closing(self.output, self.config):
                print(line, flush=True)
        return 0

    def _before_first_step(self) -> int | None:
        """Evaluate the model as it is; return an exit status if the run is to end."""
        try:
            evaluation = self._evaluate(0)
        except Abandoned:
            self._leave(f"stopped before the first step; start with --output {self.output} --resume")
            return INTERRUPTED
        if evaluation is not None:
            self._record(metrics_line({"step": 0}, evaluation))
            self.view.step({"step": 0}, evaluation, [])
            if self.config.run.guard == "rollback":
                self._save(0)
        return None

    def _step(self, step: int) -> int | None:
        """Take a step, evaluate, write what came out and save; return an exit status if the run is to end."""
        self.writer.report_failure()
        if parallel.on_any(self.interrupt.asked):
            return self._stop(step if self.pending else step - 1, self.pending)
        try:
            values, shown = self.pending or self._take(step)
        except Abandoned:
            return self._stop(step - 1)
        try:
            evaluation = self._evaluate(step)
        except Abandoned:
            return self._stop(step, (values, shown))
        self.pending = None
        shown = with_truth(shown, self.learner.task)
        self.view.step(values, evaluation, shown)
        action = self._record(metrics_line(values, evaluation))
        for each in shown:
            self.samples.write(each)
        return self._save_if_due(step, action)

    def _take(self, step: int) -> StepResult:
        """Take a step, or skip it where its loss or gradient is not finite."""
        config, train = self.config, self.learner.task.train
        chosen = prompts_of_step(len(train), config.rollout.prompts_per_step, step, config.run.seed)
        try:
            with self.trace.during(step):
                return parallel.from_first(train_step(self.learner, [train[each] for each in chosen], step))
        except NotFiniteError as error:
            return self._skip(step, error)

    def _skip(self, step: int, error: NotFiniteError) -> StepResult:
        """Keep the batch of a step that is not finite, and count it.

        Raises:
            FloatingPointError: as many steps as are allowed have been skipped.
        """
        batch, most = save_batch(self.output / "skipped", step, error.batch), self.config.run.max_skipped_steps
        if self.learner.skipped == most:
            self._save(step - 1, wait=True)
            raise FloatingPointError(
                f"{error}, in step {step}, after {most} steps that were skipped (max_skipped_steps); its batch is in {batch}"
            ) from error
        self.learner.skipped += 1
        self.view.warn(
            f"step {step} is skipped, {self.learner.skipped} of at most {most}: {error}; its batch is in {batch}"
        )
        return {"step": step, "skipped_steps": self.learner.skipped}, []

    def _evaluate(self, step: int) -> dict[str, float] | None:
        """Return the evaluation that is due after a step, None where none is."""
        options, steps = self.config.eval, self.config.optim.steps
        due = options.eval_every and (step in (0, steps) or step % options.eval_every == 0)
        if not (due and self.learner.task.held_out):
            return None
        with parallel.gathered(self.learner.policy.model):
            engine = divided(self.learner.engine)
            return parallel.from_first(evaluate(self.learner.policy, engine, self.learner.task, self.config, step))

    def _record(self, line: dict[str, Any]) -> str | None:
        """Show a metrics line to the guard, do what the guard says, and write the line; return what the guard did."""
        signs = [] if self.config.run.guard == "off" else self.guard.look(line)
        if signs:
            self._act_on(signs, line)
        for sink in (self.metrics, *self.loggers):
            sink.write(line)
        action: str | None = line["guard"]
        return action

    def _act_on(self, signs: list[str], line: dict[str, Any]) -> None:
        """Warn of signs of collapse, enter them in the line, and go back to the best checkpoint where the guard says so."""
        self.writer.settle()
        best = self.guard.best(parallel.from_first(checkpoint.saved_steps(self.checkpoints)))
        action = self.guard.decide(self.config.run.guard, self.config.run.guard_rollbacks, best)
        line["guard"], line["guard_signs"] = action, "; ".join(signs)
        path = None if best is None else self.checkpoints / f"step_{best}"
        self.view.warn(message(line["step"], signs, str(path or "none yet"), CONSEQUENCE[action]))
        self.guard.record(action)
        if action == "rollback":  # the steps, and with them the random numbers, go on: the fall is not repeated
            assert path is not None
            checkpoint.restore(checkpoint.load(path), self.learner)

    def _save(self, step: int, *, wait: bool = False, pending: StepResult | None = None) -> Path:
        best = None
        if self.config.run.guard != "off":
            best = self.guard.best([*checkpoint.saved_steps(self.checkpoints), step])
        sizes = self.metrics.sync(), self.samples.sync()
        return self.writer.save(self.learner, step, *sizes, best, pending=pending, wait=wait)

    def _save_if_due(self, step: int, action: str | None) -> int | None:
        """Save after a step where that is due; return an exit status if the guard ends the run."""
        stopped, last, every = action == "stop", step == self.config.optim.steps, self.config.run.checkpoint_every
        new_best = self.config.run.guard == "rollback" and self.guard.is_best(step)
        if not (stopped or last or new_best or (every and step % every == 0)):
            return None
        path = self._save(step, wait=stopped or last)
        if not stopped:
            return None
        self._leave(
            f"stopped after step {step} of {self.config.optim.steps}; saved {path}; --guard warn --resume continues anyway"
        )
        return COLLAPSED

    def _stop(self, step: int, pending: StepResult | None = None) -> int:
        """Save what the steps so far have done; `pending` is the last one's result, if its evaluation is still to come."""
        path = self._save(step, wait=True, pending=pending)
        self._leave(
            f"stopped after step {step} of {self.config.optim.steps}; saved {path}; continue with --output {self.output} --resume"
        )
        return INTERRUPTED

    def _leave(self, text: str) -> None:
        """Write the report of a run that ends early, and print why."""
        self.view.stop()
        with parallel.together():  # the others wait: torchrun would end the first as soon as one ends with a status
            if parallel.is_first():
                write_report(self.output, self.learner.policy.device)
                print(text, flush=True)
