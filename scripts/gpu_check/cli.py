"""The command line of ``python scripts/gpu_check``."""

from __future__ import annotations

import argparse
import signal
import tempfile
from pathlib import Path

from gpu_check import results, wheels
from gpu_check.stages import ROOT, STAGES, Check, run_stages
from gpu_check.summary import summary

WHEELS = ROOT / "build" / "gpu-wheels"
FILES = """
files in the folder:
  summary.txt       the targets, each met or missed by how much; failed tests; every lost row with the reason. It is also printed
  rows.jsonl        one line for each row that began or finished, written at once; the other files are computed from it
  environment.json  device, versions, commit; copy bandwidth and matmul rate as measured now
  tests.json        each test of tests/gpu, with the text of failures and the figures that tests recorded
  benchmarks.json   the benchmarks, for benchmarks/report.py
  tuning.json       what `python benchmarks/tune.py` measured and chose
  profile.json      with --profile: every kernel of one step of each op at full size
  log.txt           what the processes printed

Nothing is installed: the interpreter that runs this has torch, triton, pytest, pytest-benchmark and hypothesis. The commit is
MGRPO_COMMIT's, that of a file COMMIT in the tree, or git's. The exit code is 1 if a test failed or was lost.
"""


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        prog="gpu_check",
        description="Tests, benchmarks and tuning on one GPU, in which no hang, crash or cut-off loses a finished row.",
        epilog=FILES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out", type=Path, default=Path("gpu-check"), help="folder for the results (default: %(default)s)"
    )
    parser.add_argument(
        "--minutes", type=float, default=9.0, help="time for everything; stages are shortened or dropped to keep it"
    )
    parser.add_argument("--profile", action="store_true", help="also write profile.json")
    parser.add_argument(
        "--wheels",
        type=Path,
        metavar="DIR",
        help="folder of wheels to import peers from, as `make gpu-wheels` collects them (default: build/gpu-wheels, if it exists)",
    )
    parser.add_argument(
        "--dry-run-on-cpu", action="store_true", help="prove this script on a machine without a GPU, on tiny shapes"
    )
    parser.add_argument(
        "--summarize", action="store_true", help="only write the results anew from rows.jsonl of an earlier run"
    )
    options = parser.parse_args(arguments)
    if options.wheels is not None and not options.wheels.is_dir():
        parser.error(f"--wheels: expected a folder of wheels, got {options.wheels}, which is none")
    return options


def unpack_wheels(folder: Path, to: Path) -> str:
    """Unpack the wheels, and return the line of the summary about them."""
    if not folder.is_dir():
        return "wheels: none were given (make gpu-wheels collects them), so only peers that are installed are measured"
    unpacked, left_out = wheels.unpack(folder, to)
    return f"wheels: {', '.join(unpacked) or 'none'}" + (f"; not used: {'; '.join(left_out)}" if left_out else "")


def main(arguments: list[str] | None = None) -> int:
    """Run the stages, and print the summary."""
    options = parse(arguments)
    out = options.out.resolve()
    if options.summarize:
        text = summary(out, results.write_all(out), seconds=0.0, notes=[])
        results.write(out / "summary.txt", text)
        print(text)
        return 0
    with tempfile.TemporaryDirectory() as site:
        check = Check(out, options.minutes, options.dry_run_on_cpu, [Path(site)])
        for stopped in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(stopped, check.stop)
        check.note(unpack_wheels(options.wheels or WHEELS, Path(site)))
        run_stages(check, [stage for stage in STAGES if stage.title != "profile" or options.profile])
        print(check.refresh())
    ran = results.tests(results.read(out / "rows.jsonl"))
    return 0 if ran["passed"] and not ran["failed"] and not ran["lost"] else 1
