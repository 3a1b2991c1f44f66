"""curves.png and report.html, from what a run has written."""

from __future__ import annotations

import base64
import html
import io
import json
from pathlib import Path
from typing import Any

from mgrpo_kernels.train.metrics import KEYS

PANELS = (
    ("held-out accuracy", ("eval_accuracy", "eval_greedy", "eval_maj_at_k", "eval_pass_at_k")),
    ("the vote", ("vote_share", "label_accuracy", "reward_mean")),
    ("signs of collapse", ("distinct_labels", "top_answer_share", "pruned_fraction")),
    ("entropy, nats a token", ("entropy",)),
    ("KL, nats a token", ("kl",)),
    ("distance of the momentum model", ("momentum_distance",)),
)
SMOOTHING = 20  # steps of the running mean drawn over the single steps


def write_report(output: Path) -> None:
    """Write ``curves.png`` and the self-contained ``report.html`` of the run in `output`."""
    lines = read_lines(output / "metrics.jsonl")
    picture = draw(lines)
    (output / "curves.png").write_bytes(picture)
    samples = read_lines(output / "samples.jsonl")
    config = (output / "config.yaml").read_text(encoding="utf-8")
    (output / "report.html").write_text(page(output.name, picture, lines, samples, config), encoding="utf-8")


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def draw(lines: list[dict[str, Any]]) -> bytes:
    """Return the curves as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7), layout="constrained")
    for place, (title, keys) in enumerate(PANELS):
        axes = figure.add_subplot(2, 3, place + 1)
        for key in keys:
            points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
            if not points:
                continue
            steps, values = zip(*points, strict=True)
            if key.startswith("eval_"):
                axes.plot(steps, values, marker="o", markersize=3, label=key)
            else:
                (drawn,) = axes.plot(steps, values, linewidth=0.5, alpha=0.35)
                axes.plot(steps, running_mean(list(values)), color=drawn.get_color(), label=key)
        axes.set_title(title)
        axes.set_xlabel("step")
        if axes.get_lines():
            axes.legend(fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def running_mean(values: list[float]) -> list[float]:
    """Return the mean of each value and those before it, at most SMOOTHING."""
    means = []
    for end in range(1, len(values) + 1):
        window = values[max(0, end - SMOOTHING) : end]
        means.append(sum(window) / len(window))
    return means


def page(title: str, picture: bytes, lines: list[dict[str, Any]], samples: list[dict[str, Any]], config: str) -> str:
    """Return the report: one file with nothing outside it."""
    last: dict[str, Any] = {}
    for line in lines:
        last.update({key: value for key, value in line.items() if value is not None})
    steps = sorted({sample["step"] for sample in samples})
    shown = {steps[i * (len(steps) - 1) // 4] for i in range(5)} if steps else set()
    columns = ("step", "prompt", "response", "answer", "label", "gold", "reward", "entropy", "pruned", "sampled_by")
    figures = table(("figure", "last value", "meaning"), [(key, last.get(key), text) for key, text in KEYS.items()])
    answers = table(columns, [tuple(sample[key] for key in columns) for sample in samples if sample["step"] in shown])
    image = base64.b64encode(picture).decode()
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title><style>
body {{ font: 15px/1.4 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }}
img {{ max-width: 100%; }}
table {{ border-collapse: collapse; }} td, th {{ border: 1px solid #ccc; padding: .2rem .5rem; text-align: left; vertical-align: top; }}
td {{ white-space: pre-wrap; overflow-wrap: anywhere; }}
</style></head><body>
<h1>{html.escape(title)}</h1>
<img alt="curves" src="data:image/png;base64,{image}">
<h2>Samples</h2>{answers}
<h2>Figures</h2>{figures}
<h2>Configuration</h2><pre>{html.escape(config)}</pre>
</body></html>
"""


def table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    def cells(tag: str, values: tuple[Any, ...]) -> str:
        return "".join(f"<{tag}>{html.escape(_text(value))}</{tag}>" for value in values)

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<table><tr>{cells('th', head)}</tr>{body}</table>"


def _text(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
