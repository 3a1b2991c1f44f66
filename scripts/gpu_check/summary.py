"""summary.txt: on one screen which targets were met or missed by how much, which tests failed, and every row that was lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from gpu_check import results
from gpu_check.rows import LOST, Run
from gpu_check.supervisor import last_line

MAIN_SHAPE = "qwen2.5-7b"
AT_MOST = 12  # lines of one kind


class Figures:
    """The measurements, by the names that the targets use."""

    def __init__(self, runs: dict[str, Run], dry: bool = False) -> None:
        self.tests = results.tests(runs)["tests"]
        self.rows: dict[tuple[str, str, str], dict[str, Any]] = {}
        for bench in results.benchmarks(runs)["benchmarks"]:
            params = bench["params"] or {}
            if params.get("dtype", "bfloat16") == "bfloat16" and (dry or params.get("shape", MAIN_SHAPE) == MAIN_SHAPE):
                op = bench["name"].partition("[")[0].removeprefix("bench_")
                self.rows[op, params["provider"], params.get("step", "forward")] = bench["extra_info"]

    def share(self, op: str, step: str) -> float | None:
        """Return which share of its ceiling our op reaches."""
        row = self.rows.get((op, "ours", step))
        return None if row is None else row.get("share_of_ceiling")

    def ceilings(self, op: str, step: str) -> float | None:
        """Return how many times its ceiling (as many bare matmuls as it has, say) our op takes."""
        share = self.share(op, step)
        return 1 / share if share else None

    def ahead(self, op: str, step: str, *peers: str) -> float | None:
        """Return how many times as long as ours the fastest of the providers takes whose names begin with one of `peers`.

        Ours was timed in the provider's own row, in turn with it, and computes what the provider computes.
        """
        ratios = [
            row["ratio_to_ours"]
            for (of, name, at), row in self.rows.items()
            if (of, at) == (op, step) and name.startswith(peers) and row.get("ratio_to_ours")
        ]
        return min(ratios, default=None)

    def of_test(self, test: str, figure: str, entry: str = "MiB") -> float | None:
        """Return the largest figure of that name that a test recorded."""
        found = [
            each["figures"][figure][entry] for each in self.tests if test in each["test"] and figure in each["figures"]
        ]
        return max(found, default=None)

    def passed(self, *names: str) -> float | None:
        """Return the share of the tests with one of these names that passed; None if none ran."""
        ran = [
            each for each in self.tests if any(name in each["test"] for name in names) and each["outcome"] != "skipped"
        ]
        return sum(each["outcome"] == "passed" for each in ran) / len(ran) if ran else None


class Target(NamedTuple):
    """A line of the design's list for a GPU."""

    text: str
    figure: Callable[[Figures], float | None]
    at_least: bool
    goal: float
    unit: str = "x"  # or "%" of a share


HEAD_PEERS = ("trl", "verl", "cce", "torch")
TARGETS = (
    Target("from logits, forward: share of copy bandwidth", lambda f: f.share("token_stats", "forward"), True, 0.90, "%"),
    Target("from logits, backward: share of copy bandwidth", lambda f: f.share("token_stats", "backward"), True, 0.90, "%"),
    Target("from logits, forward: ahead of TRL", lambda f: f.ahead("token_stats", "forward", "trl"), True, 1.05),
    Target("from logits, forward: ahead of eager PyTorch", lambda f: f.ahead("token_stats", "forward", "eager"), True, 10.0),
    Target("from logits, backward: ahead of eager PyTorch", lambda f: f.ahead("token_stats", "backward", "eager"), True, 10.0),
    Target("head, forward: share of the bare matmul's rate", lambda f: f.share("linear_token_stats", "forward"), True, 0.85, "%"),
    Target("head, forward: the same, past Liger's", lambda f: f.share("linear_token_stats", "forward"), True, 0.92, "%"),
    Target("head, both: times four bare matmuls", lambda f: f.ceilings("linear_token_stats", "both"), False, 1.30),
    Target("head, both: the same, past Liger's", lambda f: f.ceilings("linear_token_stats", "both"), False, 1.10),
    Target("head, forward: ahead of verl, TRL, CCE, torch", lambda f: f.ahead("linear_token_stats", "forward", *HEAD_PEERS), True, 1.0),
    Target("head, both: ahead of verl, TRL, CCE, torch", lambda f: f.ahead("linear_token_stats", "both", *HEAD_PEERS), True, 1.0),
    Target("head, forward: workspace", lambda f: f.of_test("test_linear_token_stats", "workspace forward"), False, 512, "MiB"),
    Target("head, both: workspace", lambda f: f.of_test("test_linear_token_stats", "workspace forward and backward"), False, 512, "MiB"),
    Target("hidden to loss: times three bare matmuls", lambda f: f.ceilings("linear_policy_loss", "both"), False, 1.15),
    Target("hidden to loss: ahead of what needs four",
           lambda f: f.ahead("linear_policy_loss", "both", "ours, composed", "trl", "liger"), True, 1.0),
    Target("hidden to loss: workspace and accumulator", lambda f: f.of_test("test_linear_policy_loss", "workspace and accumulator"),
           False, 512 + 4 * 152064 * 3584 / 2**20, "MiB"),
    Target("momentum: share of copy bandwidth", lambda f: f.share("ema", "forward"), True, 0.90, "%"),
    Target("momentum: ahead of torch._foreach_lerp_", lambda f: f.ahead("ema", "forward", "foreach"), True, 1.0),
    Target("loss, filter, momentum: one launch", lambda f: f.passed("test_one_triton_kernel"), True, 1.0, "%"),
    Target("loss, filter: CUDA graphs", lambda f: f.passed("test_cuda_graph"), True, 1.0, "%"),
    Target("no host sync", lambda f: f.passed("test_no_host_sync"), True, 1.0, "%"),
)  # fmt: skip


def target_line(target: Target, figures: Figures) -> str:
    """Return a target's line: what was wanted, what was measured, met or missed by how much."""

    def written(value: float) -> str:
        return {"x": f"{value:.2f} x", "%": f"{100 * value:.1f} %", "MiB": f"{value:.0f} MiB"}[target.unit]

    value, sign = target.figure(figures), ">=" if target.at_least else "<="
    wanted = f"{sign} {written(target.goal)}"
    if value is None:
        return f"  {target.text:<50} {wanted:>13} {'-':>10}  not measured"
    met = value >= target.goal if target.at_least else value <= target.goal
    return f"  {target.text:<50} {wanted:>13} {written(value):>10}  {'met' if met else f'MISSED by {written(abs(value - target.goal))}'}"


def reason(text: str) -> str:
    """Return the line of a failure's text that says what went wrong."""
    errors = [each[1:].strip() for each in text.splitlines() if each.startswith("E ")]
    return (errors[0] if errors else last_line(text))[:150]


def short(name: str) -> str:
    """Return a row's name without its folder."""
    return name.partition("::")[0].rpartition("/")[2] + "".join(name.partition("::")[1:])


def about_machine(runs: dict[str, Run]) -> list[str]:
    """Return the lines about the machine; those that could not be measured are missing."""
    found = results.environment(runs)
    lines = []
    if "device" in found:
        lines.append(f"{found['device']}, driver {found['driver']}, commit {str(found.get('commit'))[:12]}")
    if "torch" in found:
        lines.append(f"torch {found['torch']}, triton {found['triton']}, Python {found['python']}")
    if "copy_bytes_per_second" in found:
        lines.append(f"copy {found['copy_bytes_per_second'] / 1e12:.2f} TB/s")
    if "matmul_flop_per_second" in found:
        lines.append(f"matmul {found['matmul']} {found['matmul_flop_per_second'] / 1e12:.0f} TFLOP/s")
    return lines


def about_tests(runs: dict[str, Run]) -> list[str]:
    """Return the counts, and the tests that failed with the reason."""
    ran = results.tests(runs)
    if not ran["tests"]:
        return ["tests: none ran"]
    bad = [each for each in ran["tests"] if each["outcome"] == "failed"]
    lines = [
        f"tests: {ran['passed']} passed, {ran['failed']} failed, {ran['skipped']} skipped, {len(ran['lost'])} lost"
    ]
    lines += [f"  FAILED {short(each['test'])}: {reason(each['text'])}" for each in bad[:AT_MOST]]
    return lines + ([f"  ... and {len(bad) - AT_MOST} more in tests.json"] if len(bad) > AT_MOST else [])


def about_lost_rows(runs: dict[str, Run]) -> list[str]:
    """Return a line for each row that hung, crashed or was cut off, and for each run the rows that were not reached, with the reason."""
    lines, waiting = [], []
    for run in runs.values():
        lines += [
            f"  LOST {run.name} {row['row'].rpartition('::')[2]}: {row['text']}"[:240]
            for row in run.rows.values()
            if row["outcome"] in LOST
        ]
        reasons = [end["reason"] for end in run.ends if end.get("reason")]
        missing = run.not_finished
        if missing:
            names = ", ".join(name.rpartition("::")[2] for name in missing[:3]) + (", ..." if len(missing) > 3 else "")
            why = reasons[-1] if reasons else "not finished"
            waiting.append(
                f"  NOT RUN {run.name}: {len(missing)} {'row' if len(missing) == 1 else 'rows'} ({names}): {why}"[:300]
            )
        elif reasons and not run.rows:
            waiting.append(f"  NOT RUN {run.name}: {reasons[-1]}"[:300])
    hidden = len(lines) - 2 * AT_MOST
    lines = lines[: 2 * AT_MOST] + ([f"  ... and {hidden} more in rows.jsonl"] if hidden > 0 else []) + waiting
    return ["lost rows:", *lines] if lines else ["lost rows: none"]


def about_peers(runs: dict[str, Run]) -> list[str]:
    """Return which providers have no benchmark at all, each with the reason, and which benchmarks failed."""
    measured, reasons, failed = set(), {}, []
    for run in runs.values():
        if not run.name.startswith(results.BENCHMARKS):
            continue
        for row in run.rows.values():
            provider = row.get("params", {}).get("provider", "").partition(",")[0]
            if row.get("benchmark"):
                measured.add(provider)
            elif provider:
                reasons.setdefault(provider, reason(row.get("text", "")))
            if row["outcome"] == "failed":
                failed.append(f"  FAILED {short(row['row'])}: {reason(row['text'])}")
    missing = [f"  {name}: {why}" for name, why in reasons.items() if name not in measured]
    lines = ["providers that were not measured:", *missing] if missing else []
    return lines + ([f"benchmarks: {len(failed)} failed", *failed[:AT_MOST]] if failed else [])


def about_tuning(out: Path, runs: dict[str, Run]) -> list[str]:
    """Return what the sweep chose, and which candidates failed."""
    if results.TUNING not in runs:
        return []
    done = runs[results.TUNING].rows.values()
    measured = sum(row["outcome"] == "passed" for row in done)
    lines = [f"tuning: {measured} of {len(done)} candidates measured"]
    if (out / "tuning.json").exists():
        chosen = json.loads((out / "tuning.json").read_text(encoding="utf-8"))
        other = {name: value for name, value in chosen["tuning"].items() if value != chosen["defaults"][name]}
        lines[0] += f"; fields not reached: {', '.join(chosen['not_reached']) or 'none'}"
        lines.append(f"  faster than the defaults: {', '.join(f'{k}={v}' for k, v in other.items()) or 'none'}")
    bad = [row for row in done if row["outcome"] == "failed"]
    return lines + [f"  FAILED {row['row']}: {reason(row['text'])}" for row in bad[:AT_MOST]]


def summary(out: Path, runs: dict[str, Run], *, seconds: float, notes: list[str], dry: bool = False) -> str:
    """Return one screen. A part that cannot be written, because a row is not as expected, costs itself alone."""

    def targets() -> list[str]:
        figures = Figures(runs, dry)
        return ["targets:", *(line for target in TARGETS for line in part(lambda: [target_line(target, figures)]))]  # noqa: B023

    def part(write: Callable[[], list[str]]) -> list[str]:
        try:
            return write()
        except Exception as error:
            return [f"  this script failed here: {type(error).__name__}: {error}"]

    lines = [f"gpu-check{' (dry run on a CPU: no figure here means anything)' if dry else ''}: {seconds:.0f} s"]
    for write in (
        lambda: about_machine(runs),
        lambda: about_tests(runs),
        lambda: about_lost_rows(runs),
        targets,
        lambda: about_peers(runs),
        lambda: about_tuning(out, runs),
    ):
        lines += part(write)
    return "\n".join([*lines, *notes]) + "\n"
