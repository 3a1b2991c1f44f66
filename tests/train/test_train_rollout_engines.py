"""The comparison of rollout engines runs on a model's directory, and writes what each has generated."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest


def test_engines_take_turns_and_all_are_written(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    script = importlib.import_module("rollout_engines")
    monkeypatch.setattr(script, "QUESTION", "1 2 =")
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: None)  # vLLM's engine takes a minute to start
    out = tmp_path / "engines.json"
    shape = {"prompts": 2, "rollouts": 3, "tokens": 4, "rounds": 2}
    options = [each for name, value in shape.items() for each in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["rollout_engines.py", str(base), "--out", str(out), *options])
    script.main()
    written = json.loads(out.read_text())
    assert written["shape"] == shape
    assert set(written["engines"]) == {"ours", "transformers"}
    assert written["engines"]["ours"]["ours_over_it"] == 1.0
    assert all(each["tokens_per_second"] > 0 for each in written["engines"].values())
    assert "transformers: " in capsys.readouterr().out
