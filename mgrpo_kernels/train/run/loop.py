"""The loop of a run: a step, its evaluation, the collapse guard and the checkpoints, from where the run is to its last step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mgrpo_kernels.train import parallel
from mgrpo_kernels.train.data.task import prompts_of_step
from mgrpo_kernels.train.errors import FailedElsewhereError, OutputError
from mgrpo_kernels.train.export import save_final
from mgrpo_kernels.train.rollout.divided import divided
from mgrpo_kernels.train.run import checkpoint
from mgrpo_kernels.train.run.evaluation import examine
from mgrpo_kernels.train.run.files import reason
from mgrpo_kernels.train.run.held_out import DIRECTORY, HeldOut
from mgrpo_kernels.train.run.hub import push
from mgrpo_kernels.train.run.output import METRICS, SAMPLES, closing, open_lines, past_lines, save_batch, with_truth
from mgrpo_kernels.train.run.stopping import Abandoned, Interrupt
from mgrpo_kernels.train.step import Learner, train_step
from mgrpo_kernels.train.text import print_line
from mgrpo_kernels.train.update import NotFiniteError
from mgrpo_kernels.train.watch.certificate import CERTIFICATE, write_certificate
from mgrpo_kernels.train.watch.guard import Guard, message
from mgrpo_kernels.train.watch.live import Plain
from mgrpo_kernels.train.watch.loggers import open_loggers
from mgrpo_kernels.train.watch.metrics import metrics_line
from mgrpo_kernels.train.watch.report import write_report
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
    """A learner's training in an output directory.

    Args:
        learner: what trains, as it was at the checkpoint.
        output: the output directory.
        interrupt: says when the user or the machine asks the run to stop.
        view: shows progress.
        found: the facts of the checkpoint that the learner was restored from; None for a run that begins.
        fingerprints: of the data, the base model and its tokenizer.
    """

    def __init__(
        self,
        learner: Learner,
        output: Path,
        interrupt: Interrupt,
        view: Plain,
        found: checkpoint.Facts | None = None,
        fingerprints: Mapping[str, str] | None = None,
    ) -> None:
        self.learner, self.output, self.interrupt, self.view = learner, output, interrupt, view
        self.config = config = learner.config
        self.checkpoints = output / "checkpoints"
        self.is_new = found is None
        self.start = 0 if found is None else found["step"]
        # The last step's result, whose evaluation is still to come.
        self.pending: StepResult | None = None if found is None else found["pending"]
        self.writer = checkpoint.Writer(
            self.checkpoints,
            config.run.keep_checkpoints,
            background=config.run.async_checkpoints,
            write_line=view.warn,
            newest=None if found is None else found["path"],
            fingerprints=fingerprints,
        )
        self.taken = self.skipped = 0  # steps of this process
        self.proven: Path | None = None  # the newest checkpoint after which a step has succeeded
        learner.engine.check = interrupt.check

        sizes = (0, 0) if found is None else (found["metrics_bytes"], found["samples_bytes"])
        unwritten = {} if found is None else found["unwritten"]
        more, samples = unwritten.get(METRICS, []), unwritten.get(SAMPLES, [])
        past = parallel.from_first(past_lines(output / METRICS, sizes[0], more) if parallel.is_first() else [])
        self.loggers = open_loggers(config, output, past, view.warn) if parallel.is_first() else []
        with parallel.together():
            self.metrics = open_lines(output / METRICS, sizes[0], more, view.warn)
            self.samples = open_lines(output / SAMPLES, sizes[1], samples, view.warn)
        learner.skipped = past[-1]["skipped_steps"] or 0 if past else 0
        evaluated = [line["step"] for line in past if line.get("eval_accuracy") is not None]
        self.held_out = HeldOut(output / DIRECTORY, config, evaluated, view.warn) if parallel.is_first() else None
        self.guard = Guard(len(learner.task.held_out), config.eval.eval_samples)
        self.guard.replay(past)
        view.begin(past)
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
        return self._finish() if status is None else status

    def _finish(self) -> int:
        """Write final/ and the report; return the exit status 0.

        Raises:
            FloatingPointError: the weights are not worth it.
            OutputError: a file could not be written; the others are.
        """
        self._check_result()
        self.view.stop()
        if self.config.run.load_best:
            self._load_best()
        failure: RuntimeError | None = None
        try:
            save_final(self.learner.policy, self.output / "final")
        except (OutputError, FailedElsewhereError) as error:
            failure = error
        if parallel.is_first():
            self.writer.prune([self._best()])
            self.writer.report_failure()
            self._report()
        if failure is not None:
            raise failure
        with parallel.together():
            unwritten = len(self.metrics.unwritten) + len(self.samples.unwritten)
            if unwritten:
                raise OutputError(
                    f"output: {unwritten} lines of {METRICS} and {SAMPLES} could not be written; the last checkpoint contains them, and "
                    "--resume writes them"
                )
            if parallel.is_first():
                for line in closing(self.output, self.config):
                    print_line(line)
                if self.config.run.push_to_hub is not None:
                    print_line(f"uploaded: {push(self.output / 'final', self.config.run.push_to_hub)}")
        return 0

    def _load_best(self) -> None:
        """Restore the weights of the best evaluation, if it is better than the last one by more than chance explains."""
        best = parallel.from_first(self.held_out.best_of_all() if self.held_out is not None else None)
        if best is None:
            self.view.write_line(
                "load_best: final/ has the last weights, since no evaluation is better beyond its error"
            )
            return
        path = self.checkpoints / f"step_{best}"
        if best not in parallel.from_first(checkpoint.saved_steps(self.checkpoints)):
            self.view.warn(f"warning: load_best: expected the checkpoint {path}, got none; final/ has the last weights")
            return
        checkpoint.restore(checkpoint.load(path), self.learner)
        self.view.write_line(f"load_best: final/ has the weights of step {best}, the best evaluation")

    def _report(self) -> None:
        """Write the certificate and the report."""
        prompts, samples = len(self.learner.task.held_out), self.config.eval.eval_samples

        def write(name: str) -> None:
            if name == CERTIFICATE:
                write_certificate(self.output, prompts, samples, self.config.run.guard)
            else:
                write_report(self.output, self.learner.policy.device)

        for name in (CERTIFICATE, "report.html"):
            try:
                write(name)
            except OSError as error:
                self.view.warn(f"warning: {name} could not be written: {reason(error)}")

    def _check_result(self) -> None:
        """Raise FloatingPointError if the weights are not finite, or most steps were skipped, so that no step shows them to be good."""
        bad = checkpoint.not_finite(self.learner)
        if bad is not None:
            raise FloatingPointError(f"weights: expected finite ones, got NaN or infinity in {bad}")
        everything = self.learner.skipped, self.config.optim.steps
        for skipped, steps, which in ((*everything, ""), (self.skipped, self.taken, " since the run was resumed")):
            if 2 * skipped > steps:
                raise FloatingPointError(
                    f"{skipped} of {steps} steps{which} were skipped, since loss or gradient was not finite: final/ is not written, and "
                    "the weights of the last step that was taken are not good; a lower --learning-rate may help"
                )

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
            if self.config.run.guard == "rollback" or self.config.run.load_best:
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
        self.taken += 1
        try:
            with self.trace.during(step):
                result: StepResult = parallel.from_first(
                    train_step(self.learner, [train[each] for each in chosen], step)
                )
        except NotFiniteError as error:
            self.skipped += 1
            return self._skip(step, error)
        self._prove()
        return result

    def _prove(self) -> None:
        """Note that the newest checkpoint is good, since a step from its weights succeeded, and delete the one kept in its place."""
        newest = self.writer.newest
        if newest != self.proven and self.writer.is_idle:
            self.proven = newest
            self.writer.prune([self._best()])

    def _best(self) -> int | None:
        """Return the step of the checkpoint that the guard would go back to, None without a guard."""
        return None if self.config.run.guard == "off" else self.guard.best(checkpoint.saved_steps(self.checkpoints))

    def _skip(self, step: int, error: NotFiniteError) -> StepResult:
        """Keep the batch of a step that is not finite, and count it.

        Raises:
            FloatingPointError: as many steps as are allowed have been skipped.
        """
        saved, most = save_batch(self.output / "skipped", step, error.batch), self.config.run.max_skipped_steps
        if self.learner.skipped == most:
            self._save(step - 1, wait=True)
            raise FloatingPointError(
                f"{error}, in step {step}, after {most} steps that were skipped (--max-skipped-steps); {saved}"
            ) from error
        self.learner.skipped += 1
        self.view.warn(f"step {step} is skipped, {self.learner.skipped} of at most {most}: {error}; {saved}")
        return {"step": step, "skipped_steps": self.learner.skipped}, []

    def _evaluate(self, step: int) -> dict[str, float | None] | None:
        """Return the metrics of the evaluation that is due after a step, None where none is."""
        options, steps = self.config.eval, self.config.optim.steps
        due = options.eval_every and (step in (0, steps) or step % options.eval_every == 0)
        if not (due and self.learner.task.held_out):
            return None
        with parallel.gathered(self.learner.policy.model):
            engine = divided(self.learner.engine)
            questions = examine(self.learner.policy, engine, self.learner.task, self.config)
        return parallel.from_first({} if self.held_out is None else self.held_out.record(step, questions))

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
        """Warn of signs of collapse, enter them in the line, and restore the best checkpoint if the guard decides to roll back."""
        self.writer.settle()
        best = self.guard.best(parallel.from_first(checkpoint.saved_steps(self.checkpoints)))
        action = self.guard.decide(self.config.run.guard, self.config.run.guard_rollbacks, best)
        line["guard"], line["guard_signs"] = action, "; ".join(signs)
        path = None if best is None else self.checkpoints / f"step_{best}"
        self.view.warn(message(line["step"], signs, str(path or "none yet"), CONSEQUENCE[action]))
        self.guard.record(action)
        if action == "rollback":  # the step numbers, and so the random numbers, continue: the same fall is not repeated
            assert path is not None
            checkpoint.restore(checkpoint.load(path), self.learner)

    def _save(self, step: int, *, wait: bool = False, pending: StepResult | None = None) -> Path:
        """Save a checkpoint, and keep the newest that is known to be good beside it.

        Raises:
            FloatingPointError: the weights are not finite, and what has been saved is better.
        """
        bad = checkpoint.not_finite(self.learner)
        if bad is not None:
            raise FloatingPointError(f"weights: expected finite ones after step {step}, got NaN or infinity in {bad}")
        best = None
        if self.config.run.guard != "off":
            best = self.guard.best([*checkpoint.saved_steps(self.checkpoints), step])
        sizes = self.metrics.sync(), self.samples.sync()
        unwritten = {METRICS: self.metrics.unwritten, SAMPLES: self.samples.unwritten}
        proven = None if self.proven is None else checkpoint.step_of(self.proven)
        return self.writer.save(
            self.learner, step, *sizes, best, proven=proven, unwritten=unwritten, pending=pending, wait=wait
        )

    def _save_if_due(self, step: int, action: str | None) -> int | None:
        """Save after a step where that is due; return an exit status if the guard ends the run."""
        stopped, last, every = action == "stop", step == self.config.optim.steps, self.config.run.checkpoint_every
        keeps_best = self.config.run.guard == "rollback" or self.config.run.load_best
        new_best = keeps_best and self.guard.is_best(step)
        if not (stopped or last or new_best or (every and step % every == 0)):
            return None
        if last and not stopped:
            self._check_result()
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
                self._report()
                print_line(text)
