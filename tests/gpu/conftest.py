"""The device that the tests of this folder run on.

``pytest tests/gpu`` runs them on a GPU. With MGRPO_GPU_TESTS_ON=cpu the same tests run on CPU tensors, small, through Triton's
interpreter, to prove the tests themselves; those that mean nothing there are marked ``device_only`` and are skipped.
MGRPO_GPU_TESTS_EVERY=n keeps the first of each test function's cases and every n-th after it.
"""

import os
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest
import torch
from on_device import DEVICE, ON_CPU

HERE = Path(__file__).resolve().parent


def pytest_configure(config):
    config.addinivalue_line("markers", "device_only: means nothing on a CPU")


def pytest_collection_modifyitems(config, items):
    every, seen, kept, left_out = int(os.environ.get("MGRPO_GPU_TESTS_EVERY", "1")), Counter(), [], []
    for item in items:
        if HERE not in item.path.parents:
            kept.append(item)
            continue
        (left_out if seen[item.function] % every else kept).append(item)
        seen[item.function] += 1
    if left_out:
        items[:] = kept
        config.hook.pytest_deselected(items=left_out)
    for item in items:
        if ON_CPU and HERE in item.path.parents and item.get_closest_marker("device_only"):
            item.add_marker(pytest.mark.skip(reason="no GPU on this machine, which this test needs"))


@pytest.fixture(autouse=True, scope="session")
def kernels_run_as_meant():
    """Fail where a GPU would be given the interpreter, or a CPU the compiler."""
    setting = os.environ.get("TRITON_INTERPRET")
    assert (setting == "1") == ON_CPU, f"expected TRITON_INTERPRET=1 on a CPU alone, got {setting} for {DEVICE.type}"


@pytest.fixture(autouse=True)
def as_on_a_gpu():
    """Send the CPU down a GPU's path where the ops know the difference: the host does not count masked rows."""
    if not ON_CPU:
        yield
        return
    with mock.patch("mgrpo_kernels.ops._rows.can_read", return_value=False):
        yield


@pytest.fixture(autouse=True)
def no_leftovers():
    """Give back what a test of gigabytes held, and see a failed kernel in the test that launched it."""
    yield
    if not ON_CPU:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
