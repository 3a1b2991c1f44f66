"""What fills the figures of README.md and docs/, each from a committed file of results. How a page asks for one: see spans.py."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PUBLISHED = "cpu-epyc-zen5-2cores"  # the run that the pages show; the others are listed in measured_facts.md
NO_RUN = "(not recorded yet)"
STUDY = ROOT / "examples" / "collapse"
REAL_MODEL = ROOT / "examples" / "real_model"

sys.path += [str(ROOT / "benchmarks"), str(STUDY), str(REAL_MODEL)]
import real_runs  # noqa: E402
import report  # noqa: E402
import summary  # noqa: E402

FIGURES: dict[str, Callable[..., str]] = {}


def figure(function: Callable[..., str]) -> Callable[..., str]:
    """Enter a function under its name, with - for _."""
    FIGURES[function.__name__.replace("_", "-")] = function
    return function


# Results of benchmarks/record.py


def run(name: str = PUBLISHED) -> tuple[dict[str, Any], list[report.Row]] | None:
    """Return a recorded run, None if it is not there; raise if it may not be shown."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return None
    data, rows = report.read(path)
    if data.get("small") is not False or data.get("idle") is not True:
        raise ValueError(f"{path}: expected a run of full size on idle cores, as benchmarks/record.py records it")
    return data, rows


def find(op: str, provider: str, name: str = PUBLISHED, **params: str) -> report.Row | None:
    """Return the row of a provider in a run, None if it was not measured."""
    _, rows = run(name) or ({}, [])
    found = [
        row
        for row in rows
        if row.op == op
        and row.provider == provider
        and all(row.params.get(key) == each for key, each in params.items())
    ]
    if len(found) > 1:
        raise ValueError(f"{op}, {provider}: expected one row, got {len(found)} of {params}")
    return found[0] if found else None


def row_of(op: str, provider: str, selection: tuple[str, ...], name: str = PUBLISHED) -> report.Row | None:
    """Return the row of a run that words such as bfloat16 and both choose."""
    keys = {"bfloat16": "dtype", "float32": "dtype", "forward": "step", "backward": "step", "both": "step"}
    return find(op, provider, name, **{keys[word]: word for word in selection})


def described(data: dict[str, Any]) -> str:
    """Return where, with what and when a run was taken."""
    machine, files = data["machine_info"], data["files"].values()
    dates, commits = sorted({each["date"] for each in files}), sorted({each["commit"][:10] for each in files})
    sets = [
        name for name in machine["cpu"]["instruction_sets"] if name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    ]
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return (
        f"{machine['device']}, {machine['cores']} cores with {', '.join(sets)}, {machine['threads']} threads, torch {machine['torch']}, "
        f"{when}, commit {', '.join(commits)}"
    )


@figure
def machine() -> str:
    """Return what the figures of the published run are of."""
    found = run()
    return described(found[0]) if found else NO_RUN


@figure
def times(op: str, provider: str, *selection: str) -> str:
    """Return how many times as long as ours a provider takes, by rounds of its row."""
    row = row_of(op, provider, selection)
    return report.three_digits(row.info["ratio_to_ours"]) if row else NO_RUN


@figure
def milliseconds(op: str, provider: str, *selection: str) -> str:
    """Return the median of a provider's times."""
    row = row_of(op, provider, selection)
    return f"{report.three_digits(row.info['p50_ms'])} ms" if row else NO_RUN


@figure
def ceilings(op: str, provider: str, *selection: str) -> str:
    """Return how many times its ceiling a provider takes, by rounds of its row."""
    row = row_of(op, provider, selection)
    return f"{row.info['ratio']:.2f}" if row else NO_RUN


@figure
def memory(op: str, provider: str, *selection: str) -> str:
    """Return the peak of a provider's memory, beyond inputs and gradients."""
    row = row_of(op, provider, selection)
    return f"{row.memory:.0f} MiB" if row else NO_RUN


COLUMNS = {"eager": "eager PyTorch", "compile": "`torch.compile`", "trl": "TRL", "liger": "Liger"}
PACKAGE = {"trl": "trl", "liger": "liger-kernel"}
PASS = {"forward": "forward", "backward": "backward", "both": "forward + backward"}
OF_README = (
    ("linear_token_stats", "bfloat16", "forward"),
    ("linear_token_stats", "bfloat16", "both"),
    ("linear_token_stats", "float32", "both"),
    ("linear_policy_loss", "bfloat16", "both"),
    ("linear_policy_loss", "float32", "both"),
    ("token_stats", "bfloat16", "both"),
    ("token_stats", "float32", "forward"),
    ("logits_policy_loss", "bfloat16", "both"),
    ("policy_loss", "both"),
    ("ema",),
)


@figure
def measured(*ops: str) -> str:
    """Return the table of some ops, or with no argument README's."""
    return measured_on(PUBLISHED, *ops)


@figure
def measured_on(name: str, *ops: str) -> str:
    """Return that table of a run."""
    found = run(name)
    if found is None:
        return f"No run of this machine is recorded yet: `python benchmarks/record.py` writes\n`benchmarks/results/{name}.json`."
    data, rows = found
    if ops:
        chosen: list[tuple[str, ...]] = [
            (row.op, *(row.params[key] for key in ("dtype", "step") if key in row.params))
            for row in rows
            if row.op in ops and row.provider == "ours"
        ]
    else:
        chosen = list(OF_README)
    measured_ones = {row.provider for row in rows if row.op in {op for op, *_ in chosen}}
    columns = {peer: title for peer, title in COLUMNS.items() if peer in measured_ones}
    versions = data["machine_info"]["peers"]
    titles = [f"{title} {versions.get(PACKAGE.get(peer, ''), '')}".strip() for peer, title in columns.items()]
    lines = [
        f"| | ours | {' | '.join(titles)} | memory, MiB: ours, eager, TRL |",
        f"|---|---|{'---|' * len(titles)}---|",
    ]
    for op, *selection in chosen:
        ours = row_of(op, "ours", tuple(selection), name)
        if ours is None:
            continue
        others = {peer: row_of(op, peer, tuple(selection), name) for peer in columns}
        cells = [
            ", ".join([f"`{op}`", *(PASS.get(word, word) for word in selection)]),
            f"**{ours.info['ratio']:.2f}** {ours.info['ceiling']}, {report.three_digits(ours.info['p50_ms'])} ms",
            *(f"{report.three_digits(row.info['ratio_to_ours'])} x" if row else "" for row in others.values()),
            ", ".join(f"{row.memory:.0f}" if row else "-" for row in (ours, others.get("eager"), others.get("trl"))),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


@figure
def logits_stored() -> str:
    """Return the table of the head's statistics with and without room for all logits, forward + backward."""
    op, lines = (
        "linear_token_stats",
        ["| | with room for a tile | with room for all logits | `torch.compile` |", "|---|---|---|---|"],
    )
    for dtype in ("float32", "bfloat16"):
        found = [row_of(op, name, (dtype, "both")) for name in ("ours", "ours, logits stored", "compile")]
        cells = [f"{row.info['ratio']:.2f} matmul, {row.memory:.0f} MiB" if row else NO_RUN for row in found]
        lines.append(f"| {dtype} | {' | '.join(cells)} |")
    return "\n".join(lines)


@figure
def runs() -> str:
    """Return the list of all recorded runs."""
    lines = []
    for path in sorted(RESULTS.glob("*.json")):
        if path.stem != "demo-seeds" and "files" in json.loads(path.read_text(encoding="utf-8")):
            found = run(path.stem)
            assert found is not None
            minutes = sum(each["seconds"] for each in found[0]["files"].values()) / 60
            shown = ", the one that the pages show" if path.stem == PUBLISHED else ""
            lines.append(f"- `benchmarks/results/{path.name}`{shown}: {described(found[0])}; {minutes:.0f} minutes")
    return "\n".join(
        lines or [f"None yet: `python benchmarks/record.py` writes\n`benchmarks/results/{PUBLISHED}.json`."]
    )


TARGETS = (  # of the design for two cores, in times the ceiling or, for the last, times as fast
    ("linear_token_stats", ("bfloat16", "forward"), 1.0),
    ("linear_token_stats", ("bfloat16", "both"), 4.2),
    ("linear_token_stats", ("float32", "both"), 4.2),
    ("linear_policy_loss", ("bfloat16", "both"), 4.2),
    ("linear_policy_loss", ("float32", "both"), 3.2),
    ("token_stats", ("float32", "forward"), 1.25),
)


@figure
def targets() -> str:
    """Return the targets beside what was measured."""
    lines = ["| | target: at most | measured | |", "|---|---|---|---|"]
    for op, selection, most in TARGETS:
        row = row_of(op, "ours", selection)
        got = f"{row.info['ratio']:.2f} {row.info['ceiling']}" if row else NO_RUN
        met = "" if row is None else "met" if row.info["ratio"] <= most else f"missed by {row.info['ratio'] - most:.2f}"
        lines.append(f"| `{op}`, {', '.join(PASS.get(word, word) for word in selection)} | {most} | {got} | {met} |")
    return "\n".join(lines)


# The trainer


def trainer_row(shape: str, work: str) -> dict[str, Any] | None:
    """Return the figures of a row of bench_trainer, None if it was not measured."""
    row = find("trainer", "ours", shape=shape, work=work)
    return row.info if row else None


@figure
def trainer() -> str:
    """Return the table of the trainer's steps beside TRL's."""
    lines = ["| | ours, ms (p20 - p80) | TRL, ms | TRL takes (p20 - p80) |", "|---|---|---|---|"]
    for shape in ("demo", "small"):
        info = trainer_row(shape, "grpo")
        if info is None:
            continue
        low, mid, high = (report.three_digits(info[f"p{share}_ms"]) for share in (20, 50, 80))
        paired = [f"{info[f'ratio_to_ours{end}']:.2f}" for end in ("", "_p20", "_p80")]
        lines.append(
            f"| {info['layers']} layers of width {info['width']}, {info['vocabulary']} words; {info['prompts']} x {info['group']} "
            f"rollouts, {info['prompt_tokens']} + {info['response_tokens']} tokens | {mid} ({low} - {high}) "
            f"| {report.three_digits(info['ceiling_p50_ms'])} | {paired[0]} times as long ({paired[1]} - {paired[2]}) |"
        )
    return "\n".join(lines) if len(lines) > 2 else NO_RUN


@figure
def trainer_times(shape: str) -> str:
    """Return how many times as long as our step TRL's takes."""
    info = trainer_row(shape, "grpo")
    return f"{info['ratio_to_ours']:.1f}" if info else NO_RUN


@figure
def mgrpo_adds(shape: str) -> str:
    """Return what M-GRPO's parts add to a step of ours."""
    info = trainer_row(shape, "mgrpo")
    return f"{info['ratio'] - 1:.0%}" if info else NO_RUN


@figure
def mgrpo_share(shape: str) -> str:
    """Return the share of scoring, filter, vote and EMA in a step of M-GRPO."""
    info = trainer_row(shape, "mgrpo")
    return f"{info['shares']['score_vote_ema']:.1%}" if info else NO_RUN


# The demonstration, and the plan beside real runs


def read_json(name: str) -> dict[str, Any]:
    """Return a file of results."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def spread(values: list[float], digits: int) -> str:
    """Return the least and the most."""
    return f"{min(values):.{digits}f} - {max(values):.{digits}f}"


@figure
def demo(key: str, at: str = "") -> str:
    """Return the least and the most over seeds: of seconds, or of a held-out accuracy at the start, best or end."""
    runs = read_json("demo-seeds")["runs"]
    return spread([each[key][at] for each in runs], 2) if at else f"{spread([each[key] for each in runs], 0)} s"


@figure
def stamp(name: str) -> str:
    """Return what the figures of a file of results are of: of the demonstration, the plan's check, TRL or verl before and after."""
    if not (RESULTS / f"{name}.json").exists():
        return NO_RUN
    found = read_json(name).get("environment")
    if found is None:
        return "a machine whose name was not recorded"
    return ", ".join([found["CPU"], f"torch {found['torch']}", *([found["date"]] if "date" in found else [])])


@figure
def real_model() -> str:
    """Return the table of the real model's runs."""
    found = summary.read(REAL_MODEL / "results.jsonl")
    return real_runs.table(found) if found else NO_RUN


@figure
def real_model_change(cell: str) -> str:
    """Return a cell's held-out accuracy before and after, the means over seeds."""
    runs = [run for run in summary.read(REAL_MODEL / "results.jsonl") if run["cell"] == cell]
    if not runs:
        return NO_RUN
    return " to ".join(f"{statistics.fmean(run['curve']['eval_accuracy'][at] for run in runs):.2f}" for at in (0, -1))


@figure
def plan() -> str:
    """Return the table of the plan's estimates beside real runs."""
    head = [
        "run",
        "parameters, M",
        "memory: estimate / measured, MiB",
        "ratio",
        "step: estimate / measured, s",
        "ratio",
    ]
    phases = ("rollout", "score", "update")
    lines = [f"| {' | '.join([*head, *phases])} |", "|" + "---|" * (len(head) + len(phases))]
    for name, row in read_json("plan-check")["rows"].items():
        said, got, ratio = row["estimate"], row["measured"], row["estimate over measured"]
        cells = [
            name,
            f"{said['parameters'] / 1e6:.1f}",
            f"{said['memory'] / 2**20:.0f} / {got['memory'] / 2**20:.0f}",
            f"{ratio['memory']:.2f}",
            f"{said['step']:.2f} / {got['step']:.2f}",
            f"{ratio['step']:.2f}",
            *(f"{ratio[p]:.2f}" if ratio.get(p) else "-" for p in phases),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


@figure
def plan_within(what: str, limit: str) -> str:
    """Return in how many runs memory was within a share, or the step within a factor, and which missed it."""
    rows = read_json("plan-check")["rows"]
    ratios = {name: row["estimate over measured"][what] for name, row in rows.items()}
    most = float(limit)
    kept = {n for n, r in ratios.items() if (abs(r - 1) <= most if what == "memory" else 1 / most <= r <= most)}
    missed = ", ".join(f"{name} ({ratio:.2f})" for name, ratio in ratios.items() if name not in kept)
    return f"{len(kept)} of {len(ratios)} runs" + (f"; missed: {missed}" if missed else "")


@figure
def plan_load() -> str:
    """Return the least and the most load beside the runs that the plan is compared with."""
    return spread([row["load_average"] for row in read_json("plan-check")["rows"].values()], 0)


# TRL and verl, before and after


@figure
def before_after(name: str, of: str) -> str:
    """Return the results of examples/<name>_before_after.py: where, the table, and the times of `of` relative to the patched run."""
    if not (RESULTS / f"{name}-before-after.json").exists():
        return "These figures have not been recorded yet."
    data = read_json(f"{name}-before-after")
    times = ", ".join(f"{what} {ratio:.2f}" for what, ratio in data["times"].items())
    return f"Measured on {stamp(f'{name}-before-after')}:\n\n{data['table']}\n\n{of}, as multiples of the patched run's time: {times}."
