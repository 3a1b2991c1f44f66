"""report.html and curves.png: complete, self-contained, and readable in a real browser."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browser
import pytest
import tiny
import torch

from mgrpo_kernels.train.watch.curves import FRACTIONS, PANELS, draw
from mgrpo_kernels.train.watch.lines import Lines
from mgrpo_kernels.train.watch.metrics import KEYS, metrics_line
from mgrpo_kernels.train.watch.names import name_of
from mgrpo_kernels.train.watch.report import write_report
from mgrpo_kernels.train.watch.samples import chosen_steps, held_out, verdict

HEADINGS = [
    "Curves",
    "Collapse guard",
    "Samples",
    "Held-out responses",
    "Time",
    "Figures",
    "Environment",
    "Configuration",
]
CPU = torch.device("cpu")
STEPS = 60


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser.chromium() as started:
        yield started


def evaluation(step: int) -> dict[str, float]:
    done = step / STEPS
    return {
        "eval_accuracy": 0.4 + 0.4 * done,
        "eval_greedy": 0.5 + 0.4 * done,
        "eval_pass_at_k": 0.8,
        "eval_maj_at_k": 0.6 + 0.3 * done,
        "eval_accuracy_error": 0.03,
        "eval_accuracy_change": 0.4 * done,
        "eval_accuracy_change_error": 0.02,
    }


def values(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "loss": 0.1,
        "reward_mean": 0.5,
        "vote_share": 0.5 + 0.4 * step / STEPS,
        "label_accuracy": 0.7,
        "entropy": 1.0 / step,
        "distinct_labels": 0.9,
        "top_answer_share": 0.2,
        "pruned_fraction": 0.05,
        "momentum_distance": 0.001 * step,
        "kl": math.nan,
        "time_rollout": 0.06,
        "time_score": 0.01,
        "time_vote": 0.005,
        "time_update": 0.02,
        "time_ema": 0.005,
    }


def sample(step: int, correct: bool | None, **changes: Any) -> dict[str, Any]:
    return {
        "step": step,
        "prompt": "3+4=",
        "response": "77#7$" if correct else "#3$",
        "answer": "7" if correct else "3",
        "label": "7",
        "gold": "7",
        "reward": float(bool(correct)),
        "entropy": 0.5,
        "pruned": False,
        "finished": True,
        "sampled_by": "policy",
        "correct": correct,
        **changes,
    }


def write_run(output: Path, lines: list[dict[str, Any]], samples: list[dict[str, Any]], **changes: Any) -> Path:
    """Write a run's files as the trainer does, and its report; return the report."""
    output.mkdir(parents=True)
    (output / "config.yaml").write_text(tiny.config(steps=STEPS, **changes).to_yaml())
    for name, rows in (("metrics.jsonl", lines), ("samples.jsonl", samples)):
        file = Lines(output / name, 0)
        for row in rows:
            file.write(row)
        file.close()
    write_report(output, CPU)
    return output / "report.html"


def whole_run() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    lines = [metrics_line({"step": 0}, evaluation(0))]
    for step in range(1, STEPS + 1):
        line = metrics_line(values(step), evaluation(step) if step % 10 == 0 else None)
        if step == 40:
            line |= {"guard": "warn", "guard_signs": "entropy 0.500 -> 0.020; pruned share 0.01 -> 0.20"}
        lines.append(line)
    return lines, [sample(step, (step + place) % 3 == 0) for step in range(1, STEPS + 1) for place in range(2)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("report") / "mgrpo-run", *whole_run())


def visible(seen: browser.Seen) -> set[str]:
    """Return which of the two sets of curves is seen."""
    return set(seen.page.evaluate("[...document.images].filter(i => i.offsetWidth > 0).map(i => i.className)"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_in_a_browser(chromium: Any, whole: Path, scheme: str, width: int) -> None:
    seen = browser.Seen(chromium, whole, color_scheme=scheme, viewport={"width": width, "height": 800})
    assert seen.outside == []
    assert seen.complaints == []
    assert seen.texts("h1") == ["mgrpo-run"]
    assert seen.texts("h2") == HEADINGS
    assert len(seen.widths()) == 2 * 5  # for light and dark; KL was never a number, so it has no curve
    assert min(seen.widths()) > 300
    assert seen.texts("h3") == ["Start", "Middle", "End"]
    assert len(seen.texts("tr.right")) >= 3
    assert len(seen.texts("tr.wrong")) >= 3
    assert seen.page.evaluate("document.documentElement.scrollWidth") <= width
    background, color = seen.page.evaluate("(s => [s.backgroundColor, s.color])(getComputedStyle(document.body))")
    assert (background == "rgb(22, 24, 29)") == (scheme == "dark")
    assert color != background
    assert visible(seen) == {scheme}


def test_what_it_says(chromium: Any, whole: Path) -> None:
    seen = browser.Seen(chromium, whole)
    text = seen.page.inner_text("body")
    assert "method mgrpo, 60 steps, seed 0" in text
    for part in (
        "entropy 0.500 -> 0.020; pruned share 0.01 -> 0.20",
        "learning_rate: 0.001",
        "60.0%",
        "all\t6.00 s\t100%",
        torch.__version__,
        "held-out accuracy\t0.400 ± 0.030\t0.800 ± 0.030\t+0.400 ± 0.020\teval_accuracy",
    ):
        assert part in text, part
    summary = json.loads(seen.page.locator("#summary").text_content())
    assert summary["evaluation"]["eval_accuracy"] == {"start": 0.4, "end": 0.8, "errors": [0.03] * 7}
    assert summary["best_step"] is None
    assert summary["seconds"]["time_rollout"] == pytest.approx(3.6)
    assert summary["guard"] == [
        {"step": 40, "did": "warn", "signs": "entropy 0.500 -> 0.020; pruned share 0.01 -> 0.20"}
    ]
    assert summary["config"]["rollouts"] == 8
    alt = seen.page.evaluate("document.images[0].alt")
    assert "held-out accuracy from 0.4 to 0.8" in alt


def test_printed(chromium: Any, whole: Path) -> None:
    seen = browser.Seen(chromium, whole, color_scheme="dark")
    seen.page.emulate_media(media="print")
    assert visible(seen) == {"light"}  # whatever the screen is
    assert seen.page.pdf().startswith(b"%PDF")


SHORT = {
    "no evaluation": ([metrics_line(values(step), None) for step in (1, 2, 3)], [sample(1, True)]),
    "one step": ([metrics_line(values(1), None)], [sample(1, None, gold=None)]),
    "no samples": ([metrics_line({"step": 0}, evaluation(0)), metrics_line(values(1), evaluation(1))], []),
    "the evaluation before the first step": ([metrics_line({"step": 0}, evaluation(0))], []),
    "nothing": ([], []),
}


@pytest.mark.parametrize("case", SHORT)
def test_runs_that_lack_something(chromium: Any, tmp_path: Path, case: str) -> None:
    seen = browser.Seen(chromium, write_run(tmp_path / "run", *SHORT[case]))
    assert (seen.outside, seen.complaints) == ([], [])
    assert seen.texts("h2") == HEADINGS
    assert all(seen.widths())
    text = seen.page.inner_text("body")
    assert "nan" not in text.lower().split()
    assert ("No evaluation." in text) == (case in ("no evaluation", "one step", "nothing"))
    assert ("None were kept" in text) == (not SHORT[case][1])
    assert "stopped after" in text
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_what_a_model_writes_is_text(chromium: Any, tmp_path: Path) -> None:
    evil = "</td></script><script>alert(1)</script><img src=x onerror=alert(2)>&lt;"
    lines = [metrics_line({**values(1), "guard": "warn", "guard_signs": evil}, None)]
    file = write_run(
        tmp_path / "<b>run", lines, [sample(1, True, response=evil, prompt=evil)], prompt_template=evil + "{question}"
    )
    seen = browser.Seen(chromium, file)
    assert (seen.outside, seen.complaints) == ([], [])
    assert seen.texts("h1") == ["<b>run"]
    assert seen.texts(".samples td:nth-child(2)") == [evil]
    assert json.loads(seen.page.locator("#summary").text_content())["config"]["prompt_template"] == evil + "{question}"


def test_the_browser_would_have_told(chromium: Any, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_text(
        '<img src="http://127.0.0.1:9/x.png"><img src="data:image/png;base64,AAAA"><script>throw new Error("told")</script>'
    )
    seen = browser.Seen(chromium, file)
    assert seen.outside == ["http://127.0.0.1:9/x.png"]
    assert any("told" in each for each in seen.complaints)
    assert seen.widths() == [0, 0]


def test_a_missing_browser_fails_in_ci_and_skips_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(browser, "missing", lambda: "expected a browser, got none")
    for ci, outcome in (("true", pytest.fail.Exception), ("", pytest.skip.Exception)):
        monkeypatch.setenv("CI", ci)
        with pytest.raises(outcome, match="expected a browser, got none"), browser.chromium():
            pass


def test_samples_show_right_beside_wrong() -> None:
    rows = [sample(step, step in (4, 50, 97)) for step in range(1, 101)]
    assert chosen_steps(rows) == {"Start": {1, 4}, "Middle": {50, 49}, "End": {100, 97}}
    assert chosen_steps(rows[:1]) == {"Start": {1}}
    rows = [sample(step, True) for step in (1, 100)]
    assert chosen_steps(rows) == {"Start": {1}, "End": {100}}


def test_without_the_truth_agreement_counts() -> None:
    assert verdict(sample(1, None, answer="7")) == "agrees"
    assert verdict(sample(1, None, answer="3")) == "differs"


def test_no_answer_is_not_a_wrong_one() -> None:
    assert verdict(sample(1, None, answer=None, label=None)) == "no answer"
    assert verdict(sample(1, False, answer=None)) == "no answer"


def test_a_prompt_with_many_samples_stands_once(chromium: Any, tmp_path: Path) -> None:
    rows = [sample(1, True, prompt="a long question"), sample(1, False, answer=None, prompt="a long question")]
    seen = browser.Seen(chromium, write_run(tmp_path / "run", [metrics_line(values(1), None)], rows))
    assert seen.page.inner_text("body").count("a long question") == 1
    assert seen.texts("tr.right td:first-child") == ["right"]
    assert seen.texts("tr.none td:first-child") == ["no answer"]


def test_held_out_responses_before_and_after() -> None:
    def line(prompt: str, right: int, response: str) -> dict[str, Any]:
        flags = [place < right for place in range(4)]
        return {"prompt": prompt, "gold": ["7", "07"], "right": flags, "greedy_response": response, "greedy": "7"}

    before = [line(f"prompt {number}", 1, "before & early") for number in range(9)]
    after = [line(f"prompt {number}", min(4, number // 2), "late") for number in range(9)]
    text = held_out(before, after)
    shown = {number for number in range(9) if f"<pre>prompt {number}</pre>" in text}
    assert len(shown) == 6
    assert shown >= {8, 0, 1}  # the most gained, and the two that lost
    assert text.count("before &amp; early") == 6
    assert "true answer: 7 or 07" in text
    assert "4 of 4" in text
    assert "There are no responses of two" in held_out(before, after[1:])


def test_legends_and_axes_of_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    real = Figure.savefig

    def kept(self: Figure, *arguments: Any, **options: Any) -> None:
        drawn.append(self)
        real(self, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", kept)
    draw(whole_run()[0], PANELS)
    plots = {axes.get_title(): axes for axes in drawn[0].axes}
    for title in FRACTIONS:
        assert plots[title].get_ylim() == (-0.02, 1.02)
    labels = [label for axes in plots.values() for label in axes.get_legend_handles_labels()[1]]
    assert "held-out accuracy" in labels
    assert not [label for label in labels if label in KEYS and "_" in label]
    assert len(plots["held-out accuracy"].containers) == 4  # with error bars
    draw([metrics_line({**values(1), "reward_mean": -3.0}, None)], PANELS)
    low, _ = {axes.get_title(): axes for axes in drawn[1].axes}["the vote"].get_ylim()
    assert low < -3.0


def test_every_metric_has_a_name() -> None:
    names = [name_of(key) for key in KEYS]
    assert len(set(names)) == len(KEYS)


def test_the_report_is_the_same_for_the_same_files(whole: Path) -> None:
    before = whole.read_bytes()
    write_report(whole.parent, CPU)
    assert whole.read_bytes() == before
