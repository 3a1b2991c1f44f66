"""curves.png and report.html, from what a run has written."""

from __future__ import annotations

import base64
import html
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mgrpo_kernels.train.config import read_yaml
from mgrpo_kernels.train.run.evaluation import derived
from mgrpo_kernels.train.run.files import write_bytes, write_text
from mgrpo_kernels.train.run.held_out import DIRECTORY
from mgrpo_kernels.train.watch.curves import DARK, PANELS, draw, points_of
from mgrpo_kernels.train.watch.html_parts import Markup, Row, table, text_of
from mgrpo_kernels.train.watch.lines import read_lines
from mgrpo_kernels.train.watch.metrics import ACCURACIES, KEYS
from mgrpo_kernels.train.watch.names import NAMES, name_of
from mgrpo_kernels.train.watch.samples import held_out, samples
from mgrpo_kernels.train.watch.uncertainty import with_error

PACKAGES = ("mgrpo_kernels", "torch", "triton", "transformers", "tokenizers", "numpy", "math-verify")
PHASES = tuple(key for key in KEYS if key.startswith("time_"))


class Run(NamedTuple):
    """What a run has written, and where it ran."""

    name: str
    config: dict[str, Any]
    config_text: str
    lines: list[dict[str, Any]]  # of metrics.jsonl
    samples: list[dict[str, Any]]
    held_out: list[list[dict[str, Any]]]  # of the first evaluation and of the last
    environment: dict[str, str]


def write_report(output: Path, device: torch.device) -> None:
    """Write ``curves.png`` and the self-contained ``report.html`` of the run in `output`, which is on `device`."""
    file, lines = output / "config.yaml", read_lines(output / "metrics.jsonl")
    evaluated = [step for step, _ in points_of(lines, "eval_accuracy")] or [0]
    kept = [output / DIRECTORY / f"step_{step}.jsonl" for step in (evaluated[0], evaluated[-1])]
    run = Run(
        output.resolve().name,
        read_yaml(file),
        file.read_text(encoding="utf-8"),
        lines,
        read_lines(output / "samples.jsonl"),
        [read_lines(each) if each.exists() else [] for each in kept],
        environment(device),
    )
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
:root {{ --line: #d0d4da; --soft: #5a6270; --right: #10703a; --wrong: #b3261e; --none: #8a6100; --bar: #3b78c4; }}
@media screen and (prefers-color-scheme: dark) {{
  :root {{ --line: #3a3f48; --soft: #a2a9b5; --right: #57c98a; --wrong: #ff8a80; --none: #e0b050; --bar: #6aa4ea; }}
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
.samples td:nth-child(2), .samples td:nth-child(3) {{ min-width: 9rem; overflow-wrap: anywhere; font-family: ui-monospace, monospace; }}
.quoted pre {{ border-left: 3px solid var(--line); padding-left: .6rem; margin: .2rem 0; }} .quoted {{ margin-top: 1rem; }}
tr.none td:first-child {{ color: var(--none); font-weight: 600; }}
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
<h2>Held-out responses</h2>{held_out(*run.held_out)}
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
    """Return the held-out accuracies at the start and the end, with their standard errors."""
    evaluated = {line["step"]: line for line in lines if line.get("eval_accuracy") is not None}
    if not evaluated:
        return "<p>No evaluation.</p>"
    first, last = (list(evaluated.values())[place] for place in (0, -1))
    best = evaluated.get(last.get("eval_best_step"))
    rows = []
    of_sets = [key for key in last if key.startswith("eval_accuracy/")]
    for key in (key for key in (*ACCURACIES, *of_sets) if last.get(key) is not None):
        error, change = derived(key, "error"), last.get(derived(key, "change"))
        by = None if change is None else with_error(change, last.get(derived(key, "change_error")), sign=True)
        ends = [with_error(line[key], line.get(error)) for line in (first, last)]
        rows.append((name_of(key), *ends, by, key, KEYS[key.partition("/")[0]]))
    text = "± is the standard error over the held-out prompts; that of the change follows from the differences prompt by prompt."
    if best is not None:
        accuracy = with_error(best["eval_accuracy"], best.get("eval_accuracy_error"))
        text += f" The best accuracy was {accuracy}, at step {best['step']}."
    return table(("held out", "start", "end", "change", "key", "meaning"), rows) + f'<p class="soft">{text}</p>'


def curves(lines: list[dict[str, Any]]) -> str:
    def uri(panel: tuple[str, tuple[str, ...]], dark: bool) -> str:
        return "data:image/png;base64," + base64.b64encode(draw(lines, [panel], dark)).decode()

    parts = []
    for panel in PANELS:
        ends = [(key, points[0][1], points[-1][1]) for key in panel[1] if (points := points_of(lines, key))]
        if not ends:
            continue
        text = f"{panel[0]}: " + ", ".join(
            f"{NAMES[key]} from {text_of(start)} to {text_of(end)}" for key, start, end in ends
        )
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


def times(lines: list[dict[str, Any]]) -> str:
    spent = phases(lines)
    whole = sum(spent.values())
    if not whole:
        return "<p>No steps.</p>"
    rows: list[Row] = []
    for key, seconds in spent.items():
        bar = Markup(f'<span class="bar" style="width: {12 * seconds / whole:.3f}rem"></span>')
        rows.append((NAMES[key], f"{seconds:.2f} s", f"{seconds / whole:.1%}", bar))
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
    return table(
        ("figure", "last value", "key", "meaning"),
        [(name_of(key), last.get(key), key, text) for key, text in KEYS.items()],
    )


def summary(run: Run) -> dict[str, Any]:
    """Return the report's figures for a program: the element with the id "summary"."""
    return {
        "name": run.name,
        "steps": last_step(run.lines),
        "config": run.config,
        "environment": run.environment,
        "evaluation": {
            key: {
                "start": points[0][1],
                "end": points[-1][1],
                "errors": [each for _, each in points_of(run.lines, f"{key}_error")],
            }
            for key in ACCURACIES
            if (points := points_of(run.lines, key))
        },
        "best_step": next((line["eval_best_step"] for line in reversed(run.lines) if "eval_best_step" in line), None),
        "seconds": phases(run.lines),
        "guard": [
            {"step": line["step"], "did": line["guard"], "signs": line.get("guard_signs")}
            for line in run.lines
            if line.get("guard") is not None
        ],
    }
