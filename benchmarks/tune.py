"""Measure the sizes that depend on the device: ``python benchmarks/tune.py --out tuning.json [--minutes 4] [--install]``.

One size after another (mgrpo_kernels/ops/_triton/tuning.py says what each is), on the shape of Qwen2.5-7B's head, each candidate beside
the choice so far, its result checked against that of the choice so far. The decisions that matter most come first. `--install` writes
the choice where the library reads it: commit that file. `--dry-run` takes tiny shapes, for machines without a GPU (with
TRITON_INTERPRET=1): it proves the sweep, not the sizes.

Candidates are measured in a process of their own, which writes a line to ``<out>.rows.jsonl`` for each. One that does not compile, gives
a wrong result or raises anything else is recorded and skipped; one that crashes its process, hangs or leaves the GPU unusable is
recorded, and a new process measures the rest.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

from gpu_check.measure import commit
from gpu_check.results import TUNING, write
from gpu_check.rows import Run as Log
from gpu_check.rows import Worker, read
from gpu_check.supervisor import Supervisor

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


def sweep(work: Workloads | None = None) -> dict[str, tuple[list[Any], Callable[[], Run]]]:
    """Return field -> (candidates, its workload), those first whose choice matters most."""
    rows = 0 if work is None else work.sizes.rows
    return {
        "forward_tile": (
            [(8192, columns) for columns in (2048, 4096, 8192, 16384, 32768)],
            lambda: work.head(grad=False),
        ),
        "fused_tile": (FUSED_TILES, lambda: work.head_both()),
        "matmul": (["library", "fused"], lambda: work.head_both()),
        "tile_state": (THREADS_AND_LOADS, lambda: work.head(grad=False)),
        "tile_gradient": (THREADS_AND_LOADS, lambda: work.head(grad=True)),
        "backward_rows": ([4096, 8192, 16384], lambda: work.head(grad=True)),
        "workspace_bytes": ([256 * 2**20, 512 * 2**20], lambda: work.head(grad=True)),
        "stats_forward": (THREADS_AND_LOADS, lambda: work.logits(rows, grad=False)),
        "stats_backward": (THREADS_AND_LOADS, lambda: work.logits(rows, grad=True)),
        "programs_per_processor": ([2, 4, 8], lambda: work.logits(max(1, rows // 128), grad=False)),
        "ema": (
            [(16384, 2048, 8), (32768, 2048, 8), (65536, 2048, 8), (32768, 1024, 4), (32768, 4096, 8)],
            lambda: work.ema(),
        ),
    }


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


def row_name(field: str, candidate: Any) -> str:
    """Return the name of a candidate's row."""
    return f"{field}={json.dumps(candidate)}"


def in_order(candidates: list[Any], default: Any, dry: bool) -> list[Any]:
    """Return the candidates with the default first, which the others are compared with; in a dry run it and one other."""
    ordered = sorted(candidates, key=lambda value: value != default)
    return ordered[:1] + ordered[-1:] if dry else ordered


def result_of(log: Log, about: dict[str, Any], table: dict[str, list[Any]]) -> dict[str, Any]:
    """Return tuning.json as far as the rows of the log allow: the choice, and what was measured or why it was not."""
    defaults = dataclasses.asdict(tuning.Tuning())
    result = {**about, "defaults": defaults, "tuning": dict(defaults), "measured": {}, "not_reached": []}
    for field, candidates in table.items():
        entries, best = [], None
        for value in candidates:
            row = log.rows.get(row_name(field, value))
            if row is None:
                continue
            entries.append(
                {"value": value, "ms": row["ms"]} if "ms" in row else {"value": value, "failed": row["text"][:300]}
            )
            if "ms" in row and (best is None or row["ms"] < 0.99 * best["ms"]):  # less is noise
                best = entries[-1]
        if entries:
            result["measured"][field] = entries
        if len(entries) < len(candidates):
            result["not_reached"].append(field)
        if best is not None:
            result["tuning"][field] = best["value"]
    return result


class Sweep:
    """The sweep in one process. What an earlier process began is not measured again; what it chose is built upon."""

    def __init__(self, out: Path, sizes: Sizes, device: torch.device, dry: bool) -> None:
        self.out, self.device, self.worker = out, device, Worker()
        self.work, self._expected = Workloads(sizes, device), ("", None)
        default, self.table = tuning.Tuning(), {}
        for field, (candidates, _) in sweep(self.work).items():
            self.table[field] = in_order(candidates, getattr(default, field), dry)
        name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
        self.about = {
            "device": name,
            "torch": torch.__version__,
            "triton": triton.__version__,
            "commit": commit(),
            "sizes": sizes._asdict(),
        }

    def save(self) -> dict[str, Any]:
        """Write what is known so far, and return it."""
        result = result_of(self.worker.so_far(), self.about, self.table)
        write(self.out, result)
        return result

    def trial(self, field: str, candidate: Any) -> tuning.Tuning:
        """Return the choice so far with the candidate in it."""
        chosen = self.save()["tuning"] | {field: candidate}
        if field == "fused_tile":  # of use only where the matmul is ours
            chosen["matmul"] = "fused"
        return tuning.Tuning(
            **{key: tuple(value) if isinstance(value, list) else value for key, value in chosen.items()}
        )

    def outcome(self, field: str) -> tuple[Run, tuple[torch.Tensor, ...]]:
        """Return a field's workload, and what it gives with the sizes in force."""
        run = sweep(self.work)[field][1]()
        return run, run()

    def expected(self, field: str) -> tuple[torch.Tensor, ...] | None:
        """Return the result of the first candidate that worked; None if none has so far."""
        if self._expected[0] == field:
            return self._expected[1]
        rows = self.worker.so_far().rows
        for candidate in self.table[field]:
            if rows.get(row_name(field, candidate), {}).get("outcome") == "passed":
                with mock.patch.object(tuning, "of", return_value=self.trial(field, candidate)):
                    self._expected = field, self.outcome(field)[1]
                return self._expected[1]
        return None

    def measure(self, field: str, candidate: Any, want: tuple[torch.Tensor, ...] | None) -> dict[str, Any]:
        """Return a candidate's time, if its result is right."""
        with mock.patch.object(tuning, "of", return_value=self.trial(field, candidate)):
            run, got = self.outcome(field)
            finite = all(bool(each.isfinite().all()) for each in got)
            if not finite or (want is not None and not agrees(got, want)):
                raise AssertionError(f"{field}={candidate} gives a wrong result: no time is taken of it")
            times = [milliseconds(run, self.device) for _ in range(3 if self.device.type == "cuda" else 1)]
        return {"ms": statistics.median(times)}

    def run(self, fields: list[str]) -> None:
        """Measure the candidates of `fields` that no earlier process began."""
        remaining = set(self.worker.collect([row_name(f, value) for f in fields for value in self.table[f]]))
        for field in fields:
            waiting = [value for value in self.table[field] if row_name(field, value) in remaining]
            for value in waiting:
                self.worker.do(row_name(field, value), lambda: self.measure(field, value, self.expected(field)))  # noqa: B023
                self.save()
            if waiting:
                print(f"{field}: {self.save()['measured'][field]}", flush=True)
        self.save()


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--minutes", type=float, default=4.0, help="candidates that were not reached by then keep the default"
    )
    parser.add_argument(
        "--seconds-per-candidate", type=float, default=60.0, help="a candidate that takes longer is killed"
    )
    parser.add_argument("--only", nargs="+", choices=list(sweep()), metavar="FIELD", help="sweep these fields only")
    parser.add_argument("--install", action="store_true", help="write the choice where the library reads it")
    parser.add_argument("--dry-run", action="store_true", help="use tiny shapes, on any machine")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)  # the process that measures
    arguments = parser.parse_args()
    if not torch.cuda.is_available() and not arguments.dry_run:
        parser.error("expected a GPU, found none (--dry-run proves the sweep in Triton's interpreter)")
    return arguments


def work(arguments: argparse.Namespace) -> None:
    """Measure, in this process."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = Sizes(24, 16, 300) if arguments.dry_run else Sizes(8192, 3584, 152064)
    fused_from = 1 if arguments.dry_run else linear_triton.FUSED_FROM
    with use_backend("triton"), mock.patch.object(linear_triton, "FUSED_FROM", fused_from):
        Sweep(arguments.out, sizes, device, arguments.dry_run).run(arguments.only or list(sweep()))


def main(script: str = __file__) -> None:
    """Measure in processes of their own, and write as soon as a candidate is done: a run cut short loses nothing."""
    arguments = parse()
    if arguments.worker:
        work(arguments)
        return
    log = arguments.out.with_suffix(".rows.jsonl")
    log.unlink(missing_ok=True)
    supervisor = Supervisor(log, Path.cwd(), record=lambda title, text: print(f"{title}\n{text}", flush=True))
    done = supervisor.run(
        TUNING,
        [script, *sys.argv[1:], "--worker"],
        seconds=60 * arguments.minutes,
        row_seconds=arguments.seconds_per_candidate,
    )
    for row in read(log).get(TUNING, Log(TUNING)).rows.values():
        if row["outcome"] != "passed":
            print(f"{row['row']} {row['outcome']}: {row['text'][:300]}")
    if done.reason:
        print(f"the sweep is incomplete: {done.reason}")
    if not arguments.out.exists():
        sys.exit("no candidate was measured")
    result = json.loads(arguments.out.read_text(encoding="utf-8"))
    if arguments.install:
        tuning.FOLDER.mkdir(exist_ok=True)
        target = tuning.FOLDER / f"{tuning.slug(result['device'])}.json"
        write(target, result)
        print(f"installed: {target.name}")


if __name__ == "__main__":
    main()
