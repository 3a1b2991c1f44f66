"""--profile-steps: a trace that can be read, of the steps asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny

from mgrpo_kernels.train.__main__ import main
from mgrpo_kernels.train.errors import UsageError


def test_a_trace_of_the_steps_asked_for(base: Path, tmp_path: Path) -> None:
    output = tiny.output_with(base, tmp_path / "run")
    assert main([*tiny.FLAGS, "--output", str(output), "--eval-every", "0", "--profile-steps", "2:3"]) == 0
    events = json.loads((output / "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    names = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    assert names.count("rollout") == names.count("update") == names.count("ema") == 2
    assert any(event["name"] == "aten::mm" and event["dur"] > 0 for event in events if event.get("ph") == "X")


def test_a_run_that_ends_before_leaves_what_there_is(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mgrpo_kernels.train.run import loop

    real = loop.train_step

    def broken(learner: object, examples: object, step: int) -> object:
        if step == 3:
            raise FloatingPointError("on purpose")
        return real(learner, examples, step)

    monkeypatch.setattr(loop, "train_step", broken)
    output = tiny.output_with(base, tmp_path / "run")
    assert main([*tiny.FLAGS, "--output", str(output), "--eval-every", "0", "--profile-steps", "2:4"]) == 1
    events = json.loads((output / "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    assert [event["name"] for event in events if event.get("cat") == "user_annotation"].count("ema") == 1


@pytest.mark.parametrize("steps", ["3", "0:2", "3:2", "a:b", ":", "-1:2", "1:5"])
def test_steps_that_are_none(steps: str) -> None:
    with pytest.raises(UsageError, match="profile_steps: expected"):
        tiny.config(profile_steps=steps, steps=4)
    assert list(tiny.config(profile_steps="2:4", steps=4).profiled) == [2, 3, 4]
