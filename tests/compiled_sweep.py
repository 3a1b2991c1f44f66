"""Lowers every Triton kernel to TTIR for each kind of argument that a launch can have.

Triton compiles a kernel anew for an integer argument that is 1 (it becomes a constant), that is a multiple of 16, or that needs 64 bits,
and for a pointer that is None. The interpreter does none of this, and each launch of tests/compiled_launches.py is one case of many.
Here the launches of every option and dtype (tests/compiled_options.py) are recorded, and lowered with other integers in their place:
1, a multiple of 16, an odd number and one above 2^31, all at once and each alone.

python tests/compiled_sweep.py OP...    prints, as JSON, how many variants of each kernel were lowered, and what failed
"""

import ast
import importlib.util
import inspect
import json
import subprocess
import sys
import textwrap

import compiled
import compiled_launches as launches
import compiled_options

INTEGERS = {"1": 1, "a multiple of 16": 4096, "odd": 4097, "above 2^31": 2**31 + 1}


def variants(args, *, first, extreme):
    """Yield (which integers are what, the arguments) for a launch.

    In every dtype a launch is lowered as recorded, in the kernel's first one also with all integers 1 and above 2^31. An extreme launch
    (the most or the fewest arguments are None) gets every kind of integer, and in the first dtype each integer by itself too.
    """
    names = [name for name, value in args.items() if type(value) is int]
    yield "as recorded", args
    for what, value in INTEGERS.items():
        if extreme or (first and what in ("1", "above 2^31")):
            yield f"every integer {what}", args | dict.fromkeys(names, value)
        for name in names if extreme and first else []:
            yield f"{name} {what}", args | {name: value}


def lower(source, chosen, target):
    """Lower what Triton would compile to TTIR, as `triton.compile` does."""
    from triton._C.libtriton import ir
    from triton.compiler import make_backend

    backend, context, stages = make_backend(target), ir.context(), {}
    ir.load_dialects(context)
    backend.load_dialects(context)
    codegen, modules = backend.get_codegen_implementation(chosen), backend.get_module_map()
    module = source.make_ir(target, chosen, codegen, modules, context)
    backend.add_stages(stages, chosen, source.language)
    stages["ttir"](module, {})


def sweep(calls):
    """Return kernel -> variants lowered, and what failed, in words, of recorded (dtype, name, kernel, arguments, options)."""
    by_kernel = {}
    for call in calls:
        by_kernel.setdefault(call[2], []).append(call)
    counts, failures = {}, []
    for kernel, of_kernel in by_kernel.items():
        title = launches.name_of(kernel.fn.__module__, kernel.fn.__name__)
        counts[title], failed = sweep_kernel(kernel, of_kernel)
        failed += [f"{name} is never {what}" for name, what in one_sided(kernel, of_kernel)]
        failures += [f"{title}: {words}" for words in failed]
    return counts, failures


def sweep_kernel(kernel, calls):
    """Return how many variants of a kernel were lowered, and what failed."""
    target = launches.gpu_target("sm_90")
    seen, failed = set(), []
    for dtype in dict.fromkeys(dtype for dtype, *_ in calls):
        of_dtype = [call for call in calls if call[0] == dtype]
        absent = [sum(value is None for value in args.values()) for *_, args, _ in of_dtype]
        extremes = {absent.index(min(absent)), absent.index(max(absent))}
        for i, (_, name, _, args, options) in enumerate(of_dtype):
            for what, changed in variants(args, first=dtype == calls[0][0], extreme=i in extremes):
                source, chosen = launches.source(kernel, changed, options, target)
                key = repr((source.signature, source.constants, source.attrs, chosen))
                if key in seen:
                    continue
                seen.add(key)
                try:
                    lower(source, chosen, target)
                except Exception as error:  # whatever it is, it is reported
                    cause = error.__cause__ or error
                    failed.append(f"{dtype}, {name}, {what}: {type(cause).__name__}: {str(cause).splitlines()[-1]}")
    return len(seen), failed


def one_sided(kernel, calls):
    """Yield (argument, "absent" or "present") for arguments that the kernel's code compares with None and no launch has so."""
    compared = compared_with_none(kernel)
    for name in [parameter.name for parameter in kernel.params if parameter.name in compared]:
        found = {args[name] is None for *_, args, _ in calls}
        yield from ((name, what) for absent, what in ((True, "absent"), (False, "present")) if absent not in found)


def compared_with_none(function):
    """Return the names that a jitted function, or one that it calls, compares with None."""
    names, called = set(), []
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function.fn)))):
        if (
            isinstance(node, ast.Compare)
            and isinstance(node.left, ast.Name)
            and isinstance(node.ops[0], (ast.Is, ast.IsNot))
        ):
            names.add(node.left.id)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            called.append(function.fn.__globals__.get(node.func.id))
    return names.union(*(compared_with_none(each) for each in called if hasattr(each, "fn")))


def of_op(op):
    """Sweep the launches of an op, in every dtype that it accepts."""
    calls = []
    for dtype in compiled_options.DTYPES:
        for function in (launches.LAUNCHES[op], compiled_options.OPTIONS[op]):
            calls += [(str(dtype), *call) for call in launches.record(op, function, dtype)]
    return sweep(calls)


def of_file(path):
    """Sweep the launches that a file with kernels of its own, such as tests/faulty_kernels.py, lists as CALLS."""
    spec = importlib.util.spec_from_file_location("faulty._triton_kernels", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return sweep(module.CALLS)


def run(*groups):
    """Return (counts, failures) of what `groups` name (ops, or a file), each group in a process of its own where kernels compile."""
    running = [
        subprocess.Popen(
            [sys.executable, __file__, *group], env=compiled.environment(), stdout=subprocess.PIPE, text=True
        )
        for group in groups
    ]
    outputs = [process.communicate(timeout=600)[0] for process in running]
    assert [process.returncode for process in running] == [0] * len(groups)
    counts, failures = {}, []
    for output in map(json.loads, outputs):
        counts |= output["counts"]
        failures += output["failures"]
    return counts, failures


if __name__ == "__main__":
    found = {"counts": {}, "failures": []}
    for word in sys.argv[1:]:
        counts, failures = of_file(word) if word.endswith(".py") else of_op(word)
        found["counts"] |= counts
        found["failures"] += failures
    json.dump(found, sys.stdout)
