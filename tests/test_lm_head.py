"""A transformers model that gives statistics instead of logits."""

import copy
import pickle

import pytest
import tiny_families
import torch
import transformers
from torch import nn

from mgrpo_kernels import fuse_lm_head

SIZES = {
    "vocab_size": 199,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
MODELS = {
    "qwen3": (transformers.Qwen3Config, {"head_dim": 16}),
    "llama": (transformers.LlamaConfig, {}),
    "gemma2": (transformers.Gemma2Config, {"head_dim": 16, "final_logit_softcapping": 2.0}),
    "cohere": (transformers.CohereConfig, {"logit_scale": 0.3}),
    "granite": (transformers.GraniteConfig, {"logits_scaling": 4.0}),
    "phi": (transformers.PhiConfig, {"num_key_value_heads": 2}),  # its head has a bias
    "qwen2": (transformers.Qwen2Config, {}),
    "gemma3": (transformers.Gemma3TextConfig, {"head_dim": 16, "final_logit_softcapping": 1.5}),
    "hyperclovax": (transformers.HyperCLOVAXConfig, {"logits_scaling": 0.4}),  # multiplies by what Granite divides by
    "minicpm3": (
        transformers.MiniCPM3Config,
        {"dim_model_base": 16, "num_key_value_heads": 2, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8,
         "qk_rope_head_dim": 8, "v_head_dim": 16},
    ),
    "falcon_h1": (
        transformers.FalconH1Config,
        {"lm_head_multiplier": 0.3, "mamba_d_ssm": 32, "mamba_n_heads": 2, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1},
    ),
    "recurrent_gemma": (transformers.RecurrentGemmaConfig, {"logits_soft_cap": 0.7, "attention_window_size": 4, "head_dim": 16}),
    "llama4": (
        transformers.Llama4TextConfig,
        {"intermediate_size_mlp": 48, "num_local_experts": 2, "head_dim": 16, "attention_chunk_size": 4},
    ),
}  # fmt: skip


def make(name, **more):
    config, options = MODELS[name]
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config(**{**SIZES, "pad_token_id": 0, **options, **more}))


@pytest.mark.parametrize("name", MODELS)
def test_statistics_are_those_of_the_logits(name):
    model = make(name).train()
    tokens = torch.randint(0, 199, (2, 9))
    labels = tokens.roll(-1, 1).clone()
    labels[:, -1] = -100
    logp = (model(input_ids=tokens).logits.float() / 0.8).log_softmax(-1)
    fused = fuse_lm_head(model, temperature=0.8)
    assert fused is model
    assert model.training
    stats = model(input_ids=tokens, labels=labels)
    torch.testing.assert_close(
        stats.logprob[:, :-1],
        logp.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)[:, :-1],
        rtol=1e-4,
        atol=1e-4,
    )
    torch.testing.assert_close(stats.entropy[:, :-1], -(logp.exp() * logp).sum(-1)[:, :-1], rtol=1e-4, atol=1e-4)
    assert (stats.logprob[:, -1] == 0).all()
    stats.logprob.sum().backward()
    assert model.get_output_embeddings().weight.grad.abs().sum() > 0
    assert model(input_ids=tokens).logits.shape == (2, 9, 199)
    del model.forward
    assert model(input_ids=tokens, labels=labels).loss.isfinite()


@pytest.mark.parametrize("name", MODELS)
def test_generation_is_unchanged(name):
    model = make(name).eval()
    tokens = torch.randint(1, 199, (2, 5))
    options = {"attention_mask": torch.tensor([[0, 1, 1, 1, 1], [1] * 5]), "max_new_tokens": 4, "do_sample": False}
    before = model.generate(tokens, **options)
    keeps = model._supports_logits_to_keep()
    fuse_lm_head(model)
    assert torch.equal(model.generate(tokens, **options), before)
    assert model._supports_logits_to_keep() == keeps  # else a prompt's logits would all be held


def log_probs(model, tokens):
    """Return log-probs of the tokens after the first of each row, from the logits of the class's own forward."""
    logits = type(model).forward(model, input_ids=tokens).logits[:, :-1]
    return logits.log_softmax(-1).gather(-1, tokens[:, 1:].unsqueeze(-1)).squeeze(-1)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_scores_with_its_own_weights(copied):
    """As a reference model that is copied from a fused policy does, while the policy trains."""
    model, tokens = fuse_lm_head(make("llama"), stats=("logprob",)), torch.arange(10).view(2, 5)
    copy_of = copied(model)
    before = log_probs(model, tokens)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    for each, want in ((copy_of, before), (model, log_probs(model, tokens))):
        labels = torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=-100)
        torch.testing.assert_close(each(input_ids=tokens, labels=labels).logprob[:, :-1], want)
    assert (before - want).abs().max() > 0.01
    assert torch.equal(copy_of(input_ids=tokens).logits, type(model).forward(copy_of, input_ids=tokens).logits)


def test_a_model_may_return_tuples():
    tokens = torch.arange(10).view(2, 5)
    model = fuse_lm_head(make("llama"))
    want = model(input_ids=tokens, labels=tokens)
    assert all(map(torch.equal, model(input_ids=tokens, labels=tokens, return_dict=False)[:2], want[:2]))
    assert isinstance(model(input_ids=tokens, return_dict=False), tuple)


def test_an_adapter_goes_on_the_fused_base():
    import peft

    torch.manual_seed(0)
    model = peft.get_peft_model(make("llama"), peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    tokens = torch.randint(0, 199, (2, 9))
    logp = model(input_ids=tokens).logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    with pytest.raises(
        TypeError, match=r"model: expected the model itself, fuse_lm_head\(model.get_base_model\(\)\), got PeftModel"
    ):
        fuse_lm_head(model)
    fuse_lm_head(model.get_base_model())
    found = model(input_ids=tokens, labels=tokens).logprob
    torch.testing.assert_close(found, logp, rtol=1e-4, atol=1e-4)
    found.sum().backward()
    assert all(p.grad.abs().sum() > 0 for n, p in model.named_parameters() if "lora" in n)
    on_head = peft.get_peft_model(make("llama"), peft.LoraConfig(r=4, target_modules=["lm_head"]))
    with pytest.raises(TypeError, match=r"linear head, got LlamaForCausalLM with a peft.tuners.lora.layer.Linear"):
        fuse_lm_head(on_head.get_base_model())


def test_bad_models():
    with pytest.raises(
        TypeError, match="model: expected a transformers causal language model with a linear head, got Linear"
    ):
        fuse_lm_head(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="stats: expected"):
        fuse_lm_head(make("llama"), stats=("perplexity",))
    model = make("llama")
    model.config.logit_scale = 3.0  # a scale that the model itself does not apply
    with pytest.raises(
        ValueError,
        match="model: expected a head that is weight, bias, logit scale and soft cap alone, got LlamaForCausalLM",
    ):
        fuse_lm_head(model)


@pytest.mark.parametrize("name", ["xlstm", "inkling_text"])
def test_caps_and_scales_of_other_names_are_read(name):
    """Where a name is not read, the check of the fused head refuses the model."""
    fuse_lm_head(tiny_families.tiny_model(name))


@pytest.mark.parametrize("scale", [1.001, 3.0])
def test_a_wrong_scale_is_refused(scale):
    model = make("llama")
    model.get_output_embeddings().weight.data.mul_(30)
    model.config.logit_scale = scale  # the model itself does not apply it
    with pytest.raises(ValueError, match="whose log-probs differ by"):
        fuse_lm_head(model)


def test_a_model_that_needs_more_than_tokens_is_refused():
    with pytest.raises(
        ValueError, match="expected a transformers causal language model that runs on token ids alone"
    ) as error:
        fuse_lm_head(tiny_families.tiny_model("gemma4_assistant"))
    assert "\n" not in str(error.value)


def test_a_bad_argument_is_named():
    model, tokens = make("llama"), torch.arange(10).view(2, 5)
    for temperature, kind in ((0.0, ValueError), ("hot", TypeError), (torch.tensor([1.0, -1.0]), ValueError)):
        with pytest.raises(kind, match="temperature: expected"):
            fuse_lm_head(model, temperature=temperature)
        assert "forward" not in vars(model)
    fuse_lm_head(model, temperature=torch.tensor([[1.0], [2.0]]))
    with pytest.raises(ValueError, match=r"labels: expected shape \(2, 5\), got \(2, 4\)"):
        model(input_ids=tokens, labels=tokens[:, 1:])
    with pytest.raises(TypeError, match="labels: expected dtype int32 or int64, got float32"):
        model(input_ids=tokens, labels=tokens.float())


def test_a_forward_that_another_library_has_replaced_is_refused():
    """As accelerate replaces it, for autocast or to move inputs: the fused head would leave that out."""
    model = make("llama")
    model.forward = lambda *args, **kwargs: type(model).forward(model, *args, **kwargs)
    with pytest.raises(ValueError, match="model: expected one with its class's own forward, got one whose forward"):
        fuse_lm_head(model)
    del model.forward
    fuse_lm_head(fuse_lm_head(model), temperature=2.0)  # its own replacement is replaced
