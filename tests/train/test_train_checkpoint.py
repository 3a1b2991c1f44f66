"""Checkpoints: everything comes back, `latest` names a complete one, and old ones go."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from mgrpo_kernels.train.errors import CheckpointError, UsageError
from mgrpo_kernels.train.model.policy import Policy, load_policy
from mgrpo_kernels.train.run import checkpoint, files
from mgrpo_kernels.train.step import train_step
from mgrpo_kernels.train.watch.lines import Lines
from mgrpo_kernels.train.watch.metrics import metrics_line


def test_a_restored_learner_goes_on_with_the_same_bits(policy: Policy, base: Path, tmp_path: Path) -> None:
    learner = tiny.learner(policy)
    train_step(learner, learner.task.train[:3], 1)
    place = checkpoint.save(tmp_path, learner, 1, 11, 22, keep=2)
    other = tiny.learner(load_policy(str(base), torch.device("cpu"), torch.float32))
    state = checkpoint.load(place)
    checkpoint.restore(state, other)
    assert (state["step"], state["metrics_bytes"], state["samples_bytes"]) == (1, 11, 22)
    for each in (learner, other):
        train_step(each, learner.task.train[3:6], 2)
    assert learner.momentum is not None
    assert other.momentum is not None
    assert other.momentum.updates == learner.momentum.updates == 2
    for one, two in ((policy, other.policy), (learner.momentum, other.momentum)):
        assert all(torch.equal(value, tiny.weights(two)[name]) for name, value in tiny.weights(one).items())


def test_old_ones_go_and_latest_follows(policy: Policy, tmp_path: Path) -> None:
    learner = tiny.learner(policy)
    for step in (2, 4, 10):
        checkpoint.save(tmp_path, learner, step, 0, 0, keep=2)
        assert checkpoint.latest(tmp_path) == tmp_path / f"step_{step}"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["latest", "step_10", "step_4"]
    checkpoint.save(tmp_path, learner, 12, 0, 0, keep=0)
    assert len(list(tmp_path.glob("step_*"))) == 3


def test_leftovers_of_a_killed_save_are_written_again(policy: Policy, tmp_path: Path) -> None:
    learner = tiny.learner(policy)
    assert checkpoint.latest(tmp_path) is None
    checkpoint.save(tmp_path, learner, 2, 0, 0, keep=1)
    for name in ("step_4", ".step_4.new", "step_6"):  # killed after the rename, before it, and in an earlier life
        (tmp_path / name).mkdir()
        (tmp_path / name / "__0_0.distcp").write_bytes(b"half")
    checkpoint.save(tmp_path, learner, 4, 0, 0, keep=1)
    assert checkpoint.load(tmp_path / "latest")["step"] == 4
    assert sorted(each.name for each in tmp_path.iterdir()) == ["latest", "step_4"]


@pytest.mark.parametrize("call", ["torch.save", "os.fsync", "Path.rename", "Path.replace"])
def test_a_save_that_breaks_off_leaves_the_last_one(
    policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    learner = tiny.learner(policy)
    checkpoint.save(tmp_path, learner, 2, 0, 0, keep=3)

    def broken(*_: object, **__: object) -> None:
        raise OSError("no space left")

    where, name = call.split(".")
    monkeypatch.setattr({"torch": torch, "os": os, "Path": Path}[where], name, broken)
    with pytest.raises(CheckpointError, match="step 4 could not be written .* no space left; step_2 is complete"):
        checkpoint.save(tmp_path, learner, 4, 0, 0, keep=3)
    monkeypatch.undo()
    assert not list(tmp_path.glob(".step*"))  # what was written of it does not fill the disk further
    latest = checkpoint.latest(tmp_path)
    assert latest is not None
    assert checkpoint.load(latest)["step"] == 2
    checkpoint.save(tmp_path, learner, 4, 0, 0, keep=3)
    assert checkpoint.load(tmp_path / "latest")["step"] == 4


@pytest.mark.parametrize("call", ["Path.symlink_to", "shutil.rmtree"])
def test_a_clean_up_that_fails_is_no_failed_save(
    policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    messages: list[str] = []
    learner, writer = tiny.learner(policy), checkpoint.Writer(tmp_path, 1, write_line=messages.append)
    writer.save(learner, 2, 0, 0, wait=True)

    def broken(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    where, name = call.split(".")
    monkeypatch.setattr({"shutil": shutil, "Path": Path}[where], name, broken)
    for step in (4, 6):
        writer.save(learner, step, 0, 0, wait=True)
        assert checkpoint.latest(tmp_path) == tmp_path / f"step_{step}"
    monkeypatch.undo()
    assert len(messages) == 2
    assert all("Permission denied" in each and "could not be " in each for each in messages)
    assert not any("step 4 could not be written" in each for each in messages)
    writer.save(learner, 8, 0, 0, wait=True)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["latest", "step_8"]
    assert (tmp_path / "latest").readlink() == Path("step_8")


def test_a_file_system_that_does_not_rename_over_a_file(
    policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("rename", "replace"):
        real = getattr(Path, name)

        def only_to_new(self: Path, target: Path, real: Any = real) -> Any:
            if target.exists() or target.is_symlink():
                raise FileExistsError(17, "File exists")
            return real(self, target)

        monkeypatch.setattr(Path, name, only_to_new)
    learner = tiny.learner(policy)
    for step in (2, 4):
        checkpoint.save(tmp_path, learner, step, 0, 0, keep=1)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["latest", "step_4"]
    assert checkpoint.load(tmp_path / "latest")["step"] == 4
    for text in ("one", "two"):
        files.write_text(tmp_path / "config.yaml", text)
    assert (tmp_path / "config.yaml").read_text() == "two"


def test_another_method_is_refused(policy: Policy, tmp_path: Path) -> None:
    checkpoint.save(tmp_path, tiny.learner(policy), 2, 0, 0, keep=1)
    state = checkpoint.load(tmp_path / "latest")
    with pytest.raises(UsageError, match="resume: expected a run with no momentum model"):
        checkpoint.restore(state, tiny.learner(policy, method="srt"))


def test_lines_are_cut_back_and_never_nan(tmp_path: Path) -> None:
    file = Lines(tmp_path / "m.jsonl", 0)
    file.write({"a": 1.0, "b": float("nan"), "c": float("inf"), "d": torch.tensor(2.0)})
    size = file.sync()
    file.write({"a": 2.0})
    file.close()
    again = Lines(tmp_path / "m.jsonl", size)
    assert again.sync() == size
    again.write({"a": 3.0})
    assert again.sync() == (tmp_path / "m.jsonl").stat().st_size
    assert (tmp_path / "m.jsonl").read_text() == '{"a": 1.0, "b": null, "c": null, "d": 2.0}\n{"a": 3.0}\n'
    with pytest.raises(UsageError, match="expected at least the 999 bytes"):
        Lines(tmp_path / "m.jsonl", 999)


def test_a_key_that_is_not_documented_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="new_key"):
        metrics_line({"step": 1, "new_key": 2}, None)
