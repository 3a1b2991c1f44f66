"""Every @triton.jit kernel compiled for every target, with no GPU: no spills, 16-byte loads, 64-bit addressing.

The launches are those that the backends would make: a script of its own (this file, run without the interpreter) records them
instead of running them, and compiles what they ask for.
"""

import importlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "mgrpo_kernels" / "ops"
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
DTYPES = (torch.float32, torch.bfloat16)
VOCAB = 151936  # of Qwen
# Kernels that stream rows or tensors through memory: these must move 16 bytes a load.
STREAMING = (
    "token_stats.forward_kernel",
    "token_stats.backward_kernel",
    "linear_token_stats.state_kernel",
    "linear_token_stats.gradient_kernel",
    "ema.update_kernel",
)
# A tensor of rows x vocabulary may pass 2^31 elements: the argument whose offsets must be int64.
HUGE = {
    "token_stats.forward_kernel": "logits",
    "token_stats.merge_kernel": "logits",
    "token_stats.backward_kernel": "logits",
    "linear_token_stats.state_kernel": "x",
    "linear_token_stats.gradient_kernel": "x",
}
PARKED = (
    8  # bytes: Triton 3.6's assembler parks a loop-invariant value or two to fit one more program on a multiprocessor
)


# ---------------------------------------------------------------------------------------------- the launches to compile


def token_stats(backend, dtype):
    from mgrpo_kernels.ops.token_stats.specs import Wanted

    grad = torch.ones(4)
    for rows, labels_each, wanted in (
        (4, 1, (True, True, False)),
        (4, 5, (True, True, True)),
        (1, 1, (True, False, False)),
    ):
        logits, labels = torch.zeros(rows, VOCAB, dtype=dtype), torch.zeros(rows, labels_each, dtype=torch.int64)
        per_row = grad[:rows] if labels_each > 1 else 0.7
        mask = torch.ones(rows, dtype=torch.bool) if labels_each > 1 else None
        with mock.patch(
            "mgrpo_kernels.ops._triton.launch.processors", lambda device, rows=rows: 1 if rows > 1 else 132
        ):
            backend.forward(logits, labels, mask, per_row, Wanted(*wanted))
        grads = (torch.ones(rows, labels_each), grad[:rows] if wanted[1] else None, grad[:rows] if wanted[2] else None)
        backend.backward(torch.empty_like(logits), *grads, logits, labels, mask, per_row, grad[:rows], grad[:rows])


def linear_token_stats(backend, dtype):
    from mgrpo_kernels.ops.linear_token_stats.specs import Head

    x, labels = torch.zeros(64, 8192, dtype=dtype), torch.zeros(64, dtype=torch.int64)
    weight, bias, row = torch.zeros(8192, 8, dtype=dtype), torch.zeros(8192, dtype=dtype), torch.ones(64)
    for head in (Head(weight, None, 0.7, 1.0, None, 0, None), Head(weight, bias, row, 0.5, 30.0, 8192, None)):
        backend.GpuPasses.state(x, head, labels, torch.zeros(6, 64))
        backend.GpuPasses.gradient_(x, head, labels, torch.ones(4, 64), row)


def policy_loss(backend, dtype):
    from mgrpo_kernels.ops.policy_loss import specs

    values, offsets, mask = (
        torch.zeros(4096, dtype=dtype),
        torch.arange(0, 4097, 512),
        torch.ones(4096, dtype=torch.bool),
    )
    for kind, loss_type in enumerate(specs.LOSS_TYPES if dtype == torch.float32 else specs.LOSS_TYPES[:2]):
        level, mode = specs.IMPORTANCE_LEVELS[kind % 2], specs.BEHAVIOUR_MODES[kind % 4]
        mode = mode.replace("sequence", "token") if loss_type == "vespo" else mode
        options = specs.LossOptions(
            loss_type, level, kl_estimator=specs.KL_ESTIMATORS[kind % 3], kl_bias_correction=kind % 2 == 1, behaviour_mode=mode,
            max_response_tokens=512, clip_delta=2.0 if kind == 0 else None,
        )  # fmt: skip
        some = values if kind % 2 else None
        advantages = values if kind % 3 else values[:8]
        tokens = specs.Tokens(values, values, advantages, mask, offsets, some, some, values, None, None)
        scale, baseline = specs.SCALES[kind % 3], specs.BASELINES[kind % 2]
        groups = specs.Groups(
            torch.zeros(8), torch.arange(0, 9, 4), torch.ones(8, dtype=torch.bool), baseline, scale, 1e-6
        )
        if kind % 2:
            backend.forward(tokens, None, options)
            if kind == 1:  # short sequences
                backend.forward(tokens._replace(offsets=torch.arange(0, 4097, 64), advantages=values), None, options)
        else:
            backend.forward(tokens._replace(advantages=None), groups, options)
            backend.group_advantages(groups)


def ema(backend, dtype):
    from mgrpo_kernels.ops.ema.specs import Batch, Span

    whole = torch.zeros(100_000)
    narrow = whole.to(dtype)
    decay = torch.tensor(0.9, dtype=torch.float64)
    span = Span(0, 100_000, 0)
    backend.update_(Batch([whole], [narrow], [narrow], decay, [], [span]))
    backend.update_(Batch([narrow], [narrow], [], decay, [(1, 2)], [span]))
    mixed = [whole, narrow, whole.half(), whole.double()]
    backend.update_(Batch(mixed, mixed[::-1], mixed[1:] + mixed[:1], decay, [(1, 2)] * 4, [span] * 4))


def iqr_filter(backend, dtype):
    for mask in (None, torch.ones(64, dtype=torch.bool)):
        backend.forward(torch.zeros(64), torch.arange(0, 65, 16), mask, 0.75)


LAUNCHES = {
    "token_stats": token_stats,
    "linear_token_stats": linear_token_stats,
    "policy_loss": policy_loss,
    "ema": ema,
    "iqr_filter": iqr_filter,
}


# -------------------------------------------------------------------------------- the script: records, compiles, reports


def by_rows(backend, rows):
    """Launch everything that takes a number of rows, tokens or rollouts."""
    from mgrpo_kernels.ops.linear_token_stats.specs import Head
    from mgrpo_kernels.ops.policy_loss import specs
    from mgrpo_kernels.ops.token_stats.specs import Wanted

    values, labels = torch.zeros(rows), torch.zeros(rows, dtype=torch.int64)
    x = torch.zeros(rows, 512)
    if hasattr(backend, "group_advantages"):
        offsets, mask = torch.arange(0, 4 * rows + 1, 4), torch.ones(4 * rows, dtype=torch.bool)
        groups = specs.Groups(values, torch.tensor([0, rows]), None, "mean", "std", 1e-6)
        tokens = specs.Tokens(torch.zeros(4 * rows), None, None, mask, offsets, None, None, None, None, None)
        backend.forward(tokens, groups, specs.LossOptions())
        backend.group_advantages(groups)
    elif hasattr(backend, "GpuPasses"):
        head = Head(torch.zeros(512, 8), None, 0.7, 1.0, None, rows, None)  # `rows` also as the tile's first entry
        backend.GpuPasses.state(x, head, labels, torch.zeros(6, rows))
        backend.GpuPasses.gradient_(x, head, labels, torch.zeros(4, rows), values)
    else:
        backend.forward(x, labels.unsqueeze(-1), None, 0.7, Wanted(True, True, False))
        backend.backward(
            torch.empty_like(x), values.unsqueeze(-1), values, None, x, labels.unsqueeze(-1), None, 0.7, values, values
        )


def count_variants():
    """Return how many variants of each kernel the numbers of rows ask for."""
    variants = {}
    for op, rows in itertools.product(("token_stats", "linear_token_stats", "policy_loss"), (1, 2, 3, 16, 33, 4096)):
        for kernel, args, options in record(op, rows, by_rows):
            wanted = source(kernel, args, options)
            seen = variants.setdefault(f"{op}.{kernel.__name__}", set())
            seen.add(repr((wanted.signature, wanted.constants, wanted.attrs, sorted(options.items()))))
    return {name: len(seen) for name, seen in variants.items()}


def record(op, argument, launches=None):
    """Return the (kernel, arguments by name, options) of an op's launches."""
    backend = importlib.import_module(f"mgrpo_kernels.ops.{op}.triton")
    calls = []

    def note(kernel, grid, like, *args, enable_fp_fusion=True, **options):
        names = [parameter.name for parameter in kernel.params]
        calls.append((kernel, dict(zip(names, args, strict=False)), options | {"enable_fp_fusion": enable_fp_fusion}))

    with mock.patch.object(backend, "launch", note):
        (launches or LAUNCHES[op])(backend, argument)
    return calls


def source(kernel, args, options):
    """Return what Triton would compile for a launch with these arguments: their types and what it specialises on."""
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = options[parameter.name] if parameter.is_constexpr else args[parameter.name]
        special = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and special):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + POINTERS[value.dtype]
            aligned = value.data_ptr() % 16 == 0
        elif isinstance(value, float):
            signature[parameter.name], aligned = "fp32", False
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = value % 16 == 0 and special
        if aligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


POINTERS = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64",
    torch.int64: "i64", torch.int32: "i32", torch.uint8: "u8",
}  # fmt: skip


def report(target, op, dtype, call):
    """Compile one launch and return what the compiler says of it."""
    import triton
    from triton.backends.compiler import GPUTarget

    kernel, args, options = call
    amd = target.startswith("gfx")
    gpu = GPUTarget("hip", target, 64) if amd else GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    compiler_options = {key: options[key] for key in ("num_warps", "enable_fp_fusion") if key in options}
    compiled = triton.compile(source(kernel, args, options), target=gpu, options=compiler_options)
    name = f"{op}.{kernel.__name__}"
    entry = {"kernel": name, "dtype": str(dtype).removeprefix("torch."), "shared": compiled.metadata.shared}
    if amd:
        text = compiled.asm["amdgcn"]
        entry["spilled"] = sum(int(n) for n in re.findall(r"\.(?:vgpr|sgpr)_spill_count:\s+(\d+)", text))
        entry["spilled"] += sum(int(n) for n in re.findall(r"\.private_segment_fixed_size:\s+(\d+)", text))
        entry["registers"] = max(int(n) for n in re.findall(r"\.vgpr_count:\s+(\d+)", text))
        entry["wide_loads"] = len(re.findall(r"(?:global|buffer)_load_dwordx4", text))
    else:
        usage = resource_usage(compiled.asm["cubin"])
        entry["spilled"] = usage["STACK"] + usage["LOCAL"]
        entry["registers"] = usage["REG"]
        entry["wide_loads"] = len(
            re.findall(r"ld\.global[.\w:]*\.v(?:4\.(?:b|f|u)32|2\.b64|8\.b32|4\.b64)", compiled.asm["ptx"])
        )
    if "SEEN" in options:
        entry["combinations"] = options["SEEN"].bit_count()
    huge = HUGE.get(name)
    if huge is not None:
        entry["int64_offsets"] = bool(
            re.search(rf"tt\.addptr %{huge}\w*, %[\w#]+ : !tt\.ptr<\w+>, i64", str(compiled.asm["ttir"]))
        )
    return entry


def resource_usage(cubin):
    """Return registers and bytes of stack (where spills go) of a cubin, as NVIDIA's own tool reads them."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    return {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}


def compile_all(targets):
    results = {}
    for target in targets:
        with mock.patch.object(torch.version, "hip", "an AMD build" if target.startswith("gfx") else None):
            calls = [(op, dtype, call) for op in LAUNCHES for dtype in DTYPES for call in record(op, dtype)]
        results[target] = [report(target, *call) for call in calls]
    return results


# ------------------------------------------------------------------------------------------------------------- the tests


def environment():
    """Return that of a process in which kernels compile."""
    return {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | {
        "PYTHONPATH": str(REPOSITORY)
    }


@pytest.fixture(scope="module")
def compiled():
    """Target -> the reports of all its kernels. Two processes at a time; Triton's cache makes a second run quick."""
    pytest.importorskip("triton", reason="there is no triton for this platform")
    running = [
        subprocess.Popen([sys.executable, __file__, *half], env=environment(), stdout=subprocess.PIPE, text=True)
        for half in (TARGETS[::2], TARGETS[1::2])
    ]
    outputs = [process.communicate(timeout=600)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    return {target: reports for output in outputs for target, reports in json.loads(output).items()}


def kernels_in_source():
    """Return op.function of every @triton.jit function that the package holds and no other one calls."""
    found = {}
    for path in sorted(PACKAGE.glob("*/*kernels.py")):
        text = path.read_text()
        for name in re.findall(r"^@triton\.jit[^\n]*\ndef (\w+)", text, re.MULTILINE):
            found[f"{path.parent.name}.{name}"] = name
    sources = [path.read_text() for path in PACKAGE.glob("*/*kernels.py")]
    return {key for key, name in found.items() if sum(len(re.findall(rf"\b{name}\(", text)) for text in sources) == 1}


def test_no_jit_function_hides_outside_the_kernel_files():
    other = [path for path in PACKAGE.parent.rglob("*.py") if not path.name.endswith("kernels.py")]
    assert not [path.name for path in other if "@triton.jit" in path.read_text()]


def test_every_kernel_is_compiled(compiled):
    assert set(compiled) == set(TARGETS)
    for reports in compiled.values():
        assert {entry["kernel"] for entry in reports} == kernels_in_source()


def test_the_number_of_rows_compiles_nothing_new():
    output = subprocess.run(
        [sys.executable, __file__, "variants"],
        env=environment(),
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    variants = json.loads(output.stdout)
    assert len(variants) == 6
    assert {name: count for name, count in variants.items() if count > 1} == {}


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_spills(compiled, target):
    assert [entry for entry in compiled[target] if entry["spilled"] > PARKED] == []


@pytest.mark.parametrize("target", TARGETS)
def test_16_byte_loads(compiled, target):
    streaming = [entry for entry in compiled[target] if entry["kernel"] in STREAMING]
    assert {entry["kernel"] for entry in streaming} == set(STREAMING)
    assert [entry for entry in streaming if not entry["wide_loads"]] == []


@pytest.mark.parametrize("target", TARGETS)
def test_the_momentum_update_keeps_values_in_their_threads(compiled, target):
    updates = [entry for entry in compiled[target] if entry.get("combinations") == 1]
    assert updates
    assert [entry for entry in updates if entry["shared"]] == []


@pytest.mark.parametrize("target", TARGETS)
def test_rows_are_addressed_in_64_bits(compiled, target):
    huge = [entry for entry in compiled[target] if "int64_offsets" in entry]
    assert {entry["kernel"] for entry in huge} == set(HUGE)
    assert [entry for entry in huge if not entry["int64_offsets"]] == []


if __name__ == "__main__":
    json.dump(count_variants() if sys.argv[1:] == ["variants"] else compile_all(sys.argv[1:]), sys.stdout)
