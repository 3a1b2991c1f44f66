"""Every Triton kernel lowered to TTIR for each kind of argument: integers of 1, multiples of 16, odd, above 2^31; None; every dtype."""

import sys
from pathlib import Path

import compiled_launches
import compiled_options
import compiled_sweep
import pytest

FAULTY = Path(__file__).with_name("faulty_kernels.py")


@pytest.fixture(scope="module")
def swept():
    """Kernel -> how many variants of it were lowered; and what failed."""
    if not sys.platform.startswith("linux"):
        pytest.skip("there is no triton for this platform")  # on Linux it is a dependency: its absence is an error
    return compiled_sweep.run(
        ["token_stats", "ema", "iqr_filter", "policy_loss"],
        ["linear_token_stats", "kept_token_stats", "linear_policy_loss"],
    )


def test_every_op_is_swept():
    assert compiled_options.OPTIONS.keys() == compiled_launches.LAUNCHES.keys()


def test_every_kernel_compiles_for_every_kind_of_argument(swept):
    counts, failures = swept
    assert failures == []
    assert counts.keys() == compiled_launches.kernels_in_source()
    assert min(counts.values()) >= 4, counts


def test_the_sweep_finds_faulty_kernels():
    counts, failures = compiled_sweep.run([str(FAULTY)])
    name = "faulty.{}".format
    # With and without a mask, the stride: 7 and 4097, which are one variant; 1; 4096; and above 2^31.
    assert counts[name("sound_kernel")] == 2 * 4
    found = {line.partition(":")[0]: line for line in failures}
    assert found.keys() == counts.keys() - {name("sound_kernel")}
    assert "every integer 1: " in found[name("stride_of_1_kernel")]
    assert "object has no attribute 'to'" in found[name("stride_of_1_kernel")]
    assert "every integer above 2^31: " in found[name("many_rows_kernel")]
    assert "as recorded: " in found[name("absent_mask_kernel")]
    assert found[name("mask_never_absent_kernel")].endswith("mask is never absent")
