"""A transformers model that gives statistics instead of logits."""

import pytest
import torch
import transformers
from contract import forbid_large_allocations
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
}


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
    assert model.generate(tokens[:, :3], max_new_tokens=2, do_sample=False).shape[1] <= 5
    del model.forward
    assert model(input_ids=tokens, labels=labels).loss.isfinite()


def test_no_logits_are_held():
    model = fuse_lm_head(make("llama", vocab_size=5000))
    tokens = torch.randint(0, 5000, (2, 200))
    with torch.no_grad():
        model(
            input_ids=tokens, labels=tokens
        )  # the workspace is larger than these logits; rows x vocabulary never is one tensor
        with forbid_large_allocations(2 * 200 * 5000):
            model(input_ids=tokens, labels=tokens)


def test_bad_models():
    with pytest.raises(
        TypeError, match="model: want a transformers causal language model with a linear head, got Linear"
    ):
        fuse_lm_head(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="stats: want"):
        fuse_lm_head(make("llama"), stats=("perplexity",))
    model = make("llama")
    model.config.logit_scale = 3.0  # a scale that the model itself does not apply
    with pytest.raises(
        ValueError,
        match="model: want a head that is weight, bias, logit scale and soft cap alone, got LlamaForCausalLM",
    ):
        fuse_lm_head(model)
