"""Faults that a GPU can cause, injected on a CPU: whatever happens to one row, all other rows are in the results, and the loss is named."""

import json
import re
import textwrap
from pathlib import Path

import pytest
from gpu_check import results, rows
from gpu_check.summary import summary
from gpu_check.supervisor import Supervisor

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.usefixtures("outside_xdist")  # the processes that these tests start are no workers
RUN = "tests/test_fault.py"
PASSED_BUT = (
    "def test_before(record_property):\n    record_property('bytes', 3)\n{fault}\ndef test_after():\n    pass\n"
)


@pytest.fixture
def supervise(tmp_path):
    """Return a function that runs a test file under a supervisor, and returns what the log says and how the run ended."""

    def run(source, *, seconds=60.0, row_seconds=30.0, start_seconds=30.0, file=RUN):
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(source))
        supervisor = Supervisor(tmp_path / "rows.jsonl", tmp_path)
        command = [
            "-m",
            "pytest",
            path,
            "-q",
            "-p",
            "no:cacheprovider",
            "-p",
            "gpu_check.recorder",
            "--rootdir",
            tmp_path,
            "-o",
            "faulthandler_timeout=2",
        ]
        done = supervisor.run(
            file,
            command,
            seconds=seconds,
            row_seconds=row_seconds,
            start_seconds=start_seconds,
            environment={"PYTHONPATH": str(ROOT / "scripts")},
        )
        assert not supervisor.running
        return rows.read(tmp_path / "rows.jsonl").get(file, rows.Run(file)), done

    return run


def outcomes(run):
    return {name.rpartition("::test_")[2]: row["outcome"] for name, row in run.rows.items()}


def text_of(run, test):
    return next(row["text"] for name, row in run.rows.items() if name.endswith(f"::test_{test}"))


def alive(number):
    try:
        state = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def lost_lines(tmp_path):
    return summary(tmp_path, rows.read(tmp_path / "rows.jsonl"), seconds=1.0, notes=[])


def test_a_row_that_hangs_is_killed_and_the_others_run(supervise, tmp_path):
    run, done = supervise(
        PASSED_BUT.format(fault="def test_fault():\n    import time\n    time.sleep(600)"), row_seconds=3.0
    )
    assert outcomes(run) == {"before": "passed", "fault": "hung", "after": "passed"}
    assert run.rows[f"{RUN}::test_before"]["figures"] == {"bytes": 3}
    assert "in test_fault" in run.rows[f"{RUN}::test_fault"]["printed"]  # where it hung
    assert (done.reason, done.processes) == ("", 2)
    assert "LOST tests/test_fault.py test_fault: hung: it was killed after 3 s without a result" in lost_lines(tmp_path)


def test_a_row_that_ignores_signals_and_keeps_a_child_is_killed_with_it(supervise, tmp_path):
    fault = f"""
def test_fault():
    import signal, subprocess, sys
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])
    open({str(tmp_path / "child")!r}, 'w').write(str(child.pid))
    while True:
        pass
"""
    run, _ = supervise(PASSED_BUT.format(fault=fault), row_seconds=3.0)
    assert outcomes(run) == {"before": "passed", "fault": "hung", "after": "passed"}
    assert not alive((tmp_path / "child").read_text())


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "killed by SIGKILL"),
        ("os.abort()", "killed by SIGABRT"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "killed by SIGSEGV"),
        ("os._exit(0)", "exit code 0"),
        ("os._exit(11)", "exit code 11"),
        ("pytest.exit('enough')", "exit code 2"),
    ],
)
def test_a_row_that_kills_its_process_costs_itself_alone(supervise, tmp_path, how, named):
    run, done = supervise(PASSED_BUT.format(fault=f"def test_fault():\n    import os, pytest, signal\n    {how}"))
    assert outcomes(run) == {"before": "passed", "fault": "crashed", "after": "passed"}
    assert named in text_of(run, "fault")
    assert done.reason == ""
    assert f"{named}" in lost_lines(tmp_path)


BROKEN = """
broken = False

def use_the_gpu():
    if broken:
        raise RuntimeError("later rows of this process fail, too")

def test_before():
    use_the_gpu()

def test_fault():
    global broken
    broken = True
    raise RuntimeError({error!r})

def test_after():
    use_the_gpu()
"""


def test_a_row_that_loses_the_gpu_is_the_last_of_its_process(supervise):
    error = "CUDA error: an illegal memory access was encountered"
    run, done = supervise(BROKEN.format(error=error))
    assert outcomes(run) == {"before": "passed", "fault": "failed", "after": "passed"}
    assert error in text_of(run, "fault")
    assert done.processes == 2


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        ("RuntimeError: CUDA error: device-side assert triggered", True),
        ("AcceleratorError: CUDA error: unspecified launch failure", True),
        ("RuntimeError: Triton Error [CUDA]: misaligned address", True),
        ("RuntimeError: CUDA driver error: unspecified launch failure", True),
        ("RuntimeError: CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling cublasGemmEx", True),
        ("cuda.bindings: CUDA_ERROR_ILLEGAL_ADDRESS", True),
        ("OutOfResources: out of resource: shared memory", False),
        ("OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", False),
        ("AssertionError: gradient of hidden: error 2.1 times that of plain PyTorch", False),
    ],
)
def test_errors_after_which_a_process_has_no_gpu(error, lost):
    assert rows.is_sticky(error) == lost


def test_a_lost_gpu_is_found_by_asking_it_whatever_the_error_said(supervise):
    """The error is one that the pattern does not know; the next call of the device fails all the same."""
    asks = """
import sys, types

def synchronize():
    if broken:
        raise RuntimeError("no answer")

sys.modules.setdefault("torch", types.SimpleNamespace(cuda=types.SimpleNamespace(is_initialized=lambda: True, synchronize=synchronize)))
"""
    run, done = supervise(asks + BROKEN.format(error="something else"))
    assert outcomes(run) == {"before": "passed", "fault": "failed", "after": "passed"}
    assert done.processes == 2
    # Without a lost GPU, a failed row costs no new process.
    run, done = supervise(BROKEN.format(error="wrong").replace("broken = True", "pass"), file="tests/test_other.py")
    assert outcomes(run) == {"before": "passed", "fault": "failed", "after": "passed"}
    assert done.processes == 1


def test_an_error_that_shows_in_teardown_belongs_to_its_row(supervise):
    """A kernel's failure is seen when the host next waits for the device."""
    source = """
    import pytest, time
    @pytest.fixture
    def gpu(request):
        yield
        if request.function.__name__ == "test_fails":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        time.sleep(600)
    def test_fails(gpu, record_property):
        record_property("bytes", 3)
    def test_hangs(gpu, record_property):
        record_property("bytes", 4)
    def test_after():
        pass
    """
    run, done = supervise(source, row_seconds=3.0)
    assert outcomes(run) == {"fails": "failed", "hangs": "hung", "after": "passed"}
    assert [row["figures"] for row in run.rows.values()] == [{"bytes": 3}, {"bytes": 4}, {}]
    assert done.processes == 3


def test_a_cut_off_in_the_middle_of_a_file_keeps_what_was_finished(supervise, tmp_path):
    source = "import time, pytest\n@pytest.mark.parametrize('n', range(9))\ndef test_row(n):\n    time.sleep(600 * (n == 3))\n"
    run, done = supervise(source, seconds=4.0)
    assert list(outcomes(run).values()) == ["passed"] * 3 + ["cut off"]
    assert len(run.not_finished) == 5
    assert done.seconds < 15
    text = lost_lines(tmp_path)
    assert "tests: 3 passed, 0 failed, 0 skipped, 6 lost" in text
    assert "LOST tests/test_fault.py test_row[3]: cut off" in text
    assert (
        "NOT RUN tests/test_fault.py: 5 rows (test_row[4], test_row[5], test_row[6], ...): no time left after 4 s"
        in text
    )


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("import time; time.sleep(600)", "hung for 1 s before its first row"),
        ("import os; os.abort()", "killed by SIGABRT before its first row"),
        ("raise ImportError('no such kernel')", "exit code 2 before its first row"),
    ],
)
def test_a_file_that_cannot_be_collected_is_named_and_not_tried_for_ever(supervise, tmp_path, source, named):
    run, done = supervise(source, start_seconds=1.0 if "sleep" in source else 30.0)
    assert run.rows == {}
    assert done.processes == 1
    assert named in done.reason
    assert done.cannot_start == ("sleep" not in source)
    assert f"NOT RUN {RUN}: the process" in lost_lines(tmp_path)


def test_every_row_hangs_and_the_file_still_ends(supervise):
    source = "import time, pytest\n@pytest.mark.parametrize('n', range(50))\ndef test_row(n):\n    time.sleep(600)\n"
    run, done = supervise(source, seconds=8.0, row_seconds=3.0)
    assert done.seconds < 40
    assert set(outcomes(run).values()) <= {"hung", "cut off"}
    assert len(run.rows) + len(run.not_finished) == 50


def test_rows_run_in_the_order_of_their_worth(supervise, monkeypatch):
    monkeypatch.setenv("GPU_CHECK_FIRST", "-ours-,-eager-")
    names = ["a-trl-both", "a-eager-both", "a-ours-both", "b-ours-both"]
    run, _ = supervise(f"import pytest\n@pytest.mark.parametrize('n', {names})\ndef test_row(n):\n    pass\n")
    assert [re.search(r"\[(.*)\]", name)[1] for name in run.rows] == [
        "a-ours-both",
        "b-ours-both",
        "a-eager-both",
        "a-trl-both",
    ]


def test_a_benchmark_that_hangs_leaves_the_finished_ones_in_the_results(supervise, tmp_path, monkeypatch):
    monkeypatch.setenv("MGRPO_COMMIT", "0123abcd")
    source = """
    import pytest, time
    @pytest.mark.parametrize("provider", ["ours", "trl", "absent", "eager"])
    def test_bench(benchmark, provider):
        if provider == "trl":
            time.sleep(600)
        if provider == "absent":
            pytest.skip("peer absent is not installed")
        benchmark.pedantic(int, rounds=2)
        benchmark.extra_info.update(p50_ms=1.0)
    """
    file = "benchmarks/test_bench.py"
    conftest = tmp_path / "benchmarks" / "conftest.py"
    conftest.parent.mkdir()
    conftest.write_text(
        "def pytest_benchmark_update_machine_info(config, machine_info):\n    machine_info['device'] = 'a GPU'\n"
    )
    supervise(source, row_seconds=3.0, file=file)
    runs = results.write_all(tmp_path)
    written = json.loads((tmp_path / "benchmarks.json").read_text())
    assert [each["params"]["provider"] for each in written["benchmarks"]] == ["ours", "eager"]
    assert written["machine_info"]["device"] == "a GPU"
    assert written["commit_info"]["id"] == "0123abcd"
    text = summary(tmp_path, runs, seconds=1.0, notes=[])
    assert "LOST benchmarks/test_bench.py test_bench[trl]: hung" in text
    assert (
        "providers that were not measured:\n  trl: hung: it was killed after 3 s without a result\n  absent: Skipped: peer absent is not installed"
        in text
    )


def test_a_line_cut_off_by_a_kill_costs_no_other(tmp_path):
    log = tmp_path / "rows.jsonl"
    rows.append(log, {"run": "a", "row": "1", "outcome": "passed"})
    with log.open("a") as file:
        file.write('{"run": "a", "row": "2", "outc')
    reader = rows.Reader(log, "a")
    rows.append(log, {"run": "a", "row": "2", "outcome": "crashed", "text": ""})
    rows.append(log, {"run": "b", "row": "3", "outcome": "passed"})
    assert {name: row["outcome"] for name, row in rows.read(log)["a"].rows.items()} == {"1": "passed", "2": "crashed"}
    assert [line["row"] for line in reader.new()] == ["2"]
    assert reader.new() == []
