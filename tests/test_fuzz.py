"""Some hundred random calls of every op, valid and broken, in a process of their own: what ends it fails the test alone."""

import subprocess
import sys
from pathlib import Path

import fuzz_ops
import pytest
import torch

from mgrpo_kernels import policy_loss


@pytest.mark.parametrize(("backends", "calls"), [("native,reference", 400), ("triton", 40)])
def test_a_call_returns_or_raises_a_clean_error(backends, calls):
    command = [sys.executable, fuzz_ops.__file__, "--calls", str(calls), "--backends", backends]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_the_calls_reach_every_op_and_every_native_kernel():
    reached = set()
    for number in range(180):
        draw = fuzz_ops.random.Random(number)
        with fuzz_ops.recorded() as calls:
            fuzz_ops.backward(fuzz_ops.MAKERS[number % len(fuzz_ops.MAKERS)](draw, "native")())
        reached |= {call.name.removesuffix(".default") for call in calls}
    ops = {name.partition(".")[0].replace("::", ".") for name in torch._C._dispatch_get_all_op_names()}
    wanted = {name for name in ops if name.startswith(("mgrpo_kernels.", "mgrpo_native."))}
    assert wanted - reached == {f"mgrpo_native.{name}" for name in fuzz_ops.WITHOUT_TENSORS}


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda: {}["x"], "raised KeyError"),
        (lambda: torch._C._broken, "raised AttributeError"),
        (lambda: torch._assert(False, "x"), "raised AssertionError"),
        (lambda: (_ for _ in ()).throw(RuntimeError("INTERNAL ASSERT FAILED")), "an internal assertion failed"),
    ],
)
def test_an_unclean_error_is_a_fault(function, message):
    assert fuzz_ops.fault(fuzz_ops.Call("f", function), valid=False, differentiate=False).startswith(message)


def test_a_valid_call_that_raises_is_a_fault():
    short = fuzz_ops.Call("policy_loss", policy_loss, (torch.zeros(2, 3), None, torch.zeros(3)))
    assert fuzz_ops.fault(short, valid=False, differentiate=True) is None
    assert "a valid call raised ValueError: advantages" in fuzz_ops.fault(short, valid=True, differentiate=True)


def test_the_same_seed_makes_the_same_calls():
    runs = []
    for _ in range(2):
        runs.append([])
        for number in range(20):
            fuzz_ops.one(3, number, ("native",), runs[-1].append)
    assert runs[0] == runs[1]
    assert len({call.split("(")[0] for call in runs[0]}) > 8
