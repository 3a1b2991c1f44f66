"""The launches that the backends make, recorded instead of run: what tests/compiled.py compiles.

A new kernel or configuration is a few lines here. A function of LAUNCHES yields a name and then calls the backend: what it launches
up to the next name is entered under it, in a table of one entry for each kernel, dtype and name.
"""

import ast
import importlib
from pathlib import Path
from unittest import mock

import torch

from mgrpo_kernels.ops._triton import tuning

PACKAGE = Path(tuning.__file__).parents[1]
DTYPES = (torch.float32, torch.bfloat16)
VOCAB = 151936  # of Qwen


def token_stats(backend, dtype):
    from mgrpo_kernels.ops.token_stats.specs import Wanted

    grad = torch.ones(4)
    for name, rows, labels_each, wanted in (
        ("log-prob and entropy", 4, 1, (True, True, False)),
        ("all, 5 labels, mask, temperature a row", 4, 5, (True, True, True)),
        ("log-prob, rows in parts", 1, 1, (True, False, False)),
    ):
        yield name
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
    from mgrpo_kernels.ops._statistics import Wanted
    from mgrpo_kernels.ops.linear_token_stats.specs import Entries, Head

    hidden, labels = torch.zeros(64, 64, dtype=dtype), torch.zeros(64, dtype=torch.int64)
    x, grad = torch.zeros(64, 8192), torch.zeros(64, 8192, dtype=dtype)
    weight, bias, row = torch.zeros(8192, 64, dtype=dtype), torch.zeros(8192, dtype=dtype), torch.ones(64)
    for name, head in (
        ("plain", Head(weight, None, 0.7, 1.0, None, 0, None)),
        ("bias", Head(weight, bias, 0.7, 1.0, None, 0, None)),
        ("bias, softcap, temperature a row", Head(weight, bias, row, 0.5, 30.0, 8192, None)),
    ):
        yield name
        state, coefficients = torch.zeros(6, 64), torch.ones(4, 64)
        backend.GpuPasses().state(x, head, labels, state)
        backend.GpuPasses().gradient(x, head, labels, coefficients, row, grad)
        if dtype.itemsize == 2:
            backend.FusedPasses().fill(None, hidden, head, labels, state)
            backend.FusedPasses().fill_gradient(grad, hidden, head, labels, coefficients, row, grad)
    plain = head._replace(bias=None, softcap=None)
    alone = Wanted(True, False, False)
    yield "log-prob alone"
    backend.GpuPasses(alone).state(x, plain, labels, state)
    backend.GpuPasses(alone).gradient(x, plain, labels, coefficients, row, grad)
    if dtype.itemsize == 2:
        backend.FusedPasses(alone).fill(None, hidden, plain, labels, state)
        backend.FusedPasses(alone).fill_gradient(grad, hidden, plain, labels, coefficients, row, grad)
        yield "log-prob alone, logits in 16 bits"
        backend.GpuPasses(alone).state(grad, plain, labels, state)
        backend.GpuPasses(alone).gradient(grad, plain, labels, coefficients, row, grad)
        yield "plain, logits written"
        backend.FusedPasses().fill(x, hidden, plain, labels, state)
        yield "plain, logits in 16 bits"
        backend.GpuPasses().state(grad, plain, labels, state)
        backend.GpuPasses().gradient(grad, plain, labels, coefficients, row, grad)
        backend.FusedPasses().fill(grad, hidden, plain, labels, state)
    for name, each, room in (
        ("plain", plain, 4096),
        ("bias, softcap, temperature a row", head, 4096),
        ("few entries", plain, 513),
    ):
        yield name
        entries = Entries.empty(64, room, hidden.device)
        with mock.patch.object(backend.GpuPasses, "state"):  # is above
            backend.TopPasses(Wanted(True, True, False), entries, 0, 1e-6).state(x, each, labels, state)
        backend.select(each, coefficients, row, 2.0**-8, entries)


def kept_token_stats(backend, dtype):
    weight, ids = torch.zeros(8192, 1024, dtype=dtype), torch.zeros(64, 128, dtype=torch.int32)
    hidden, grad = torch.zeros(64, 1024, dtype=dtype), torch.zeros(64, 128)
    for name, need_bias in (("plain", False), ("bias", True)):
        yield name
        if not need_bias:
            backend.logits(hidden, weight, ids, None)
            backend.hidden_gradient(grad, weight, ids, None)
        backend.weight_gradient(grad, hidden, ids, weight, need_bias, None)


def linear_policy_loss(backend, dtype):
    yield "any"
    backend.scale_([torch.zeros(8192, 64, dtype=dtype)], torch.ones(()))


def policy_loss(backend, dtype):
    from mgrpo_kernels.ops.policy_loss import specs

    values, offsets, mask = (
        torch.zeros(4096, dtype=dtype),
        torch.arange(0, 4097, 512),
        torch.ones(4096, dtype=torch.bool),
    )
    for kind, loss_type in enumerate(specs.LOSS_TYPES if dtype == torch.float32 else specs.LOSS_TYPES[:2]):
        level, mode = specs.IMPORTANCE_LEVELS[kind % 2], specs.BEHAVIOUR_MODES[kind % 4 if kind < 8 else kind - 4]
        mode = mode.replace("sequence", "token") if loss_type == "vespo" else mode
        options = specs.LossOptions(
            loss_type,
            level,
            kl_estimator=specs.KL_ESTIMATORS[kind % 3],
            kl_bias_correction=kind % 2 == 1,
            behaviour_mode=mode,
            max_response_tokens=512,
            clip_delta=2.0 if kind == 0 else None,
            off_policy_delta=0.1 if kind >= 8 else None,
        )
        some = values if kind % 2 else None
        advantages = values if kind % 3 else values[:8]
        tokens = specs.Tokens(values, values, advantages, mask, offsets, some, some, values, None, None)
        scale, baseline = specs.SCALES[kind % 3 if kind < 8 else 3], specs.BASELINES[kind % 2]
        groups = specs.Groups(
            torch.zeros(8), torch.arange(0, 9, 4), torch.ones(8, dtype=torch.bool), baseline, scale, 1e-6
        )
        name = f"{loss_type}, {level} ratio, {mode}"
        if kind % 2:
            yield name
            backend.forward(tokens, None, options)
        else:
            yield f"{name}, {baseline} / {scale}"
            backend.forward(tokens._replace(advantages=None), groups, options)
            backend.group_advantages(groups)
        if kind == 1:
            yield f"{name}, short sequences"
            backend.forward(tokens._replace(offsets=torch.arange(0, 4097, 64), advantages=values), None, options)


def ema(backend, dtype):
    from mgrpo_kernels.ops.ema.specs import Batch, Span

    whole = torch.zeros(100_000)
    narrow = whole.to(dtype)
    decay = torch.tensor(0.9, dtype=torch.float64)
    span = Span(0, 100_000, 0)
    kind = str(dtype).removeprefix("torch.")
    yield f"float32 from {kind}, {kind} copy"
    backend.update_(Batch([whole], [narrow], [narrow], decay, [], [span]))
    yield f"{kind} from {kind}, stochastic"
    backend.update_(Batch([narrow], [narrow], [], decay, [(1, 2)], [span]))
    yield "all dtypes, stochastic"
    mixed = [whole, narrow, whole.half(), whole.double()]
    backend.update_(Batch(mixed, mixed[::-1], mixed[1:] + mixed[:1], decay, [(1, 2)] * 4, [span] * 4))


def iqr_filter(backend, dtype):
    for name, mask in (("no mask", None), ("mask", torch.ones(64, dtype=torch.bool))):
        yield name
        backend.forward(torch.zeros(64), torch.arange(0, 65, 16), mask, 0.75)


LAUNCHES = {
    "token_stats": token_stats,
    "linear_token_stats": linear_token_stats,
    "kept_token_stats": kept_token_stats,
    "linear_policy_loss": linear_policy_loss,
    "policy_loss": policy_loss,
    "ema": ema,
    "iqr_filter": iqr_filter,
}


# ------------------------------------------------------------- everything that takes a number of rows, tokens or rollouts


def token_stats_by_rows(backend, rows):
    from mgrpo_kernels.ops.token_stats.specs import Wanted

    yield rows
    x, values, labels = torch.zeros(rows, 512), torch.zeros(rows), torch.zeros(rows, 1, dtype=torch.int64)
    backend.forward(x, labels, None, 0.7, Wanted(True, True, False))
    backend.backward(torch.empty_like(x), values.unsqueeze(-1), values, None, x, labels, None, 0.7, values, values)


def linear_token_stats_by_rows(backend, rows):
    from mgrpo_kernels.ops._statistics import EVERYTHING
    from mgrpo_kernels.ops.linear_token_stats.specs import Entries, Head

    yield rows
    values, labels = torch.zeros(rows), torch.zeros(rows, dtype=torch.int64)
    weight = torch.zeros(512, 64, dtype=torch.bfloat16)
    head = Head(weight, None, 0.7, 1.0, None, rows, None)  # `rows` also as the tile's first entry
    x, grad = torch.zeros(rows, 512), torch.zeros(rows, 512, dtype=torch.bfloat16)
    hidden = torch.zeros(rows, 64, dtype=torch.bfloat16)
    state, coefficients = torch.zeros(6, rows), torch.zeros(4, rows)
    backend.GpuPasses().state(x, head, labels, state)
    backend.GpuPasses().gradient(x, head, labels, coefficients, values, grad)
    backend.FusedPasses().fill(None, hidden, head, labels, state)
    backend.FusedPasses().fill_gradient(grad, hidden, head, labels, coefficients, values, grad)
    entries = Entries.empty(rows, 64, hidden.device)
    backend.TopPasses(EVERYTHING, entries, 0, 1e-6).state(x, head, labels, state)
    backend.select(head, coefficients, values, 2.0**-8, entries)


def kept_token_stats_by_rows(backend, rows):
    yield rows
    weight, ids = torch.zeros(512, 64, dtype=torch.bfloat16), torch.zeros(rows, 128, dtype=torch.int32)
    hidden, grad = torch.zeros(rows, 64, dtype=torch.bfloat16), torch.zeros(rows, 128)
    backend.logits(hidden, weight, ids, None)
    backend.hidden_gradient(grad, weight, ids, None)
    backend.weight_gradient(grad, hidden, ids, weight, True, None)


def linear_policy_loss_by_rows(backend, rows):
    yield rows
    backend.scale_([torch.zeros(rows, 64)], torch.ones(()))


def policy_loss_by_rows(backend, rows):
    from mgrpo_kernels.ops.policy_loss import specs

    yield rows
    offsets, mask = torch.arange(0, 4 * rows + 1, 4), torch.ones(4 * rows, dtype=torch.bool)
    groups = specs.Groups(torch.zeros(rows), torch.tensor([0, rows]), None, "mean", "std", 1e-6)
    tokens = specs.Tokens(torch.zeros(4 * rows), None, None, mask, offsets, None, None, None, None, None)
    backend.forward(tokens, groups, specs.LossOptions())
    backend.group_advantages(groups)


def ema_by_rows(backend, rows):
    """Update `rows` tensors, and tensors of `rows` elements."""
    from mgrpo_kernels.ops.ema.specs import Batch, Span

    yield rows
    for number, size in ((rows, 100), (1, rows)):
        tensors = [torch.zeros(size) for _ in range(number)]
        decay = torch.tensor(0.9, dtype=torch.float64)
        backend.update_(Batch(tensors, tensors, [], decay, [], [Span(0, size, 0)] * number))


def iqr_filter_by_rows(backend, rows):
    """Filter `rows` groups of one, and one group of `rows`."""
    yield rows
    for offsets in (torch.arange(rows + 1), torch.tensor([0, rows])):
        backend.forward(torch.zeros(rows), offsets, None, 0.75)


BY_ROWS = {
    "token_stats": token_stats_by_rows,
    "linear_token_stats": linear_token_stats_by_rows,
    "kept_token_stats": kept_token_stats_by_rows,
    "linear_policy_loss": linear_policy_loss_by_rows,
    "policy_loss": policy_loss_by_rows,
    "ema": ema_by_rows,
    "iqr_filter": iqr_filter_by_rows,
}


# ----------------------------------------------------------------------------------------------------------- the recorder


def record(op, launches, argument, tuned=None):
    """Return the (name, kernel, arguments by name, options) of an op's launches, with the sizes of `tuned`, None: the defaults."""
    backend = importlib.import_module(f"mgrpo_kernels.ops.{op}.triton")
    calls = []

    def note(kernel, grid, like, *args, enable_fp_fusion=True, **options):
        names = [parameter.name for parameter in kernel.params]
        by_name = [each.name for each in kernel.params if not each.is_constexpr and each.name in options]
        given = dict(zip(names, args, strict=False)) | {name: options.pop(name) for name in by_name}
        options |= {"enable_fp_fusion": enable_fp_fusion}
        calls.append((current, kernel, given, options))

    current = None
    with (
        mock.patch.object(backend, "launch", note),
        mock.patch.object(tuning, "of", return_value=tuned or tuning.Tuning()),
    ):
        for name in launches(backend, argument):
            current = name
    return calls


def name_of(module, function):
    """Return op.kernel, or op.fused.kernel where the file is named _fused_triton_kernels."""
    *_, op, file = module.split(".")
    part = file.removesuffix("triton_kernels").strip("_")
    return ".".join(filter(None, (op, part, function)))


def kernels_in_source():
    """Return op.function of every @triton.jit function that the package holds and no other one calls."""
    jitted, called = {}, set()
    for path in sorted(PACKAGE.glob("*/*kernels.py")):
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(function, ast.FunctionDef):
                continue
            if any("triton.jit" in ast.unparse(each) for each in function.decorator_list):
                module = f"{path.parent.name}.{path.stem}"
                jitted[name_of(module, function.name)] = function.name
            calls = [each.func for each in ast.walk(function) if isinstance(each, ast.Call)]
            called |= {func.id for func in calls if isinstance(func, ast.Name)}
    return {key for key, name in jitted.items() if name not in called}


def source(kernel, args, options, target):
    """Return what Triton would compile for a launch with these arguments on a GPUTarget, and with which options.

    Triton's own binder says it: the arguments' types, which of them become constants and what is known of the others.
    """
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(target)
    bound, special, rest = create_function_from_signature(kernel.signature, kernel.params, backend)(**args, **options)
    chosen, signature, constants, attributes = kernel._pack_args(backend, rest, bound, special, rest)
    return ASTSource(kernel, signature, constants, attributes), chosen


def gpu_target(target):
    """Return Triton's description of a target such as sm_90 or gfx942."""
    from triton.backends.compiler import GPUTarget

    amd = target.startswith("gfx")
    return GPUTarget("hip", target, 64) if amd else GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
