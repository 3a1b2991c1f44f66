"""Turn the JSON of a run into Markdown tables, and into the README's plots.

pytest benchmarks/ --benchmark-only --benchmark-json results.json
python benchmarks/report.py results.json [more.json ...] [--plots docs/]

``--plots`` writes scaling.png (time and memory over the number of tokens) and roofline.png (share of the ceiling by op and
provider) of the first file. A time is the median, with the 20th and 80th percentiles. "times ours" and "times its ceiling" are
medians over rounds in which the three were called in turn. The ceiling of an op over a head is its provider's own number of matmuls.
Memory is the peak beyond what was there before the call and the gradients that it returns.
"""

from __future__ import annotations

import argparse
import collections
import json
from pathlib import Path
from typing import Any, NamedTuple

STEPS = ("forward", "backward", "both")
MIB = 2**20
# A colour for each family: "ours, logprob" is ours.
COLOURS = {
    "ours": "#d62246",
    "eager": "#7d8597",
    "compile": "#adb5bd",
    "trl": "#e09f3e",
    "liger": "#2a9d8f",
    "torch": "#457b9d",
}
OTHERS = "#6d597a"


class Row(NamedTuple):
    """One measurement."""

    op: str
    params: dict[str, Any]
    info: dict[str, Any]

    @property
    def provider(self) -> str:
        return self.params.get("provider", self.info.get("provider", ""))

    @property
    def step(self) -> str:
        return self.params.get("step", "both" if self.op == "scaling" else "")

    @property
    def memory(self) -> float:
        """MiB beyond inputs and gradients."""
        return max(0, self.info["peak_memory_bytes"] - self.info.get("gradient_bytes", 0)) / MIB

    @property
    def times_ours(self) -> str:
        """How many times as long as ours it takes, and what of ours that was, where it is not the row's op itself."""
        if "ratio_to_ours" not in self.info:
            return ""
        of = self.info.get("ours", "ours")
        values = [self.info[f"ratio_to_ours{end}"] for end in ("", "_p20", "_p80")]
        text = f"{three_digits(values[0])} ({three_digits(values[1])} - {three_digits(values[2])})"
        return text if of == "ours" else f"{text} {of}"

    @property
    def rate(self) -> str:
        seconds = self.info["p50_ms"] / 1e3
        if self.info.get("gemms") == 0:
            return ""  # the gradient was formed in the forward pass
        if "flops" in self.info:
            return f"{self.info['flops'] / seconds / 1e9:.0f} GFLOP/s"
        return f"{self.info['bytes'] / seconds / 1e9:.1f} GB/s" if "bytes" in self.info else ""


def read(path: Path) -> tuple[dict, list[Row]]:
    """Return the run's description and its rows."""
    data = json.loads(path.read_text(encoding="utf-8"))
    rows = []
    for bench in data["benchmarks"]:
        if "p50_ms" not in bench["extra_info"]:
            raise ValueError(
                f"{path}: expected extra_info with p50_ms, got {sorted(bench['extra_info'])} in {bench['name']}"
            )
        op = bench["name"].partition("[")[0].removeprefix("bench_")
        row = Row(op, bench["params"] or {}, bench["extra_info"])
        if not row.provider.startswith("ours") and "ratio_to_ours" not in row.info:
            raise ValueError(
                f"{path}: expected ours timed in a peer's row, got none in {bench['name']}: run the benchmarks again"
            )
        rows.append(row)
    return data, rows


def three_digits(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def table(rows: list[Row]) -> str:
    """Return one op's table."""
    names = [name for name in ("op", "shape", "dtype", "tokens", "step") if name in rows[0].params]
    head = [
        *({"step": "pass"}.get(name, name) for name in names),
        "provider",
        "computes",
        "ms (p20 - p80)",
        "times ours",
        "times its ceiling",
        "share of ceiling",
        "matmuls",
        "rate",
        "memory, MiB",
    ]

    def order(row: Row) -> list[tuple[int, float, str]]:
        keys = [
            (STEPS.index(value), 0.0, "")
            if value in STEPS
            else (0, value, "")
            if isinstance(value, int)
            else (0, 0.0, value)
            for value in (row.params[name] for name in names)
        ]
        return [*keys, (0, -len(row.info.get("computes", "")), ""), (0, row.info["p50_ms"], "")]

    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in sorted(rows, key=order):
        info = row.info
        cells = [
            *(str(row.params[name]) for name in names),
            row.provider,
            info.get("computes", ""),
            f"{three_digits(info['p50_ms'])} ({three_digits(info['p20_ms'])} - {three_digits(info['p80_ms'])})",
            row.times_ours,
            f"{info['ratio']:.2f} {info['ceiling']}",
            percent(info["share_of_ceiling"]),
            str(info.get("gemms", "")),
            row.rate,
            f"{row.memory:.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def title(data: dict) -> str:
    machine, files = data["machine_info"], data.get("files", {})  # the latter where record.py wrote it
    commit = ", ".join(
        sorted({each["commit"][:10] for each in files.values()}) or [data["commit_info"].get("id", "")[:10]]
    )
    peers = ", ".join(f"{name} {version}" for name, version in machine.get("peers", {}).items())
    return f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}, {peers}; commit {commit}"


def colour(provider: str) -> str:
    return COLOURS.get(provider.partition(",")[0], OTHERS)


def plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")
    axes.tick_params(colors="#444444")


def plot_scaling(data: dict, rows: list[Row], path: Path) -> None:
    """Draw time and peak memory, forward and backward, over the number of tokens; a line ends where memory did."""
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    lines = collections.defaultdict(dict)  # (op, provider) -> tokens -> row
    for row in rows:
        if row.op == "scaling":
            lines[row.params["op"], row.provider][row.params["tokens"]] = row
    if not lines:
        raise ValueError("scaling.png: expected rows of bench_scaling, got none")
    ops = list(dict.fromkeys(op for op, _ in lines))
    sizes = sorted({tokens for line in lines.values() for tokens in line})
    figure, grid = plt.subplots(
        2, len(ops), figsize=(5.2 * len(ops), 7.2), squeeze=False, sharex=True, layout="constrained"
    )
    for column, op in enumerate(ops):
        for axes, value in (
            (grid[0][column], lambda row: seconds(row, lines[row.params["op"], "ours"][row.params["tokens"]])),
            (grid[1][column], lambda row: max(row.memory, 1.0)),
        ):
            ends = []
            for (name, provider), line in lines.items():
                if name != op:
                    continue
                xs = sorted(line)
                ys = [value(line[x]) for x in xs]
                ours = provider == "ours"
                axes.plot(
                    xs,
                    ys,
                    marker="o",
                    markersize=6 if ours else 4,
                    linewidth=2.8 if ours else 1.6,
                    color=colour(provider),
                    zorder=3 if ours else 2,
                )
                ends.append((ys[-1], xs[-1], provider))
            axes.set(xscale="log", yscale="log", xlim=(sizes[0] * 0.85, sizes[-1] * 2.1))
            axes.xaxis.set_major_locator(FixedLocator(sizes))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0f}"))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
            axes.grid(color="#e6e6e6", linewidth=0.8)
            axes.set_axisbelow(True)
            plain(axes)
            label_ends(axes, ends)
        grid[0][column].set_title(f"{op}", loc="left", fontweight="bold")
        grid[1][column].set_xlabel("tokens")
    grid[0][0].set_ylabel("forward + backward, seconds")
    grid[1][0].set_ylabel("memory beyond gradients, MiB")
    figure.suptitle(heading(data, "A head's time and memory over the number of tokens"), x=0.01, ha="left", fontsize=11)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def seconds(row: Row, ours: Row) -> float:
    """Return the time to be drawn beside ours: that of our own row, times the ratio that was taken in the row of a peer."""
    return ours.info["p50_ms"] / 1e3 * row.info.get("ratio_to_ours", 1.0)


def label_ends(axes: Any, ends: list[tuple[float, int, str]]) -> None:
    """Name the lines at their ends, pushed apart where they would overlap."""
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * (high / low) ** 0.08)
    apart = (high / low) ** 0.055
    at = 0.0
    for y, x, provider in sorted(ends):
        at = max(y, at * apart)
        axes.annotate(
            provider,
            (x, y),
            xytext=(x * 1.12, at),
            va="center",
            color=colour(provider),
            fontsize=10,
            fontweight="bold" if provider == "ours" else "normal",
        )


def heading(data: dict, what: str) -> str:
    machine = data["machine_info"]
    return f"{what}  ({machine['device']}, {machine['threads']} threads, torch {machine['torch']}, bf16)"


def plot_roofline(data: dict, rows: list[Row], path: Path) -> None:
    """Draw each provider's share of the ceiling, a panel for each op and pass, in bfloat16 and the first shape measured."""
    from matplotlib import pyplot as plt

    shown = [(op, step) for op in ("linear_token_stats", "token_stats") for step in ("forward", "both")]
    shown += [("linear_policy_loss", "both"), ("logits_policy_loss", "both"), ("policy_loss", "both"), ("ema", "")]
    panels = []
    for op, step in shown:
        some = [
            row
            for row in rows
            if row.op == op and row.step == step and row.params.get("dtype", "bfloat16") == "bfloat16"
        ]
        shape = next((row.params.get("shape") for row in some if row.params.get("shape") == "qwen2.5-7b"), None)
        shape = shape or (some[0].params.get("shape") if some else None)
        some = [row for row in some if row.params.get("shape") == shape]
        if some:
            panels.append((op, step, shape, sorted(some, key=lambda row: row.info["share_of_ceiling"])))
    if not panels:
        raise ValueError("roofline.png: expected rows of the ops in bfloat16, got none")
    pairs = [panels[i : i + 2] for i in range(0, len(panels), 2)]
    heights = [max(len(panel[3]) for panel in pair) + 1.6 for pair in pairs]
    figure, grid = plt.subplots(
        len(pairs),
        2,
        figsize=(13, 0.31 * sum(heights)),
        squeeze=False,
        layout="constrained",
        gridspec_kw={"height_ratios": heights},
    )
    most = max(1.1, *(row.info["share_of_ceiling"] for panel in panels for row in panel[3]))
    for axes in grid.flat[len(panels) :]:
        axes.axis("off")
    for axes, (op, step, shape, some) in zip(grid.flat, panels, strict=False):
        shares = [row.info["share_of_ceiling"] for row in some]
        axes.barh(range(len(some)), shares, color=[colour(row.provider) for row in some], height=0.72)
        axes.axvline(1, color="#222222", linewidth=1.2, linestyle=(0, (4, 3)))
        for i, row in enumerate(some):
            count = row.info.get("gemms")
            text = f"{row.info['share_of_ceiling']:.0%}   "
            text += (
                f"{row.times_ours.partition(' ')[0]} x ours"
                if row.times_ours
                else f"{three_digits(row.info['p50_ms'])} ms"
            )
            text += "" if count is None else f", {count} matmul{'' if count == 1 else 's'}"
            axes.text(
                shares[i] + 0.012 * most,
                i,
                text,
                va="center",
                fontsize=8.5,
                color="#222222",
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.85},
            )
        axes.set_yticks(range(len(some)), [row.provider for row in some])
        for label, row in zip(axes.get_yticklabels(), some, strict=True):
            label.set(color=colour(row.provider), fontweight="bold" if row.provider.startswith("ours") else "normal")
        axes.set(xlim=(0, most * 1.25), ylim=(-0.6, len(some) - 0.4))
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
        passes = {"forward": "forward", "both": "forward + backward", "": "update"}[step]
        axes.set_title(f"{op}, {passes}", loc="left", fontweight="bold", fontsize=10)
        below = f"ceiling: {some[0].info['ceiling']}" + (f", {shape}" if shape else "")
        axes.text(0.995, 0.03, below, transform=axes.transAxes, ha="right", fontsize=8.5, color="#666666")
        plain(axes)
        axes.tick_params(axis="y", length=0)
    figure.suptitle(heading(data, "Share of the ceiling measured beside it"), x=0.01, ha="left", fontsize=11)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    """Print the tables of every file, and write the plots of the first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="write scaling.png and roofline.png there")
    options = parser.parse_args(arguments)
    runs = [read(path) for path in options.results]
    for data, rows in runs:
        print(f"## {title(data)}\n")
        by_op = collections.defaultdict(list)
        for row in rows:
            by_op[row.op].append(row)
        for op, some in by_op.items():
            print(f"### {op}\n\n{table(some)}\n")
    if options.plots is not None:
        import matplotlib as mpl

        mpl.use("Agg")
        options.plots.mkdir(parents=True, exist_ok=True)
        plot_scaling(*runs[0], options.plots / "scaling.png")
        plot_roofline(*runs[0], options.plots / "roofline.png")


if __name__ == "__main__":
    main()
