"""What a test needs and does not find: a failure in CI, which installs all of it, and a skip elsewhere."""

import importlib.util
import os

import pytest
import torch

from mgrpo_kernels import _native


def absent(reason, *, module=False):
    """End the test, or with `module` the collection of its file, with a reason that names what is missing."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason, allow_module_level=module)


def need(package, install):
    """Have a package, or end the test: `install` says how to get it."""
    if importlib.util.find_spec(package) is None:
        absent(f"{package} is not installed: {install}")


def need_native():
    """Have the native kernels, or end the test."""
    if _native.missing() is not None:
        absent(f"the native kernels are missing: {_native.missing()}")


def need_instructions(isa):
    """Have a CPU with an instruction set, or skip. ATEN_CPU_CAPABILITY is not held to what the CPU has: more ends in SIGILL."""
    order, here = ["DEFAULT", "AVX2", "AVX512"], torch.backends.cpu.get_cpu_capability()
    if order.index(isa) > (order.index(here) if here in order else 0):
        pytest.skip(f"this CPU has {here}, not {isa}")
