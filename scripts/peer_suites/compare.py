"""Run another library's own tests twice, as it is and with our ops in place, and compare the outcomes test by test.

    scripts/peer_suites.sh trl ~/src/trl
    scripts/peer_suites.sh trl ~/src/trl --vocabulary qwen_agent/utils/qwen.tiktoken     on a machine without the hub
    scripts/peer_suites.sh verl ~/src/verl

The checkout gives the tests only; what they import is the installed library. Nothing is downloaded by this script; the tests of TRL load
tiny models from the hub, or with ``--vocabulary`` stand-ins that are made here (``stand_ins.py``). The result goes to
``docs/peer_suites.json``, one entry for each library, and ends with status 1 if an outcome differs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

from stand_ins import make_all

HERE = Path(__file__).resolve().parent
RECORDED = HERE.parents[1] / "docs" / "peer_suites.json"
SUITES = {
    "trl": ("test_grpo_trainer.py", "test_rloo_trainer.py", "test_utils.py"),
    "verl": tuple(
        f"trainer/ppo/test_{name}.py"
        for name in (
            "core_algos_on_cpu",
            "dynamic_policy_losses_on_cpu",
            "loss_aggregation_on_cpu",
            "rollout_corr",
            "rollout_corr_integration",
        )
    ),
}
"""The files of each library's tests that reach what an integration replaces, below ``tests``."""


def outcomes_of(peer: str, place: Path, stand_ins: Path | None, patched: bool, chosen: list[str]) -> dict[str, Any]:
    """Run the library's tests in a process of their own; return what the plugin wrote."""
    name = "patched" if patched else "plain"
    found = place / f"{name}.json"
    environment = {
        **os.environ,
        "PEER_PATCH": peer if patched else "",
        "PEER_STAND_INS": str(stand_ins or ""),
        "PEER_OUTCOMES": str(found),
        "PYTHONPATH": os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH", "")))),
        **({"HF_HUB_OFFLINE": "1"} if stand_ins else {}),
    }
    command = [sys.executable, "-m", "pytest", "-p", "plugin", "-q", "--tb=line", "-W", "ignore"]
    command += ["--continue-on-collection-errors", *chosen]
    command += [f"tests/{file}" for file in SUITES[peer]]
    with Path(place, f"{name}.log").open("w") as log:
        subprocess.run(command, cwd=place, env=environment, stdout=log, stderr=log, check=False)
    if not found.exists():
        sys.exit(
            f"{place}/{name}.log: the tests of {peer} did not run:\n{Path(place, f'{name}.log').read_text()[-2000:]}"
        )
    return checked(json.loads(found.read_text(encoding="utf-8")), f"{place}/{name}.log")


def checked(outcomes: dict[str, Any], log: str) -> dict[str, Any]:
    """Return the outcomes; end where no test has passed, since two runs of which nothing runs are always alike."""
    if not any(run["outcome"] == "passed" for run in outcomes.values()):
        sys.exit(f"{log}: expected tests that pass, got {len(outcomes)} that do not")
    return outcomes


def summary(plain: dict[str, Any], patched: dict[str, Any]) -> dict[str, Any]:
    """Return how the two runs compare."""
    different = [
        {"test": name, "plain": plain[name]["outcome"], "patched": run["outcome"], "reason": run.get("reason", "")}
        for name, run in patched.items()
        if run["outcome"] != plain[name]["outcome"]
    ]
    reached = Counter(op for run in patched.values() for op in run.get("calls", ()))
    own_code = Counter(line for run in patched.values() for line in run.get("own_code", ()))
    return {
        "not_collected": sorted(name for name, run in plain.items() if run["outcome"] == "not collected"),
        "outcomes": dict(Counter(run["outcome"] for run in plain.values())),
        "different": different,
        "tests_that_call": dict(reached),
        "own_code": dict(own_code),
        "failed_in_both": {
            name: run.get("reason", "")
            for name, run in plain.items()
            if run["outcome"] == "failed" and patched[name]["outcome"] == "failed"
        },
    }


def commit_of(checkout: Path) -> str | None:
    """Return the commit of a checkout; None for a directory without git."""
    command = ["git", "-C", checkout, "rev-parse", "--short=10", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def main() -> None:
    """Run a library's tests and record the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=SUITES, help="the library")
    parser.add_argument("checkout", type=Path, help="a checkout of it, at the installed version if possible")
    parser.add_argument("--vocabulary", type=Path, metavar="FILE", help="make stand-ins with this qwen.tiktoken")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="directory for logs and outcomes (default: temporary)")
    parser.add_argument(
        "--out", type=Path, default=RECORDED, metavar="FILE", help="the record (default: docs/peer_suites.json)"
    )
    given, chosen = parser.parse_known_args()  # what is left goes to pytest
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        place = (given.keep or Path(temporary)).resolve()
        shutil.copytree(given.checkout / "tests", place / "tests", dirs_exist_ok=True)
        stand_ins = None
        if given.vocabulary:
            stand_ins = place / "stand_ins"
            if not stand_ins.exists():
                make_all(given.checkout, stand_ins, given.vocabulary)
        plain, patched = (outcomes_of(given.peer, place, stand_ins, each, chosen) for each in (False, True))
    result = {
        "version": version(given.peer),
        "checkout": commit_of(given.checkout),
        "stand_ins": given.vocabulary is not None,
        "pytest_options": chosen,
        "seconds": round(time.perf_counter() - start),
        **summary(plain, patched),
    }
    record = json.loads(given.out.read_text(encoding="utf-8")) if given.out.exists() else {}
    record[given.peer] = result
    given.out.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in result.items() if key != "failed_in_both"}, indent=1))
    sys.exit(bool(result["different"]))


if __name__ == "__main__":
    main()
