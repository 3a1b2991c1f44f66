"""The trainer's command line with ``--engine vllm``."""

from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path

import pytest
import tiny
from transformers import AutoModelForCausalLM

from mgrpo_kernels.train import __main__ as command
from mgrpo_kernels.train.extras import how_to_install

STEPS = 4
FLAGS = [
    *tiny.FLAGS,
    "--engine",
    "vllm",
    "--vllm-cache-gib",
    "0.1",
    "--steps",
    str(STEPS),
    "--checkpoint-every",
    "1",
    "--lr-schedule",
    "constant",
]


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tiny.output_with(base, tmp_path_factory.mktemp("whole") / "run")
    assert command.main([*FLAGS, "--output", str(output)]) == 0
    return output


def test_it_trains(whole: Path) -> None:
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().split("\n")[:-1]]
    assert [line["step"] for line in lines] == list(range(STEPS + 1))
    for line in lines[1:]:
        assert 0 < line["behaviour_mismatch"] < 1e-4
        assert line["time_sync"] > 0
        assert line["time_rollout"] > 0
        assert line["loss"] is not None
    assert [line["eval_greedy"] is not None for line in lines if "eval_greedy" in line] == [True] * 3
    before, after = (AutoModelForCausalLM.from_pretrained(whole / name).state_dict() for name in ("base", "final"))
    assert any(not before[name].equal(value) for name, value in after.items())


def test_killed_and_resumed_gives_the_same_bits(whole: Path, base: Path, tmp_path: Path) -> None:
    output = tiny.output_with(base, tmp_path / "run")
    process = tiny.start(*FLAGS, "--output", str(output))
    deadline = time.monotonic() + 300
    while not (output / "checkpoints" / "step_2").exists():
        assert process.poll() is None, process.stdout and process.stdout.read()
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert not (output / "final").exists()
    assert command.main(["--output", str(output), "--resume"]) == 0
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert tiny.lines(output, name) == tiny.lines(whole, name)
    assert (output / "final" / "model.safetensors").read_bytes() == (whole / "final" / "model.safetensors").read_bytes()


def test_without_vllm_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "vllm" else find(name))
    assert command.main([*FLAGS, "--output", str(tmp_path / "run")]) == 2
    assert f"error: --engine: expected the package vllm, got none: {how_to_install('vllm')}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
