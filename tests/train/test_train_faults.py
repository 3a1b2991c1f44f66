"""What a long run meets: kill -9, a full disk, torn files, steps that are not finite, SIGTERM while it samples."""

from __future__ import annotations

import errno
import os
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torture

from mgrpo_kernels.train import __main__ as command
from mgrpo_kernels.train import step
from mgrpo_kernels.train.errors import CheckpointError
from mgrpo_kernels.train.model.policy import Policy
from mgrpo_kernels.train.run import checkpoint, loop
from mgrpo_kernels.train.run.stopping import Abandoned, Interrupt


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the output of a run that nobody disturbed."""
    output = tiny.output_with(base, tmp_path_factory.mktemp("whole") / "run")
    assert command.main([*torture.flags(), "--output", str(output)]) == 0
    return output


def test_the_undisturbed_run_is_not_empty(whole: Path) -> None:
    lines = tiny.lines(whole)[1:]
    assert any(line["reward_mean"] for line in lines)
    assert any(line["pruned_fraction"] for line in lines)
    assert all(line["grad_norm"] is None or line["grad_norm"] > 0 for line in lines)
    assert lines[-1]["momentum_distance"] > 0


@pytest.mark.parametrize(("event", "number"), [("rollout", 60), ("checkpoint", 14), ("line", 22)])
def test_killed_and_resumed_gives_the_same_bits(
    whole: Path, base: Path, tmp_path: Path, event: str, number: int
) -> None:
    output = tiny.output_with(base, tmp_path / "run")
    assert torture.killed(event, number, output)
    assert not (output / "final").exists()
    assert len((output / "metrics.jsonl").read_text().split("\n")[:-1]) > 1
    if event == "checkpoint":  # at the others one may be on its way, too: it is written while training goes on
        assert list((output / "checkpoints").glob(".*.new"))
    assert command.main(["--output", str(output), "--resume"]) == 0
    assert not list((output / "checkpoints").glob(".*.new"))
    assert torture.differences(whole, output) == []


# --- Checkpoints


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let no file grow beyond `size` bytes inside the block: the write that would make it so fails half way, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_is_told_and_the_last_checkpoint_stands(policy: Policy, tmp_path: Path, background: bool) -> None:
    said: list[str] = []
    learner = tiny.learner(policy)
    writer = checkpoint.Writer(tmp_path, 3, background=background, write_line=said.append)
    writer.save(learner, 2, 0, 0)
    writer.settle()
    with largest_file(300_000):  # of some 1.7 MB
        writer.save(learner, 4, 0, 0)
        writer.settle()
    (text,) = said
    assert text.startswith(
        f"warning: checkpoint: step 4 could not be written to {tmp_path}/step_4: OSError: [Errno 27] "
    )
    assert text.endswith("; step_2 is complete. Training continues; the next checkpoint is tried again")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["latest", "step_2"]
    assert checkpoint.load(tmp_path / "latest")["step"] == 2
    with largest_file(300_000), pytest.raises(CheckpointError, match="step 4 could not be written"):
        writer.save(learner, 4, 0, 0, wait=True)  # nothing else would be left of the run
    writer.save(learner, 4, 0, 0, wait=True)
    assert checkpoint.load(tmp_path / "latest")["step"] == 4


def test_a_run_outlives_a_disk_that_is_full_for_a_while(
    whole: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tiny.output_with(base, tmp_path / "run")
    real = torch.save

    def full(value: Any, file: Any, *args: Any, **options: Any) -> None:
        if (output / "checkpoints" / ".step_6.new").exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(value, file, *args, **options)

    monkeypatch.setattr(torch, "save", full)
    assert command.main([*torture.flags(), "--output", str(output)]) == 0
    assert "warning: checkpoint: step 6 could not be written" in capsys.readouterr().out
    assert checkpoint.saved_steps(output / "checkpoints") == [3, 9, 10]
    assert torture.differences(whole, output) == []


def test_a_torn_checkpoint_is_told_and_the_one_before_is_taken(
    whole: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tiny.output_with(base, tmp_path / "run")
    assert torture.killed("line", 37, output, "--no-async-checkpoints")  # after step 7; checkpoints of steps 3 and 6
    torn = output / "checkpoints" / "step_6" / "__0_0.distcp"
    os.truncate(torn, torn.stat().st_size // 2)
    assert command.main(["--output", str(output), "--resume"]) == 0
    text = capsys.readouterr().out
    assert f"warning: checkpoint: expected {torn} of " in text
    assert "resuming after step 3" in text
    assert torture.differences(whole, output) == []


def test_a_damaged_file_of_the_right_size_is_told(policy: Policy, tmp_path: Path) -> None:
    learner = tiny.learner(policy)
    for number in (2, 4):
        checkpoint.save(tmp_path, learner, number, 0, 0, keep=0)
    said: list[str] = []
    for number, resumed in ((4, 2), (2, None)):
        file = tmp_path / f"step_{number}" / "__0_0.distcp"
        file.write_bytes(b"\0" * file.stat().st_size)
        if resumed is None:
            with pytest.raises(CheckpointError, match="expected one in .* that can be read, got 2 that cannot"):
                checkpoint.resume(tmp_path, learner, said.append)
        else:
            found = checkpoint.resume(tmp_path, learner, said.append)
            assert found is not None
            assert found["step"] == resumed
    assert len(said) == 3
    assert all("checkpoint: expected a readable one in" in text for text in said)


# --- Steps that are not finite


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list of steps whose advantages are NaN."""
    steps: list[int] = []
    real = step.training_batch

    def training_batch(learner: Any, *args: Any) -> Any:
        batch = real(learner, *args)
        return batch._replace(advantages=batch.advantages * torch.nan) if current[0] in steps else batch

    current = [0]
    real_step = loop.train_step

    def train_step(learner: Any, examples: Any, number: int) -> Any:
        current[0] = number
        return real_step(learner, examples, number)

    monkeypatch.setattr(step, "training_batch", training_batch)
    monkeypatch.setattr(loop, "train_step", train_step)
    return steps


def test_a_step_that_is_not_finite_is_skipped_counted_and_saved(
    base: Path, tmp_path: Path, broken: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    broken += [2, 4]
    output = tiny.output_with(base, tmp_path / "run")
    flags = [*tiny.FLAGS, "--steps", "5", "--checkpoint-every", "1", "--keep-checkpoints", "0", "--eval-every", "0"]
    assert command.main([*flags, "--max-skipped-steps", "1", "--output", str(output)]) == 1
    shown = capsys.readouterr()
    assert "step 2 is skipped, 1 of at most 1: update: expected a finite loss and gradient, got loss nan" in shown.out
    assert "in step 4, after 1 steps that were skipped (--max-skipped-steps); its batch is in" in shown.err
    lines = tiny.lines(output)
    assert [line["skipped_steps"] for line in lines] == [0, 1, 1]
    assert lines[1]["loss"] is None
    states = [checkpoint.read(output / "checkpoints" / f"step_{number}", "") for number in (1, 2, 3)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())  # momentum and optimizer too
    assert any(not torch.equal(value, states[2][name]) for name, value in states[1].items())
    assert checkpoint.saved_steps(output / "checkpoints") == [1, 2, 3]
    assert sorted(each.name for each in (output / "skipped").iterdir()) == ["step_2.pt", "step_4.pt"]
    batch = torch.load(output / "skipped" / "step_4.pt", weights_only=True)
    assert batch["advantages"].isnan().all()
    assert batch["tokens"].shape == batch["mask"].shape
    # The count goes on where the run goes on.
    assert command.main(["--output", str(output), "--resume", "--max-skipped-steps", "2"]) == 0
    assert [line["skipped_steps"] for line in tiny.lines(output)] == [0, 1, 1, 2, 2]


# --- SIGTERM


def test_sigterm_does_not_wait_for_sampling(base: Path, tmp_path: Path) -> None:
    output = tiny.output_with(base, tmp_path / "run")
    size = ["--rollouts", "1024", "--prompts-per-step", "64", "--eval-every", "0"]  # sampling takes many seconds
    process = tiny.start(*tiny.FLAGS, "--steps", "5", *size, "--output", str(output))
    assert process.stdout is not None
    while not (output / "samples.jsonl").exists():  # made right before the first step
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(1.0)
    start = time.monotonic()
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 130, text
    assert text.splitlines()[-1].startswith(
        f"stopped after step 0 of 5; saved {output}/checkpoints/step_0; continue with "
    )
    assert time.monotonic() - start < 20  # a machine gives 30 and more
    assert checkpoint.load(output / "checkpoints" / "latest")["step"] == 0


@pytest.mark.parametrize(("where", "which"), [("step", 4), ("evaluation", 2)])
def test_left_while_sampling_and_resumed_gives_the_same_bits(
    whole: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, which: int
) -> None:
    output = tiny.output_with(base, tmp_path / "run")
    places: list[str] = []
    real_step, real_evaluate = loop.train_step, loop.examine

    def noted(name: str, function: Any) -> Any:
        def call(*args: Any) -> Any:
            places.append(name)
            return function(*args)

        return call

    tokens = 4  # of that place, which are drawn before it is left

    def check(interrupt: Interrupt) -> None:
        nonlocal tokens
        if places and places[-1] == where and places.count(where) == which:
            tokens -= 1
            if tokens == 0:
                interrupt.asked = True
                raise Abandoned

    monkeypatch.setattr(loop, "train_step", noted("step", real_step))
    monkeypatch.setattr(loop, "examine", noted("evaluation", real_evaluate))
    with monkeypatch.context() as patch:
        patch.setattr(Interrupt, "check", check)
        assert command.main([*torture.flags(), "--output", str(output)]) == 130
    assert (places[-1], places.count(where)) == (where, which)
    assert command.main(["--output", str(output), "--resume"]) == 0
    assert torture.differences(whole, output) == []
