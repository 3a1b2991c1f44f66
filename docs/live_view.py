"""Draw docs/live_view.svg, the trainer's live view as a terminal shows it, from the files of a finished run of the built-in task.

python -m mgrpo_kernels.train --output runs/demo
python docs/live_view.py runs/demo --step 150
"""

from __future__ import annotations

import argparse
import io
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI

from mgrpo_kernels.train.config import build
from mgrpo_kernels.train.data import demo
from mgrpo_kernels.train.watch.lines import read_lines
from mgrpo_kernels.train.watch.live import Live

DRAWN = Path(__file__).resolve().parent / "live_view.svg"
WIDTH, HEIGHT = 118, 30


def draw(run: Path, step: int) -> str:
    """Return the view of a run after this step as SVG."""
    console = Console(file=io.StringIO(), force_terminal=True, width=WIDTH, height=HEIGHT, record=True)
    metrics = read_lines(run / "metrics.jsonl")
    config = build(demo.OPTIONS, {"steps": metrics[-1]["step"]})
    view = Live(config, f"{config.method.method}  {run}", console)
    samples = {
        key: list(each) for key, each in groupby(read_lines(run / "samples.jsonl"), key=lambda line: line["step"])
    }
    clock = 0.0
    view._bar.get_time = lambda: clock
    view.begin([line for line in metrics if line["step"] == 0])
    for line in metrics:
        if 0 < line["step"] <= step:
            clock += sum(line[key] or 0.0 for key in line if key.startswith("time_"))
            view.step(line, None, samples.get(line["step"], []))
    console.print(view._view())
    return console.export_svg(title="python -m mgrpo_kernels.train", theme=MONOKAI)


def main() -> None:
    """Draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="output directory of the run")
    parser.add_argument("--step", type=int, default=150, help="the step after which the view is drawn (default: 150)")
    given = parser.parse_args()
    DRAWN.write_text(draw(given.run, given.step), encoding="utf-8")


if __name__ == "__main__":
    main()
