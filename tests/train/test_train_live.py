"""What a run shows while it goes on: plain lines, and the live view on a terminal."""

from __future__ import annotations

import html
import io
import json
import os
import re
import runpy
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import tiny
from rich.cells import cell_len
from rich.console import Console

from mgrpo_kernels.train import __main__ as command
from mgrpo_kernels.train.run import loop
from mgrpo_kernels.train.watch import live
from mgrpo_kernels.train.watch.live import Curve, Live

HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def values(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "vote_share": 0.5 + 0.01 * step,
        "label_accuracy": 0.6,
        "distinct_labels": 0.9,
        "top_answer_share": 0.2,
        "entropy": 1.5 - 0.01 * step,
        "pruned_fraction": 0.03125,
        "momentum_distance": 0.0123,
        "tokens_per_second": 12345.6,
        "reward_mean": 0.4,
        "kl": 0.001,
        "response_tokens": 7.0,
        "grad_norm": 1.25,
    }


def sample(**changes: Any) -> dict[str, Any]:
    return {
        "step": 9,
        "prompt": "3+4=",
        "response": "77#7",
        "answer": "7",
        "label": "7",
        "gold": "7",
        "reward": 1.0,
        "correct": True,
        "sampled_by": "policy",
        "pruned": False,
        "finished": True,
        **changes,
    }


def make_view(width: int, height: int, **changes: Any) -> tuple[Live, Console]:
    console = Console(file=io.StringIO(), force_terminal=True, width=width, height=height, color_system=None)
    return Live(tiny.config(**changes), "mgrpo  runs/here", console), console


def frame(view: Live, console: Console) -> list[str]:
    """Return the view's lines as a terminal shows them."""
    with console.capture() as shown:
        console.print(view._view())
    return ESCAPE.sub("", shown.get()).splitlines()


@pytest.mark.parametrize(("width", "height"), [(80, 24), (120, 40), (60, 12), (40, 10)])
def test_the_view_fits_the_terminal(width: int, height: int) -> None:
    view, console = make_view(width, height, steps=40)
    view.begin([{"step": 0, "eval_accuracy": 0.4, "eval_greedy": 0.5, "eval_maj_at_k": 0.6, "eval_pass_at_k": 0.7}])
    for step in range(1, 31):
        view.step(values(step), None, [sample(step=step, response="7 " * 200, prompt="a long question " * 20)] * 4)
    view.warn("collapse guard, step 30: " + "signs " * 60)
    view.stopping()
    lines = frame(view, console)
    if height >= 24:  # below that, a view of figures alone is cut at the bottom
        assert len(lines) < height
        assert sum("label 7  true answer 7" in line for line in lines) >= 1
    assert max(map(cell_len, lines)) <= width
    assert "step 30/40" in lines[1]
    text = "\n".join(lines)
    assert "collapse guard, step 30" in text
    assert "stopping after this step" in text
    assert "…" not in "".join(line for line in lines if line.startswith(("held-out", "vote share")))


def test_the_view_says_start_best_and_now() -> None:
    view, console = make_view(100, 40, steps=40)
    view.begin([{"step": 0, "eval_accuracy": 0.4}])
    for step in range(1, 31):
        view.step(
            values(step),
            {"eval_accuracy": {10: 0.9, 30: 0.7}.get(step, 0.5), "eval_accuracy_error": 0.02, "eval_best_step": 10}
            if step % 10 == 0
            else None,
            [sample(step=step)],
        )
    rows = {line[:20].strip(): line[20:].split() for line in frame(view, console) if line.strip()}
    assert rows["held-out accuracy"][:5] == ["0.400", "0.900", "0.700", "±", "0.020"]
    assert rows["vote share"][:2] == ["0.530", "0.755"]  # means of the first 5 and the last 10, as the guard's
    assert rows["tokens/s"][:2] == ["12,346", "12,346"]
    assert "".join(dict.fromkeys(rows["held-out accuracy"][5])) == "▁█▂▅"
    assert "label accuracy" in rows
    assert "held-out, greedy" not in rows  # nothing is known of it


def test_a_resumed_run_shows_its_whole_way() -> None:
    view, console = make_view(80, 24, steps=40)
    view.begin([{**values(step), "eval_accuracy": 0.4 if step == 1 else None} for step in range(1, 21)])
    view.step(values(21), {"eval_accuracy": 0.6}, [])
    lines = frame(view, console)
    assert "step 21/40" in lines[1]
    assert any(re.search(r"held-out accuracy\s+0.400\s+0.600", line) for line in lines)


def test_samples_are_marked() -> None:
    view, console = make_view(100, 40)
    shown = [
        sample(),
        sample(answer="3", correct=False, reward=0.0),
        sample(answer=None, correct=False, reward=0.0, response="7777"),
        sample(answer="7", sampled_by="momentum", pruned=True),
        sample(answer="7.0", correct=None, gold=None),
    ]
    view.begin([])
    view.step(values(1), None, shown)
    rows = [line for line in frame(view, console) if line.startswith(("  ✓", "  ✗", "  ○"))]
    assert [row.split()[0] for row in rows] == ["✓", "✗", "○", "✓", "✗"]  # no answer is not a wrong one
    assert "none" in rows[2]
    assert "momentum, pruned" in rows[3]


def test_no_control_character_of_a_response_reaches_the_terminal() -> None:
    view, console = make_view(80, 24)
    view.begin([])
    evil = "\x1b[2J\x1b]0;title\x07a\r\nb\x9bc\x00"
    view.step(values(1), None, [sample(response=evil, answer=evil, prompt=evil, label=evil, gold=evil)])
    with console.capture() as shown:
        console.print(view._view())
    assert not set(ESCAPE.sub("", shown.get())) & set("\x1b\x07\r\x9b\x00")


def test_a_value_that_is_not_finite_is_no_point() -> None:
    view, console = make_view(80, 24)
    view.begin([])
    view.step({"step": 1, "vote_share": float("nan"), "entropy": 0.5}, None, [])
    text = "\n".join(frame(view, console))
    assert "nan" not in text
    assert "vote share" not in text
    assert "entropy" in text


def test_curves_of_long_runs_keep_their_shape() -> None:
    curve = Curve(smooth=False)
    assert not curve
    for i in range(10_001):
        curve.add(float(i))
    assert len(curve._points) < 2 * live.POINTS
    assert (curve.start, curve.now) == (0.0, 10_000.0)
    assert curve.drawn(8) == "▁▂▃▄▅▆▇█"
    assert len(curve.drawn(1000)) == 1000
    flat = Curve(smooth=False)
    assert flat.drawn(8) == ""
    flat.add(3.0)
    assert flat.drawn(8) == "▁" * 8


def test_a_column_is_the_same_time_in_all_curves() -> None:
    view, console = make_view(120, 40)
    view.begin([{"step": 0, "eval_accuracy": 0.2}])
    for step in range(1, 21):
        view.step({"step": step, "vote_share": 0.4 if step <= 10 else 0.8}, None, [])
    view.step({"step": 21, "vote_share": 0.8, "eval_accuracy": 0.9}, None, [])
    curves = {line[:17].strip(): line.split()[-1] for line in frame(view, console)}
    assert curves["held-out accuracy"] == "▁" * 11 + "█" * 10
    assert curves["vote share"] == "▁" * 10 + "█" * 11


def test_the_picture_in_the_docs_is_of_a_run(tmp_path: Path) -> None:
    run = tmp_path / "demo"
    run.mkdir()
    lines: list[dict[str, Any]] = [{"step": 0, "eval_accuracy": 0.25}]
    lines += [{**values(step), "time_update": 2.0} for step in (1, 2, 3)]
    lines[2]["eval_accuracy"] = 0.75
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "samples.jsonl").write_text("".join(json.dumps(sample(step=step)) + "\n" for step in (1, 2, 2, 3)))
    draw = runpy.run_path(str(Path(__file__).resolve().parents[2] / "docs" / "live_view.py"))["draw"]
    picture = html.unescape(re.sub("<[^>]*>", " ", draw(run, 2))).replace("\xa0", " ")
    assert re.search(r"step +2/3", picture)
    assert "0:00:04" in picture
    assert "0.250" in picture
    assert "0.750" in picture
    assert picture.count("77#7") == 3  # of steps 1 and 2


class Terminal:
    """A pseudo-terminal in place of standard output, and what has come out of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, value in {"TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"}.items():
            monkeypatch.setenv(name, value)
        for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
            monkeypatch.delenv(name, raising=False)
        self._master, slave = os.openpty()
        self._file = open(slave, "w", encoding="utf-8")  # noqa: SIM115, PTH123
        self._parts: list[bytes] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        monkeypatch.setattr("sys.stdout", self._file)
        monkeypatch.setattr("sys.stderr", self._file)

    def _read(self) -> None:
        while True:
            try:
                part = os.read(self._master, 65536)
            except OSError:  # the other end is closed
                return
            self._parts.append(part)

    def text(self) -> str:
        """Close it; return everything."""
        self._file.close()
        self._reader.join()
        os.close(self._master)
        return b"".join(self._parts).decode()


def run(base: Path, output: Path, *flags: str) -> int:
    tiny.output_with(base, output)
    return command.main([*tiny.FLAGS, "--output", str(output), *flags])


def last_lines(text: str, number: int) -> list[str]:
    return [line for line in ESCAPE.sub("", text).replace("\r", "").split("\n") if line.strip()][-number:]


def test_on_a_terminal(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(monkeypatch)
    status = run(base, tmp_path / "run", "--steps", "3")
    text = terminal.text()
    assert status == 0
    assert text.count(HIDE) == text.count(SHOW) == 1
    assert text.index(HIDE) < text.index("held-out accuracy") < text.index(SHOW)
    after = text[text.index(SHOW) :]
    assert "try next:" in after  # the closing lines are below the view, as plain text
    assert "\x1b[" not in after.removeprefix(SHOW)
    for part in ("temperature 1.0", "step 3/3", "vote share", "label ", "true answer"):
        assert part in ESCAPE.sub("", text)


@pytest.mark.parametrize("how", ["--plain", "dumb"])
def test_plain_lines_on_a_terminal(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    terminal = Terminal(monkeypatch)
    if how == "dumb":
        monkeypatch.setenv("TERM", "dumb")
    status = run(base, tmp_path / "run", "--steps", "1", *(["--plain"] if how == "--plain" else []))
    text = terminal.text()
    assert status == 0
    assert "\x1b" not in text
    assert "step 1/1  reward" in text


def test_no_color(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(monkeypatch)
    monkeypatch.setenv("NO_COLOR", "1")
    assert run(base, tmp_path / "run", "--steps", "1") == 0
    colors = re.findall(r"\x1b\[([0-9;]*)m", terminal.text())
    assert not [each for each in colors if re.search(r"(^|;)(3[0-8]|4[0-8]|9[0-7])", each)]


def interrupted(count: int) -> Any:
    """Return a step that is interrupted `count` times while it is taken."""
    real = loop.train_step

    def step(*arguments: Any) -> Any:
        for _ in range(count):
            os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments)

    return step


def test_interrupt_on_a_terminal(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(loop, "train_step", interrupted(1))
    terminal = Terminal(monkeypatch)
    status = run(base, tmp_path / "run", "--eval-every", "0")
    text = terminal.text()
    assert status == 130
    assert live.STOPPING[:60] in ESCAPE.sub("", text)
    assert text.count(HIDE) == text.count(SHOW) == 1
    assert "stopped after step 1 of 4; saved" in "".join(last_lines(text, 4))
    assert (tmp_path / "run" / "report.html").exists()
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before


def test_second_interrupt_on_a_terminal(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "train_step", interrupted(2))
    terminal = Terminal(monkeypatch)
    status = run(base, tmp_path / "run", "--eval-every", "0")
    text = terminal.text()
    assert status == 130
    assert text.count(HIDE) == text.count(SHOW) == 1
    assert "interrupted; --resume continues" in "".join(last_lines(text, 2))


def test_an_error_leaves_the_terminal_as_it_was(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(monkeypatch)
    flags = ["--learning-rate", "1e18", "--lr-schedule", "constant", "--eval-every", "0", "--max-skipped-steps", "0"]
    status = run(base, tmp_path / "run", *flags)
    text = terminal.text()
    assert status == 1
    assert text.count(HIDE) == text.count(SHOW) == 1
    assert "error: " in text[text.index(SHOW) :]


def test_messages_are_not_lost(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What is said, printed, or warned of while the view is there comes out whole, above it."""
    terminal = Terminal(monkeypatch)
    console = Console()
    with Live(tiny.config(), "here", console) as view:
        view.begin([])
        for number in range(20):
            view.write_line(f"said {number} " + "x" * 150)
            print(f"printed {number}")
            view.step(values(number), None, [sample()])
    text = ESCAPE.sub("", terminal.text())
    for number in range(20):
        assert f"said {number} " + "x" * 150 in text
        assert f"printed {number}\r\n" in text
