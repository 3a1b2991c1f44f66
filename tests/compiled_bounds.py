"""What bounds each streaming kernel on an H100, by the count of its instructions and loads: the table of docs/kernels_without_a_gpu.md."""

PROCESSORS, CLOCK = 132, 1.755e9  # of an H100 SXM, at its boost under load
BANDWIDTH, LATENCY = 3.0e12, 700e-9  # bytes a second as copied; seconds of a load that misses the L2 cache
ISSUE = 4 * 32  # lanes a clock and multiprocessor: one warp instruction for each of four schedulers
ALU, MUFU = (
    64,
    16,
)  # lanes likewise; CUDA programming guide, "Arithmetic Instructions": throughput of native instructions


def bounds(report, loads, stores):
    """Return a kernel's shares of each limit at BANDWIDTH, from bytes loaded and stored for each element.

    "bandwidth": the share of BANDWIDTH to be expected of a closed queueing network in which each warp waits for its loads
    (LATENCY, and its turn at the memory), then for its turn at the busiest unit, by mean value analysis.
    """
    moved = loads + stores
    rate = BANDWIDTH / moved / PROCESSORS / CLOCK  # elements a clock and multiprocessor
    shares = {
        "issue": report["loop"] * rate / ISSUE,
        "alu": report["alu"] * rate / ALU,
        "mufu": report["mufu"] * rate / MUFU,
    }
    elements = 32 * report["elements"]  # of a warp's iteration
    wave = elements * moved * PROCESSORS / BANDWIDTH  # seconds that the memory is busy with one
    shares["in flight"] = report["warps"] * elements * loads
    shares["needed"] = BANDWIDTH * loads / moved * LATENCY / PROCESSORS
    shares["bandwidth"] = (
        _throughput(report["warps"], (wave, wave * max(shares["issue"], shares["alu"], shares["mufu"]))) * wave
    )
    return shares


def _throughput(customers, services):
    """Return the rate of a closed network of queues with these mean service times, and a delay of LATENCY (Reiser, Lavenberg 1980)."""
    waiting, rate = [0.0] * len(services), 0.0
    for number in range(1, customers + 1):
        times = [service * (1 + queue) for service, queue in zip(services, waiting, strict=True)]
        rate = number / (LATENCY + sum(times))
        waiting = [rate * time for time in times]
    return rate


def bytes_of(key):
    """Return the bytes loaded and stored for each element, of a streaming kernel's key."""
    kernel, _, rest = key.partition(", ")
    size = 4 if rest.startswith("float32") else 2
    if kernel.startswith("linear_token_stats."):
        logits = size if "in 16 bits" in rest else 4
        return logits, size if kernel.endswith("gradient_kernel") else 0
    if kernel != "ema.update_kernel":
        return size, size if kernel.split(".")[-1] in ("backward_kernel", "gradient_kernel") else 0
    ema, param = (4 if f"{word}float32" in rest else 2 for word in (": ", "from "))
    return ema + param, ema + (size if "copy" in rest else 0)


def table(versions):
    """Return it in Markdown: the figures of each version of Triton, where they differ, one after the other."""
    head = (
        "registers",
        "warps",
        "instructions an element",
        "issue",
        "ALU",
        "MUFU",
        "KiB in flight (needed)",
        "of copy bandwidth",
    )
    lines = [
        f"| kernel, dtype: launch (Triton {' / '.join(versions)}) | {' | '.join(head)} |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for key, first in next(iter(versions.values())).items():
        if "loop" not in first:
            continue
        columns = []
        for entry in (entries[key] for entries in versions.values()):
            found = bounds(entry, *bytes_of(key))
            columns.append(
                [
                    str(entry["registers"]),
                    str(entry["warps"]),
                    f"{entry['loop']:.1f}",
                    f"{found['issue']:.0%}",
                    f"{found['alu']:.0%}",
                    f"{found['mufu']:.0%}",
                    f"{found['in flight'] / 1024:.0f}",
                    f"{found['bandwidth']:.0%}",
                ]
            )
        cells = [" / ".join(dict.fromkeys(each)) for each in zip(*columns, strict=True)]
        cells[-2] += f" ({found['needed'] / 1024:.0f})"
        lines.append(f"| {key} | {' | '.join(cells)} |")
    return "\n".join(lines)
