"""TensorBoard, Weights & Biases, Trackio: every step once, whatever happened to the run; nothing that is null."""

from __future__ import annotations

import importlib.util
import json
import struct
import sys
import types
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import tiny
from absent import need

from mgrpo_kernels.train import __main__ as command
from mgrpo_kernels.train.extras import how_to_install
from mgrpo_kernels.train.run import loop
from mgrpo_kernels.train.watch import loggers
from mgrpo_kernels.train.watch.lines import read_lines
from mgrpo_kernels.train.watch.loggers import open_loggers, scalars

Logged = dict[str, dict[int, float]]  # tag -> step -> value


def test_what_is_logged() -> None:
    line = {
        "step": 3,
        "loss": 0.5,
        "kl": None,
        "entropy": float("nan"),
        "time_rollout": 0.1,
        "time_sync": None,
        "eval_accuracy": 0.4,
        "guard": "warn",
        "guard_signs": "entropy 1 -> 0",
        "top_answer_share": 0.0,
    }
    assert scalars(line) == {
        "train/loss": 0.5,
        "time/rollout": 0.1,
        "eval/accuracy": 0.4,
        "guard/warn": 1.0,
        "train/top_answer_share": 0.0,
    }


def expected(output: Path) -> Logged:
    """Return what metrics.jsonl says should have been logged."""
    found: Logged = {}
    for line in read_lines(output / "metrics.jsonl"):
        for tag, value in scalars(line).items():
            found.setdefault(tag, {})[line["step"]] = value
    return found


def run_in_parts(base: Path, output: Path, monkeypatch: pytest.MonkeyPatch, *flags: str) -> None:
    """Train with a checkpoint after step 2, be stopped at once in step 4 and again in step 6, and resume each time."""
    tiny.output_with(base, output)
    real, taken = loop.train_step, []

    def step(learner: Any, examples: Any, number: int) -> Any:
        taken.append(number)
        if taken.count(number) == 1 and number in (4, 6):
            raise KeyboardInterrupt
        return real(learner, examples, number)

    monkeypatch.setattr(loop, "train_step", step)
    first = [*tiny.FLAGS, "--steps", "7", "--checkpoint-every", "2", *flags]
    for arguments, status in ((first, 130), (["--resume"], 130), (["--resume"], 0)):
        assert command.main([*arguments, "--output", str(output)]) == status
    assert taken == [1, 2, 3, 4, 3, 4, 5, 6, 5, 6, 7]  # steps 3 and 5 were taken twice
    monkeypatch.setattr(loop, "train_step", real)


def event_files(output: Path) -> list[Path]:
    return sorted(file for file in (output / "tensorboard").glob("events.out.tfevents.*") if file.stat().st_size)


def in_tensorboard(output: Path) -> Logged:
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    found: Logged = {}
    for file in event_files(output):
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name == "scalars":
                    assert event.step not in found.setdefault(value.tag, {}), (value.tag, event.step)
                    found[value.tag][event.step] = value.tensor.float_val[0]
    return found


def same(found: Logged, wanted: Logged) -> None:
    assert found.keys() == wanted.keys()
    for tag, values in wanted.items():
        assert found[tag].keys() == values.keys(), tag
        for step, value in values.items():
            # Times, rates and memory differ when a step is repeated.
            if not tag.startswith("time/") and "per_second" not in tag and "memory" not in tag:
                assert found[tag][step] == pytest.approx(value, rel=1e-6), (tag, step)


def test_tensorboard(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "run"
    run_in_parts(base, output, monkeypatch, "--tensorboard")
    same(in_tensorboard(output), expected(output))
    assert len(event_files(output)) == 1
    assert set(in_tensorboard(output)["eval/accuracy"]) == {0, 2, 4, 6, 7}
    assert set(in_tensorboard(output)["train/loss"]) == set(range(1, 8))


def test_a_reader_of_tensorboard_forgets_what_is_written_again(tmp_path: Path) -> None:
    """One that has read the older file, and sees the newer beside it, has each step once."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = tiny.config(tensorboard=True)
    (first,) = open_loggers(config, tmp_path, [{"step": step, "loss": float(step)} for step in range(1, 5)])
    reader = EventAccumulator(str(tmp_path / "tensorboard"))
    reader.Reload()
    first.close()
    assert len(reader.Scalars("train/loss")) == 4
    (second,) = open_loggers(config, tmp_path, [{"step": step, "loss": 10.0 * step} for step in (1, 2)])
    second.write({"step": 3, "loss": 30.0})
    second.close()
    for _ in range(2):
        reader.Reload()
    assert [(each.step, each.value) for each in reader.Scalars("train/loss")] == [(1, 10.0), (2, 20.0), (3, 30.0)]


def test_a_logger_joins_at_a_resume(base: Path, tmp_path: Path) -> None:
    output = tiny.output_with(base, tmp_path / "run")
    assert command.main([*tiny.FLAGS, "--steps", "2", "--output", str(output)]) == 0
    assert command.main(["--steps", "3", "--output", str(output), "--resume", "--tensorboard"]) == 0
    same(in_tensorboard(output), expected(output))


class Recorder:
    """Stands for wandb and trackio: keeps what it is given, by run, as their servers do."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.opened: list[dict[str, Any]] = []
        self.lines: dict[str, list[tuple[int, dict[str, float]]]] = {}
        module: Any = types.ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.init = self.init
        module.Settings = dict
        module.login = lambda: True
        module.errors = types.SimpleNamespace(Error=RuntimeError)
        module.setup = lambda: types.SimpleNamespace(settings=types.SimpleNamespace(mode="online"))
        self.module = module
        monkeypatch.setitem(sys.modules, name, module)

    def init(self, **options: Any) -> Any:
        self.opened.append(options)
        lines = self.lines.setdefault(options["name"], [])
        return types.SimpleNamespace(log=lambda values, step: lines.append((step, values)), finish=lambda: None)

    def logged(self) -> Logged:
        (lines,) = self.lines.values()  # one run
        found: Logged = {}
        for step, values in lines:
            for tag, value in values.items():
                assert step not in found.setdefault(tag, {}), (tag, step)
                found[tag][step] = value
        return found


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_once(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    recorder = Recorder(monkeypatch, name)
    output = tmp_path / "run"
    run_in_parts(base, output, monkeypatch, f"--{name}", "sums")
    same(recorder.logged(), expected(output))
    assert [each["project"] for each in recorder.opened] == ["sums"] * 3
    assert {each["resume"] for each in recorder.opened} == {"allow"}
    assert recorder.opened[0]["config"]["learning_rate"] == 1e-3
    state = json.loads((output / "loggers.json").read_text())
    assert state == {name: {"project": "sums", "run": recorder.opened[0]["name"], "step": 7}}
    with pytest.raises(
        loggers.UsageError, match=f"{name}: expected sums, the project in which the run was started, got other"
    ):
        open_loggers(tiny.config(**{name: "other"}), output, [])


def test_killed_between_the_mark_and_the_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step is missing there, rather than there twice."""
    recorder = Recorder(monkeypatch, "trackio")
    lines = [{"step": step, "loss": 1.0} for step in range(1, 5)]
    (logger,) = open_loggers(tiny.config(trackio="sums"), tmp_path, lines[:2])

    def killed(values: Any, step: int) -> None:
        raise KeyboardInterrupt

    logger._logger._send = killed  # type: ignore[attr-defined]
    with pytest.raises(KeyboardInterrupt):
        logger.write(lines[2])
    open_loggers(tiny.config(trackio="sums"), tmp_path, lines)
    assert list(recorder.logged()["train/loss"]) == [1, 2, 4]


def records_of(file: Path) -> Iterator[bytes]:
    """Read a .wandb file: a header of 7 bytes, then LevelDB's log format, records cut to fit blocks of 32 KiB."""
    data, at, parts = file.read_bytes(), 7, []
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:  # no room for another part's header
            at += left
            continue
        size, kind = struct.unpack_from("<HB", data, at + 4)  # after the checksum
        parts.append(data[at + 7 : at + 7 + size])
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield b"".join(parts)
            parts = []


def in_wandb(output: Path) -> Logged:
    """Read the files that an offline run leaves for `wandb sync`."""
    from wandb.proto import wandb_internal_pb2

    found: Logged = {}
    for file in sorted((output / "wandb").glob("offline-run-*/*.wandb")):
        for data in records_of(file):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            values = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
            }
            for tag, value in values.items():
                if not tag.startswith("_"):
                    assert record.history.step.num not in found.setdefault(tag, {}), (tag, record.history.step.num)
                    found[tag][record.history.step.num] = value
    return found


def test_wandb_itself(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need("wandb", "pip install wandb")
    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    output = tmp_path / "run"
    run_in_parts(base, output, monkeypatch, "--wandb", "sums")
    same(in_wandb(output), expected(output))
    names = {file.stem for file in (output / "wandb").glob("offline-run-*/*.wandb")}
    run = json.loads((output / "loggers.json").read_text())["wandb"]["run"]
    assert names == {f"run-{run}"}  # three parts of one run


def test_trackio_itself(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need("trackio", "pip install trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for module in [module for module in sys.modules if module.partition(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, module)  # it reads TRACKIO_DIR when it is imported, which others may have done
    output = tmp_path / "run"
    run_in_parts(base, output, monkeypatch, "--trackio", "sums")
    from trackio.sqlite_storage import SQLiteStorage

    (name,) = SQLiteStorage.get_runs("sums")
    assert name == json.loads((output / "loggers.json").read_text())["trackio"]["run"]
    found: Logged = {}
    for row in SQLiteStorage.get_logs("sums", name):
        for tag, value in row.items():
            if tag not in ("step", "timestamp"):
                assert row["step"] not in found.setdefault(tag, {}), (tag, row["step"])
                found[tag][row["step"]] = value
    same(found, expected(output))


@pytest.mark.parametrize("flags", [["--tensorboard"], ["--wandb", "sums"], ["--trackio", "sums"]])
def test_an_absent_package_stops_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    name, real = flags[0].removeprefix("--"), importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda each, *rest: None if each == name else real(each, *rest))
    output = tmp_path / "run"
    assert command.main([*tiny.FLAGS, "--output", str(output), *flags]) == 2
    assert f"error: --{name}: expected the package {name}, got none: {how_to_install(name)}" in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.parametrize("refusal", [RuntimeError("no key"), False])
def test_no_login_stops_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], refusal: Any
) -> None:
    def login() -> bool:
        if refusal:
            raise refusal
        return False

    Recorder(monkeypatch, "wandb").module.login = login
    output = tmp_path / "run"
    assert command.main([*tiny.FLAGS, "--output", str(output), "--wandb", "sums"]) == 2
    assert "error: --wandb: expected a login (wandb login) or WANDB_MODE=offline, got" in capsys.readouterr().err
    assert not output.exists()


def test_an_empty_project_is_refused() -> None:
    for name in ("wandb", "trackio"):
        with pytest.raises(loggers.UsageError, match=f"{name}: expected the name of a project, got ''"):
            tiny.config(**{name: ""})
