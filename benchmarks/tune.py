"""Measure the sizes that depend on the device: ``python benchmarks/tune.py --out tuning.json [--minutes 4] [--install]``.

One size after another (mgrpo_kernels/ops/_triton/tuning.py says what each is), on the shape of Qwen2.5-7B's head, each candidate beside
the choice so far, its result checked against that of the defaults. `--install` writes the choice where the library reads it: commit
that file. `--dry-run` takes tiny shapes, for machines without a GPU (with TRITON_INTERPRET=1): it proves the sweep, not the sizes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton

from mgrpo_kernels import ema_update_, linear_token_stats, token_stats_from_logits, use_backend
from mgrpo_kernels.ops._triton import tuning
from mgrpo_kernels.ops.linear_token_stats import triton as linear_triton

Run = Callable[[], tuple[torch.Tensor, ...]]
THREADS_AND_LOADS = [(128, 2), (128, 4), (256, 1), (256, 2), (256, 4), (256, 8), (512, 2), (512, 4)]
FUSED_TILES = [
    (128, 128, 64, 4, 8),
    (128, 128, 64, 3, 8),
    (128, 256, 64, 3, 8),
    (128, 256, 64, 4, 8),
    (64, 256, 64, 4, 4),
]


class Sizes(NamedTuple):
    """Of the workloads."""

    rows: int
    width: int
    vocab: int


class Workloads:
    """What each size is measured on. Every method returns a function to be timed, whose results can be compared."""

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        torch.manual_seed(0)
        self.sizes, self.device = sizes, device
        self.hidden = torch.randn(sizes.rows, sizes.width, device=device).bfloat16()
        self.weight = (
            torch.empty(sizes.vocab, sizes.width, device=device).normal_(std=2.5 * sizes.width**-0.5).bfloat16()
        )
        self.labels = torch.randint(0, sizes.vocab, (sizes.rows,), device=device)

    def logits(self, rows: int, *, grad: bool) -> Run:
        labels = self.labels[:rows]
        logits = (self.hidden[:rows] @ self.weight.t()).requires_grad_(grad)

        def forward() -> tuple[torch.Tensor, ...]:
            stats = token_stats_from_logits(logits, labels)
            return stats.logprob, stats.entropy

        if not grad:
            return forward
        total = sum(each.sum() for each in forward())
        return lambda: torch.autograd.grad(total, logits, retain_graph=True)

    def head(self, *, grad: bool) -> Run:
        leaves = [t.detach().requires_grad_(grad) for t in (self.hidden, self.weight)]

        def forward() -> tuple[torch.Tensor, ...]:
            stats = linear_token_stats(*leaves, self.labels)
            return stats.logprob, stats.entropy

        if not grad:
            return forward
        total = sum(each.sum() for each in forward())
        return lambda: torch.autograd.grad(total, leaves, retain_graph=True)

    def head_both(self) -> Run:
        leaves = [t.detach().requires_grad_() for t in (self.hidden, self.weight)]

        def run() -> tuple[torch.Tensor, ...]:
            stats = linear_token_stats(*leaves, self.labels)
            return torch.autograd.grad(stats.logprob.sum() + stats.entropy.sum(), leaves)

        return run

    def ema(self) -> Run:
        params = [self.weight] * 4
        ema, emit = [p.float() for p in params], [torch.empty_like(p) for p in params]

        def run() -> tuple[torch.Tensor, ...]:
            ema_update_(ema, params, 0.99, emit=emit)
            return tuple(emit)

        return run


def sweep(work: Workloads) -> list[tuple[str, list[Any], Callable[[], Run]]]:
    """Return (field, candidates, its workload), in an order in which later ones build on earlier ones."""
    rows = work.sizes.rows
    return [
        ("stats_forward", THREADS_AND_LOADS, lambda: work.logits(rows, grad=False)),
        ("stats_backward", THREADS_AND_LOADS, lambda: work.logits(rows, grad=True)),
        ("programs_per_processor", [2, 4, 8], lambda: work.logits(max(1, rows // 128), grad=False)),
        ("ema", [(16384, 2048, 8), (32768, 2048, 8), (65536, 2048, 8), (32768, 1024, 4), (32768, 4096, 8)], work.ema),
        ("tile_state", THREADS_AND_LOADS, lambda: work.head(grad=False)),
        ("tile_gradient", THREADS_AND_LOADS, lambda: work.head(grad=True)),
        ("forward_tile", [(8192, columns) for columns in (2048, 4096, 8192, 16384, 32768)], lambda: work.head(grad=False)),
        ("backward_rows", [4096, 8192, 16384], lambda: work.head(grad=True)),
        ("fused_tile", FUSED_TILES, work.head_both),
        ("matmul", ["library", "fused"], work.head_both),
        ("workspace_bytes", [256 * 2**20, 512 * 2**20], lambda: work.head(grad=True)),
    ]  # fmt: skip


def milliseconds(run: Run, device: torch.device) -> float:
    """Return the median time of a call."""
    if device.type == "cuda":
        return triton.testing.do_bench(run, warmup=50, rep=200, return_mode="median")
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def agrees(got: tuple[torch.Tensor, ...], want: tuple[torch.Tensor, ...]) -> bool:
    """Return whether results differ by 16-bit rounding at most: of logits as large as 10, in their exponentials."""
    return all(
        bool((a.float() - b.float()).norm() <= 2e-2 * b.float().norm()) and bool(a.isfinite().all())
        for a, b in zip(got, want, strict=True)
    )


def choose(
    field: str, candidates: list[Any], make: Callable[[], Run], chosen: tuning.Tuning, device: torch.device
) -> tuple[tuning.Tuning, list[dict[str, Any]]]:
    """Return the choice with the fastest candidate in it, and what was measured."""
    if field == "fused_tile":  # of use only where the matmul is ours
        chosen = dataclasses.replace(chosen, matmul="fused")
    measured: list[dict[str, Any]] = []
    best, want = None, None
    for candidate in sorted(candidates, key=lambda value: value != getattr(chosen, field)):  # what it is so far, first
        trial = dataclasses.replace(chosen, **{field: candidate})
        with mock.patch.object(tuning, "of", return_value=trial):
            run = make()
            try:
                got = run()
            except (
                triton.runtime.errors.OutOfResources,
                torch.OutOfMemoryError,
            ) as error:  # no candidate on this device
                measured.append({"value": candidate, "failed": f"{type(error).__name__}: {error}"[:300]})
                continue
            want = got if want is None else want
            if not agrees(got, want):
                raise AssertionError(
                    f"{field}={candidate} gives another result than {candidates[0]}: no time is taken of it"
                )
            times = [milliseconds(run, device) for _ in range(3 if device.type == "cuda" else 1)]
        measured.append({"value": candidate, "ms": statistics.median(times)})
        if best is None or measured[-1]["ms"] < 0.99 * best["ms"]:  # less is noise
            best = measured[-1]
    if field == "fused_tile":
        chosen = dataclasses.replace(chosen, matmul="library")
    return (chosen if best is None else dataclasses.replace(chosen, **{field: best["value"]})), measured


def commit() -> str | None:
    """Return the commit of the tree, None outside a checkout."""
    result = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, cwd=Path(__file__).parent
    )
    return result.stdout.strip() or None


def main() -> None:
    """Sweep, and write as soon as a field is done: a run cut short loses nothing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=4.0, help="fields not reached by then keep what they had")
    parser.add_argument("--install", action="store_true", help="write the choice where the library reads it")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, on whatever machine this is")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not arguments.dry_run:
        parser.error("want a GPU, found none (--dry-run proves the sweep in Triton's interpreter)")
    sizes = Sizes(24, 16, 300) if arguments.dry_run else Sizes(8192, 3584, 152064)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    result: dict[str, Any] = {
        "device": name, "torch": torch.__version__, "triton": triton.__version__, "commit": commit(), "sizes": sizes._asdict(),
        "tuning": {}, "measured": {}, "not_reached": [],
    }  # fmt: skip
    chosen, deadline = tuning.Tuning(), time.monotonic() + 60 * arguments.minutes
    fused_from = 1 if arguments.dry_run else linear_triton.FUSED_FROM
    with use_backend("triton"), mock.patch.object(linear_triton, "FUSED_FROM", fused_from):
        work = Workloads(sizes, device)
        for field, candidates, make in sweep(work):
            if time.monotonic() > deadline:
                result["not_reached"].append(field)
                continue
            few = candidates[-2:] if arguments.dry_run else candidates
            chosen, result["measured"][field] = choose(field, few, make, chosen, device)
            result["tuning"] = dataclasses.asdict(chosen)
            arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            print(f"{field}: {getattr(chosen, field)}  {result['measured'][field]}", flush=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if arguments.install:
        tuning.FOLDER.mkdir(exist_ok=True)
        target = tuning.FOLDER / f"{tuning.slug(name)}.json"
        target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"installed: {target.name}")


if __name__ == "__main__":
    main()
