"""Sampling by vLLM: the same tokens again, log-probs as transformers has them, weights exchanged, ends, failures."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from typing import Any

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from mgrpo_kernels import MomentumModel
from mgrpo_kernels.train.config import VllmConfig
from mgrpo_kernels.train.data import demo
from mgrpo_kernels.train.errors import EngineError, UsageError
from mgrpo_kernels.train.model.policy import Policy
from mgrpo_kernels.train.rollout import Rollouts
from mgrpo_kernels.train.rollout import vllm as module
from mgrpo_kernels.train.rollout.transformers import TransformersEngine
from mgrpo_kernels.train.rollout.truncation import Truncation
from mgrpo_kernels.train.rollout.vllm import VllmEngine
from mgrpo_kernels.train.score import score

PROMPTS = ["3+4=", "1+2+3+4+5+6=", "9+9+9=", "0+5="]
COPIES = 6


def draw(
    engine: VllmEngine, seed: int = 0, momentum: MomentumModel | None = None, temperature: float = 1.1
) -> Rollouts:
    generator = torch.Generator().manual_seed(seed)
    prompts = engine.policy.encode(PROMPTS)
    return engine.sample(prompts, COPIES, temperature=temperature, generator=generator, momentum=momentum)


def equal(one: Rollouts, other: Rollouts) -> bool:
    pairs = [(a, b) for a, b in zip(one, other, strict=True) if a is not None]
    assert len(pairs) >= 4
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in pairs)


def mismatch(policy: Policy, seen: Rollouts, temperature: float = 1.1, copies: int = COPIES) -> float:
    """Return the largest difference between the sampler's log-probs and the trainer's."""
    prompts = [prompt for prompt in policy.encode(PROMPTS) for _ in range(copies)]
    own = score(policy, prompts, seen.tokens, seen.mask, temperature=temperature, budget=10**6).logprob
    assert own is not None
    return float((own - seen.logprobs).abs().max())


def shaken(policy: Policy) -> MomentumModel:
    """Return a momentum model that is another model."""
    momentum, seed = MomentumModel(policy.model, 0.9), torch.Generator().manual_seed(1)
    for value in momentum.ema.values():
        value.add_(0.2 * value.std() * torch.randn(value.shape, generator=seed))
    return momentum


def test_same_seed_and_weights_same_tokens(engine: VllmEngine) -> None:
    first, again, other = draw(engine, 1), draw(engine, 1), draw(engine, 2)
    assert equal(first, again)
    assert not equal(first, other)
    assert len({tuple(row.tolist()) for row in first.tokens[:COPIES]}) > 1  # a group's rollouts differ


@pytest.mark.parametrize("temperature", [0.7, 1.1])
def test_logprobs_are_those_of_transformers(engine: VllmEngine, policy: Policy, temperature: float) -> None:
    assert mismatch(policy, draw(engine, temperature=temperature), temperature) < 1e-4


@pytest.mark.parametrize("truncation", [Truncation(top_p=0.6), Truncation(top_k=3), Truncation(min_p=0.3)])
def test_truncated_sampling_returns_the_kept_sets(engine: VllmEngine, policy: Policy, truncation: Truncation) -> None:
    prompts, generator = policy.encode(PROMPTS), torch.Generator().manual_seed(0)
    seen = engine.sample(prompts, COPIES, temperature=1.1, generator=generator, truncation=truncation)
    assert seen.kept is not None
    assert (seen.kept == seen.tokens.unsqueeze(-1)).any(-1)[seen.mask].all()
    assert (seen.kept[~seen.mask] == -1).all()
    every = [prompt for prompt in prompts for _ in range(COPIES)]
    options = {"temperature": 1.1, "budget": 10**6, "stats": ("logprob",)}
    own = score(policy, every, seen.tokens, seen.mask, **options, kept=seen.kept).logprob
    assert float((own - seen.logprobs).abs().max()) < 1e-4
    whole = score(policy, every, seen.tokens, seen.mask, **options).logprob
    assert float((whole - seen.logprobs).abs().max()) > 0.1
    alike = TransformersEngine(policy, 8, 10**6).sample(
        prompts, COPIES, temperature=1.1, generator=generator, truncation=truncation
    )
    first, other = seen.kept[:, 0], alike.kept[:, 0]  # the first token follows the same prompt
    assert [set(row.tolist()) - {-1} for row in first] == [set(row.tolist()) - {-1} for row in other]


def test_more_prompts_than_one_pass_takes(engine: VllmEngine) -> None:
    """Some would be prefilled in parts, which a CPU's seeds do not survive."""
    texts = ["+".join(f"{number:020}") + "=" for number in range(200)]  # 40 tokens each, no two the same
    got = engine.sample(engine.policy.encode(texts), 1, temperature=1.0, generator=torch.Generator().manual_seed(0))
    assert got.mask.any(-1).all()


def test_greedy_is_that_of_transformers(engine: VllmEngine, policy: Policy) -> None:
    prompts, generator = policy.encode(PROMPTS), torch.Generator().manual_seed(0)
    got = engine.sample(prompts, 1, temperature=0.0, generator=generator)
    want = TransformersEngine(policy, engine.max_tokens, 10**6).sample(prompts, 1, temperature=0.0, generator=generator)
    assert torch.equal(got.tokens, want.tokens)
    assert torch.equal(got.finished, want.finished)
    torch.testing.assert_close(got.logprobs, want.logprobs, atol=1e-4, rtol=0)


def test_draws_follow_the_distribution(engine: VllmEngine, policy: Policy) -> None:
    copies = 3000
    generator = torch.Generator().manual_seed(0)
    got = engine.sample(policy.encode(["3+4="]), copies, temperature=1.1, generator=generator).tokens[:, 0]
    logits = policy.model(input_ids=torch.tensor(policy.encode(["3+4="]))).logits[0, -1] / 1.1
    share = torch.bincount(got, minlength=len(logits)) / copies
    torch.testing.assert_close(
        share, logits.detach().softmax(-1), atol=0.035, rtol=0
    )  # 4 standard errors of a share of 1/2


def test_policy_momentum_policy(engine: VllmEngine, policy: Policy) -> None:
    momentum = shaken(policy)
    before = {name: value.clone() for name, value in policy.model.state_dict().items()}
    own, theirs, again = draw(engine), draw(engine, momentum=momentum), draw(engine)
    assert equal(own, again)
    assert not torch.equal(own.tokens, theirs.tokens)
    assert mismatch(policy, theirs) > 0.1
    with momentum.swapped_into(policy.model):
        assert mismatch(policy, theirs) < 1e-4
    assert all(torch.equal(before[name], value) for name, value in policy.model.state_dict().items())


def test_an_optimizer_step_reaches_vllm(engine: VllmEngine, policy: Policy) -> None:
    before = draw(engine)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.mul_(1.05)
    after, synced = draw(engine), engine.sync_seconds
    assert mismatch(policy, after) < 1e-4
    assert not torch.equal(before.logprobs, after.logprobs)
    draw(engine)
    assert engine.sync_seconds > synced > 0


def test_ends_and_lengths(engine: VllmEngine, policy: Policy) -> None:
    got = engine.sample(policy.encode(PROMPTS), 16, temperature=1.5, generator=torch.Generator().manual_seed(0))
    lengths = got.mask.sum(-1)
    assert got.tokens.shape == got.mask.shape == got.logprobs.shape == (64, int(lengths.max()))
    assert 0 < int(got.finished.sum()) < 64  # both kinds are there to be looked at
    for row, length in enumerate(lengths.tolist()):
        assert got.mask[row, :length].all()
        assert (got.tokens[row, length:] == 0).all()
        assert (got.logprobs[row, length:] == 0).all()
        assert (got.logprobs[row, :length] < 0).all()
        assert policy.eos[0] not in got.tokens[row, : length - 1].tolist()
        assert bool(got.finished[row]) == (got.tokens[row, length - 1] == policy.eos[0])
        assert got.finished[row] or length == engine.max_tokens


def test_every_end_of_the_policy_ends(engine: VllmEngine, policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    hash_, end = policy.encode(["#$"])[0]
    monkeypatch.setattr(policy, "eos", [hash_])
    got = draw(engine)
    assert bool(got.finished.any())
    assert end in got.tokens.tolist()[0] + got.tokens.flatten().tolist()  # what ended before does no longer
    last = got.tokens.gather(1, got.mask.sum(-1, keepdim=True) - 1).squeeze(1)
    assert torch.equal(got.finished, last == hash_)


def test_nan_weights_stop_the_rollout(engine: VllmEngine, policy: Policy) -> None:
    policy.model.get_output_embeddings().weight.data[3] = torch.nan
    with pytest.raises(FloatingPointError, match="rollout: expected finite log-probs"):
        draw(engine)


def test_refused_arguments(engine: VllmEngine) -> None:
    generator = torch.Generator()
    for prompt, length in ([[]], 0), ([[3] * 41], 41):
        with pytest.raises(ValueError, match=f"prompts: expected 1 to 40 tokens, got {length}"):
            engine.sample(prompt, 1, temperature=1.0, generator=generator)
    with pytest.raises(ValueError, match=r"temperature: expected 0 or >= 0\.01 with vllm, got 0\.001"):
        engine.sample([[3]], 1, temperature=0.001, generator=generator)


def test_failures_have_their_reason_and_leave_nothing_behind(
    engine: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = draw(engine)

    def broken() -> list[Any]:
        raise RuntimeError("an illegal memory access")

    with monkeypatch.context() as patch:
        patch.setattr(engine._llm.llm_engine, "step", broken)
        with pytest.raises(
            EngineError, match="vllm: expected 24 responses .* got RuntimeError: an illegal memory access"
        ):
            draw(engine)
    assert equal(draw(engine), want)

    step = engine._llm.llm_engine.step
    with monkeypatch.context() as patch:
        patch.setattr(engine._llm.llm_engine, "step", lambda: (time.sleep(0.1), step())[1])
        engine.timeout = 0.3
        with pytest.raises(EngineError, match=r"expected 24 responses within 0\.3 s \(vllm_timeout\), got \d+$"):
            draw(engine)
    engine.timeout = 60.0
    assert equal(draw(engine), want)


def test_a_call_that_hangs_ends_the_process() -> None:
    program = (
        "import time; from mgrpo_kernels.train.rollout.vllm import ended_after\n"
        "with ended_after(0.2, 'vllm: expected an answer, got none'): time.sleep(60)"
    )
    got = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50, check=False)
    assert got.returncode == 1
    assert got.stderr.startswith(
        "error: vllm: expected an answer, got none; --resume continues from the last checkpoint"
    )
    assert "most recent call first" in got.stderr


@pytest.mark.parametrize("timeout", [1.0, 600.0])
def test_a_call_has_a_minute_beyond_its_time_limit(
    engine: VllmEngine, monkeypatch: pytest.MonkeyPatch, timeout: float
) -> None:
    """However short the limit: a machine that is only slow is told of it by an error, and goes on."""
    limits = []

    def noted(seconds: float, reason: str) -> contextlib.AbstractContextManager[None]:
        limits.append(seconds)
        return contextlib.nullcontext()

    monkeypatch.setattr(module, "ended_after", noted)
    monkeypatch.setattr(engine, "_generate", lambda *_: [module.Completion([1], [-0.5])])
    engine.timeout = timeout
    draw(engine)
    assert limits == [timeout + 60.0]


def test_weights_that_go_astray_are_noticed(engine: VllmEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    right = module.checkpoint_weights

    def crossed(model: Any, *, untie: bool) -> dict[str, torch.Tensor]:
        named = dict(right(model, untie=untie))
        names = [f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1)]
        named[names[0]], named[names[1]] = named[names[1]], named[names[0]]
        return named

    engine._check()
    monkeypatch.setattr(module, "checkpoint_weights", crossed)
    with pytest.raises(
        UsageError, match="expected a model that vLLM and transformers read alike .* LlamaForCausalLM, which"
    ):
        engine._check()


def test_an_exchange_that_fails_is_the_end(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.layers import rotary_embedding

    monkeypatch.setattr(
        rotary_embedding, "_ROPE_DICT", {}
    )  # what is left half-loaded shall not be shared with other engines
    engine = VllmEngine(policy, 8, 12, VllmConfig(vllm_cache_gib=0.1))
    monkeypatch.setattr(module, "checkpoint_weights", lambda _, untie: {"model.layers.7.nowhere": torch.zeros(2)})
    with pytest.raises(
        UsageError, match="engine: expected a model that vLLM runs, with weights that it takes, got LlamaForCausalLM: "
    ):
        engine._check()
    with pytest.raises(
        EngineError, match="expected a new engine after an exchange of weights that failed, got the old one"
    ):
        draw(engine)


def test_a_prefix_cache_that_vllm_keeps_is_an_error(engine: VllmEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would have keys and values of the weights before."""
    monkeypatch.setattr(engine._llm, "reset_prefix_cache", lambda: False)
    with pytest.raises(EngineError, match="the prefix cache was in use and kept"):
        draw(engine)
    monkeypatch.undo()
    engine._whole = True  # the exchange itself was whole


def small(**changes: Any) -> Policy:
    """Return a small Qwen2 with tied embeddings and biases."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(demo.CHARACTERS) + 2,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
    )
    model: Any = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return Policy(model, demo.make_tokenizer(), **changes)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_tied_weights_and_dtypes(dtype: torch.dtype, most: float) -> None:
    policy = small(dtype=dtype)
    names = [set(module.checkpoint_weights(policy.model, untie=untie)) for untie in (False, True)]
    assert names[1] - names[0] == {"lm_head.weight"}
    assert policy.model.dtype == torch.float32  # of the master
    seen = draw(VllmEngine(policy, 8, 12, VllmConfig(vllm_cache_gib=0.1)))
    assert mismatch(policy, seen) < most


def test_what_vllm_cannot_do_is_refused(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="vllm_sleep: expected a GPU"):
        VllmEngine(policy, 8, 12, VllmConfig(vllm_sleep=True))
    with pytest.raises(
        UsageError, match="engine: expected a model and memory with which vLLM .* got LlamaForCausalLM and .* less than"
    ):
        VllmEngine(policy, 8, 12, VllmConfig(vllm_cache_gib=1e5))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="engine: expected transformers under torchrun"):
        VllmEngine(policy, 8, 12, VllmConfig())
