"""Turn the JSON of a run into Markdown tables: ``python benchmarks/report.py results.json [more.json ...]``.

pytest benchmarks/ --benchmark-only --benchmark-json results.json
"""

from __future__ import annotations

import collections
import json
import sys
from pathlib import Path


def rows(path: Path) -> tuple[dict, dict[str, list[dict]]]:
    """Return the machine and, by op, its measurements."""
    data = json.loads(path.read_text(encoding="utf-8"))
    by_op = collections.defaultdict(list)
    for bench in data["benchmarks"]:
        by_op[bench["name"].partition("[")[0].removeprefix("bench_")].append(bench)
    return data, by_op


def table(benches: list[dict]) -> str:
    """Return one op's table, with a column for each figure that any of its measurements has."""
    names = [name for name in benches[0]["params"] if name != "provider"]
    ratios = sorted({key for bench in benches for key in bench["extra_info"] if key.startswith("ratio_to_")})
    head = [
        *names,
        "provider",
        "median, ms",
        *(key.replace("ratio_to_", "x ") for key in ratios),
        "GB/s",
        "GFLOP/s",
        "peak memory, MiB",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    order = lambda bench: [str(bench["params"][name]) for name in names]  # noqa: E731 - a key
    for bench in sorted(benches, key=lambda bench: (order(bench), bench["stats"]["median"])):
        info, seconds = bench["extra_info"], bench["stats"]["median"]
        memory = info["peak_memory_bytes"] - info.get("gradient_bytes", 0)
        cells = [
            *order(bench), bench["params"]["provider"], f"{seconds * 1e3:.2f}",
            *(f"{info[key]:.2f}" if key in info else "" for key in ratios),
            f"{info['bytes'] / seconds / 1e9:.1f}" if "bytes" in info else "",
            f"{info['flops'] / seconds / 1e9:.0f}" if "flops" in info else "", f"{max(memory, 0) / 2**20:.0f}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Print the tables of every file named on the command line."""
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    for name in sys.argv[1:]:
        data, by_op = rows(Path(name))
        machine = data["machine_info"]
        commit = data["commit_info"].get("id", "")[:10]
        print(f"## {machine['device']}, {machine['threads']} threads, torch {machine['torch']}, commit {commit}\n")
        for op, benches in by_op.items():
            print(f"### {op}\n\n{table(benches)}\n")


if __name__ == "__main__":
    main()
