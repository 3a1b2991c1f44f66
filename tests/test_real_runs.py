"""The runs of the real model: what is missing is run, what is there is not, and the table is of the results."""

import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "real_model"
sys.path[:0] = [str(FOLDER)]
import real_runs  # noqa: E402
import task  # noqa: E402


def line(cell, seed, options, before=0.4, after=0.8):
    curve = {"step": [0, 20]}
    for key in ("eval_accuracy", "eval_greedy", "eval_maj_at_k"):
        curve |= {key: [before, after], f"{key}_error": [0.05, 0.03]}
    return {"cell": cell, "seed": seed, "options": options, "cpu": "none", "seconds": 120, "curve": curve, "means": {}}


@pytest.fixture
def taken(monkeypatch):
    """Run nothing; note what would have run."""
    found = []

    def take(cell, seed, model, files, options):
        found.append((cell, seed))
        assert files[0].exists()
        assert files[1].exists()
        return line(cell, seed, options, after=0.8 + 0.1 * seed)

    monkeypatch.setattr(real_runs, "take", take)
    monkeypatch.setattr(real_runs, "real_model", lambda: "model")
    return found


def start(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["real_runs.py", *map(str, arguments)])
    real_runs.main()


def test_what_is_missing_is_run_once(taken, monkeypatch, tmp_path, capsys):
    results = tmp_path / "some" / "results.jsonl"
    start(monkeypatch, "--cells", "mgrpo", "--seeds", 1, "--results", results)
    start(monkeypatch, "--cells", "mgrpo", "gold", "--seeds", 2, "--results", results)
    assert sorted(taken) == [("gold", 0), ("gold", 1), ("mgrpo", 0), ("mgrpo", 1)]
    assert "| M-GRPO, no labels | 2 | 0.40 ± 0.05 | 0.85 ± 0.03 (0.80 - 0.90) |" in capsys.readouterr().out


def test_results_of_other_options_are_refused(taken, monkeypatch, tmp_path):
    results = tmp_path / "results.jsonl"
    results.write_text(json.dumps(line("mgrpo", 0, {"steps": 1})) + "\n")
    with pytest.raises(SystemExit, match="name another --results"):
        start(monkeypatch, "--cells", "mgrpo", "--seeds", 1, "--results", results)
    assert not taken


def test_a_run_that_fails_says_why(monkeypatch, tmp_path):
    with pytest.raises(RuntimeError, match=r"(?s)mgrpo, seed 0: exit status 2\n.*--model: expected"):
        real_runs.take(
            "mgrpo", 0, tmp_path / "nowhere", task.write_task(tmp_path), {**real_runs.COMMON, "method": "mgrpo"}
        )


def test_no_held_out_question_has_the_factors_of_a_training_question(tmp_path):
    files = task.write_task(tmp_path)
    rows = [[json.loads(row) for row in file.read_text().split("\n")[:-1]] for file in files]
    factors = [{frozenset(row["question"][-1]["content"].split(" * ")) for row in part} for part in rows]
    assert not factors[0] & factors[1]
    assert len(rows[0]) + len(rows[1]) == 121
    for row in rows[0] + rows[1]:
        a, b = row["question"][-1]["content"].split(" * ")
        assert int(row["answer"]) == int(a) * int(b)
