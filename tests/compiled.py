"""Compiles every Triton kernel for every target, with no GPU, and keeps tests/compiled_kernels.json: what the compilers made of each.

python tests/compiled.py --write-table    renews the table, for this version of Triton; the others' entries stay
python tests/compiled.py --bounds         prints the first table of docs/kernels_without_a_gpu.md from it
scripts/compile_tables.sh                 does these things for every version of Triton that the project supports
"""

import importlib.metadata
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

import compiled_launches as launches  # noqa: E402
import compiled_sass  # noqa: E402
import torch  # noqa: E402

from mgrpo_kernels.ops._triton import tuning  # noqa: E402

TABLE = Path(__file__).with_name("compiled_kernels.json")
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
# The target of a tuned device, by a word of its name.
DEVICES = {"a100": "sm_80", "h100": "sm_90", "h200": "sm_90", "gh200": "sm_90", "b200": "sm_100", "mi300x": "gfx942"}
# A tensor of rows x vocabulary may pass 2^31 elements: the argument whose offsets must be int64.
HUGE = {
    "token_stats.forward_kernel": "logits",
    "token_stats.merge_kernel": "logits",
    "token_stats.backward_kernel": "logits",
    "linear_token_stats.state_kernel": "x",
    "linear_token_stats.gradient_kernel": "x",
    "linear_token_stats.entry.top_kernel": "x",
    "linear_token_stats.entry.select_kernel": "ids",
    "linear_token_stats.fused.gradient_kernel": "out",
    "kept_token_stats.logits_kernel": "x",
    "kept_token_stats.hidden_gradient_kernel": "out",
    "kept_token_stats.weight_gradient_kernel": "out",
}


# ------------------------------------------------------------------------------------------------------ streaming kernels


def row_loads(args, options):
    """Return how many elements a step takes, and the bytes of an element in each tensor it loads."""
    sizes = [args[name].element_size() for name in ("logits", "x", "bias") if args.get(name) is not None]
    return options["STEPS"] * options["LANES"], sizes


def ema_loads(args, options):
    code = options["SEEN"].bit_length() - 1
    sizes = [(4, 2, 2, 8)[kind] for kind in (code % 4, code // 4 % 4)]
    return options["BLOCK"], [size for size in sizes if size == max(sizes)]  # narrower values come in narrower loads


# Kernels that stream rows or tensors through memory: these must move 16 bytes a load.
STREAMING = {
    "token_stats.forward_kernel": row_loads,
    "token_stats.backward_kernel": row_loads,
    "linear_token_stats.state_kernel": row_loads,
    "linear_token_stats.gradient_kernel": row_loads,
    "ema.update_kernel": ema_loads,
}


def loop_of(name, args, options, sass):
    """Return (elements of a thread, instructions) of an iteration of the streaming loop, or None where there is not one."""
    if name not in STREAMING or options.get("SEEN", 1).bit_count() > 1:
        return None
    elements, sizes = STREAMING[name](args, options)
    threads = 32 * options["num_warps"]
    loop = compiled_sass.streaming_loop(sass)
    loaded = sum(each.load_bytes for each in loop if each.load_bytes >= 16)
    steps, rest = divmod(loaded * threads, elements * sum(sizes))  # several, where the assembler unrolled the loop
    if not steps or rest:
        raise ValueError(f"{name}: {loaded} bytes loaded by a thread in an iteration of {elements // threads} elements")
    return steps * elements // threads, loop


# ---------------------------------------------------------------------------------------------------------------- compile


def compile_one(target, call):
    """Return what Triton makes of one launch."""
    import triton

    _, kernel, args, options = call
    gpu = launches.gpu_target(target)
    # On AMD, Triton addresses tensors below 2 GiB in another way. Logits are often larger, but recorded with a few rows only.
    with mock.patch("triton.backends.amd.compiler.HIPBackend.is_within_2gb", return_value=False):
        source, chosen = launches.source(kernel, args, options, gpu)
    return triton.compile(source, target=gpu, options=chosen.__dict__)


def measure(target, dtype, call, device, compiled, sass):
    """Return what the compiler says of one launch, given its code; `sass` is None on AMD. The table's part of it is named in COLUMNS."""
    variant, kernel, args, options = call
    name = launches.name_of(kernel.fn.__module__, kernel.fn.__name__)
    kind = str(dtype).removeprefix("torch.")
    variant += f", tuned for {device}" if device else ""
    entry = {"kernel": name, "key": f"{name}, {kind}: {variant}", "shared": compiled.metadata.shared}
    if sass is None:
        text = compiled.asm["amdgcn"]
        # A scalar register spills to lanes of a vector register: no memory, but instructions; 4 bytes each.
        spills = sum(int(n) for n in re.findall(r"\.(?:vgpr|sgpr)_spill_count:\s+(\d+)", text))
        scratch = sum(int(n) for n in re.findall(r"\.private_segment_fixed_size:\s+(\d+)", text))
        entry["spilled"] = max(4 * spills, scratch)
        entry["registers"] = max(int(n) for n in re.findall(r"\.vgpr_count:\s+(\d+)", text))
        loads = re.findall(r"(?:global|buffer)_load_(dwordx\d|dword|ushort|sshort|short|ubyte|sbyte|lds)", text)
        entry["load"] = max((AMD_WIDTHS.get(load, 1) for load in loads), default=0)
        entry["barriers"] = text.count("s_barrier")
    else:
        usage = resource_usage(compiled.asm["cubin"])
        entry["spilled"] = usage["STACK"] + usage["LOCAL"]
        entry["registers"] = usage["REG"]
        entry["barriers"] = sass.count("BAR.SYNC")
        found, _ = compiled_sass.blocks(sass)
        entry["load"] = max((each.load_bytes for block in found for each in block), default=0)
        if loop := loop_of(name, args, options, sass):
            elements, instructions = loop
            entry["loop"] = round(len(instructions) / elements, 2)
            pipes = compiled_sass.pipes(instructions).items()
            entry |= {kind: round(count / elements, 3) for kind, count in pipes} | {"elements": elements}
    num_warps = options["num_warps"]
    entry["warps"] = compiled_sass.occupancy(target, entry["registers"], entry["shared"], num_warps)
    if "SEEN" in options:
        entry["combinations"] = options["SEEN"].bit_count()
    if huge := HUGE.get(name):
        entry["int64_offsets"] = adds_int64(str(compiled.asm["ttir"]), huge)
    return entry


AMD_WIDTHS = {"dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16, "ushort": 2, "sshort": 2, "short": 2}


def adds_int64(ttir, name):
    """Return whether the argument `name`, or a tensor of copies of it, has int64 offsets added."""
    copies = re.findall(rf"%(\w+) = tt\.splat %{name} :", ttir)
    pointers = "|".join([rf"{name}\w*", *copies])
    return bool(re.search(rf"tt\.addptr %(?:{pointers}), %[\w#]+ : .*(?:x|, )i64\b", ttir))


def resource_usage(cubin):
    """Return registers and bytes of stack (where spills go) of a cubin, as NVIDIA's own tool reads them."""
    text = nvidia_tool(cubin, "cuobjdump", ".cubin", "-res-usage")
    return {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}


def disassembled(target, cubins):
    """Return cubin -> its machine code as text. One run takes them all, one after the other: to start takes it half a second."""
    number = int(target.removeprefix("sm_"))
    code = {cubin: machine_code(cubin) for cubin in cubins}
    kind = f"SM{number}{'a' if number >= 90 else ''}"  # as Triton has it compiled
    text = nvidia_tool(b"".join(code.values()), "nvdisasm", ".bin", "--binary", kind, "--no-dataflow")
    lines = iter(compiled_sass.LINE.finditer(text))
    size = 16  # bytes of an instruction
    texts = {cubin: "\n".join(next(lines)[0] for _ in range(len(each) // size)) for cubin, each in code.items()}
    assert next(lines, None) is None, f"{target}: more instructions than the kernels have"
    return texts


def machine_code(cubin):
    """Return the instructions in a cubin of one kernel: the ELF section whose name begins with .text."""
    (headers,), (size, number, names) = struct.unpack_from("<Q", cubin, 40), struct.unpack_from("<3H", cubin, 58)
    sections = [struct.unpack_from("<2I4Q", cubin, headers + i * size) for i in range(number)]
    start = sections[names][4]
    (found,) = [each for each in sections if cubin.startswith(b".text.", start + each[0])]
    return cubin[found[4] : found[4] + found[5]]


def nvidia_tool(data, tool, suffix, *options):
    """Run one of the tools that come with Triton on a file."""
    import triton

    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=suffix) as file:
        file.write(data)
        file.flush()
        return subprocess.run([folder / tool, *options, file.name], check=True, capture_output=True, text=True).stdout


def tuned_for(target):
    """Return the (device, sizes) that are shipped for a target: the defaults, of no device, and each tuned device's."""
    shipped = [(None, tuning.Tuning())]
    for path in sorted(tuning.FOLDER.glob("*.json")):
        (of_device,) = {DEVICES[word] for word in path.stem.split("-") if word in DEVICES}
        if of_device == target and tuning.read(path) != tuning.Tuning():
            shipped.append((path.stem, tuning.read(path)))
    return shipped


def compile_for(target):
    """Return the reports of all kernels."""
    with mock.patch.object(torch.version, "hip", "an AMD build" if target.startswith("gfx") else None):
        calls = [
            (dtype, call, device)
            for device, tuned in tuned_for(target)
            for op, function in launches.LAUNCHES.items()
            for dtype in launches.DTYPES
            for call in launches.record(op, function, dtype, tuned)
        ]
    made = [compile_one(target, call) for _, call, _ in calls]
    amd = target.startswith("gfx")
    sass = {} if amd else disassembled(target, {each.asm["cubin"] for each in made})
    return [measure(target, *calls[i], each, sass.get(each.asm.get("cubin"))) for i, each in enumerate(made)]


def count_variants():
    """Return how many variants of each kernel the numbers of rows ask for."""
    variants = {}
    for op, function in launches.BY_ROWS.items():
        for rows in (1, 2, 3, 16, 33, 4096):
            for _, kernel, args, options in launches.record(op, function, rows):
                wanted, _ = launches.source(kernel, args, options, launches.gpu_target("sm_90"))
                seen = variants.setdefault(launches.name_of(kernel.fn.__module__, kernel.fn.__name__), set())
                seen.add(repr((wanted.signature, wanted.constants, wanted.attrs, sorted(options.items()))))
    return {name: len(seen) for name, seen in variants.items()}


def environment():
    """Return that of a process in which kernels compile."""
    return {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}


def reports():
    """Return target -> the reports of all its kernels. Two processes at a time; Triton's cache makes a second run quick."""
    running = [
        subprocess.Popen([sys.executable, __file__, *half], env=environment(), stdout=subprocess.PIPE, text=True)
        for half in (TARGETS[::2], TARGETS[1::2])
    ]
    outputs = [process.communicate(timeout=900)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    return {target: found for output in outputs for target, found in json.loads(output).items()}


# -------------------------------------------------------------------------------------------------------------- the table

# registers of a thread, bytes spilled by it, bytes of shared memory of a program, bytes of the widest load from global memory,
# instructions of the streaming loop for each element, warps that a multiprocessor holds.
COLUMNS = ("registers", "spilled", "shared", "load", "loop", "warps")
# Of the streaming loop: instructions of the slower units for each element, elements of a thread's iteration. The bounds are of them.
COUNTS = ("alu", "mufu", "elements")
SLACK = 4  # registers more that pass, where as many warps fit as before
RENEW = "python tests/compiled.py --write-table renews tests/compiled_kernels.json"


def version():
    """Return Triton's, major and minor: another one makes other code."""
    return ".".join(importlib.metadata.version("triton").split(".")[:2])


def entries(found):
    """Return target -> key -> what the table holds, of reports."""
    table = {}
    for target, some in found.items():
        of_target = table.setdefault(target, {})
        for report in some:
            assert report["key"] not in of_target, f"two launches are called {report['key']}"
            of_target[report["key"]] = {column: report[column] for column in COLUMNS + COUNTS if column in report}
    return table


def read_table():
    """Return version -> target -> key -> entry."""
    return json.loads(TABLE.read_text(encoding="utf-8")) if TABLE.exists() else {}


def write_table(found):
    """Put the entries in place of this version's. One line each."""
    table = read_table() | {version(): entries(found)}
    text = json.dumps(dict(sorted(table.items(), key=lambda item: [int(n) for n in item[0].split(".")])), indent=1)
    TABLE.write_text(re.sub(r"\{\s+(\"registers\"[^}]*?)\s+\}", lambda m: f"{{{' '.join(m[1].split())}}}", text) + "\n")


def compare(old, new):
    """Return what got worse and what got better from one entry to the other, in words."""
    worse, better = [], []
    for column in COLUMNS:
        before, now = old.get(column), new.get(column)
        if before == now:
            continue
        if before is None or now is None:
            worse.append(f"{column}: {before} before, {now} now")
            continue
        growth = now - before if column not in ("load", "warps") else before - now
        if column == "registers" and 0 < growth <= SLACK and new["warps"] >= old["warps"]:
            continue
        (worse if growth > 0 else better).append(f"{column}: {before} before, {now} now")
    return worse, better


def compare_tables(old, new):
    """Return what got worse, or is missing on either side, and what got better: lines that begin with the entry's key."""
    worse, better = [], []
    for key in sorted(old.keys() | new.keys()):
        if key not in new:
            worse.append(f"{key}: in the table, but no longer launched")
        elif key not in old:
            worse.append(f"{key}: not in the table")
        else:
            for lines, found in zip((worse, better), compare(old[key], new[key]), strict=True):
                lines.extend(f"{key}: {what}" for what in found)
    return worse, better


if __name__ == "__main__":
    if sys.argv[1:] == ["--write-table"]:
        write_table(reports())
    elif sys.argv[1:] == ["--bounds"]:
        import compiled_bounds

        print(compiled_bounds.table({version: table["sm_90"] for version, table in read_table().items()}))
    else:
        found = (
            count_variants()
            if sys.argv[1:] == ["variants"]
            else {target: compile_for(target) for target in sys.argv[1:]}
        )
        json.dump(found, sys.stdout)
