"""The examples run as they stand, with small models made on the spot."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from mgrpo_kernels.train import __main__ as command

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def run(monkeypatch, capsys):
    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        names = runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out, names

    return run


def history(names):
    return [line for line in names["trainer"].state.log_history if "loss" in line]


def test_grpo_loop_learns(run):
    out, _ = run("grpo_loop.py", "--steps", "12")
    rewards = [float(line.split("reward")[1].split()[0]) for line in out.splitlines()]
    assert len(rewards) == 12
    assert rewards[-1] > rewards[0] + 0.3


def test_fuse_lm_head(run):
    out, _ = run("fuse_lm_head.py")
    assert "mean entropy 10.8" in out  # ln 50,000 = 10.82: a random model
    assert "12 tokens" in out


def test_trl_patched_is_plain_trl(run, tmp_path):
    runs = [
        history(run("trl_patched.py", "--steps", "3", "--output", str(tmp_path), *more)[1])
        for more in ([], ["--plain"])
    ]
    assert len(runs[0]) == 3
    for fused, plain in zip(*runs, strict=True):
        for name in ("loss", "grad_norm", "entropy", "reward"):
            assert fused[name] == pytest.approx(plain[name], rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("schedule", ["gated", "hard", "ema"])
def test_teacher_loop(run, schedule):
    out, names = run("teacher_loop.py", "--steps", "40", "--schedule", schedule)
    assert len(out.splitlines()) == 4
    assert names["teacher"].updates == {"gated": 7, "hard": 8, "ema": 40}[schedule]
    assert names["accuracy"] > 0.85


def test_trl_mgrpo(run, tmp_path):
    _, names = run("trl_mgrpo.py", "--steps", "2", "--warm-steps", "50", "--output", str(tmp_path))
    lines = history(names)
    assert len(lines) == 2
    assert all(line["grad_norm"] > 0 and line["mgrpo/momentum_distance"] > 0 for line in lines)


def test_trl_before_after(run, tmp_path):
    """Its processes are its own; here only that they run, and agree, and that a page gets what it asks for."""
    out, _ = run(
        "trl_before_after.py",
        "--vocabulary",
        "50",
        "--width",
        "64",
        "--tokens",
        "4",
        "--steps",
        "3",
        "--pairs",
        "1",
        "--out",
        str(tmp_path / "result.json"),
    )
    written = json.loads((tmp_path / "result.json").read_text())
    assert written["table"].count("\n") == 3
    assert all(value > 0 for value in written["times"].values())
    assert {"CPU", "torch", "date"} <= set(written["environment"])
    lines = out.splitlines()
    for plain, patched in zip(lines[0:6:2], lines[1:6:2], strict=True):
        assert plain.split()[2] == "plain"
        assert [float(x) for x in patched.split()[4::2]] == pytest.approx(
            [float(x) for x in plain.split()[4::2]], rel=1e-3, abs=1e-6
        )
    assert [line.split()[0] for line in lines[7:]] == ["plain", "patched"]


def test_small_model(run, tmp_path):
    data = Path(__file__).parent / "train" / "data" / "gsm8k.jsonl"
    out, _ = run(
        "small_model.py", str(data), "--output", str(tmp_path / "small"), "--steps", "120", "--vocabulary", "400"
    )
    assert "step 120 of 120" in out
    flags = [
        "--data",
        str(data),
        "--steps",
        "2",
        "--prompts-per-step",
        "2",
        "--rollouts",
        "4",
        "--max-response-tokens",
        "12",
    ]
    status = command.main(
        ["--model", str(tmp_path / "small"), *flags, "--eval-every", "0", "--output", str(tmp_path / "run")]
    )
    assert status == 0
    responses = [
        json.loads(line)["response"] for line in (tmp_path / "run" / "samples.jsonl").read_text().split("\n")[:-1]
    ]
    assert any("\\boxed{" in response for response in responses)  # it has learnt the form
