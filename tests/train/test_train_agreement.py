"""Sampling and scoring are held to the model before a run: what is wrong is refused, or sampled in a slower way that is right."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_families
import torch

from mgrpo_kernels.train.data.demo import make_tokenizer
from mgrpo_kernels.train.errors import UsageError
from mgrpo_kernels.train.model.policy import Policy
from mgrpo_kernels.train.rollout import agreement
from mgrpo_kernels.train.rollout.agreement import check_scoring, right_cache, scores, why_not
from mgrpo_kernels.train.rollout.cache import NoCache, PaddedCache, SharedCache, UnpaddedCache
from mgrpo_kernels.train.rollout.transformers import TransformersEngine

FASTEST = {
    "llama": SharedCache,
    "deepseek_v3": SharedCache,  # its values are narrower than its keys
    "qwen3_next": PaddedCache,  # linear attention
    "diffllama": PaddedCache,  # calls attention twice in a layer
    "llama4_text": PaddedCache,  # its get_decoder() is the causal model itself
    "bart": UnpaddedCache,  # ignores positions
    "mamba": UnpaddedCache,  # its cache is called cache_params
    "recurrent_gemma": NoCache,  # keeps state outside the cache
}


def policy_of(family: str, dtype: torch.dtype = torch.float32) -> Policy:
    return Policy(tiny_families.tiny_model(family), make_tokenizer(), dtype)


@pytest.mark.parametrize("family", FASTEST)
def test_the_fastest_cache_that_gives_the_models_own_log_probs_is_taken(family: str) -> None:
    policy = policy_of(family)
    check_scoring(policy)
    assert right_cache(policy) is FASTEST[family]


@pytest.mark.parametrize("family", ["qwen2", "jamba"])
def test_a_model_in_bfloat16_agrees_within_its_rounding(family: str) -> None:
    policy = policy_of(family, torch.bfloat16)
    check_scoring(policy)
    assert right_cache(policy) is (SharedCache if family == "qwen2" else PaddedCache)
    assert policy.dtype == torch.bfloat16


def test_a_model_that_rounds_more_in_bfloat16_is_held_to_its_own_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """As deep models do: tests/train/test_train_real_model.py checks SmolLM2-135M."""
    policy = policy_of("qwen2", torch.bfloat16)
    with torch.no_grad():
        policy.head()[0].mul_(6.0)
    with agreement.computing_in(policy, torch.float32):
        exact = agreement.Expected(policy)
    with agreement.computing_in(policy, torch.bfloat16):
        rounded = agreement.Expected(policy)
    assert 0.05 < rounded.tolerance(torch.bfloat16, exact) / agreement.ROUNDINGS < 0.2
    check_scoring(policy)
    assert right_cache(policy) is SharedCache
    monkeypatch.setattr(agreement, "scores", lambda of, *given: scores(of, *given) + (of.dtype == torch.bfloat16) / 2)
    with pytest.raises(UsageError, match=r"whose scores differ by .* in torch\.bfloat16"):
        check_scoring(policy)


@pytest.mark.parametrize(
    "family, kind",
    [
        ("llama", SharedCache),
        *((each, kind) for each in ("llama", "jamba") for kind in (PaddedCache, UnpaddedCache, NoCache)),
    ],
)
def test_a_fault_of_any_cache_is_seen(family: str, kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = policy_of(family)
    for method, fault in ((kind.keep, _keep_others), (kind.extend, _repeat_a_token)):
        with monkeypatch.context() as patch:
            patch.setattr(kind, method.__name__, fault(method))
            why = why_not(policy, kind)
        assert why is not None
        assert "differ" in why


def _keep_others(keep: Any) -> Any:
    return lambda self, prompts, rollouts: keep(self, prompts, rollouts.flip(-1))


def _repeat_a_token(extend: Any) -> Any:
    return lambda self, tokens: extend(self, tokens[:1].expand_as(tokens).contiguous())


@pytest.mark.parametrize("fault", ["nan", "raises", "differs in bfloat16"])
def test_a_model_without_a_right_cache_is_refused(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = policy_of("llama", torch.bfloat16 if "bfloat16" in fault else torch.float32)

    def wrong(*_: Any) -> float:
        if fault == "raises":
            raise KeyError("no such thing\nin this model")
        differs = fault == "nan" or policy.dtype == torch.bfloat16
        return float("nan") if fault == "nan" else float(differs)

    monkeypatch.setattr(agreement, "sampled_difference", wrong)
    reason = "sampling fails: KeyError" if fault == "raises" else "the log-probs of sampling and of scoring differ by"
    with pytest.raises(UsageError, match=f"model: expected one that samples what it scores, got .*{reason}") as error:
        right_cache(policy)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_that_are_not_the_models_are_refused(dtype: torch.dtype) -> None:
    policy = policy_of("granite", dtype)
    check_scoring(policy)
    policy.head_options = policy.head_options._replace(logit_scale=1.3 * policy.head_options.logit_scale)
    with pytest.raises(UsageError, match="model: expected one whose scores are its own log-probs, got GraniteFor"):
        check_scoring(policy)


def test_scores_of_padded_sequences_are_held_to_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = policy_of("bloom")
    hidden = policy.hidden
    monkeypatch.setattr(
        policy, "hidden", lambda ids: hidden(ids.flip(0)).flip(0) + (ids[:, :1] == ids[0, 0])[..., None]
    )
    with pytest.raises(UsageError, match="whose scores differ by"):
        check_scoring(policy)


REFUSED = {
    "xlnet": "expected a causal language model, got XLNetLMHeadModel, whose logits change by .* with the tokens that follow",
    "cpmant": "expected a causal language model, got CpmAntForCausalLM",
    "rwkv": "expected one that leaves its weights as they are, got RwkvForCausalLM, which changes them when it runs",
    "bert": "expected logits that are the product of the head and the last hidden state, got BertLMHeadModel",
    "gemma4_assistant": "expected a causal language model that runs on token ids alone, got Gemma4AssistantForCausalLM: inputs_embeds",
}


@pytest.mark.parametrize("family", REFUSED)
def test_what_no_way_gets_right_is_refused_in_a_line(family: str) -> None:
    with pytest.raises(UsageError, match=f"^model: {REFUSED[family]}") as error:
        policy_of(family)
    assert "\n" not in str(error.value)


def test_a_layer_with_a_mask_of_its_own_is_not_packed() -> None:
    """Its sparse attention would be lost: a layout replaces the mask."""
    unpackable = policy_of("doge").unpackable
    assert unpackable is not None
    assert "a mask of its own" in unpackable


def test_the_engine_says_how_it_samples() -> None:
    engine = TransformersEngine(policy_of("qwen2"), 4, 100)
    assert engine.how() == SharedCache.HOW
    engine.policy.unpackable = "for this test"
    assert engine.how() == PaddedCache.HOW


def test_prompts_of_equal_length_apart_get_their_own_logits(policy: Policy) -> None:
    prompts = policy.encode(["1+2=", "1+2+3=", "4+5="])
    assert len(prompts[0]) == len(prompts[2]) != len(prompts[1])
    with torch.no_grad():
        logits = UnpaddedCache(policy, prompts, 1, 2).start()
        for row, prompt in zip(logits, prompts, strict=True):
            torch.testing.assert_close(
                row, policy.model(torch.tensor([prompt])).logits[0, -1].float(), rtol=1e-4, atol=1e-4
            )
