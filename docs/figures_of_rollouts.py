"""The tables of the head's work on a real model's responses, over kept sets and without 16-bit instructions, from recorded benchmarks."""

from __future__ import annotations

from typing import Any

from figures import NO_RUN, PUBLISHED, RESULTS, figure, read_json, report, run

MOST = {  # the targets, in bare matmuls
    ("real_rollouts", "ours, tolerance 2^-8", "both"): 1.5,
    ("loss_of_real_rollouts", "ours", "both"): 2.1,
    ("loss_of_real_rollouts", "ours, tolerance 2^-8", "both"): 1.3,
    ("kept_token_stats", "ours", "both"): 0.1,
}


def rows(op: str, name: str) -> list[report.Row]:
    """Return the rows of an op in a recorded run."""
    found = run(name)
    return [row for row in found[1] if row.op == op] if found else []


def missed(value: float, target: float, *, at_most: bool = True) -> str:
    """Return by how much a target was missed, if it was."""
    by = value - target if at_most else target - value
    return "" if by <= 0 else f" (target {target:g}, missed by {by:.2g})"


def matmuls(row: report.Row | None) -> str:
    """Return how many bare matmuls a row takes, and whether that meets its target, if it has one."""
    if row is None:
        return "-"
    most = MOST.get((row.op, row.provider, row.params.get("step", "both")))
    return f"{row.info['ratio']:.2f}{missed(row.info['ratio'], most)}" if most else f"{row.info['ratio']:.2f}"


@figure
def real_rollouts(name: str = PUBLISHED) -> str:
    """Return the time of forward + backward on real responses, in bare matmuls, and the errors of the gradients."""
    columns = {
        "ours": "exact",
        "ours, tolerance 2^-8": "tolerance 2^-8",
        "eager": "eager PyTorch",
        "compile": "`torch.compile`",
    }
    lines = [f"| | {' | '.join(columns.values())} |", f"|---|{'---|' * len(columns)}"]
    of_op = [row for row in rows("real_rollouts", name) if row.step == "both"]
    for dtype, temperature in dict.fromkeys((row.params["dtype"], row.params["temperature"]) for row in of_op):
        here: dict[str, Any] = {
            row.provider: row
            for row in of_op
            if (row.params["dtype"], row.params["temperature"]) == (dtype, temperature)
        }
        times = [matmuls(here.get(each)) for each in columns]
        lines.append(f"| {dtype}, temperature {temperature}: matmuls | {' | '.join(times)} |")
        errors = [here[each].info["errors"] if each in here else None for each in columns]
        cells = [
            "-" if each is None else f"{100 * each['hidden']:.2g}%, {100 * each['weight']:.2g}%" for each in errors
        ]
        lines.append(f"| error of the gradients of hidden and weight | {' | '.join(cells)} |")
    return "\n".join(lines) if of_op else NO_RUN


@figure
def rollout_engines(name: str) -> str:
    """Return the rates of the rollout engines on the real model, as a file has them."""
    if not (RESULTS / f"{name}.json").exists():
        return NO_RUN
    found = read_json(name)
    lines = ["| engine | tokens a second | ours is as fast, times |", "|---|---|---|"]
    for engine, row in found["engines"].items():
        target = "" if engine != "vLLM" else missed(row["ours_over_it"], 2.0, at_most=False)
        lines.append(f"| {engine} | {row['tokens_per_second']:.0f} | {row['ours_over_it']:.2f}{target} |")
    return "\n".join(lines)


@figure
def loss_of_real_rollouts(name: str = PUBLISHED) -> str:
    """Return the time of the loss of which half of the sequences have no advantage, in bare matmuls."""
    found = [
        f"| {row.params['dtype']}, {row.provider} | {matmuls(row)} |" for row in rows("loss_of_real_rollouts", name)
    ]
    return "\n".join(["| `linear_policy_loss` | matmuls |", "|---|---|", *found]) if found else NO_RUN


@figure
def kept_sets(name: str = PUBLISHED) -> str:
    """Return the time over kept sets, in bare matmuls of the whole vocabulary."""
    names = {"forward": "forward", "hidden": "forward + backward, frozen weight", "both": "forward + backward"}
    found = [
        f"| {row.params['dtype']}, {names[row.params['step']]} | {matmuls(row)} |"
        for row in rows("kept_token_stats", name)
    ]
    return "\n".join(["| K = 128 | matmuls |", "|---|---|", *found]) if found else NO_RUN


NARROW = {"forward": 0.25, "forward + backward": 1.0}  # the targets, in 16-bit matmuls


@figure
def narrow_head() -> str:
    """Return the times of 16-bit heads on a CPU without 16-bit instructions, in matmuls of 16 and of 32 bits."""
    if not (RESULTS / "narrow-head.json").exists():
        return NO_RUN
    lines = ["| | in 16-bit matmuls | in float32 matmuls |", "|---|---|---|"]
    for case in read_json("narrow-head")["cases"]:
        for name, of in case["calls"].items():
            target = NARROW.get(name) if case["tokens"] == 512 else None
            note = missed(of["matmul"], target) or f" (target {target:g})" if target else ""
            lines.append(
                f"| {case['dtype']}, {case['tokens']} tokens: {name} | {of['matmul']:.3g}{note} | {of['float32']:.3g} |"
            )
    return "\n".join(lines)
