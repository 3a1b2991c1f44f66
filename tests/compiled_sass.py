"""What a kernel's machine code says of its speed: an iteration of its streaming loop, and how many warps fit a multiprocessor."""

import collections
import re

# Bytes of a load by its suffix; without one it moves 4.
LOAD = re.compile(r"LDG(?:STS)?\.E")
WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}


class Limits(collections.namedtuple("Limits", "registers unit warps threads programs shared reserved")):
    """What a multiprocessor has: registers (allocated by the unit, a warp at a time), warps and programs at most, bytes of shared memory.

    `reserved` bytes of shared memory are the system's, for each program. On AMD warps are waves of 64 threads, registers those of a
    thread on one of four SIMDs.
    """


# CUDA C++ programming guide, "Compute Capabilities": tables "Technical Specifications per Compute Capability"; and CUDA's occupancy
# calculator (cuda_occupancy.h) for the allocation unit of registers. Of gfx942: LLVM's AMDGPU backend, AMDGPUBaseInfo.cpp
# (getVGPRAllocGranule, getTotalNumVGPRs, getMaxWavesPerEU) and AMDGPUSubtarget's getMaxWorkGroupsPerCU.
LIMITS = {
    "sm_80": Limits(65536, 256, 64, 32, 32, 164 * 1024, 1024),
    "sm_90": Limits(65536, 256, 64, 32, 32, 228 * 1024, 1024),
    "sm_100": Limits(65536, 256, 64, 32, 32, 228 * 1024, 1024),
    "gfx942": Limits(512, 8, 32, 64, 16, 64 * 1024, 0),
}


def occupancy(target, registers, shared, num_warps):
    """Return how many warps a multiprocessor holds of programs of `num_warps` with these registers a thread and bytes shared."""
    limits = LIMITS[target]
    if target.startswith("gfx"):
        by_simd = limits.registers // _up(max(1, registers), limits.unit)
        by_registers = 4 * by_simd // num_warps
        programs = limits.warps if num_warps == 1 else limits.programs
    else:
        # A warp's registers come from one of the four schedulers' files.
        by_scheduler = limits.registers // 4 // _up(max(1, registers) * limits.threads, limits.unit)
        by_registers = 4 * by_scheduler // num_warps
        programs = limits.programs
    by_shared = limits.shared // max(1, _up(shared, 128) + limits.reserved)
    return min(limits.warps // num_warps, by_registers, by_shared, programs) * num_warps


def _up(number, unit):
    return -(-number // unit) * unit


# ------------------------------------------------------------------------------------------------------------------ loops


class Instruction(collections.namedtuple("Instruction", "guard opcode operands")):
    """One line of SASS: "@!P0", "LDG.E.128", "R4, desc[UR6][R2.64]"."""

    @property
    def kind(self):
        """The opcode without what modifies it."""
        return self.opcode.split(".")[0]

    @property
    def target(self):
        """Address that a branch leads to, None of other instructions."""
        return int(TARGET.search(self.operands)[1], 16) if self.kind == "BRA" else None

    @property
    def load_bytes(self):
        """Bytes that a thread loads from global memory."""
        if not LOAD.match(self.opcode):
            return 0
        return max((WIDTHS[part] for part in self.opcode.split(".") if part in WIDTHS), default=4)


LINE = re.compile(r"/\*([0-9a-f]+)\*/\s+(@!?U?P\w+)?\s*([A-Z][\w.]*)\s*(.*?)\s*;")
TARGET = re.compile(r"\b0x([0-9a-f]+)$")


def blocks(sass):
    """Return the basic blocks, lists of instructions, and each one's successors, of what nvdisasm prints of one kernel's code."""
    lines = [(int(match[1], 16), Instruction(match[2] or "", match[3], match[4])) for match in LINE.finditer(sass)]
    targets = {each.target for _, each in lines}
    found, starting_at, ended = [], {}, True
    for address, instruction in lines:
        if ended or address in targets:
            starting_at[address] = len(found)
            found.append([])
        found[-1].append(instruction)
        ended = instruction.kind in ("BRA", "EXIT", "RET", "BRX", "JMP")
    successors = []
    for i, block in enumerate(found):
        last = block[-1]
        after = [] if last.target is None else [starting_at[last.target]]
        always = not last.guard and not re.match(r"U?P\d", last.operands)
        if not (always and last.kind in ("BRA", "EXIT", "RET")) and i + 1 < len(found):
            after.append(i + 1)
        successors.append(after)
    return found, successors


def streaming_loop(sass):
    """Return the instructions of one iteration of the loop that streams, on its shortest way round.

    It is the loop with the most bytes in loads of 16 bytes or more, and of such loops the one with the most bytes in all: an inner loop
    over labels, unrolled by the assembler, may load as many bytes in narrow loads. Shortest: what only some tiles do (a label's, say) is
    branched over, as most iterations do.
    """
    found, successors = blocks(sass)
    best, most = [], (0, 0)
    for latch, after in enumerate(successors):
        for header in after:
            if header > latch:
                continue
            path = _shortest(found, successors, header, latch)
            sizes = [instruction.load_bytes for i in path for instruction in found[i]]
            loaded = sum(size for size in sizes if size >= 16), sum(sizes)
            if loaded > most:
                best, most = [instruction for i in path for instruction in found[i]], loaded
    return best


def _shortest(found, successors, first, last):
    """Return the path of blocks with the fewest instructions."""
    cost, before, waiting = {first: len(found[first])}, {}, {first}
    while waiting:
        i = min(waiting, key=cost.get)
        waiting.remove(i)
        if i == last:
            break
        for j in successors[i]:
            if cost[i] + len(found[j]) < cost.get(j, 1 << 30):
                cost[j], before[j] = cost[i] + len(found[j]), i
                waiting.add(j)
    if last not in cost:
        return []
    path = [last]
    while path[-1] != first:
        path.append(before[path[-1]])
    return path[::-1]


# Units of half a warp a clock for each scheduler. The rest (FADD, FMUL, FFMA, IMAD, moves) have a whole one, or are few.
ALU = frozenset([
    "FMNMX", "FSEL", "SEL", "FSETP", "ISETP", "SHF", "LOP3", "PRMT", "IADD3", "LEA", "MOV", "PLOP3", "VIADD", "HSETP2", "F2FP",
    "P2R", "R2P", "IABS", "VIMNMX", "I2FP",
])  # fmt: skip


def pipes(instructions):
    """Return how many of them go to the units that are slower than issue: "mufu" (exponentials, reciprocals) and "alu"."""
    names = [instruction.kind for instruction in instructions]
    return {"mufu": names.count("MUFU"), "alu": sum(name in ALU for name in names)}
