"""Liger's kernels as a backend by name. A stand-in has the signature, checks and outputs that liger-kernel 0.8.5 has on a GPU."""

import importlib.util
import inspect
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from absent import need
from contract import assert_no_worse_than_plain

import mgrpo_kernels
from mgrpo_kernels import BackendUnavailable, backend, linear_token_stats, policy_loss, use_backend
from mgrpo_kernels.ops.linear_token_stats import OP, liger, linear_token_stats_op

FOLDER = Path(__file__).resolve().parents[1] / ".venv" / "liger"
B, L, H, V = 3, 7, 16, 301
CUDA, BF16 = torch.device("cuda"), torch.bfloat16
ARGUMENTS = (
    "_input",
    "weight",
    "target",
    "temperature",
    "ignore_index",
    "m_tiles_per_cluster",
    "return_entropy",
    "selected_token_ids",
)
STAND_IN = """
import torch

class LigerFusedLinearScaledCrossEntropyFunction:
    @staticmethod
    def apply(
        _input, weight, target, temperature=1.0, ignore_index=-100, m_tiles_per_cluster=1, return_entropy=False,
        selected_token_ids=None,
    ):
        assert _input.dtype == weight.dtype == torch.bfloat16 and target.dtype == torch.int64
        assert _input.shape == (target.shape[0], weight.shape[1]) and _input.shape[0] > 0
        assert isinstance(temperature, float) and temperature > 0
        assert type(m_tiles_per_cluster) is int and type(return_entropy) is bool
        counted = target != ignore_index
        assert ((target >= 0) & (target < weight.shape[0]))[counted].all(), "Liger raises ValueError"
        assert _input.isfinite().all(), "a kernel multiplies every row"
        logp = ((_input.float() @ weight.float().t()) / temperature).log_softmax(-1)
        nll = -logp.gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        entropy = -(logp.exp() * logp).sum(-1)
        outputs = [torch.where(counted, each, 0.0) for each in (nll, entropy)]
        return (outputs[0], outputs[1].to(weight.dtype)) if return_entropy else outputs[0]
"""


def package(folder, name, text=""):
    path = folder.joinpath(*name.split("."))
    path.mkdir(parents=True, exist_ok=True)
    for each in (path, *path.parents):
        if each == folder:
            break
        each.joinpath("__init__.py").touch()
    path.joinpath("__init__.py").write_text(text, encoding="utf-8")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder for packages, before all others; those of Liger that are installed are hidden."""
    names = ("liger_kernel", "cutlass", "tvm_ffi", "cuda")
    find = importlib.util.find_spec

    def find_here(name, *rest):
        if name.partition(".")[0] in names and not tmp_path.joinpath(name.partition(".")[0]).exists():
            return None
        return find(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", find_here)
    monkeypatch.syspath_prepend(tmp_path)
    for module in [module for module in sys.modules if module.partition(".")[0] in names]:
        monkeypatch.delitem(sys.modules, module)
    yield tmp_path
    for module in [module for module in sys.modules if module.partition(".")[0] in names]:
        del sys.modules[module]


@pytest.fixture(params=[(9, 0), (10, 0)], ids=["sm_90", "sm_100"])
def installed(place, monkeypatch, request):
    """The stand-in and all that it needs, on a GPU of the capability; tensors stay on the CPU."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: request.param)
    monkeypatch.setattr(torch.version, "hip", None)
    kernel = liger.HOPPER if request.param == (9, 0) else liger.BLACKWELL
    package(place, kernel.module, STAND_IN)
    for module in kernel.needs:
        package(place, module)
    assert liger.unsupported(CUDA, BF16) is None
    monkeypatch.setattr(liger, "unsupported", lambda device, dtype: None)


def make(seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(B, L, H, generator=generator).to(BF16)
    weight = (0.5 * torch.randn(V, H, generator=generator)).to(BF16)
    labels = torch.randint(0, V, (B, L), generator=generator)
    mask = torch.rand(B, L, generator=generator) > 0.3
    mask[0, :2] = torch.tensor([True, False])
    return hidden, weight, labels, mask


def gradients(stats, weights, leaves):
    loss = sum(
        (stat * weight.to(stat.dtype)).sum() for stat, weight in zip(stats, weights, strict=False) if stat is not None
    )
    return torch.autograd.grad(loss, leaves)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("wanted", [("logprob", "entropy"), ("entropy",), ("logprob",)])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"temperature": 1.3, "logit_scale": 0.4}])
@pytest.mark.parametrize("masked", [False, True])
def test_the_contract_of_the_op(wanted, options, masked):
    """Masks full of NaN, labels of 32 bits, temperature and scale: against float64 truth no worse than plain PyTorch in bfloat16."""
    hidden, weight, labels, mask = make()
    weights = torch.randn(2, B, L, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def plain(dtype):
        leaves = [each.to(dtype).requires_grad_() for each in (hidden, weight)]
        z = (leaves[0] @ leaves[1].t()) * (options.get("logit_scale", 1.0) / options.get("temperature", 1.0))
        logp = z.log_softmax(-1)
        stats = [logp.gather(-1, labels.unsqueeze(-1)).squeeze(-1), -(logp.exp() * logp).sum(-1)]
        stats = [torch.where(mask, stat, 0.0) if masked else stat for stat in stats]
        chosen = [stat if name in wanted else None for name, stat in zip(("logprob", "entropy"), stats, strict=True)]
        return [each for each in chosen if each is not None], gradients(chosen, weights, leaves)

    given = [hidden.clone(), weight.clone()]
    if masked:
        given[0][~mask] = torch.nan
    leaves = [each.requires_grad_() for each in given]
    targets = None if wanted == ("entropy",) else torch.where(mask, labels, -100 if masked else labels).int()
    got = linear_token_stats(*leaves, targets, stats=wanted, mask=mask if masked else None, backend="liger", **options)
    assert got.self_certainty is None
    assert [name for name in ("logprob", "entropy") if getattr(got, name) is not None] == [
        name for name in ("logprob", "entropy") if name in wanted
    ]
    found = [stat for stat in got[:2] if stat is not None]
    found_grads = gradients(got[:2], weights, leaves)
    (truth, true_grads), (rounded, rounded_grads) = plain(torch.float64), plain(BF16)
    for one, of_plain, true in zip(
        [*found, *found_grads], [*rounded, *rounded_grads], [*truth, *true_grads], strict=True
    ):
        assert_no_worse_than_plain(one, of_plain, true)
    for stat in found:
        assert stat.dtype == torch.float32
        assert not masked or (stat[~mask] == 0).all()
    assert not masked or (found_grads[0][~mask] == 0).all()


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("label", [-100, -1, V])
def test_a_label_outside_the_vocabulary_makes_its_own_log_prob_nan(label):
    """Liger itself gives 0 for -100, and raises for the others."""
    hidden, weight, labels, _ = make()
    labels[1, 2] = label
    leaves = [each.requires_grad_() for each in (hidden, weight)]
    logprob, entropy, _ = linear_token_stats(*leaves, labels, backend="liger")
    assert logprob.isnan().nonzero().tolist() == [[1, 2]]
    assert (entropy > 0).all()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(logprob.nansum(), leaves))
    with pytest.raises(ValueError, match="labels: expected values in"):
        linear_token_stats(*leaves, labels, backend="liger", debug=True)


@pytest.mark.usefixtures("installed")
def test_a_frozen_weight_and_no_rows():
    hidden, weight, labels, _ = make()
    leaf = hidden.clone().requires_grad_()
    stats = linear_token_stats(leaf, weight, labels, backend="liger")
    assert torch.autograd.grad(stats.logprob.sum(), leaf)[0].abs().sum() > 0
    nothing = linear_token_stats(leaf[:0], weight, labels[:0], backend="liger")
    assert nothing.logprob.shape == nothing.entropy.shape == (0, L)
    assert (torch.autograd.grad(nothing.entropy.sum(), leaf)[0] == 0).all()


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"bias": torch.zeros(V, dtype=BF16)}, "bias"),
        ({"stats": ("logprob", "self_certainty")}, "stats"),
        ({"temperature": torch.ones(B, L)}, "temperature"),
        ({"logit_scale": -0.5}, "logit_scale"),
        ({"logit_scale": 0.0}, "logit_scale"),
        ({"softcap": 30.0}, "softcap"),
        ({"kept": torch.zeros(B, L, 4, dtype=torch.int64)}, "kept"),
        ({"gradient_tolerance": 0.01}, "gradient_tolerance"),
        ({"workspace_bytes": 2**20}, "workspace_bytes"),
        ({"logits_dtype": BF16}, "logits_dtype"),
    ],
)
def test_what_liger_lacks_is_an_error_that_names_the_argument(options, name):
    hidden, weight, labels, _ = make()
    with pytest.raises(
        ValueError, match=rf"^{name}: expected .* with backend='liger', got .*: leave backend out, or name 'triton'"
    ):
        linear_token_stats(hidden, weight, labels, backend="liger", **options)


@pytest.mark.usefixtures("installed")
def test_a_process_group_is_an_error_too(monkeypatch):
    monkeypatch.setattr("mgrpo_kernels.ops.linear_token_stats.check_tp_group", lambda *_: ("group", 0))
    hidden, weight, labels, _ = make()
    with pytest.raises(ValueError, match="^tp_group: expected None with backend='liger', got 'group'"):
        linear_token_stats(hidden, weight, labels, tp_group="group", backend="liger")


@pytest.mark.usefixtures("installed")
def test_liger_runs_only_where_a_call_names_it(monkeypatch):
    monkeypatch.setattr(liger, "token_stats", lambda *_, **__: pytest.fail("was picked"))
    hidden, weight, labels, _ = make()
    assert linear_token_stats(hidden, weight, labels).logprob.shape == (B, L)
    assert backend.choose(OP, None, CUDA, BF16) != "liger"
    with pytest.raises(
        ValueError, match="use_backend: expected one of reference, native, triton, got 'liger'; pass it as"
    ):
        use_backend("liger").__enter__()
    with pytest.raises(BackendUnavailable, match="policy_loss has no liger backend; it has reference, native, triton"):
        policy_loss(torch.zeros(1, 2), None, torch.zeros(1), backend="liger")
    monkeypatch.setenv("MGRPO_BACKEND", "liger")
    with pytest.raises(
        ValueError, match="MGRPO_BACKEND: expected one of reference, native, triton, got 'liger'; pass it as"
    ):
        linear_token_stats(hidden, weight, labels)


def test_the_custom_op_has_our_own_backends_alone():
    with pytest.raises(ValueError, match="backend: expected one of reference, native, triton, got 'liger'"):
        backend.implementation(OP, "liger")
    assert "liger" not in str(linear_token_stats_op._opoverload._schema)


def test_the_reason_why_it_cannot_run(place, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    capability = (9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)

    def reason(device=CUDA, dtype=BF16):
        return liger.unsupported(device, dtype)

    assert reason() == "liger-kernel is not installed: pip install 'liger-kernel[cutedsl]>=0.8.5'"
    package(place, "liger_kernel.ops")
    assert reason(torch.device("cpu")).endswith("NVIDIA GPUs of compute capability 9.0 or 10.x, got cpu")
    capability = (8, 0)
    assert reason().endswith("for compute capability 9.0 or 10.x, got 8.0")
    for capability, needs, extra, kernel in (  # noqa: B007 - read by the stand-in for torch.cuda
        ((9, 0), "nvidia-cutlass-dsl and apache-tvm-ffi", "cutedsl", liger.HOPPER),
        ((10, 3), "cuda-tile", "cutile", liger.BLACKWELL),
    ):
        assert reason() == f"Liger's kernel needs {needs}: pip install 'liger-kernel[{extra}]>=0.8.5'"
        for module in kernel.needs:
            package(place, module)
        assert reason() == f"expected liger-kernel 0.8.5 or later, got one without {kernel.module}"
        package(place, kernel.module)
        assert reason() is None
        assert reason(dtype=torch.float32) == "expected bfloat16, got float32"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert reason().endswith("got ROCm")


def test_the_report_says_whether_it_is_available(monkeypatch):
    from mgrpo_kernels.__main__ import report

    monkeypatch.setattr(liger, "unsupported", lambda device, dtype: "a reason" if dtype == BF16 else "another dtype")
    assert "    liger (bfloat16): a reason" in report().splitlines()
    assert mgrpo_kernels.backends("cpu", BF16)[OP]["liger"] == "a reason"


@pytest.fixture
def real(monkeypatch):
    """Return Liger's module, importable for one test: the environment's own, or that of scripts/peers.sh."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(FOLDER)])
    importlib.invalidate_caches()
    need("liger_kernel", "scripts/peers.sh")
    yield importlib.import_module(liger.HOPPER.module)
    for name in [each for each in sys.modules if each.partition(".")[0] == "liger_kernel"]:
        del sys.modules[name]


def test_the_installed_function_has_the_signature_of_the_stand_in(real):
    stand_in = {}
    exec(textwrap.dedent(STAND_IN), stand_in)
    for function in (getattr(real, liger.FUNCTION), stand_in[liger.FUNCTION]):
        assert tuple(inspect.signature(function.apply).parameters) == ARGUMENTS
    source = inspect.getsource(importlib.import_module("liger_kernel.ops.fused_linear_scaled_cross_entropy"))
    assert "capability == (9, 0)" in source
    for module in (liger.HOPPER.module, liger.BLACKWELL.module):
        (place,) = importlib.util.find_spec("liger_kernel").submodule_search_locations
        text = Path(place, *module.split(".")[1:]).with_suffix(".py").read_text(encoding="utf-8")
        assert f"class {liger.FUNCTION}:" in text
        assert f"ignore_index={liger.IGNORED}" in text


def test_the_installed_package_computes_what_the_op_promises(real, monkeypatch):
    """Its plain PyTorch path, on a CPU: masks, temperature, scale and gradients through our arguments."""
    monkeypatch.setattr(liger, "unsupported", lambda *_: None)
    monkeypatch.setattr(liger, "_function", lambda _: getattr(real, liger.FUNCTION).apply)
    hidden, weight, labels, mask = make()
    results = []
    for name in ("liger", "reference"):
        leaves = [each.clone().requires_grad_() for each in (hidden, weight)]
        stats = linear_token_stats(
            *leaves, labels, mask=mask, temperature=0.8, logit_scale=0.5, backend=name, logits_dtype=torch.float32
        )
        grads = torch.autograd.grad(stats.logprob.sum() + 0.5 * stats.entropy.sum(), leaves)
        results.append([stats.logprob.detach(), stats.entropy.detach(), *grads])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got.float(), want.float(), rtol=3e-2, atol=3e-2)
