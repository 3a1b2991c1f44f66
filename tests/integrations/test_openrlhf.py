"""The fused head under OpenRLHF's actor, the one of its package. What that imports and a CPU cannot have is stood in for."""

# ruff: noqa: E402 - what need() makes importable is imported after it
import logging
import runpy
import sys
import types
from importlib.machinery import ModuleSpec

import pytest
import torch
from installed_peers import ROOT, need

need("openrlhf")


def stand_in(name, **members):
    """Put a module there that has these members, unless the real one is installed."""
    module = types.ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    vars(module).update(members)
    sys.modules.setdefault(name, module)


def unpad_input(values, mask):
    """What flash-attn's does: (B, L, ...) to (N, ...), the indices, the sequences' offsets."""
    kept = mask.flatten().nonzero().flatten()
    lengths = mask.sum(-1, dtype=torch.int32)
    offsets = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return values.flatten(0, 1)[kept], kept, offsets, int(lengths.max()), lengths


def pad_input(values, indices, batch, length):
    padded = values.new_zeros(batch * length, *values.shape[1:])
    return padded.index_copy(0, indices, values).unflatten(0, (batch, length))


before = set(sys.modules)
stand_in("deepspeed")
stand_in("flash_attn")
stand_in(
    "flash_attn.bert_padding",
    index_first_axis=lambda values, indices: values[indices],
    pad_input=pad_input,
    unpad_input=unpad_input,
    rearrange=lambda values, pattern: values.flatten(0, 1),
)
stand_in("flash_attn.utils")
stand_in("flash_attn.utils.distributed", all_gather=None)

from openrlhf.models import actor as module
from openrlhf.models.actor import Actor

for name in set(sys.modules) - before:  # other tests ask whether flash-attn is there
    if name.partition(".")[0] in ("deepspeed", "flash_attn"):
        del sys.modules[name]

from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM, Qwen2Config, Qwen2ForCausalLM

from mgrpo_kernels.integrations import IntegrationError, openrlhf

NAMES = ("log_probs_from_logits", "compute_entropy", "unpad_and_slice_tensor")
SIZES = {
    "vocab_size": 203,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    """OpenRLHF compiles its entropy, which takes longer than the test."""
    own = module.compute_entropy
    monkeypatch.setattr(module, "compute_entropy", getattr(own, "_torchdynamo_orig_callable", own))


def make(cls=Qwen2ForCausalLM, config=Qwen2Config, temperature=0.7, packing=False, **changes):
    torch.manual_seed(0)
    actor = Actor(cls(config(**SIZES, **changes)), temperature=temperature)
    actor.packing_samples = packing
    return actor


def batch():
    tokens = torch.randint(3, 203, (3, 14), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0  # padded on the left, as OpenRLHF's prompts are
    mask[2, -3:] = 0
    return tokens, torch.ones(3, 6).long(), mask


def run(actor, **options):
    tokens, actions, mask = batch()
    actor.zero_grad()
    logprob, output = actor(tokens, actions, mask, return_output=True, return_entropy=True, **options)
    shown = mask[:, 1:].bool()  # the others' values are of padding
    (logprob.sum() - 0.1 * (output.entropy * shown).sum()).backward()
    grads = [parameter.grad.clone() for parameter in actor.parameters()]
    return logprob.detach(), output.entropy.detach() * shown, grads, output


def test_undo_restores_the_very_same_objects():
    before = [getattr(module, name) for name in NAMES], vars(Actor)["forward"]
    handle = openrlhf.patched()
    assert module.log_probs_from_logits is openrlhf.log_probs_from_logits
    handle.undo()
    assert [getattr(module, name) for name in NAMES] == before[0]
    assert vars(Actor)["forward"] is before[1]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_moved_is_named(monkeypatch, name):
    monkeypatch.delattr(module, name)
    own = Actor.forward
    with pytest.raises(IntegrationError, match=f"openrlhf.models.actor.{name}"):
        openrlhf.patched()
    assert Actor.forward is own


def test_other_parameters_are_told(monkeypatch):
    monkeypatch.setattr(Actor, "forward", lambda self, sequences, num_actions: None)
    with pytest.raises(
        IntegrationError, match=r"Actor.forward: expected the parameters \(self, sequences, action_mask"
    ):
        openrlhf.patched()


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_actor_computes_the_same(packing, temperature):
    actor = make(temperature=temperature, packing=packing)
    want = run(actor)
    head = actor.model.lm_head
    with openrlhf.patched(strict=True):
        got = run(actor)
    assert got[3].logits is None
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[1], want[1], rtol=1e-5, atol=1e-5)
    for mine, own in zip(got[2], want[2], strict=True):
        torch.testing.assert_close(mine, own, rtol=1e-3, atol=1e-5)
    assert actor.temperature == temperature
    assert "forward" not in vars(head)


@pytest.mark.parametrize("options", [{"return_logprobs": True}, {"action_mask": torch.ones(3, 6).long()}])
def test_without_entropy(options):
    actor = make()
    tokens, _, mask = batch()
    want = actor(tokens, attention_mask=mask, **options)
    with openrlhf.patched(strict=True):
        got = actor(tokens, attention_mask=mask, **options)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_the_logits_are_never_held():
    """No tensor of the actor's forward or backward has the vocabulary's width, but the weights and their gradients."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        wide = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.dim() == 3 and result.shape[-1] == SIZES["vocab_size"]:
                self.wide += 1
            return result

    actor = make()
    with Watch() as watch:
        run(actor)
    assert watch.wide > 0
    with openrlhf.patched(strict=True), Watch() as watch:
        run(actor)
    assert watch.wide == 0


def test_asked_for_logits_it_gives_them():
    actor = make()
    tokens, _, mask = batch()
    want = actor(tokens, attention_mask=mask, return_output=True).logits
    with openrlhf.patched(strict=True):
        assert torch.equal(actor(tokens, attention_mask=mask, return_output=True).logits, want)


def test_an_exception_leaves_the_model_as_it_was(monkeypatch):
    actor = make()
    with openrlhf.patched():
        with monkeypatch.context() as broken:
            broken.setattr(openrlhf, "linear_token_stats", lambda *args, **options: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                run(actor)
        assert "forward" not in vars(actor.model.lm_head)
        assert actor.temperature == 0.7
        run(actor)


@pytest.mark.parametrize(
    ("cls", "config", "changes"),
    [(Gemma2ForCausalLM, Gemma2Config, {"head_dim": 16}), (CohereForCausalLM, CohereConfig, {"logit_scale": 0.3})],
)
def test_a_model_that_changes_its_logits_runs_openrlhfs_code_and_says_so(cls, config, changes, caplog):
    actor = make(cls, config, **changes)
    want = run(actor)
    with openrlhf.patched(), caplog.at_level(logging.WARNING, "mgrpo_kernels"):
        got = [run(actor) for _ in range(3)][-1]
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[1], want[1], rtol=1e-5, atol=1e-5)
    assert got[3].logits.shape[-1] == SIZES["vocab_size"]
    assert [record.message for record in caplog.records] == [
        f"Actor.forward runs openrlhf's own code: expected logits as the head gives them, got {cls.__name__}, which scales or caps them"
    ]
    with openrlhf.patched(strict=True), pytest.raises(IntegrationError, match="scales or caps"):
        run(actor)


def test_a_head_of_another_kind_runs_openrlhfs_code():
    actor = make()

    class Adapter(torch.nn.Linear):
        pass

    actor.model.lm_head.__class__ = Adapter
    with (
        openrlhf.patched(strict=True),
        pytest.raises(IntegrationError, match="expected a head that is nn.Linear, got Adapter"),
    ):
        run(actor)


def test_functions_on_logits():
    logits, labels = torch.randn(2, 7, 50), torch.randint(0, 50, (2, 7))
    want = module.log_probs_from_logits(logits.clone(), labels, 0.8), module.compute_entropy(logits)
    with openrlhf.patched():
        torch.testing.assert_close(module.log_probs_from_logits(logits, labels, 0.8), want[0])
        torch.testing.assert_close(module.compute_entropy(logits), want[1])


def test_example(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["openrlhf_actor.py"])
    runpy.run_path(str(ROOT / "examples" / "openrlhf_actor.py"), run_name="__main__")  # compares the two itself
    plain, mine = capsys.readouterr().out.splitlines()
    assert "logits: 3.7 MiB" in plain
    assert "logits: none" in mine
