"""Every @triton.jit kernel compiled for every target, with no GPU: no spills, 16-byte loads, 64-bit addressing, nothing worse than before.

The launches are those that the backends would make. tests/compiled.py, run without the interpreter, records them instead of running
them, compiles what they ask for and reports; tests/compiled_kernels.json holds what it found when it was last renewed.
"""

import json
import subprocess
import sys
import warnings

import compiled as compiling
import compiled_bounds
import compiled_launches
import compiled_sass
import pytest

TARGETS = compiling.TARGETS
PARKED = (
    8  # bytes: Triton 3.6's assembler parks a loop-invariant value or two to fit one more program on a multiprocessor
)
# Two pointers that this kernel uses after its loop, where the assembler takes 64 or 72 registers (32 or 28 warps).
PARKED_POINTERS = {"linear_token_stats.entry.top_kernel": 16}

# What moves less than 16 bytes a load, and should not: with waves of 64 the update's step leaves a thread 4 elements.
NARROW = {("gfx942", "ema.update_kernel, bfloat16: bfloat16 from bfloat16, stochastic"): 8}


@pytest.fixture(scope="module")
def compiled():
    """Target -> the reports of all its kernels."""
    if not sys.platform.startswith("linux"):
        pytest.skip("there is no triton for this platform")  # on Linux it is a dependency: its absence is an error
    return compiling.reports()


def test_no_jit_function_hides_outside_the_kernel_files():
    other = [path for path in compiled_launches.PACKAGE.parent.rglob("*.py") if not path.name.endswith("kernels.py")]
    assert not [path.name for path in other if "@triton.jit" in path.read_text()]


def test_every_kernel_is_compiled(compiled):
    assert set(compiled) == set(TARGETS)
    for reports in compiled.values():
        assert {entry["kernel"] for entry in reports} == compiled_launches.kernels_in_source()


def test_the_number_of_rows_compiles_nothing_new():
    output = subprocess.run(
        [sys.executable, compiling.__file__, "variants"],
        env=compiling.environment(),
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    variants = json.loads(output.stdout)
    # merge_kernel's PARTS is a power of 2, at most that of the programs which fill the device: a few variants, and none for many rows.
    assert set(variants) == compiled_launches.kernels_in_source() - {"token_stats.merge_kernel"}
    assert {name: count for name, count in variants.items() if count > 1} == {}


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_spills(compiled, target):
    # Our own matmul is shipped where a device's tuning chooses it. Where none does it may spill, but no more than the table says:
    # on gfx942 246 to 320 scalar registers to lanes of vector registers.
    shipped = any(tuned.matmul == "fused" for _, tuned in compiling.tuned_for(target))
    may_spill = target == "gfx942" and not shipped
    entries = [entry for entry in compiled[target] if not (may_spill and ".fused." in entry["kernel"])]
    assert [entry for entry in entries if entry["spilled"] > PARKED_POINTERS.get(entry["kernel"], PARKED)] == []


@pytest.mark.parametrize("target", TARGETS)
def test_every_program_fits_a_multiprocessor(compiled, target):
    assert [entry for entry in compiled[target] if not entry["warps"]] == []


@pytest.mark.parametrize("target", TARGETS)
def test_16_byte_loads(compiled, target):
    streaming = [entry for entry in compiled[target] if entry["kernel"] in compiling.STREAMING]
    assert {entry["kernel"] for entry in streaming} == set(compiling.STREAMING)
    assert [entry for entry in streaming if entry["load"] < NARROW.get((target, entry["key"]), 16)] == []


@pytest.mark.parametrize("target", TARGETS)
def test_the_momentum_update_keeps_values_in_their_threads(compiled, target):
    updates = [entry for entry in compiled[target] if entry.get("combinations") == 1]
    assert updates
    assert [entry for entry in updates if entry["shared"]] == []


@pytest.mark.parametrize("target", TARGETS)
def test_rows_are_addressed_in_64_bits(compiled, target):
    huge = [entry for entry in compiled[target] if "int64_offsets" in entry]
    assert {entry["kernel"] for entry in huge} == set(compiling.HUGE)
    assert [entry for entry in huge if not entry["int64_offsets"]] == []


@pytest.mark.parametrize("target", TARGETS)
def test_the_labels_gradient_is_written_after_all_others(compiled, target):
    """Its logit is read before any thread writes, and its gradient is written after every thread has: a barrier each."""
    found = [entry for entry in compiled[target] if entry["kernel"] == "linear_token_stats.gradient_kernel"]
    assert found
    assert [entry for entry in found if entry["barriers"] < 2] == []


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_what_is_not_asked_for_takes_no_instructions(compiled, target):
    loops = {entry["key"]: entry["loop"] for entry in compiled[target] if "loop" in entry}
    for kernel, fewer in (
        ("state", 3.5),
        ("gradient", 1.0),
    ):  # an element; SUM_EXPZ and SUM take more than beta and gamma
        for what in ("float32: {}", "bfloat16: {}", "bfloat16: {}, logits in 16 bits"):
            key = f"linear_token_stats.{kernel}_kernel, {what}"
            assert loops[key.format("log-prob alone")] <= loops[key.format("plain")] - fewer


# ------------------------------------------------------------------------------------------------------------- the table


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_got_worse(compiled, target):
    version = compiling.version()
    table = compiling.read_table()
    assert version in table, f"nothing is known of Triton {version}: {compiling.RENEW}"
    worse, better = compiling.compare_tables(
        table[version].get(target, {}), compiling.entries({target: compiled[target]})[target]
    )
    if better:
        warnings.warn("\n".join([f"{target}: better than the table; {compiling.RENEW}", *better]), stacklevel=1)
    assert not worse, "\n".join([f"{target}: if that is wanted, {compiling.RENEW}", *worse])


def test_the_table_covers_the_pinned_triton_and_that_of_the_oldest_torch():
    table = compiling.read_table()
    assert table.keys() == {"3.6", "3.9"}
    keys = [{target: entries.keys() for target, entries in of_version.items()} for of_version in table.values()]
    assert keys[0] == keys[1]
    assert keys[0].keys() == set(TARGETS)


def test_the_page_shows_the_table():
    page = (compiling.REPOSITORY / "docs" / "kernels_without_a_gpu.md").read_text(encoding="utf-8")
    versions = {version: entries["sm_90"] for version, entries in compiling.read_table().items()}
    assert compiled_bounds.table(versions) in page, "python tests/compiled.py --bounds prints it"


ENTRY = {"registers": 60, "spilled": 0, "shared": 32, "load": 16, "loop": 11.5, "warps": 32}


@pytest.mark.parametrize(
    "change",
    [{"registers": 65}, {"registers": 62, "warps": 24}, {"spilled": 8}, {"shared": 64}, {"load": 8}, {"loop": 11.6}],
)
def test_what_counts_as_worse(change):
    worse, better = compiling.compare(ENTRY, ENTRY | change)
    assert worse
    assert not better
    worse, better = compiling.compare(ENTRY | change, ENTRY)
    assert not worse
    assert better


def test_what_does_not_count_as_worse():
    assert compiling.compare(ENTRY, ENTRY | {"registers": 64}) == ([], [])
    without = {key: value for key, value in ENTRY.items() if key != "loop"}
    for old, new in ((ENTRY, without), (without, ENTRY)):
        assert compiling.compare(old, new)[0], "a loop that is no longer found, or was not"
    for old, new in (({}, {"a": ENTRY}), ({"a": ENTRY}, {})):
        assert len(compiling.compare_tables(old, new)[0]) == 1


@pytest.mark.parametrize(
    ("target", "registers", "shared", "num_warps", "warps"),
    [
        ("sm_90", 32, 0, 8, 64),
        ("sm_90", 33, 0, 8, 48),  # 40 registers: 12 warps a scheduler
        ("sm_90", 255, 0, 8, 8),
        ("sm_90", 32, 0, 1, 32),  # 32 programs
        ("sm_90", 32, 113 * 1024, 8, 16),  # and 1 KiB for the system, twice
        ("sm_90", 32, 114 * 1024, 8, 8),
        ("sm_80", 32, 114 * 1024, 8, 8),
        ("sm_80", 32, 164 * 1024, 8, 0),
        ("gfx942", 64, 0, 4, 32),
        ("gfx942", 65, 0, 4, 28),  # 72 registers
        ("gfx942", 32, 33 * 1024, 4, 4),
    ],
)
def test_occupancy(target, registers, shared, num_warps, warps):
    assert compiled_sass.occupancy(target, registers, shared, num_warps) == warps


SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/              @!P1 LDG.E.128 R12, desc[UR6][R20.64+0x2000] ;
        /*0020*/                   LDG.E.U16 R3, desc[UR6][R22.64] ;
        /*0030*/               @P2 BRA 0x60 ;
        /*0040*/                   FADD R1, R2, R3 ;
        /*0050*/                   MUFU.EX2 R1, R2 ;
        /*0060*/                   FMNMX R1, R2, R3, !PT ;
        /*0070*/               @P0 BRA 0x10 ;
        /*0080*/                   LDG.E R2, desc[UR6][R22.64] ;
        /*0090*/               @P0 BRA 0x80 ;
        /*00a0*/                   EXIT ;
        /*00b0*/                   BRA 0xb0;
"""


def test_the_streaming_loop_is_found_and_its_rare_part_left_out():
    loop = compiled_sass.streaming_loop(SASS)
    assert [each.opcode for each in loop] == ["LDG.E.128", "LDG.E.U16", "BRA", "FMNMX", "BRA"]
    assert [each.load_bytes for each in loop] == [16, 2, 0, 0, 0]
    assert loop[0].guard == "@!P1"
    assert compiled_sass.pipes(loop) == {"mufu": 0, "alu": 1}


def test_an_unrolled_loop_of_narrow_loads_is_not_taken_for_the_streaming_loop():
    loads = [f"        /*{0x1000 + 16 * i:04x}*/                   LDG.E R3, desc[UR6][R22.64] ;" for i in range(6)]
    inner = "\n".join([*loads, "        /*1060*/               @P0 BRA 0x1000 ;"])
    assert compiled_sass.streaming_loop(inner + SASS) == compiled_sass.streaming_loop(SASS)
