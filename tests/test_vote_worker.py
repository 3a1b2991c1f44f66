"""The worker that evaluates integrals, sums and limits: limits of time and memory, and a worker that hangs, dies or is not there."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import mgrpo_kernels._math_worker as math_worker
from mgrpo_kernels._math_worker import MathWorker
from mgrpo_kernels.method import MethodOptions, select
from mgrpo_kernels.vote import answers_equal, majority_vote, symbolic
from mgrpo_kernels.vote.keys import _key_of_short, canonical_key

REPO = Path(__file__).resolve().parents[1]
HANGS = r"\sum_{k=1}^{10^7} \sin k"
HALF = r"\int_0^1 x \, dx"


@pytest.fixture
def worker(monkeypatch):
    """A worker of the test's own, which knows no answers yet."""
    mine = MathWorker(limit=10.0)
    monkeypatch.setattr(symbolic, "_worker", mine)
    monkeypatch.setattr(symbolic, "_known", {})
    _key_of_short.cache_clear()
    yield mine
    mine.close()
    _key_of_short.cache_clear()


def alive(pid: int) -> bool:
    """Whether a process still runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone_within(pid: int, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while alive(pid):
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


@pytest.mark.parametrize(
    "a, b",
    [
        (HALF, "1/2"),
        (r"\sum_{k=1}^{n} k", r"\frac{n(n+1)}{2}"),
        (r"\lim_{x\to 0} \frac{\sin x}{x}", "1"),
        (r"x = \int_0^2 x^2 dx", r"\frac83"),
        (r"\prod_{k=1}^{5} k", "5!"),
        (r"\sum_{k=1}^{\infty} \frac{1}{k^2}", r"\frac{\pi^2}{6}"),
        (r"\int_0^1 f(x) dx", r"\int_0^1 f(x)\,dx"),  # no closed form: the same text
    ],
)
def test_what_the_worker_evaluates(worker, a, b):
    assert answers_equal(a, b)
    assert not answers_equal(a, "7")


HOSTILE = [
    *(f"9^{{9^{{9^{{{k}}}}}}}" for k in range(9, 15)),
    *(f"(x+{k})^{{1000}}" for k in range(1, 6)),
    *(f"{k}!!!!" for k in range(7, 11)),
    *(f"\\sin(10^{{10^{{{k}}}}})" for k in range(3, 8)),
    "(" * 120 + "1" + ")" * 120,
    "x^" * 100 + "2",
    r"\frac{1}{" * 28 + "2" + "}" * 28,
    "1+" * 127 + "1",
    "-" * 200 + "1",
    "2^" * 50 + "2",
    r"\sqrt{" * 36 + "2" + "}" * 36,
    "10^{10^{10}}!",
    r"\binom{10^{9}}{10^{8}}",
]


def test_hostile_formulas_cost_no_time(monkeypatch):
    """Each is read, or not, in bounded time and in this process; the whole vote took minutes with a pairwise SymPy."""
    monkeypatch.setattr(MathWorker, "evaluate", None)  # calling it is an error
    _key_of_short.cache_clear()
    start = time.process_time()
    vote = majority_vote(HOSTILE, len(HOSTILE))
    assert time.process_time() - start < 5.0  # takes 0.1 s
    assert len(set(vote.cluster.tolist())) == len(HOSTILE)


def test_a_formula_that_hangs_is_given_up(worker, caplog):
    assert answers_equal(HALF, "0.5")
    first = worker._process.pid
    worker.limit = 0.5
    with caplog.at_level(logging.WARNING, logger="mgrpo_kernels"):
        assert not answers_equal(HANGS, "7")
    assert "took over 0.5 s of CPU time: it is compared as a text" in caplog.text
    assert not alive(first)
    assert answers_equal(HANGS, HANGS)  # as texts
    assert answers_equal(r"\int_0^2 x \, dx", "2")  # a new worker
    pid = worker._process.pid
    _key_of_short.cache_clear()
    assert not answers_equal(HANGS, "8")  # known by now: not asked again
    assert worker._process.pid == pid
    assert alive(pid)


def test_a_formula_that_hung_is_not_asked_about_again(worker, monkeypatch):
    worker.limit = 0.5
    assert worker.evaluate(HANGS) == (True, None)
    monkeypatch.setattr(worker, "_running", pytest.fail)
    assert worker.evaluate(HANGS) == (True, None)


def test_a_vote_survives_a_formula_that_hangs(worker):
    worker.limit = 0.5
    vote = majority_vote([HALF, HANGS, r"\frac12", "3", HANGS], 5, seconds=100.0)
    assert vote.cluster.tolist() == [0, 1, 0, 2, 1]
    assert vote.labels == [HALF]


def test_a_votes_time_is_limited_and_reported(worker, caplog):
    answers = [r"\int_0^1 x \, dx", "1/2", r"\int_0^2 x \, dx", "5"]
    with caplog.at_level(logging.WARNING, logger="mgrpo_kernels"):
        vote = majority_vote(answers, 4, seconds=0.0)
    assert vote.cluster.tolist() == [0, 1, 2, 3]  # compared as texts
    assert "0 s, is used up: 2 answers were compared as texts; vote_seconds sets the time" in caplog.text
    assert worker._process is None
    assert majority_vote(answers, 4, seconds=100.0).cluster.tolist() == [0, 0, 1, 2]  # no missing verdict is remembered


@pytest.mark.parametrize("method", ["srt", "co_rewarding_1", "self_harmony"])
@pytest.mark.parametrize("vote_by", ["count", "excess"])
def test_a_selections_elections_share_one_time_limit(method, vote_by, monkeypatch, caplog):
    """A worker that never answers in time: no election of the same step waits for it again."""
    spent = []

    def evaluate(formula, left):
        spent.append(left)
        return False, None

    monkeypatch.setattr(symbolic, "_worker", SimpleNamespace(evaluate=evaluate))
    monkeypatch.setattr(symbolic, "_known", {})
    monkeypatch.setattr(symbolic, "time", SimpleNamespace(monotonic=lambda: sum(spent)))
    _key_of_short.cache_clear()
    answers = [r"\int_0^1 x \, dx", "1/2", r"\int_0^2 x \, dx", "2"]
    options = MethodOptions(method=method, vote_by=vote_by, vote_seconds=3.0)
    second = torch.tensor([False, False, True, True])
    with caplog.at_level(logging.WARNING, logger="mgrpo_kernels"):
        select(torch.ones(4, 1, dtype=torch.bool), answers, 4, options, second_wording=second)
    assert sum(spent) == 3.0
    assert caplog.text.count("3 s, is used up") == 1


def test_a_stalled_worker_costs_no_more_than_the_votes_time(worker):
    assert answers_equal(HALF, "0.5")
    os.kill(worker._process.pid, signal.SIGSTOP)  # takes no CPU time
    start = time.monotonic()
    vote = majority_vote([r"\int_0^2 x \, dx", "2"], 2, seconds=1.0)
    assert time.monotonic() - start < 10.0
    assert vote.cluster.tolist() == [0, 1]
    assert answers_equal(r"\int_0^2 x \, dx", "2")  # asked again, of a new worker


def test_a_dead_worker_is_replaced(worker):
    assert answers_equal(HALF, "0.5")
    worker._process.kill()
    worker._process.wait()
    assert answers_equal(r"\int_0^2 x \, dx", "2")


def test_a_verdict_that_a_killed_worker_took_along_is_not_remembered(worker):
    assert answers_equal(HALF, "0.5")
    worker.limit = 60.0
    killer = subprocess.Popen(["sh", "-c", f"sleep 0.3; kill -9 {worker._process.pid}"])
    assert worker.evaluate(HANGS) == (False, None)
    killer.wait()
    assert answers_equal(r"\int_0^2 x \, dx", "2")
    assert HANGS not in worker._hopeless


def test_the_worker_may_not_take_all_memory(worker):
    assert answers_equal(HALF, "0.5")
    limits = Path(f"/proc/{worker._process.pid}/limits").read_text()
    assert re.search(rf"Max address space +{2 << 30} ", limits), limits


def test_a_signal_gets_through_while_the_worker_works(worker):
    """A handler that raises ends the wait, and no late reply meets the next question."""
    assert answers_equal(HALF, "0.5")
    worker.limit = 60.0

    def interrupt(signum, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    sender = subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -TERM {os.getpid()}"])
    try:
        start = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            majority_vote([HANGS, "3"], 2, seconds=60.0)
        assert time.monotonic() - start < 20.0
    finally:
        signal.signal(signal.SIGTERM, before)
        sender.wait()
    assert answers_equal(r"\int_0^2 x \, dx", "2")
    assert not answers_equal(r"\int_0^2 x \, dx", "3")


def test_without_math_verify(worker, monkeypatch):
    monkeypatch.setattr(math_worker.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ImportError, match=r'expected math-verify, .* got none installed; pip install "mgrpo_kernels\[train\]"'
    ):
        answers_equal(HALF, "0.5")
    assert majority_vote(["1/2", "0.5", "yes", r"\sqrt{0.25}"], 4).labels == ["1/2"]  # other answers need none


def test_a_worker_that_does_not_start(worker, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="expected the math-verify worker to start, got exit status 1"):
        answers_equal(HALF, "0.5")


def run_script(tmp_path: Path, body: str) -> subprocess.Popen[str]:
    """Run a script that has no __main__ guard."""
    script = tmp_path / "script.py"
    head = f"import sys; sys.path.insert(0, {str(REPO)!r})\nimport mgrpo_kernels.vote as v\nfrom mgrpo_kernels.vote import symbolic as s\n"
    script.write_text(head + body)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment)


def test_a_script_without_a_main_guard(tmp_path):
    process = run_script(
        tmp_path,
        f"print(v.answers_equal('0.5', {HALF!r}), s._worker._process.pid, flush=True)\n"
        "maps = open(f'/proc/{s._worker._process.pid}/maps').read()\n"
        "print('libtorch' in maps, flush=True)\n"
        # A child that outlives the script, and holds the worker's pipe open.
        "import os, time\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    os.close(1); time.sleep(30); os._exit(0)\n"
        "print(child)\n",
    )
    out, _ = process.communicate(timeout=120)
    verdict, pid, torch_too, child = out.split()
    try:
        assert process.returncode == 0
        assert verdict == "True"
        assert torch_too == "False"
        assert gone_within(int(pid), 5.0)  # it ends with the script
    finally:
        os.kill(int(child), signal.SIGKILL)


def test_a_killed_asker_leaves_no_hanging_worker(tmp_path):
    process = run_script(
        tmp_path,
        "s._worker.limit = 3.0\n"
        f"v.answers_equal('0.5', {HALF!r})\n"
        "print(s._worker._process.pid, flush=True)\n"
        f"v.answers_equal({HANGS!r}, '2')\n",
    )
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    time.sleep(0.5)  # by now it hangs
    process.kill()
    process.wait()
    process.stdout.close()
    time.sleep(0.2)
    assert alive(pid)  # the end of its pipe means nothing to it
    assert gone_within(pid, 60.0)  # the limit of its CPU time does


def test_a_forked_process_has_a_worker_of_its_own(worker):
    assert answers_equal(HALF, "0.5")
    pid = worker._process.pid
    child = os.fork()
    if child == 0:
        same = answers_equal(r"\int_0^2 x \, dx", "2") and worker._process.pid != pid
        worker.close()
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert answers_equal(r"\int_0^4 x \, dx", "8")
    assert worker._process.pid == pid


def test_a_formula_is_asked_about_once(worker, monkeypatch):
    asked = []
    monkeypatch.setattr(
        MathWorker, "evaluate", lambda self, formula, seconds=None: asked.append(formula) or (True, "2")
    )
    for _ in range(3):
        assert answers_equal(r"\int_0^2 x \, dx", "2")
        assert canonical_key(r"\int_0^2 x \, dx") == canonical_key("2")
    assert len(asked) == 1
