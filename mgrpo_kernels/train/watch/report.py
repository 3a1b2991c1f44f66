"""curves.png and report.html, from what a run has written."""

from __future__ import annotations

import base64
import html
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mgrpo_kernels.train.config import read_yaml
from mgrpo_kernels.train.run.files import write_bytes, write_text
from mgrpo_kernels.train.watch.curves import DARK, PANELS, draw, points_of
from mgrpo_kernels.train.watch.lines import read_lines
from mgrpo_kernels.train.watch.metrics import KEYS

PACKAGES = ("mgrpo_kernels", "torch", "triton", "transformers", "tokenizers", "numpy", "math-verify")
PHASES = {
    "time_rollout": "sampling", "time_score": "scoring", "time_vote": "filter, vote, advantages", "time_update": "policy update",
    "time_ema": "momentum update", "time_sync": "weights to the sampler",
}  # fmt: skip
Row = Sequence[Any]


class Run(NamedTuple):
    """What a run has written, and where it ran."""

    name: str
    config: dict[str, Any]
    config_text: str
    lines: list[dict[str, Any]]  # of metrics.jsonl
    samples: list[dict[str, Any]]
    environment: dict[str, str]


def write_report(output: Path, device: torch.device) -> None:
    """Write ``curves.png`` and the self-contained ``report.html`` of the run in `output`, which is on `device`."""
    file = output / "config.yaml"
    run = Run(
        output.resolve().name, read_yaml(file), file.read_text(encoding="utf-8"), read_lines(output / "metrics.jsonl"),
        read_lines(output / "samples.jsonl"), environment(device),
    )  # fmt: skip
    write_bytes(output / "curves.png", draw(run.lines, PANELS))
    write_text(output / "report.html", page(run))


def environment(device: torch.device) -> dict[str, str]:
    """Return what the figures may depend on: versions, system, device."""
    found = {"Python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    found["system"] = platform.platform()
    found["CPU"] = f"{cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    found["device"] = str(device)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["device"] += f": {properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        found["CUDA or HIP"] = str(torch.version.cuda or torch.version.hip)
    return found


def cpu_name() -> str:
    """Return the processor's name: Linux alone says it in full."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().split("\n") if line.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


STYLE = f"""
:root {{ --line: #d0d4da; --soft: #5a6270; --right: #10703a; --wrong: #b3261e; --bar: #3b78c4; }}
@media screen and (prefers-color-scheme: dark) {{
  :root {{ --line: #3a3f48; --soft: #a2a9b5; --right: #57c98a; --wrong: #ff8a80; --bar: #6aa4ea; }}
  body {{ background: {DARK}; color: #e6e8ec; }} img.light {{ display: none; }} img.dark {{ display: inline !important; }}
}}
body {{ font: 15px/1.45 system-ui, sans-serif; max-width: 76rem; margin: 1.5rem auto; padding: 0 1rem; }}
h1 {{ margin-bottom: 0; overflow-wrap: anywhere; }} h2 {{ margin-top: 2rem; }} .soft {{ color: var(--soft); }}
.curves {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 1rem; }}
.curves img {{ width: 100%; height: auto; }} img.dark {{ display: none; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; }}
td, th {{ border: 1px solid var(--line); padding: .2rem .5rem; text-align: left; vertical-align: top; }}
td {{ white-space: pre-wrap; overflow-wrap: break-word; }}
.samples td:nth-child(3), .samples td:nth-child(4) {{ min-width: 9rem; overflow-wrap: anywhere; font-family: ui-monospace, monospace; }}
tr.right td:first-child {{ color: var(--right); font-weight: 600; }} tr.wrong td:first-child {{ color: var(--wrong); font-weight: 600; }}
.bar {{ display: block; height: .7rem; background: var(--bar); min-width: 1px; print-color-adjust: exact; }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; }}
@media print {{
  body {{ max-width: none; margin: 0; font-size: 11px; }} .wide {{ overflow: visible; }} tr, .curves div {{ break-inside: avoid; }}
}}
"""


def page(run: Run) -> str:
    """Return the report as one self-contained file."""
    title = html.escape(run.name)
    data = json.dumps(summary(run), indent=1).replace("<", "\\u003c")
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}"><title>{title}</title><style>{STYLE}</style></head><body>
<h1>{title}</h1>
<p class="soft">{html.escape(state(run))}</p>
{results(run.lines)}
<h2>Curves</h2>{curves(run.lines)}
<h2>Collapse guard</h2>{events(run)}
<h2>Samples</h2>{samples(run.samples)}
<h2>Time</h2>{times(run.lines)}
<h2>Figures</h2>{figures(run.lines)}
<h2>Environment</h2>{table(("", ""), run.environment.items())}
<h2>Configuration</h2><pre>{html.escape(run.config_text)}</pre>
<script type="application/json" id="summary">{data}</script>
</body></html>
"""


def state(run: Run) -> str:
    done, planned = last_step(run.lines), run.config["steps"]
    ended = f"{done} steps" if done == planned else f"stopped after {done} of {planned} steps"
    return f"method {run.config['method']}, {ended}, seed {run.config['seed']}"


def last_step(lines: list[dict[str, Any]]) -> int:
    return lines[-1]["step"] if lines else 0


def results(lines: list[dict[str, Any]]) -> str:
    rows = []
    for key in ("eval_accuracy", "eval_greedy", "eval_maj_at_k", "eval_pass_at_k"):
        points = points_of(lines, key)
        if points:
            step, best = max(points, key=lambda point: point[1])
            rows.append((key, points[0][1], f"{_text(best)} (step {step})", points[-1][1], KEYS[key]))
    return table(("held out", "start", "best", "end", "meaning"), rows) if rows else "<p>No evaluation.</p>"


def curves(lines: list[dict[str, Any]]) -> str:
    def uri(panel: tuple[str, tuple[str, ...]], dark: bool) -> str:
        return "data:image/png;base64," + base64.b64encode(draw(lines, [panel], dark)).decode()

    parts = []
    for panel in PANELS:
        ends = [(key, points[0][1], points[-1][1]) for key in panel[1] if (points := points_of(lines, key))]
        if not ends:
            continue
        text = f"{panel[0]}: " + ", ".join(f"{key} from {_text(start)} to {_text(end)}" for key, start, end in ends)
        parts.append(
            f'<div><img class="light" alt="{html.escape(text)}" src="{uri(panel, False)}">'
            f'<img class="dark" alt="{html.escape(text)}" src="{uri(panel, True)}"></div>'
        )
    return f'<div class="curves">{"".join(parts)}</div>' if parts else "<p>No steps.</p>"


def events(run: Run) -> str:
    rows = [
        (line["step"], line["guard"], line.get("guard_signs")) for line in run.lines if line.get("guard") is not None
    ]
    if rows:
        return table(("step", "what it did", "signs"), rows)
    return "<p>Off.</p>" if run.config["guard"] == "off" else "<p>On, and silent: no signs of collapse.</p>"


def samples(rows: list[dict[str, Any]]) -> str:
    """Return samples of the run's start, middle and end."""
    if not rows:
        return "<p>None were kept (--samples-per-step).</p>"
    columns = ("step", "prompt", "response", "answer", "label", "true answer", "reward", "entropy", "notes")
    parts = []
    for title, steps in chosen_steps(rows).items():
        body, classes = [], []
        for each in rows:
            if each["step"] not in steps:
                continue
            word = verdict(each)
            notes = [
                f"by the {each['sampled_by']} model" if each["sampled_by"] == "momentum" else "",
                "pruned" if each["pruned"] else "",
            ]
            notes.append("" if each["finished"] else "cut at the longest length")
            classes.append("right" if word in ("right", "agrees") else "wrong")
            body.append((
                word, each["step"], each["prompt"], each["response"], each["answer"], each["label"], each["gold"], each["reward"],
                each["entropy"], ", ".join(filter(None, notes)),
            ))  # fmt: skip
        parts.append(f'<h3>{title}</h3><div class="samples">{table(("", *columns), body, classes)}</div>')
    return "".join(parts)


def verdict(sample: dict[str, Any]) -> str:
    """Return whether an answer is right, or, where the truth is not known, whether it agrees with the label."""
    if sample.get("correct") is not None:
        return "right" if sample["correct"] else "wrong"
    return "agrees" if sample["answer"] is not None and sample["answer"] == sample["label"] else "differs"


def chosen_steps(rows: list[dict[str, Any]]) -> dict[str, set[int]]:
    """Return the steps to show of start, middle and end: one each, and the nearest that shows what it lacks.

    So right and wrong are seen side by side where there are both within a tenth of the run.
    """
    found: dict[int, set[str]] = {}
    for each in rows:
        found.setdefault(each["step"], set()).add(verdict(each))
    steps = sorted(found)
    places = {"Start": steps[0], "Middle": steps[(len(steps) - 1) // 2], "End": steps[-1]}
    chosen: dict[str, set[int]] = {}
    taken: set[int] = set()
    for title, at in places.items():
        if at in taken:
            continue
        near = [
            step
            for step in sorted(steps, key=lambda step: abs(step - at))
            if 10 * abs(step - at) <= steps[-1] - steps[0]
        ]
        more = next((step for step in near if found[step] - found[at]), at)
        chosen[title] = {at, more}
        taken |= chosen[title]
    return chosen


def times(lines: list[dict[str, Any]]) -> str:
    spent = phases(lines)
    whole = sum(spent.values())
    if not whole:
        return "<p>No steps.</p>"
    rows: list[Row] = []
    for key, seconds in spent.items():
        bar = Markup(f'<span class="bar" style="width: {12 * seconds / whole:.3f}rem"></span>')
        rows.append((PHASES[key], f"{seconds:.2f} s", f"{seconds / whole:.1%}", bar))
    rows.append(("all", f"{whole:.2f} s", "100%", ""))
    return table(("phase", "time", "share", ""), rows) + (
        '<p class="soft">Of the steps; evaluations, checkpoints and loading come on top.</p>'
    )


def phases(lines: list[dict[str, Any]]) -> dict[str, float]:
    """Return the seconds of each phase over the whole run, of those that took any."""
    sums = {key: sum(value for _, value in points_of(lines, key)) for key in PHASES}
    return {key: seconds for key, seconds in sums.items() if seconds}


def figures(lines: list[dict[str, Any]]) -> str:
    last: dict[str, Any] = {}
    for line in lines:
        last.update({key: value for key, value in line.items() if value is not None})
    return table(("figure", "last value", "meaning"), [(key, last.get(key), text) for key, text in KEYS.items()])


def summary(run: Run) -> dict[str, Any]:
    """Return the report's figures for a program: the element with the id "summary"."""
    evaluated = {key: points for key in KEYS if key.startswith("eval_") and (points := points_of(run.lines, key))}
    return {
        "name": run.name,
        "steps": last_step(run.lines),
        "config": run.config,
        "environment": run.environment,
        "evaluation": {key: {"start": points[0][1], "best": max(v for _, v in points), "end": points[-1][1]}
                       for key, points in evaluated.items()},
        "seconds": phases(run.lines),
        "guard": [{"step": line["step"], "did": line["guard"], "signs": line.get("guard_signs")} for line in run.lines
                  if line.get("guard") is not None],
    }  # fmt: skip


class Markup(str):
    """Text that is HTML already."""


def table(head: Row, rows: Iterable[Row], classes: Sequence[str] | None = None) -> str:
    def cells(tag: str, values: Row) -> str:
        def shown(value: Any) -> str:
            return value if isinstance(value, Markup) else html.escape(_text(value))

        return "".join(f"<{tag}>{shown(value)}</{tag}>" for value in values)

    rows = list(rows)
    names = classes or [""] * len(rows)
    body = "".join(
        f'<tr class="{name}">{cells("td", row)}</tr>' if name else f"<tr>{cells('td', row)}</tr>"
        for name, row in zip(names, rows, strict=True)
    )
    top = f"<thead><tr>{cells('th', head)}</tr></thead>" if any(head) else ""
    return f'<div class="wide"><table>{top}<tbody>{body}</tbody></table></div>'


def _text(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
