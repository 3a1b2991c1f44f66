"""Sequences without padding: the same states, losses, gradients and samples as with it, whatever lies beside what and however it is split."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)
from transformers.activations import ACT2FN

from mgrpo_kernels.train.data.demo import make_tokenizer
from mgrpo_kernels.train.model import attention
from mgrpo_kernels.train.model.attention import Sequences
from mgrpo_kernels.train.model.lean import activated
from mgrpo_kernels.train.model.policy import Policy
from mgrpo_kernels.train.rollout.cache import SharedCache
from mgrpo_kernels.train.rollout.transformers import TransformersEngine
from mgrpo_kernels.train.score import micro_batches, response_states, score
from mgrpo_kernels.train.update import Batch, accumulate_gradient

V, WINDOW, FORCED = 20, 4, "padded on purpose"
ENDS = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
SMALL = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    **ENDS,
}
GROUPED = {**SMALL, "num_key_value_heads": 2, "head_dim": 8}
FAMILIES = {
    "llama": LlamaConfig(**GROUPED, attention_bias=True, rope_theta=100.0),
    "mistral": MistralConfig(**GROUPED, sliding_window=WINDOW),
    "qwen2": Qwen2Config(
        **{**SMALL, "num_key_value_heads": 2}, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    ),
    "qwen3": Qwen3Config(**GROUPED),
    "gemma3": Gemma3TextConfig(**GROUPED, sliding_window=WINDOW, sliding_window_pattern=2),
    "phi3": Phi3Config(**{**SMALL, "num_key_value_heads": 2}, partial_rotary_factor=0.5),
    "cohere": CohereConfig(**SMALL, logit_scale=0.3),
    "gpt2": GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=4, **ENDS),
}
LEAN = {"llama", "mistral", "qwen2", "qwen3"}
_policies: dict[str, Policy] = {}


def policy_of(family: str) -> Policy:
    """Return a random model of a family, made once, whose weights are large enough for differences to show."""
    if family not in _policies:
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(FAMILIES[family])
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data.mul_(4.0)
        _policies[family] = Policy(model, make_tokenizer())
    return _policies[family]


def rows(seed: int, shape: list[tuple[int, int]]) -> tuple[list[list[int]], Tensor, Tensor]:
    """Return prompts, responses and their mask. `shape`: of each row the prompt's number, which sets its length, and the response's."""
    draw = torch.Generator().manual_seed(seed)
    all_prompts = [torch.randint(0, V, (1 + 3 * number,), generator=draw).tolist() for number in range(4)]
    width = max(1, *(length for _, length in shape))
    tokens = torch.randint(0, V, (len(shape), width), generator=draw)
    mask = torch.arange(width) < torch.tensor([length for _, length in shape])[:, None]
    return [all_prompts[number] for number, _ in shape], tokens * mask, mask


def states(policy: Policy, prompts: list[list[int]], tokens: Tensor, mask: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return the states that response tokens follow from, and the gradients of a loss on them."""
    policy.model.zero_grad()
    hidden = response_states(policy, prompts, tokens, mask).hidden
    weight = torch.randn(hidden.shape, dtype=hidden.dtype, generator=torch.Generator().manual_seed(1))
    (hidden * weight).sum().backward()
    return hidden.detach(), [each.grad.clone() for each in policy.model.parameters() if each.grad is not None]


def padded(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "unpackable", FORCED)


SHAPES = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 7)), min_size=1, max_size=9)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shape=SHAPES, seed=st.integers(0, 99), small=st.sampled_from([1, 40, attention.SMALL]))
def test_states_and_gradients_are_those_of_the_padded_path(
    family: str, shape: list[tuple[int, int]], seed: int, small: int
) -> None:
    policy = policy_of(family)
    assert policy.unpackable is None
    assert (policy._lean is not None) == (family in LEAN)
    prompts, tokens, mask = rows(seed, shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "SMALL", small)  # at 1 every length has a block of its own
        got, got_gradients = states(policy, prompts, tokens, mask)
        padded(policy, patch)
        want, want_gradients = states(policy, prompts, tokens, mask)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)
    assert len(got_gradients) == len(want_gradients)
    for one, other in zip(got_gradients, want_gradients, strict=True):
        scale = max(1.0, float(other.abs().max()))
        torch.testing.assert_close(one / scale, other / scale, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_neighbour_is_not_seen(family: str) -> None:
    """A change of one sequence leaves the bits of every other one as they are."""
    policy = policy_of(family)
    prompts, tokens, mask = rows(0, [(0, 3), (1, 4), (1, 2), (2, 5)])
    before = response_states(policy, prompts, tokens, mask).hidden
    changed = tokens.clone()
    changed[1, 1] = (tokens[1, 1] + 1) % V
    after = response_states(policy, prompts, changed, mask).hidden
    differs = (before != after).any(-1)
    assert differs.nonzero().flatten().tolist() == [5, 6]  # of the second response what follows the change


@settings(max_examples=12, deadline=None)
@given(
    shape=SHAPES,
    seed=st.integers(0, 99),
    budget=st.integers(1, 60),
    loss=st.sampled_from(["dapo", "grpo", "dr_grpo", "vespo"]),
)
def test_loss_and_gradient_do_not_depend_on_packing_or_split(
    shape: list[tuple[int, int]], seed: int, budget: int, loss: str
) -> None:
    policy = policy_of("qwen3")
    prompts, tokens, mask = rows(seed, shape)
    draw = torch.Generator().manual_seed(seed)
    old, ref = (-3.0 + 0.3 * torch.randn(mask.shape, generator=draw) for _ in range(2))
    batch = Batch(prompts, tokens, mask, old * mask, ref * mask, torch.randn(len(shape), generator=draw))
    found = []
    for unpackable, most in ((None, budget), (None, 10**6), (FORCED, 10**6)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(policy, "unpackable", unpackable)
            policy.model.zero_grad()
            options = tiny.config(loss_type=loss, kl_coef=0.1).loss
            sums = accumulate_gradient(policy, batch, options, max_tokens=7, temperature=1.0, budget=most)
            found.append((sums, torch.cat([each.grad.flatten() for each in policy.model.parameters()])))
    for sums, gradient in found[:2]:
        scale = max(1.0, float(found[2][1].abs().max()))
        torch.testing.assert_close(gradient / scale, found[2][1] / scale, atol=2e-5, rtol=1e-3)
        assert sums == pytest.approx(found[2][0], abs=1e-3, rel=1e-3)


@given(shape=SHAPES, budget=st.integers(1, 60))
def test_batches_keep_to_the_budget(shape: list[tuple[int, int]], budget: int) -> None:
    prompts, tokens, mask = rows(0, shape)
    lengths = mask.sum(-1).tolist()
    batches = micro_batches(prompts, lengths, budget, packed=True)
    assert sorted(row for batch in batches for row in batch) == list(range(len(shape)))
    for batch in batches:
        part = torch.tensor(batch)
        layout = Sequences([prompts[row] for row in batch], [lengths[row] for row in batch], tokens[part][mask[part]])
        assert len(batch) == 1 or layout.ids.shape[1] <= budget


@pytest.mark.parametrize("one_operation", [True, False])  # as float32 on a CPU, and as everywhere else
@pytest.mark.parametrize("family", FAMILIES)
def test_samples_are_those_of_the_models_own_cache(
    family: str, one_operation: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One prompt held for all its rollouts, rollouts that end and leave, room that grows, windows that slide."""
    monkeypatch.setattr("mgrpo_kernels.train.rollout.cache.ROOM", 3)
    if not one_operation:
        monkeypatch.setattr("mgrpo_kernels.train.rollout.cache.are_plain", lambda *_: False)
    policy = policy_of(family)
    monkeypatch.setattr(policy, "eos", [1, 4, 7])
    kept, keep = [], SharedCache.keep
    monkeypatch.setattr(SharedCache, "keep", lambda self, *which: kept.append(which[1].shape) or keep(self, *which))
    prompts = [[3, 4, 5, 6, 7, 8], [9, 2], [5, 5, 5]]
    engine = TransformersEngine(policy, 14, 10**6, stats=("logprob", "entropy", "self_certainty"))

    def sample() -> Any:
        return engine.sample(prompts, 12, temperature=2.0, generator=torch.Generator().manual_seed(3))

    got = sample()
    assert any(shape[0] > 1 and shape[1] > 1 for shape in kept)  # some have left, and what stays is a block
    padded(policy, monkeypatch)
    want = sample()
    assert got.tokens.shape[1] > 2 * WINDOW
    lengths = got.mask.sum(-1)
    assert len(lengths.unique()) > 3
    assert torch.equal(got.tokens, want.tokens)
    for name in ("logprobs", "entropy", "self_certainty"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_the_samplers_statistics_are_the_trainers(family: str) -> None:
    policy = policy_of(family)
    prompts = [[3, 4, 5, 6, 7, 8], [9, 2]]
    engine = TransformersEngine(policy, 9, 10**6, stats=("logprob", "entropy", "self_certainty"))
    got = engine.sample(prompts, 5, temperature=0.7, generator=torch.Generator().manual_seed(0))
    everyone = [prompt for prompt in prompts for _ in range(5)]
    stats = ("logprob", "entropy", "self_certainty")
    want = score(policy, everyone, got.tokens, got.mask, temperature=0.7, budget=30, stats=stats)
    for mine, name in ((got.logprobs, "logprob"), (got.entropy, "entropy"), (got.self_certainty, "self_certainty")):
        torch.testing.assert_close(mine, getattr(want, name), atol=1e-4, rtol=1e-4)


def test_a_part_of_the_prompts_gets_what_the_whole_gives() -> None:
    policy, prompts = policy_of("qwen3"), [[3, 4, 5], [9, 2], [5], [7, 7]]
    engine = TransformersEngine(policy, 9, 10**6)
    options: dict[str, Any] = {"temperature": 1.5}
    whole = engine.sample(prompts, 4, generator=torch.Generator().manual_seed(0), **options)
    part = engine.sample(prompts[2:], 4, generator=torch.Generator().manual_seed(0), first=2, **options)
    width = part.tokens.shape[1]
    assert torch.equal(part.tokens, whole.tokens[8:, :width])
    assert not whole.mask[8:, width:].any()


UNPACKABLE = {
    "gemma2": (Gemma2Config(**GROUPED), "softcap"),
    "bloom": (
        BloomConfig(vocab_size=V, hidden_size=32, n_layer=2, n_head=4, **ENDS),
        "its attention cannot be replaced",
    ),
}


@pytest.mark.parametrize("family", UNPACKABLE)
def test_what_cannot_be_packed_is_padded_and_says_so(family: str, caplog: pytest.LogCaptureFixture) -> None:
    config, why = UNPACKABLE[family]
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config)
    implementation = model.config._attn_implementation
    policy = Policy(model, make_tokenizer())
    assert policy.unpackable is not None
    assert type(model).__name__ in caplog.text
    assert "padded" in caplog.text
    assert why in policy.unpackable
    assert model.config._attn_implementation == implementation
    prompts, tokens, mask = rows(0, [(0, 3), (1, 4), (1, 2)])
    found = score(policy, prompts, tokens, mask, temperature=1.0, budget=30).logprob
    assert found is not None
    for row, prompt in enumerate(prompts):
        response = tokens[row][mask[row]]
        with torch.no_grad():
            logp = model(torch.tensor([prompt + response.tolist()])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        torch.testing.assert_close(
            found[row][mask[row]], logp.gather(-1, response[:, None])[:, 0], atol=1e-4, rtol=1e-4
        )


def test_few_calls_give_what_the_modules_give(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = policy_of("qwen3")
    prompts, tokens, mask = rows(0, [(0, 3), (1, 4), (1, 2), (2, 5)])
    layout = Sequences(prompts, mask.sum(-1).tolist(), tokens[mask])
    calls: list[int] = []
    handle = policy.model.get_decoder().layers[0].register_forward_hook(lambda *_: calls.append(1))
    few = policy.packed_hidden(layout.ids, layout.positions, layout)
    assert not calls
    monkeypatch.setattr(policy.model.get_decoder().layers[0], "gradient_checkpointing", True)  # its modules recompute
    many = policy.packed_hidden(layout.ids, layout.positions, layout)
    handle.remove()
    assert calls
    torch.testing.assert_close(few, many, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["silu", "swish", "gelu", "relu"])
def test_the_gate_has_the_models_own_activation(name: str) -> None:
    act, gate, up = ACT2FN[name], torch.randn(3, 40), torch.randn(3, 40)
    with torch.no_grad():
        torch.testing.assert_close(activated(gate, up, act), act(gate) * up, rtol=1e-5, atol=1e-6)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int, int],
    deterministic: bool,
) -> Tensor:
    """What flash-attn's documentation says of it: the causal mask is aligned to the bottom right corner, grouped heads are allowed."""
    assert causal
    assert deterministic
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert (max_q, max_k) == (int(cu_q.diff().max()), int(cu_k.diff().max()))
    outs = []
    for a, b, c, d in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True):
        Q, K = int(b - a), int(d - c)
        behind = torch.arange(Q)[:, None] + K - Q - torch.arange(K)
        seen = (behind >= 0) & ((behind <= window_size[0]) if window_size[0] >= 0 else True)
        keys, values = (each[c:d].repeat_interleave(q.shape[1] // k.shape[1], 1) for each in (k, v))
        weights = (
            torch.einsum("qhd,khd->hqk", q[a:b], keys).mul(softmax_scale).masked_fill(~seen, -torch.inf).softmax(-1)
        )
        outs.append(torch.einsum("hqk,khd->qhd", weights, values))
    return torch.cat(outs)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
@pytest.mark.parametrize("shape", [[(0, 3), (1, 4), (1, 1), (2, 5), (1, 7)], [(0, 3), (1, 4), (2, 1)]])
def test_what_flash_attention_is_given(
    family: str, shape: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its kernel needs a GPU; here plain PyTorch stands for it, by its contract."""
    policy = policy_of(family)
    prompts, tokens, mask = rows(0, shape)
    want, want_gradients = states(policy, prompts, tokens, mask)
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func))
    monkeypatch.setattr(attention, "flash_attention", lambda values: True)
    got, got_gradients = states(policy, prompts, tokens, mask)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)
    for one, other in zip(got_gradients, want_gradients, strict=True):
        scale = max(1.0, float(other.abs().max()))
        torch.testing.assert_close(one / scale, other / scale, atol=2e-5, rtol=1e-3)


def test_flash_attention_takes_no_float32() -> None:
    assert not attention.flash_attention(torch.zeros(1))
    assert not attention.flash_attention(torch.zeros(1, device="meta"))
