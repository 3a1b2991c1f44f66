"""Disks that are full, memory that runs out, weights that are ruined, and text that controls a terminal."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from small_models import make_byte_model
from test_train_faults import largest_file

from mgrpo_kernels.train import __main__ as command
from mgrpo_kernels.train import export, text
from mgrpo_kernels.train.config import build
from mgrpo_kernels.train.ending import exit_status
from mgrpo_kernels.train.errors import OutputError, UsageError
from mgrpo_kernels.train.model.policy import Policy, load_policy
from mgrpo_kernels.train.run import checkpoint, files, loop, output, start
from mgrpo_kernels.train.watch.lines import Lines, read_lines

FLAGS = [
    *tiny.FLAGS,
    "--steps",
    "4",
    "--checkpoint-every",
    "2",
    "--eval-every",
    "0",
    "--keep-checkpoints",
    "0",
    "--plain",
]
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tiny.output_with(base, tmp_path_factory.mktemp("whole") / "run")
    assert command.main([*FLAGS, "--output", str(place)]) == 0
    return place


# --- Lines


def test_lines_wait_for_a_disk_that_is_full(tmp_path: Path) -> None:
    messages: list[str] = []
    lines = Lines(tmp_path / "m.jsonl", 0, warn=messages.append)
    lines.write({"step": 1})
    with largest_file(20):  # the second line is torn by it
        for step in (2, 3):
            lines.write({"step": step, "text": "x" * 20})
        assert read_lines(tmp_path / "m.jsonl") == [{"step": 1}]
        assert lines.sync() == len('{"step": 1}\n')
        assert [json.loads(line)["step"] for line in lines.unwritten] == [2, 3]
    lines.write({"step": 4})
    lines.close()
    assert [line["step"] for line in read_lines(tmp_path / "m.jsonl")] == [1, 2, 3, 4]
    assert lines.unwritten == []
    assert len(messages) == 2
    assert "m.jsonl could not be written: File too large. Its lines are kept in memory" in messages[0]
    assert "no line of it is missing" in messages[1]


def test_a_run_outlives_metrics_that_cannot_be_written(
    whole: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The disk is full from step 2 on; the run is killed after its checkpoint of step 4, and resumed on a disk with room."""
    place = tiny.output_with(base, tmp_path / "run")
    real, saved = os.write, loop.Run._save_if_due

    def full(descriptor: int, content: Any) -> int:
        if b'"step": 1,' in bytes(content) or Path(f"/proc/self/fd/{descriptor}").readlink().suffix != ".jsonl":
            return real(descriptor, content)
        real(descriptor, bytes(content)[:5])
        raise FULL

    def killed(self: Any, step: int, action: Any) -> Any:
        saved(self, step, action)
        if step == 4:
            raise KeyboardInterrupt
        return None

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        patch.setattr(loop.Run, "_save_if_due", killed)
        assert command.main([*FLAGS, "--output", str(place)]) == 130
    assert "metrics.jsonl could not be written: No space left on device" in capsys.readouterr().out
    assert [line["step"] for line in read_lines(place / "metrics.jsonl")] == [1]
    assert command.main(["--output", str(place), "--resume"]) == 0
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert tiny.lines(place, name) == tiny.lines(whole, name)


# --- Every other file


def broken(*_: Any, **__: Any) -> Any:
    raise FULL


def test_a_configuration_that_cannot_be_written_ends_in_a_line(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tiny.output_with(base, tmp_path / "run")
    monkeypatch.setattr(files, "write_text", broken)
    assert command.main([*FLAGS, "--output", str(place)]) == 2
    assert (
        "error: --output: expected a directory that can be written, got OSError: [Errno 28]" in capsys.readouterr().err
    )


def test_a_report_and_a_logger_that_fail_end_no_run(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tiny.output_with(base, tmp_path / "run")
    monkeypatch.setattr(loop, "write_report", broken)
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", broken)
    assert command.main([*FLAGS, "--steps", "2", "--tensorboard", "--output", str(place)]) == 0
    shown = capsys.readouterr().out
    assert shown.count("warning: tensorboard failed and is now disabled: OSError") == 1
    assert "warning: report.html could not be written: OSError: [Errno 28]" in shown
    assert (place / "final" / "model.safetensors").exists()


def test_a_skipped_batch_that_cannot_be_saved_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "save", broken)
    batch = loop.NotFiniteError("x", output.Batch([], *[torch.zeros(1)] * 5)).batch
    assert "its batch could not be saved: [Errno 28]" in output.save_batch(tmp_path / "skipped", 3, batch)


def test_final_is_replaced_only_by_a_complete_model(policy: Policy, tmp_path: Path) -> None:
    place = tmp_path / "final"
    export.save_final(policy, place)
    before = {each.name: each.read_bytes() for each in place.iterdir()}
    with torch.no_grad():
        policy.head()[0].add_(1.0)
    with largest_file(20_000), pytest.raises(OutputError, match="final: expected to write the model to .*, got "):
        export.save_final(policy, place)
    assert {each.name: each.read_bytes() for each in place.iterdir()} == before
    assert [each.name for each in tmp_path.iterdir()] == ["final"]
    export.save_final(policy, place)
    assert {each.name: each.read_bytes() for each in place.iterdir()} != before


def test_every_file_of_final_is_on_the_disk_before_it_takes_its_place(
    policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def noted_fsync(descriptor: int) -> None:
        order.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    def noted_replace(self: Path, target: Path) -> Path:
        order.append(f"{self.name} -> {target.name}")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    export.save_final(policy, tmp_path / "final")
    put = order.index("final.new -> final")
    assert {each.name for each in (tmp_path / "final").iterdir()} <= set(order[:put])
    assert order[put + 1] == tmp_path.name


def test_a_run_whose_model_cannot_be_written_says_what_is_saved(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tiny.output_with(base, tmp_path / "run")
    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", broken)
    assert command.main([*FLAGS, "--steps", "2", "--output", str(place)]) == 1
    assert "error: final: expected to write the model to" in capsys.readouterr().err
    assert checkpoint.latest(place / "checkpoints") == place / "checkpoints" / "step_2"
    assert (place / "report.html").exists()


def test_output_that_nobody_reads_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed(io.StringIO):
        def write(self, _: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Closed())
    for _ in range(2):
        text.print_line("a line")


# --- Memory


@pytest.mark.parametrize("error", [lambda: torch.empty(2**50), lambda: bytearray(2**60), "cuda"])
def test_out_of_memory_ends_in_a_line(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Any
) -> None:
    place = tiny.output_with(base, tmp_path / "run")

    def train_step(*_: Any) -> Any:
        if error == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
        return error()

    monkeypatch.setattr(loop, "train_step", train_step)
    assert command.main([*FLAGS, "--output", str(place)]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: out of memory: ")
    assert "--tokens-per-microbatch" in shown
    assert shown.count("\n") == 1


def test_a_rank_that_is_gone_ends_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    gone = RuntimeError(
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1"
    )
    assert exit_status(gone) == 1
    assert capsys.readouterr().err.startswith("error: lost contact with another rank: [/pytorch/third_party/gloo")
    assert exit_status(RuntimeError("a bug")) is None
    assert capsys.readouterr().err == ""


# --- Ruined weights


def test_a_rate_that_ruins_the_weights_replaces_nothing_good(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "run"
    shutil.copytree(whole, place, symlinks=True)
    before = (place / "final" / "model.safetensors").read_bytes()
    flags = ["--steps", "10", "--learning-rate", "1e30", "--lr-schedule", "constant", "--checkpoint-every", "1"]
    assert command.main(["--output", str(place), "--resume", *flags, "--keep-checkpoints", "1"]) == 1
    assert "finite" in capsys.readouterr().err
    assert (place / "final" / "model.safetensors").read_bytes() == before
    assert 4 in checkpoint.saved_steps(place / "checkpoints")  # the last one of which a step is known to have succeeded


@pytest.mark.parametrize(("skipped", "status"), [(1, 0), (2, 0), (3, 1)])
def test_a_run_that_skipped_most_of_its_steps_has_failed(
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    skipped: int,
    status: int,
) -> None:
    place, real = tiny.output_with(base, tmp_path / "run"), loop.train_step

    def train_step(learner: Any, examples: Any, step: int) -> Any:
        if step > 4 - skipped:
            raise loop.NotFiniteError("loss nan", output.Batch([], *[torch.zeros(1)] * 5))
        return real(learner, examples, step)

    monkeypatch.setattr(loop, "train_step", train_step)
    assert command.main([*FLAGS, "--output", str(place)]) == status
    assert (place / "final").exists() == (status == 0)
    assert (f"error: {skipped} of 4 steps were skipped" in capsys.readouterr().err) == (status == 1)


def test_weights_that_are_not_finite_are_not_saved(policy: Policy, tmp_path: Path) -> None:
    learner = tiny.learner(policy)
    assert checkpoint.not_finite(learner) is None
    with torch.no_grad():
        policy.model.model.norm.weight[0] = float("inf")
    assert checkpoint.not_finite(learner) == "model.model.norm.weight"
    run = object.__new__(loop.Run)
    run.learner = learner
    with pytest.raises(
        FloatingPointError, match="expected finite ones after step 7, got NaN or infinity in model.model.norm.weight"
    ):
        run._save(7)


# --- What a run cannot begin with


def test_weights_that_are_not_finite_are_refused(base: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(base, tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors["lm_head.weight"][3, 5] = float("nan")
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match="model: expected finite weights, got NaN or infinity in lm_head.weight of "):
        load_policy(str(tmp_path / "model"), torch.device("cpu"), torch.float32)


def test_a_model_without_width_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_byte_model(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "hidden_size": 0}))
    (tmp_path / "data.jsonl").write_text('{"question": "x", "answer": "1"}\n')
    flags = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "data.jsonl"), "--max-response-tokens", "12"]
    assert command.main([*flags, "--output", str(tmp_path / "run")]) == 2
    assert "error: --model: expected a hidden size of at least 1, got 0" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["temperature", "eval_temperature"])
def test_a_temperature_whose_reciprocal_is_infinite_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name}: expected .*0.0001.*, got 1e-40"):
        build({name: 1e-40})


# --- Text

CONTROL = "\x1b[2J\x9b31m\u202e\r\x07 and \udc80"


def test_control_characters_are_escaped_in_what_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, base: Path
) -> None:
    shown = text.printable(f"a\n{CONTROL}")
    assert shown == "a\n\\x1b[2J\\x9b31m\\u202e\\r\\x07 and \\udc80"
    (tmp_path / "data.jsonl").write_text(json.dumps({"\x1b[2J": "x", "\x9b": 1}) + "\n")
    flags = ["--model", str(base), "--data", str(tmp_path / "data.jsonl"), "--output", str(tmp_path / "run\x1b[2J")]
    assert command.main(flags) == 2
    assert (
        command.main(
            [
                *tiny.FLAGS,
                "--output",
                str(tmp_path / "run\x1b[2J"),
                "--dry-run",
                "--prompt-template",
                "{question}\x1b[2J",
            ]
        )
        == 0
    )
    view = start.make_view(tiny.config(), "title")
    view.warn(f"guard: {CONTROL}")
    streams = capsys.readouterr()
    assert "\\x1b[2J" in streams.err
    assert "\\x9b31m" in streams.out
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", streams.out + streams.err)


def test_no_reader_splits_lines_where_json_does_not() -> None:
    """What is written as JSON lines ends a line at a line feed alone; str.splitlines also splits at ten other characters."""
    root, forbidden = Path(__file__).resolve().parents[2], re.compile(r"(jsonl|json\.loads).*\.splitlines\(\)")
    found = [
        f"{path.relative_to(root)}: {line.strip()}"
        for folder in ("mgrpo_kernels", "examples", "scripts", "benchmarks", "docs", "tests")
        for path in (root / folder).rglob("*.py")
        for line in path.read_text(encoding="utf-8").split("\n")
        if forbidden.search(line) and "stdout" not in line and ".out." not in line
    ]
    assert found == []
