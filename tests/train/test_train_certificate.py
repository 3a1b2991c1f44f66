"""The certificate of a run: on made-up and recorded lines, and as a run writes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from test_train_guard import COLLAPSES, HEALTHY, PROMPTS, SAMPLES, collapse, line, recorded

from mgrpo_kernels.train import __main__ as command
from mgrpo_kernels.train.watch.certificate import CERTIFICATE, certificate, fall_step


def test_lead_is_from_the_first_warning_to_the_fall() -> None:
    lines = []
    for step in range(1, 151):
        accuracy = 0.8 - 0.002 * max(0, step - 80) if step % 10 == 0 else None
        lines.append(line(step, accuracy, **collapse(step)))
    found = certificate(lines, PROMPTS, SAMPLES)
    assert found["fall_step"] == 110  # 0.74 there, and 0.76 at the evaluation before
    assert next(each["step"] for each in found["warnings"]) == 72
    assert found["lead_steps"] == found["lead_steps_label_free"] == 38
    assert found["warnings"][0]["label_free"] == ["alike", "top answer"]
    assert found["warnings"][0]["signs"]["alike"] == "vote share 0.600 -> 0.740 while distinct labels 0.900 -> 0.620"
    assert found["held_out"]["best"] == {"step": 10, "accuracy": 0.8}
    assert found["held_out"]["last"] == {"step": 150, "accuracy": pytest.approx(0.66)}
    assert found["steps"] == 150
    signs = {each["sign"]: (each["from"], each["to"]) for each in found["signs"]}
    assert signs["alike"] == (72, 150)
    assert signs["top answer"][0] < 72  # alone, it causes no warning
    assert found["figures"]["top_answer_share"] == {
        "first": pytest.approx(0.2),
        "last": pytest.approx(1.0),
        "smallest": pytest.approx(0.2),
        "largest": pytest.approx(1.0),
    }
    json.dumps(found, allow_nan=False)


def test_without_an_evaluation_the_fall_is_unknown() -> None:
    found = certificate([line(step, **collapse(step)) for step in range(1, 151)], 0, 8)
    assert found["warnings"]
    assert (found["fall_step"], found["lead_steps"], found["lead_steps_label_free"]) == (None, None, None)
    assert found["held_out"] is None


def test_a_sign_that_goes_and_comes_back_has_two_intervals() -> None:
    lines = [line(step, top_answer_share=0.9 if 10 < step <= 20 or step > 60 else 0.1) for step in range(1, 81)]
    intervals = [(each["from"], each["to"]) for each in certificate(lines, 0, 8)["signs"]]
    assert len(intervals) == 2
    assert intervals[0][1] < 40 < intervals[1][0]
    assert intervals[1][1] == 80


def test_the_actions_are_those_of_the_lines() -> None:
    lines: list[dict[str, Any]] = [line(step, **collapse(step)) for step in range(1, 100)]
    lines[79]["guard"], lines[79]["guard_signs"] = "rollback", "as it was"
    found = certificate(lines, 0, 8, "rollback")
    assert [each["step"] for each in found["warnings"] if each["action"] == "rollback"] == [80]
    assert found["warnings"][0] == {
        **found["warnings"][0],
        "step": 72,
        "action": None,
    }  # what the guard would say today


@pytest.mark.parametrize("name", COLLAPSES)
def test_recorded_collapses_have_a_lead(name: str) -> None:
    found = certificate(recorded(name), PROMPTS, SAMPLES)
    assert found["lead_steps"] > 0


@pytest.mark.parametrize("name", HEALTHY)
def test_recorded_healthy_runs_have_no_warning(name: str) -> None:
    found = certificate(recorded(name), PROMPTS, SAMPLES)
    assert found["warnings"] == []
    assert found["fall_step"] is None


@pytest.mark.parametrize(
    ("accuracies", "step"),
    [([0.5, 0.451], None), ([0.5, 0.45], 1), ([0.3, 0.5, 0.46, 0.44], 3), ([0.4, 0.36, 0.31], 2), ([], None)],
)
def test_a_fall_is_five_points_below_the_best_before(accuracies: list[float], step: int | None) -> None:
    assert fall_step(list(enumerate(accuracies))) == step


@pytest.mark.parametrize("guard", ["off", "warn"])
def test_a_run_writes_it(base: Path, tmp_path: Path, guard: str) -> None:
    output = tiny.output_with(base, tmp_path / "run")
    assert command.main([*tiny.FLAGS, "--guard", guard, "--output", str(output)]) == 0
    found = json.loads((output / CERTIFICATE).read_text())
    want = certificate([json.loads(each) for each in (output / "metrics.jsonl").open()], 6, 3, guard)
    assert found == want
    assert found["held_out"]["evaluations"] == 3
    assert found["guard"] == guard
