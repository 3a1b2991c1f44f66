"""`make gpu-check` as a whole, on a small tree without a GPU: stopped from outside, out of time, with kernels that do not work."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from gpu_check import rows, stages
from test_gpu_check_faults import alive

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.usefixtures("outside_xdist")  # the processes that these tests start are no workers

CHECK = """
import sys
sys.path.insert(0, {scripts!r})
from pathlib import Path
from gpu_check import stages
stages.ROOT, stages.REFRESH, stages.STAGES = Path({tree!r}), 0.2, stages.STAGES[1:]
from gpu_check import cli
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.fixture
def check(tmp_path):
    """Return a function that starts the command on a tree with these test files."""
    tree, out = tmp_path / "tree", tmp_path / "out"
    (tree / "tests" / "gpu").mkdir(parents=True)

    def start(**files):
        for name, source in files.items():
            (tree / "tests" / "gpu" / f"test_gpu_{name}.py").write_text(source)
        script = tmp_path / "check.py"
        script.write_text(CHECK.format(scripts=str(ROOT / "scripts"), tree=str(tree)))
        command = [sys.executable, str(script), "--dry-run-on-cpu", "--out", str(out)]
        return out, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    start.out = out
    return start


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.05)


HANGS = (
    "import os, time\ndef test_before():\n    pass\n"
    "def test_hangs():\n    open('pid', 'w').write(str(os.getpid()))\n    time.sleep(600)\ndef test_after():\n    pass\n"
)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_stopped_from_outside_it_leaves_a_summary_of_what_was_finished(check, number):
    out, process = check(smoke="def test_kernel():\n    pass\n", linear=HANGS)
    log, begun = out / "rows.jsonl", '"begun": "tests/gpu/test_gpu_linear.py::test_hangs"'
    wait_for(lambda: log.exists() and begun in log.read_text())
    if number == signal.SIGKILL:
        wait_for(lambda: "tests: 2 passed" in (out / "summary.txt").read_text())
    pid = out.parent / "tree" / "pid"
    wait_for(lambda: pid.exists() and pid.read_text())
    process.send_signal(number)
    printed = process.communicate(timeout=20)[0]
    text = (out / "summary.txt").read_text()
    assert "tests: 2 passed, 0 failed, 0 skipped, 2 lost" in text
    if number == signal.SIGKILL:
        os.kill(int(pid.read_text()), signal.SIGKILL)
        assert "NOT RUN tests/gpu/test_gpu_linear.py: 2 rows (test_hangs, test_after): not finished" in text
        return
    assert process.returncode == 1
    assert text in printed
    # It was sent SIGKILL, but the command does not wait for it, and a process with PyTorch takes up to 0.1 s to free its memory.
    wait_for(lambda: not alive(pid.read_text()), 20)
    assert f"LOST tests/gpu/test_gpu_linear.py test_hangs: cut off: stopped by {number.name}" in text
    assert f"NOT RUN tests/gpu/test_gpu_linear.py: 1 row (test_after): stopped by {number.name}" in text
    assert f"stopped by {number.name} before these stages: other sizes, other benchmarks" in text


def test_where_no_kernel_works_it_ends_after_the_smoke_tests_and_says_why(check):
    out, process = check(
        smoke="def test_kernel():\n    assert 1 == 2, 'this kernel gives NaN'\n", linear="def test_a():\n    pass\n"
    )
    printed = process.communicate(timeout=60)[0]
    assert process.returncode == 1
    assert "smoke: test_kernel failed: AssertionError: this kernel gives NaN" in printed
    assert (
        "stopped after the smoke tests, none of which passed: every smoke test failed; not begun: head benchmarks"
        in printed
    )
    assert "test_gpu_linear" not in (out / "rows.jsonl").read_text()


def test_where_the_kernels_cannot_be_imported_it_ends_and_says_why(check):
    out, process = check(smoke="import no_such_module\n", linear="def test_a():\n    pass\n")
    printed = process.communicate(timeout=60)[0]
    assert process.returncode == 1
    assert (
        "stopped after the smoke tests, none of which passed: the process ended with exit code 2 before its first row"
        in printed
    )
    assert "test_gpu_linear" not in (out / "rows.jsonl").read_text()


def test_a_file_of_which_no_row_is_selected_is_named(check):
    """A pattern that selects nothing must not look like a run in which nothing was wrong."""
    check(smoke="def test_kernel():\n    pass\n", linear="")[1].communicate(timeout=120)
    text = (check.out / "summary.txt").read_text()
    assert "NOT RUN tests/gpu/test_gpu_linear.py: no row was selected" in text
    assert (
        "NOT RUN benchmarks/bench_linear_token_stats.py: the process ended with exit code 4 before its first row"
        in text
    )
    assert "NOT RUN tuning: the process ended with exit code 2 before its first row" in text


def test_a_row_that_cannot_be_summarised_does_not_end_the_check(tmp_path):
    check = stages.Check(tmp_path, 1.0, dry=True)
    rows.append(check.log, {"run": "tests/gpu/a.py", "row": "a", "outcome": "unheard of"})
    assert check.refresh().startswith("rows.jsonl could not be summarised: KeyError")
    check = stages.Check(tmp_path, 1.0, dry=True)
    rows.append(check.log, {"run": "benchmarks/a.py", "row": "a", "outcome": "passed", "params": {"provider": None}})
    text = check.refresh()
    assert "this script failed here: AttributeError" in text
    assert "head, forward: workspace" in text


def test_stages_without_time_are_named(tmp_path):
    check = stages.Check(tmp_path, 0.0, dry=True)
    stages.run_stages(check, stages.STAGES)
    text = (tmp_path / "summary.txt").read_text() if (tmp_path / "summary.txt").exists() else check.refresh()
    text = check.refresh()
    for stage in stages.STAGES:
        assert f"{stage.title}: dropped, no time left" in text
    assert "NOT RUN forward_tile: not begun: no time left" in text
    assert "NOT RUN benchmarks/bench_ema.py: not begun: no time left" in text


def test_a_fault_of_the_script_costs_one_stage(tmp_path):
    check = stages.Check(tmp_path, 1.0, dry=True)
    done = []

    def fails(check, seconds):
        raise ZeroDivisionError("oops")

    run = [stages.Stage("first", 20, fails, ()), stages.Stage("second", 20, lambda check, seconds: done.append(1), ())]
    stages.run_stages(check, run)
    assert done == [1]
    assert "first: this script failed: ZeroDivisionError: oops" in (tmp_path / "summary.txt").read_text()
