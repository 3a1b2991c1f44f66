"""The fused head under verl's names, held to verl's own code as its package has it."""

# ruff: noqa: E402 - what need() makes importable is imported after it
import json
import runpy
import sys
import types

import pytest
import torch
import two_ranks
from installed_peers import ROOT, need

need("verl")

from verl.models.transformers import monkey_patch
from verl.trainer.ppo import core_algos
from verl.utils.experimental import torch_functional as verl_heads
from verl.utils.kernel import linear_cross_entropy as verl_kernel

from mgrpo_kernels.integrations import IntegrationError, verl


def names():
    """Return every object that a patch replaces."""
    return (
        verl_kernel.linear_cross_entropy,
        vars(verl_heads.FusedLinearForPPO)["forward"],
        core_algos.compute_policy_loss_vanilla,
        dict(core_algos.POLICY_LOSS_REGISTRY),
    )


def test_importing_patches_nothing():
    assert verl_kernel.linear_cross_entropy == verl_kernel.LinearCrossEntropy.apply
    assert vars(verl_heads.FusedLinearForPPO)["forward"].__module__ == verl_heads.__name__
    assert core_algos.get_policy_loss_fn("vanilla").__module__ == core_algos.__name__
    assert verl.LOSS not in core_algos.POLICY_LOSS_REGISTRY


def test_undo_restores_the_very_same_objects():
    before = names()
    handle = verl.patched()
    assert verl_kernel.linear_cross_entropy is verl.linear_cross_entropy
    assert core_algos.get_policy_loss_fn("vanilla") is core_algos.get_policy_loss_fn(verl.LOSS)
    handle.undo()
    assert names()[:3] == before[:3]
    assert all(found is core_algos.POLICY_LOSS_REGISTRY[name] for name, found in before[3].items())
    assert set(core_algos.POLICY_LOSS_REGISTRY) == set(before[3])
    with verl.patched(vanilla=False):
        assert core_algos.get_policy_loss_fn("vanilla") is before[2]
        assert verl.LOSS in core_algos.POLICY_LOSS_REGISTRY
    assert set(core_algos.POLICY_LOSS_REGISTRY) == set(before[3])


def test_a_module_that_binds_the_head_meanwhile_gets_verls_back(monkeypatch):
    late = types.ModuleType("verl.models.mcore.model_forward_fused")
    own = verl_kernel.linear_cross_entropy
    with verl.patched():
        late.linear_cross_entropy = verl_kernel.linear_cross_entropy  # what its import would do; it takes Megatron
        monkeypatch.setitem(sys.modules, late.__name__, late)
    assert late.linear_cross_entropy is own
    with verl.patched():  # and one that is there before
        assert late.linear_cross_entropy is verl.linear_cross_entropy
    assert late.linear_cross_entropy is own


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (verl_kernel, "linear_cross_entropy"),
        (verl_heads, "FusedLinearForPPO"),
        (core_algos, "POLICY_LOSS_REGISTRY"),
        (core_algos, "compute_policy_loss_vanilla"),
    ],
)
def test_a_name_that_moved_is_named(monkeypatch, owner, name):
    monkeypatch.delattr(owner, name)
    before = verl_heads.FusedLinearForPPO.forward if name != "FusedLinearForPPO" else None
    with pytest.raises(IntegrationError, match=name):
        verl.patched()
    if before is not None:
        assert verl_heads.FusedLinearForPPO.forward is before  # nothing half patched


# --- The head


def make(rows, *, hidden=32, vocab=515, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(*rows, hidden, generator=generator).to(dtype).requires_grad_()
    w = (torch.randn(vocab, hidden, generator=generator) * 0.3).to(dtype).requires_grad_()
    labels = torch.randint(0, vocab, rows, generator=generator)
    return h, w, labels, torch.randn(2, *rows, generator=generator)


def plain(hidden, weight, labels, temperature):
    logp = torch.log_softmax(hidden @ weight.T / temperature, -1)
    return logp.gather(-1, labels.unsqueeze(-1)).squeeze(-1), -(logp.exp() * logp).sum(-1)


def verls_torch_backend(hidden, weight, labels, temperature):
    return verl_heads.FusedLinearForPPO().forward(hidden, weight, labels, temperature)


def gradients(outputs, weights, leaves):
    total = sum((o * w).sum() for o, w in zip(outputs, weights, strict=True))
    return torch.autograd.grad(total, leaves, retain_graph=True)


@pytest.mark.parametrize("rows", [(1, 37), (3, 17)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_head_is_what_verls_own_computes(rows, temperature):
    h, w, labels, weights = make(rows)
    want = verls_torch_backend(h, w, labels, temperature)
    with verl.patched():
        for got, shape in (
            (verl_kernel.linear_cross_entropy(h, w, labels, temperature, "none"), (labels.numel(),)),  # flat
            (verls_torch_backend(h, w, labels, temperature), labels.shape),
        ):
            assert [each.shape for each in got] == [shape, shape]
            got = [each.view(labels.shape) for each in got]
            for mine, own in zip(got, want, strict=True):
                assert mine.dtype == torch.float32
                torch.testing.assert_close(mine, own, rtol=1e-5, atol=1e-5)
            for mine, own in zip(gradients(got, weights, (h, w)), gradients(want, weights, (h, w)), strict=True):
                torch.testing.assert_close(mine, own, rtol=1e-4, atol=1e-5)


def test_bfloat16_head_is_nearer_the_truth_than_verls_own():
    h, w, labels, _ = make((2, 64), hidden=128, dtype=torch.bfloat16)
    truth = plain(h.double(), w.double(), labels, 0.9)
    own = verls_torch_backend(h, w, labels, 0.9)
    with verl.patched():
        mine = verls_torch_backend(h, w, labels, 0.9)
    for m, o, t in zip(mine, own, truth, strict=True):
        assert (m.double() - t).square().mean() <= (o.double() - t).square().mean()


def test_megatrons_layout():
    h, w, labels, _ = make((1, 23))
    want = plain(h, w, labels, 1.0)
    got = verl.linear_cross_entropy(h.transpose(0, 1), w, labels, 1.0, "none", None)  # (N, 1, H) and (1, N)
    for mine, own in zip(got, want, strict=True):
        torch.testing.assert_close(mine, own.flatten(), rtol=1e-5, atol=1e-5)
    with pytest.raises(
        ValueError, match=r"labels: expected hidden's shape \(3, 5, 32\) without its last axis, got \(5, 3\)"
    ):
        verl.linear_cross_entropy(torch.zeros(3, 5, 32), w, labels.new_zeros(5, 3))


@pytest.mark.parametrize("used", [0, 1])
def test_either_gradient_may_be_missing(used):
    h, w, labels, weights = make((2, 9))
    got = verl.linear_cross_entropy(h, w, labels, 0.8)[used]
    want = plain(h, w, labels, 0.8)[used].flatten()
    weights = weights[:1].flatten(1)
    for mine, own in zip(gradients([got], weights, (h, w)), gradients([want], weights, (h, w)), strict=True):
        torch.testing.assert_close(mine, own, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "Sum"])
def test_reduction(reduction):
    h, w, labels, _ = make((2, 9))
    logprob, entropy = verl.linear_cross_entropy(h, w, labels, 1.0, reduction)
    want = plain(h, w, labels, 1.0)[0].flatten()
    want = {"none": want, "sum": want.sum(), "mean": want.mean()}[reduction.lower()]
    torch.testing.assert_close(logprob, want, rtol=1e-5, atol=1e-5)
    assert entropy.shape == (labels.numel(),)


def test_wrong_calls_are_told():
    h, w, labels, _ = make((2, 9))
    with pytest.raises(ValueError, match="reduction: expected one of none, sum, mean, got 'max'"):
        verl.linear_cross_entropy(h, w, labels, 1.0, "max")
    with pytest.raises(ValueError, match="labels"):
        verl.linear_cross_entropy(h, w, labels + 600)


def test_vocabulary_over_two_ranks():
    """The ranks' gradients of hidden add up, as those of verl's kernel: Megatron's sequence parallelism sums them."""
    parts = [found["verl_head"] for found in two_ranks.results()]
    h, w, labels, weights = two_ranks.inputs(1, 21)
    h, w = h.requires_grad_(), w.requires_grad_()
    want = plain(h.transpose(0, 1), w, labels, 0.9)
    grad_hidden, grad_weight = gradients(want, weights, (h, w))
    for part in parts:
        torch.testing.assert_close(part[0], want[0].flatten(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(part[1], want[1].flatten(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(parts[0][2] + parts[1][2], grad_hidden, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.cat([part[3] for part in parts]), grad_weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["triton", "torch", "liger"])
def test_in_verls_model_forward(backend, monkeypatch):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    monkeypatch.setattr(Qwen2ForCausalLM, "forward", Qwen2ForCausalLM.forward)  # verl replaces it on the class
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=301, num_hidden_layers=2, **sizes))
    tokens = torch.randint(0, 301, (2, 19))
    want = plain(model.lm_head(model.model(tokens).last_hidden_state), torch.eye(301), tokens.roll(-1, 1), 0.8)
    loss = (want[0] - 0.1 * want[1])[:, :-1].mean()
    own = torch.autograd.grad(loss, list(model.parameters()))
    monkey_patch.patch_forward_with_backends(model, use_fused_kernels=True, fused_kernels_backend=backend)
    with verl.patched(strict=True):
        output = model(input_ids=tokens, temperature=0.8, return_dict=True)
    log_probs, entropy = output.log_probs.view(tokens.shape), output.entropy.view(tokens.shape)  # flat from "triton"
    torch.testing.assert_close(log_probs, want[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(entropy, want[1], rtol=1e-4, atol=1e-4)
    loss = (log_probs - 0.1 * entropy)[:, :-1].mean()
    for mine, theirs in zip(torch.autograd.grad(loss, list(model.parameters())), own, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-6)


# --- The examples


def test_before_and_after_are_the_same_run(monkeypatch, capsys):
    from transformers import Qwen2ForCausalLM

    own = Qwen2ForCausalLM.forward  # verl replaces it on the class
    found = {}
    for name in ("logits", "verl", "patched"):
        monkeypatch.setattr(Qwen2ForCausalLM, "forward", own)
        size = ["--vocabulary", "500", "--width", "64", "--rollouts", "4", "--tokens", "16"]
        monkeypatch.setattr(sys, "argv", ["verl_before_after.py", *size, "--run", name])
        runpy.run_path(str(ROOT / "examples" / "verl_before_after.py"), run_name="__main__")
        found[name] = json.loads(capsys.readouterr().out.splitlines()[-1])["lines"]
    assert len(found["verl"]) == 3
    for other in ("logits", "patched"):
        for mine, theirs in zip(found[other], found["verl"], strict=True):
            for key in ("loss", "grad_norm", "entropy"):
                assert mine[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-6)
    assert found["patched"][2]["loss"] != pytest.approx(found["patched"][0]["loss"], rel=0.1)  # the steps move


def test_plugin_example(capsys):
    from mgrpo_kernels.integrations import verl_plugin

    try:
        runpy.run_path(str(ROOT / "examples" / "verl_plugin.py"), run_name="__main__")
    finally:
        verl_plugin.patch.undo()
        del sys.modules[verl_plugin.__name__]
    said = capsys.readouterr().out.splitlines()
    assert "is now the one of mgrpo_kernels.integrations.verl" in said[0]
    for vanilla, mine in zip(said[1:3], said[3:], strict=True):
        assert vanilla.split("loss")[1] == mine.split("loss")[1]
        assert "loss 0.000000" not in mine
