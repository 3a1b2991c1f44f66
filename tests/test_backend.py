"""Which backend runs, and what happens where one cannot."""

import asyncio
import contextvars
import functools
import logging
import os
import subprocess
import sys
import threading

import pytest
import torch
from absent import need_instructions
from contract import BACKENDS

import mgrpo_kernels
from mgrpo_kernels import BackendUnavailable, backends, token_stats_from_logits, use_backend
from mgrpo_kernels import backend as module
from mgrpo_kernels.__main__ import report

LOGITS, LABELS = torch.randn(2, 5), torch.tensor([0, 4])


def python(code, **environment):
    """Run code in a fresh interpreter."""
    variables = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=False)


def test_every_tensor_op_has_three_backends_and_all_run_here():
    table = backends("cpu")
    assert set(table) == {
        "token_stats",
        "linear_token_stats",
        "kept_token_stats",
        "policy_loss",
        "linear_policy_loss",
        "ema",
        "iqr_filter",
    }
    for op, reasons in table.items():
        assert {name: reasons.pop(name) for name in BACKENDS} == dict.fromkeys(BACKENDS, "ok"), op
        assert list(reasons) == (["liger"] if op == "linear_token_stats" else []), op  # by name alone


def test_the_automatic_choice_on_a_cpu_is_native_and_is_logged_once(caplog):
    module._logged.discard("token_stats")
    with caplog.at_level(logging.INFO, "mgrpo_kernels"):
        token_stats_from_logits(LOGITS, LABELS)
        token_stats_from_logits(LOGITS, LABELS)
    assert [r.message for r in caplog.records] == ["token_stats runs on the native backend for torch.float32 on cpu"]


def test_argument_over_block_over_environment(monkeypatch):
    seen = []
    original = module.implementation
    monkeypatch.setattr(module, "implementation", lambda op, name: seen.append(name) or original(op, name))
    monkeypatch.setenv("MGRPO_BACKEND", "triton")
    token_stats_from_logits(LOGITS, LABELS)
    with use_backend("reference"):
        token_stats_from_logits(LOGITS, LABELS)
        token_stats_from_logits(LOGITS, LABELS, backend="native")
        with use_backend("native"):
            token_stats_from_logits(LOGITS, LABELS)
        token_stats_from_logits(LOGITS, LABELS)
    assert seen == ["triton", "reference", "native", "native", "reference"]


def chosen():
    return module.choose("token_stats", None, LOGITS.device, LOGITS.dtype)


def in_thread(function):
    """Return what a function returns in a new thread."""
    result = []
    thread = threading.Thread(target=lambda: result.append(function()))
    thread.start()
    thread.join()
    return result[0]


def test_two_threads_with_blocks_that_overlap():
    first_in, second_in, first_out = (threading.Event() for _ in range(3))
    seen = {}

    def first():
        with use_backend("reference"):
            first_in.set()
            second_in.wait(10)
            seen["first"] = chosen()
        first_out.set()

    def second():
        first_in.wait(10)
        with use_backend("triton"):
            second_in.set()
            first_out.wait(10)
            seen["second"] = chosen()
        seen["after"] = chosen()

    threads = [threading.Thread(target=each) for each in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {"first": "reference", "second": "triton", "after": "native"}
    assert chosen() == "native"


def test_a_thread_inherits_the_block_only_with_its_context():
    with use_backend("reference"):
        assert in_thread(chosen) == "native"
        assert in_thread(functools.partial(contextvars.copy_context().run, chosen)) == "reference"


def test_asyncio_tasks_do_not_see_each_others_blocks():
    async def task(backend, seen):
        with use_backend(backend):
            for _ in range(3):
                await asyncio.sleep(0)
                seen.append(chosen())

    async def both():
        seen = {"reference": [], "triton": []}
        await asyncio.gather(*(task(backend, names) for backend, names in seen.items()))
        return seen

    assert asyncio.run(both()) == {"reference": ["reference"] * 3, "triton": ["triton"] * 3}
    assert chosen() == "native"
    assert torch.compile(lambda x: x + len(chosen()), backend="eager", fullgraph=True)(torch.zeros(())) == len("native")


class Nested(torch.autograd.Function):
    """A backward pass within a backward pass: PyTorch runs those at a depth of more than 60 in threads of its own."""

    @staticmethod
    def forward(ctx, x, depth, function):
        ctx.depth, ctx.function = depth, function
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        if ctx.depth == 0:
            ctx.function()
        else:
            with torch.enable_grad():
                x = torch.ones((), requires_grad=True)
                Nested.apply(x, ctx.depth - 1, ctx.function).backward()
        return grad, None, None


def test_the_threads_of_a_backward_pass_see_the_block_around_it():
    seen = []

    def look():
        seen.append(threading.get_ident())
        seen.append(chosen())
        with use_backend("triton"):
            seen.append(chosen())
        seen.append(chosen())

    x = torch.ones((), requires_grad=True)
    with use_backend("reference"):
        Nested.apply(x, 70, look).backward()
    Nested.apply(x, 70, lambda: seen.append(chosen())).backward()
    assert seen[0] != threading.get_ident()
    assert seen[1:] == ["reference", "triton", "reference", "native"]


def test_a_compiled_function_follows_the_block_of_its_thread():
    compiled = torch.compile(lambda x: x + len(chosen()), backend="eager", fullgraph=True)
    zero = torch.zeros(())
    assert compiled(zero) == len("native")
    with use_backend("reference"):
        assert compiled(zero) == len("reference")
        assert in_thread(lambda: compiled(zero)) == len("native")
    assert compiled(zero) == len("native")

    def function(x):
        with use_backend("reference"):
            return x + len(chosen())

    assert torch.compile(function, backend="eager", fullgraph=True)(zero) == len("reference")
    assert chosen() == "native"


def test_wrong_names(monkeypatch):
    with (
        pytest.raises(ValueError, match="use_backend: expected one of reference, native, triton, got 'cuda'"),
        use_backend("cuda"),
    ):
        pass
    monkeypatch.setenv("MGRPO_BACKEND", "fast")
    with pytest.raises(ValueError, match="MGRPO_BACKEND: expected one of reference, native, triton, got 'fast'"):
        token_stats_from_logits(LOGITS, LABELS)


def test_a_named_backend_that_cannot_run_says_why():
    with pytest.raises(
        BackendUnavailable,
        match="the native backend of token_stats cannot run: expected float32, bfloat16 or float16, got torch.float64",
    ):
        token_stats_from_logits(LOGITS.double(), LABELS, backend="native")
    result = python(
        "import torch, mgrpo_kernels as m\n"
        "m.token_stats_from_logits(torch.randn(1, 3), torch.tensor([0]), backend='triton')"
    )
    assert (
        "BackendUnavailable: the triton backend of token_stats cannot run: triton needs a GPU tensor, got cpu"
        in result.stderr
    )


def test_float64_falls_to_the_reference():
    assert token_stats_from_logits(LOGITS.double(), LABELS).logprob.dtype == torch.float64


def test_without_the_extension_everything_runs_and_says_so():
    """What an installation without a compiler is like."""
    code = (
        "import sys, types, logging; logging.basicConfig()\n"
        "sys.modules['mgrpo_kernels._C'] = None\n"
        "report = types.ModuleType('mgrpo_kernels._build_report'); report.REASON = 'no compiler (test)'\n"
        "sys.modules['mgrpo_kernels._build_report'] = report\n"
        "import torch, mgrpo_kernels as m\n"
        "print(m.backends('cpu')['ema']['native'])\n"
        "print(m.token_stats_from_logits(torch.zeros(1, 4), torch.tensor([0])).entropy.item())"
    )
    result = python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        "the compiled extension is absent: no compiler (test)",
        str(torch.tensor(4.0).log().item()),
    ]
    assert (
        "token_stats runs on the reference backend for torch.float32 on cpu (native: the compiled extension is absent"
        in result.stderr
    )


def test_importing_needs_no_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, mgrpo_kernels as m\n"
        "print(m.backends('cpu')['ema']['triton'])"
    )
    result = python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("triton cannot be imported")


@pytest.mark.parametrize("isa", ["default", "avx2", "avx512"])
def test_each_instruction_set_gives_the_same_answers(isa):
    """ATEN_CPU_CAPABILITY chooses what PyTorch, and so this library, uses."""
    need_instructions(isa.upper())
    code = """
import torch, mgrpo_kernels as m
from mgrpo_kernels import _native
assert _native.missing() is None
torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    logits, labels = (torch.randn(5, 5003) * 3).to(dtype), torch.randint(0, 5003, (5,))
    hidden, weight = torch.randn(5, 24).to(dtype), torch.randn(5003, 24).to(dtype)
    results = []
    for backend in ("reference", "native"):
        leaves = [t.clone().requires_grad_() for t in (logits, hidden, weight)]
        a = m.token_stats_from_logits(leaves[0], labels, stats=("logprob", "entropy", "self_certainty"), backend=backend)
        b = m.linear_token_stats(leaves[1], leaves[2], labels, softcap=20.0, backend=backend)
        (sum(s.sum() for s in a) + b.logprob.sum() + b.entropy.sum()).backward()
        ema, emit = [weight.float() * 2, weight.clone()], [weight.clone(), weight.clone().float()]
        m.ema_update_(ema, [weight, hidden.new_ones(weight.shape)], 0.9, emit=emit, stochastic_rounding=True, seed=2, backend=backend)
        results.append([*a, b.logprob, b.entropy, *(leaf.grad for leaf in leaves), *ema, *emit])
    for i, (want, got) in enumerate(zip(*results)):
        exact = i >= 8
        tolerance = 1e-4 if dtype == torch.float32 else 0.1 if 5 <= i < 8 else 3e-2
        assert torch.equal(want, got) if exact else torch.allclose(want.float(), got.float(), rtol=tolerance, atol=tolerance), (dtype, i)
print(torch.ops.mgrpo_native.build_info().split()[-1])
"""
    result = python(code, ATEN_CPU_CAPABILITY=isa)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == isa.upper()


def test_the_extension_has_no_code_for_newer_cpus_outside_its_own_namespaces():
    """A function that the objects of two instruction sets share would be linked once, and crash an old CPU."""
    nm = subprocess.run(["nm", "-C", "--defined-only", _extension()], capture_output=True, text=True, check=True).stdout
    symbols = [line.split(maxsplit=2)[2] for line in nm.splitlines() if len(line.split(maxsplit=2)) == 3]
    mine = [s for s in symbols if "_kernel(" in s and s.startswith("mgrpo::")]
    assert mine
    assert all(s.startswith(("mgrpo::DEFAULT::", "mgrpo::AVX2::", "mgrpo::AVX512::")) for s in mine)


def _extension():
    import mgrpo_kernels._C

    return mgrpo_kernels._C.__file__


def test_the_bug_report_names_what_matters():
    text = report()
    assert f"torch {torch.__version__}" in text
    assert "instruction sets DEFAULT" in text or torch.backends.cpu.get_cpu_capability() == "NO AVX"
    for op in backends("cpu"):
        assert op in text


def test_public_names_are_the_contract():
    promised = {
        "TokenStats", "token_stats_from_logits", "linear_token_stats", "logprobs_from_logits", "entropy_from_logits",
        "logprobs_and_entropy_from_logits", "fuse_lm_head", "group_advantages", "PolicyLoss", "policy_loss", "grpo_loss",
        "linear_policy_loss", "ema_update_", "MomentumModel", "trajectory_entropy", "IqrFilter", "iqr_filter", "Vote", "majority_vote",
        "extract_answer", "BackendUnavailable", "use_backend", "backends",
    }  # fmt: skip
    more = {"Teacher", "clip_cov_mask", "kl_cov_penalty", "top_entropy_mask"}
    assert set(mgrpo_kernels.__all__) == promised | more
    assert all(hasattr(mgrpo_kernels, name) for name in promised)
