"""The sizes that depend on the device: the file that holds them, and the sweep that writes it."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from mgrpo_kernels.ops._statistics import EVERYTHING
from mgrpo_kernels.ops._triton import tuning
from mgrpo_kernels.ops.linear_token_stats import tiled
from mgrpo_kernels.ops.linear_token_stats import triton as head
from mgrpo_kernels.ops.linear_token_stats.specs import Head

REPOSITORY = Path(__file__).resolve().parents[1]

# Sweeps one size, whose candidates fail in every way that a candidate can.
FAULTY_SWEEP = """
import os, signal, sys, time
sys.path.insert(0, "benchmarks")
import torch, tune

RIGHT, broken = torch.ones(3), []
RAISED = [ValueError("does not compile"), tune.triton.runtime.errors.OutOfResources(9, 8, "registers"), AssertionError("assert"), SystemExit(3)]

def run():
    kind, number = tune.tuning.of(None).stats_forward
    if broken:
        raise RuntimeError("every later candidate of this process fails, too")
    if kind == 1:
        raise RAISED[number]
    if kind == 2:
        broken.append(True)
        raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")
    if kind == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == 4:
        time.sleep(600)
    if kind == 5:
        return (RIGHT * [1.1, float("nan")][number],)
    time.sleep(0.2 if kind == 256 else 0.01)
    return (RIGHT,)

tune.sweep = lambda work=None: {"stats_forward": (CANDIDATES, lambda: run), "backward_rows": ([16384], lambda: lambda: (RIGHT,))}
tune.in_order = lambda candidates, default, dry: candidates
tune.main(__file__)
"""


@pytest.fixture(scope="module")
def cut_short(tmp_path_factory):
    """Start a sweep that hangs until its time is over. It sleeps for most of it, so tests of other sweeps run meanwhile."""
    folder = tmp_path_factory.mktemp("cut_short")
    script, out = folder / "faulty.py", folder / "tuning.json"
    script.write_text(FAULTY_SWEEP.replace("CANDIDATES", "[(256, 4), (512, 2), (4, 0), (512, 4)]"))
    with subprocess.Popen(
        [sys.executable, script, "--dry-run", "--out", out, "--minutes", "0.5"],
        cwd=REPOSITORY,
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        yield process, out
        process.send_signal(signal.SIGINT)  # it ends the process that measures, too


def test_every_committed_choice_can_be_read():
    for path in tuning.FOLDER.glob("*.json"):
        assert isinstance(tuning.read(path), tuning.Tuning)
        assert path.stem == tuning.slug(json.loads(path.read_text())["device"])


def test_a_device_gets_its_own_choice_and_any_other_the_defaults(tmp_path):
    mine = dataclasses.replace(tuning.Tuning(), stats_forward=(512, 2), matmul="fused")
    (tmp_path / "some-gpu-80gb.json").write_text(json.dumps({"tuning": dataclasses.asdict(mine)}))
    device = torch.device("cuda", 0)
    for name, want in (("Some GPU (80GB)", mine), ("Another", tuning.Tuning())):
        tuning.of.cache_clear()
        with (
            mock.patch.object(tuning, "FOLDER", tmp_path),
            mock.patch.object(torch.cuda, "get_device_name", return_value=name),
        ):
            assert tuning.of(device) == want
    tuning.of.cache_clear()
    assert tuning.of(torch.device("cpu")) == tuning.Tuning()


def test_an_unknown_size_is_an_error(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"tuning": {"lanes": 3}}))
    with pytest.raises(TypeError, match="lanes"):
        tuning.read(path)


@pytest.mark.usefixtures("cut_short")
def test_the_sweep_runs_and_the_library_reads_what_it_writes(tmp_path):
    out = tmp_path / "tuning.json"
    subprocess.run(
        [sys.executable, "benchmarks/tune.py", "--dry-run", "--out", out],
        check=True,
        cwd=REPOSITORY,
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(REPOSITORY)},
        timeout=300,
        stdout=subprocess.DEVNULL,
    )
    result = json.loads(out.read_text())
    fields = {field.name for field in dataclasses.fields(tuning.Tuning)}
    assert set(result["measured"]) == fields  # no size is left to a guess
    assert set(dataclasses.asdict(tuning.read(out))) == fields
    assert all(entry.get("ms", 0) > 0 for entries in result["measured"].values() for entry in entries)


def test_a_candidate_that_fails_is_recorded_and_skipped_whatever_it_did(tmp_path):
    """The first candidate, which the others are compared with, is among those that fail."""
    candidates = [(3, 0), (256, 4), (1, 0), (1, 1), (1, 2), (1, 3), (2, 0), (4, 0), (5, 0), (5, 1), (512, 2), (3, 1)]
    script, out = tmp_path / "faulty.py", tmp_path / "tuning.json"
    script.write_text(FAULTY_SWEEP.replace("CANDIDATES", str(candidates)))
    done = subprocess.run(
        [sys.executable, script, "--dry-run", "--out", out, "--seconds-per-candidate", "4"],
        check=False,
        cwd=REPOSITORY,
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(REPOSITORY)},
        timeout=300,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    measured = {tuple(each["value"]): each for each in result["measured"]["stats_forward"]}
    assert list(measured) == candidates
    assert {value for value, each in measured.items() if "ms" in each} == {(256, 4), (512, 2)}
    for value, text in {
        (3, 0): "crashed: its process was killed by SIGKILL",
        (1, 0): "ValueError: does not compile",
        (1, 1): "OutOfResources: out of resource: registers",
        (1, 2): "AssertionError: assert",
        (1, 3): "crashed: its process ended with exit code 3",
        (2, 0): "RuntimeError: Triton Error [CUDA]: an illegal memory access",
        (4, 0): "hung: it was killed after 4 s",
        (5, 0): "AssertionError: stats_forward=(5, 0) gives a wrong result",
        (5, 1): "AssertionError: stats_forward=(5, 1) gives a wrong result",
        (3, 1): "crashed: its process was killed by SIGKILL",
    }.items():
        assert measured[value]["failed"].startswith(text), measured[value]
        assert text in done.stdout
    assert result["tuning"]["stats_forward"] == [512, 2]
    assert result["measured"]["backward_rows"][0]["ms"] > 0
    assert result["not_reached"] == []
    assert tuning.read(out) == dataclasses.replace(tuning.Tuning(), stats_forward=(512, 2))


def test_a_sweep_cut_short_keeps_what_it_measured(cut_short):
    process, out = cut_short
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    result = json.loads(out.read_text())
    assert [each["value"] for each in result["measured"]["stats_forward"] if "ms" in each] == [[256, 4], [512, 2]]
    assert result["tuning"]["stats_forward"] == [512, 2]
    assert result["not_reached"] == ["stats_forward", "backward_rows"]
    assert "stats_forward=[4, 0] cut off" in printed
    assert "the sweep is incomplete: no time left after 30 s" in printed


@pytest.mark.parametrize(("multiprocessors", "columns"), [(132, 8448), (108, 6912), (148, 9472), (304, 9728)])
def test_a_forward_tile_gives_every_multiprocessor_the_same_work(multiprocessors, columns):
    shape = head.forward_shape(8192, tuning.Tuning(), multiprocessors)
    assert shape == (8192, columns)
    rows_of_tiles, columns_of_tiles = 8192 // head.MATMUL_TILE[0], columns // head.MATMUL_TILE[1]
    assert rows_of_tiles * columns_of_tiles % multiprocessors == 0


@pytest.mark.parametrize(("rows", "matmuls"), [(1, 1), (400, 1), (1024, 3), (8192, 18), (20000, 54)])
def test_fewer_rows_take_fewer_matmuls(rows, matmuls):
    """152064 columns on an H100; the logits of a tile are about as many, whatever the rows."""
    shape = head.forward_shape(rows, tuning.Tuning(), 132)
    assert shape.rows * min(shape.columns, 152064) <= 1.1 * 8192 * 8192
    widths = [each.stop - each.start for each in tiled.spans(152064, shape.columns, shape.columns)]
    assert widths[:-1] == [shape.columns] * (len(widths) - 1)
    assert len(widths) * len(list(tiled.spans(rows, shape.rows))) == matmuls


def test_forward_multiplies_in_those_tiles():
    hidden, weight = torch.randn(3, 8), torch.randn(1100, 8)
    sizes = tuning.Tuning(forward_tile=(4, 512))
    of_all = Head(weight, None, 1.0, 1.0, None, 0, None)
    with mock.patch.object(tuning, "of", return_value=sizes), mock.patch.object(head, "MATMUL_TILE", (1, 512)):
        shape = head.forward_shape(3, sizes, 1)
        with mock.patch.object(tiled, "accumulate", wraps=tiled.accumulate) as accumulate:
            head.forward(hidden, of_all, None, EVERYTHING)
    assert [call.args[0].shape[1] for call in accumulate.call_args_list] == [512, 512, 76]
    assert shape.columns == 512
