"""The comparison of other libraries' own tests: an outcome that our ops change is seen, and so is a suite that did not run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from absent import need

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "scripts" / "peer_suites"
TESTS = {
    "test_grpo_trainer.py": """
import trl.trainer.grpo_trainer as module
from trl.import_utils import is_a_package_of_another_version_available

def test_that_passes_in_both():
    assert is_a_package_of_another_version_available() is False

def test_that_only_trl_itself_passes():
    assert module.GRPOTrainer._compute_loss.__module__.startswith("trl")

def test_that_fails_in_both():
    raise AssertionError("as it is")
""",
    "test_rloo_trainer.py": """
import torch
import trl.trainer.utils as utils

def test_that_calls_the_head():
    hidden, weight = torch.randn(3, 8), torch.randn(20, 8)
    found = utils._ChunkedLogProbFunction.apply(hidden, weight, None, torch.tensor([1, 2, 3]), 1.0, 16, None, 1.0, ("entropy",))
    assert len(found) > 0
""",
    "test_utils.py": "from trl.trainer.utils import something_of_another_version\n",
}


def compare(checkout: Path, place: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(FOLDER / "compare.py"), "trl", str(checkout), "--out", str(place / "out.json")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_an_outcome_that_the_ops_change_is_seen(tmp_path: Path) -> None:
    need("trl", "make setup-dev")
    (tmp_path / "trl" / "tests").mkdir(parents=True)
    for name, text in TESTS.items():
        (tmp_path / "trl" / "tests" / name).write_text(text)
    done = compare(tmp_path / "trl", tmp_path)
    assert done.returncode == 1, done.stderr
    (result,) = json.loads((tmp_path / "out.json").read_text()).values()
    assert [each["test"].rpartition("::")[2] for each in result["different"]] == ["test_that_only_trl_itself_passes"]
    assert result["different"][0]["patched"] == "failed"
    assert result["outcomes"] == {"passed": 3, "failed": 1, "not collected": 1}
    assert result["not_collected"] == ["tests/test_utils.py"]
    assert [name.rpartition("::")[2] for name in result["failed_in_both"]] == ["test_that_fails_in_both"]
    assert result["tests_that_call"] == {"linear_token_stats": 1}


def test_a_suite_in_which_nothing_passes_is_no_result() -> None:
    sys.path.insert(0, str(FOLDER))
    from compare import checked

    nothing = {"tests/test_utils.py": {"outcome": "not collected", "reason": "no such name"}}
    with pytest.raises(SystemExit, match="plain.log: expected tests that pass, got 1 that do not"):
        checked(nothing, "plain.log")
    assert checked({**nothing, "b": {"outcome": "passed"}}, "plain.log")["b"]["outcome"] == "passed"


def test_what_differs() -> None:
    sys.path.insert(0, str(FOLDER))
    from compare import summary

    def run(outcome: str, **more: Any) -> dict[str, Any]:
        return {"outcome": outcome, "calls": {}, "own_code": [], **more}

    plain = {"a": run("passed"), "b": run("failed", reason="x"), "c": run("skipped"), "d": run("failed")}
    patched = {
        "a": run("failed", reason="y", calls={"policy_loss": 2}),
        "b": run("failed"),
        "c": run("skipped", own_code=["trl's own loss runs"]),
        "d": run("passed", calls={"policy_loss": 1}),
    }
    found = summary(plain, patched)
    assert [(each["test"], each["plain"], each["patched"]) for each in found["different"]] == [
        ("a", "passed", "failed"),
        ("d", "failed", "passed"),
    ]
    assert found["tests_that_call"] == {"policy_loss": 2}
    assert found["own_code"] == {"trl's own loss runs": 1}
    assert found["failed_in_both"] == {"b": "x"}
