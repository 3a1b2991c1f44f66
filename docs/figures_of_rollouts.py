"""The tables of the head's work on a real model's responses, and over kept sets, from the recorded benchmarks."""

from __future__ import annotations

from typing import Any

from figures import NO_RUN, RESULTS, figure, read_json, report, run

MOST = {  # the targets, in bare matmuls
    ("real_rollouts", "ours, tolerance 2^-8", "both"): 1.5,
    ("loss_of_real_rollouts", "ours", "both"): 2.1,
    ("loss_of_real_rollouts", "ours, tolerance 2^-8", "both"): 1.3,
    ("kept_token_stats", "ours", "both"): 0.1,
}


def rows(op: str) -> list[report.Row]:
    """Return the recorded rows of an op."""
    found = run()
    return [row for row in found[1] if row.op == op] if found else []


def matmuls(row: report.Row | None) -> str:
    """Return how many bare matmuls a row takes, and whether that meets its target, if it has one."""
    if row is None:
        return "-"
    most = MOST.get((row.op, row.provider, row.params.get("step", "both")))
    missed = (
        ""
        if most is None or row.info["ratio"] <= most
        else f" (target {most}, missed by {row.info['ratio'] - most:.2f})"
    )
    return f"{row.info['ratio']:.2f}{missed}"


@figure
def real_rollouts() -> str:
    """Return the time of forward + backward on real responses, in bare matmuls, and the errors of the gradients."""
    columns = {
        "ours": "exact",
        "ours, tolerance 2^-8": "tolerance 2^-8",
        "eager": "eager PyTorch",
        "compile": "`torch.compile`",
    }
    lines = [f"| | {' | '.join(columns.values())} |", f"|---|{'---|' * len(columns)}"]
    of_op = [row for row in rows("real_rollouts") if row.step == "both"]
    for dtype, temperature in dict.fromkeys((row.params["dtype"], row.params["temperature"]) for row in of_op):
        here: dict[str, Any] = {
            row.provider: row
            for row in of_op
            if (row.params["dtype"], row.params["temperature"]) == (dtype, temperature)
        }
        times = [matmuls(here.get(name)) for name in columns]
        lines.append(f"| {dtype}, temperature {temperature}: matmuls | {' | '.join(times)} |")
        errors = [here[name].info["errors"] if name in here else None for name in columns]
        cells = [
            "-" if each is None else f"{100 * each['hidden']:.2g}%, {100 * each['weight']:.2g}%" for each in errors
        ]
        lines.append(f"| error of the gradients of hidden and weight | {' | '.join(cells)} |")
    return "\n".join(lines) if of_op else NO_RUN


@figure
def rollout_engines() -> str:
    """Return the rates of the rollout engines on the real model."""
    if not (RESULTS / "rollout-engines.json").exists():
        return NO_RUN
    found = read_json("rollout-engines")
    lines = ["| engine | tokens a second | ours is as fast, times |", "|---|---|---|"]
    for name, row in found["engines"].items():
        target = "" if name != "vLLM" else missed(row["ours_over_it"], 2.0)
        lines.append(f"| {name} | {row['tokens_per_second']:.0f} | {row['ours_over_it']:.2f}{target} |")
    return "\n".join(lines)


def missed(value: float, least: float) -> str:
    """Return by how much a target was missed, if it was."""
    return "" if value >= least else f" (target {least:g}, missed by {least - value:.2f})"


@figure
def loss_of_real_rollouts() -> str:
    """Return the time of the loss of which half of the sequences have no advantage, in bare matmuls."""
    found = [f"| {row.params['dtype']}, {row.provider} | {matmuls(row)} |" for row in rows("loss_of_real_rollouts")]
    return "\n".join(["| `linear_policy_loss` | matmuls |", "|---|---|", *found]) if found else NO_RUN


@figure
def kept_sets() -> str:
    """Return the time over kept sets, in bare matmuls of the whole vocabulary."""
    names = {"forward": "forward", "hidden": "forward + backward, frozen weight", "both": "forward + backward"}
    found = [
        f"| {row.params['dtype']}, {names[row.params['step']]} | {matmuls(row)} |" for row in rows("kept_token_stats")
    ]
    return "\n".join(["| K = 128 | matmuls |", "|---|---|", *found]) if found else NO_RUN
