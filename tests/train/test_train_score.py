"""Scores of responses: against the whole logits, the sampler, other splits; and models whose head is not understood."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GPT2Config, GraniteConfig, PretrainedConfig

from mgrpo_kernels.train.data.demo import make_tokenizer, model_config
from mgrpo_kernels.train.errors import UsageError
from mgrpo_kernels.train.model.policy import Policy, check_tokenizer, load_policy
from mgrpo_kernels.train.plan.describe import read_model
from mgrpo_kernels.train.rollout import Rollouts
from mgrpo_kernels.train.rollout.transformers import TransformersEngine
from mgrpo_kernels.train.score import micro_batches, response_states, score

PROMPTS = ["3+4=", "1+2+3+4+5+6=", "9+9+9=", "0+5="]
T = 1.1


def sampled(policy: Policy) -> tuple[list[list[int]], Rollouts]:
    ids = policy.encode(PROMPTS)
    rollouts = TransformersEngine(policy, 12, 10**6).sample(
        ids, 3, temperature=T, generator=torch.Generator().manual_seed(0)
    )
    return [prompt for prompt in ids for _ in range(3)], rollouts


def test_sampler_and_scores_agree(policy: Policy) -> None:
    prompts, rollouts = sampled(policy)
    scores = score(policy, prompts, rollouts.tokens, rollouts.mask, temperature=T, budget=10**6)
    torch.testing.assert_close(scores.logprob, rollouts.logprobs, atol=1e-4, rtol=0)


def test_scores_equal_those_of_whole_logits(policy: Policy) -> None:
    prompts, rollouts = sampled(policy)
    scores = score(
        policy,
        prompts,
        rollouts.tokens,
        rollouts.mask,
        temperature=T,
        budget=40,
        stats=("logprob", "entropy", "self_certainty"),
    )
    for row, prompt in enumerate(prompts):
        response = rollouts.tokens[row][rollouts.mask[row]]
        with torch.no_grad():
            z = policy.model(torch.tensor([prompt + response.tolist()])).logits[0, len(prompt) - 1 : -1] / T
        logp = z.log_softmax(-1)
        kept = rollouts.mask[row]
        want = logp.gather(-1, response[:, None])[:, 0], -(logp.exp() * logp).sum(-1), z.logsumexp(-1) - z.mean(-1)
        for got, wanted in zip(scores, want, strict=True):
            assert got is not None
            torch.testing.assert_close(got[row][kept], wanted, atol=1e-5, rtol=1e-5)
            assert (got[row][~kept] == 0).all()


@pytest.mark.parametrize("budget", [1, 25, 60, 10**6])
def test_the_split_does_not_matter(policy: Policy, budget: int) -> None:
    prompts, rollouts = sampled(policy)
    whole = score(policy, prompts, rollouts.tokens, rollouts.mask, temperature=T, budget=10**6)
    split = score(policy, prompts, rollouts.tokens, rollouts.mask, temperature=T, budget=budget)
    torch.testing.assert_close(split.logprob, whole.logprob, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(split.entropy, whole.entropy, atol=1e-5, rtol=1e-5)


def test_empty_responses_score_nothing(policy: Policy) -> None:
    prompts, rollouts = sampled(policy)
    mask = rollouts.mask.clone()
    mask[1] = False
    scores = score(policy, prompts, rollouts.tokens, mask, temperature=T, budget=60)
    assert scores.logprob is not None
    assert (scores.logprob[1] == 0).all()
    torch.testing.assert_close(scores.logprob[0], rollouts.logprobs[0], atol=1e-4, rtol=0)
    nothing = score(policy, prompts, rollouts.tokens, torch.zeros_like(mask), temperature=T, budget=60)
    assert nothing.logprob is not None
    assert (nothing.logprob == 0).all()


def test_nan_is_an_error(policy: Policy) -> None:
    prompts, rollouts = sampled(policy)
    policy.model.get_output_embeddings().weight.data[3] = torch.nan
    with pytest.raises(FloatingPointError, match="score: expected numbers, got NaN in logprob"):
        score(policy, prompts, rollouts.tokens, rollouts.mask, temperature=T, budget=60)


def test_batches_keep_to_the_budget_and_take_everything_once() -> None:
    prompts, lengths = [[1] * n for n in (3, 2, 5, 1, 1, 9, 2)], [2, 2, 4, 1, 1, 12, 3]
    whole = [len(prompt) + length - 1 for prompt, length in zip(prompts, lengths, strict=True)]
    batches = micro_batches(prompts, lengths, 12, packed=False)
    assert sorted(row for batch in batches for row in batch) == list(range(7))
    assert all(len(batch) == 1 or len(batch) * max(whole[row] for row in batch) <= 12 for batch in batches)
    assert batches[0] == [5]
    assert micro_batches([], [], 12, packed=False) == micro_batches([], [], 12, packed=True) == []


def test_packed_batches_count_a_prompt_once() -> None:
    prompts, lengths = [[1] * 5, [2] * 3, [1] * 5, [1] * 5, [2] * 3], [3, 4, 3, 9, 1]
    assert micro_batches(prompts, lengths, 9, packed=True) == [[0, 2], [3], [1, 4]]  # 5 + 2 + 2, 5 + 8, 3 + 3 + 0
    assert micro_batches(prompts, lengths, 23, packed=True) == [[0, 2, 3, 1, 4]]
    assert micro_batches(prompts, lengths, 22, packed=True) == [[0, 2, 3], [1, 4]]


SMALL = {"vocab_size": 20, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
FAMILIES = {
    "gemma2": Gemma2Config(**SMALL, num_key_value_heads=1, head_dim=16, final_logit_softcapping=0.5),
    "cohere": CohereConfig(**SMALL, logit_scale=0.3, bos_token_id=None, eos_token_id=1, pad_token_id=0),
    "granite": GraniteConfig(**SMALL, logits_scaling=4.0),
    "gpt2": GPT2Config(vocab_size=20, n_embd=32, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=1),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_with_scale_and_softcap(family: str) -> None:
    policy = Policy(AutoModelForCausalLM.from_config(FAMILIES[family]), make_tokenizer())
    for parameter in policy.model.parameters():
        parameter.data.mul_(5.0)  # logits large enough for scale and cap to show
    policy.check()
    prompts, rollouts = sampled(policy)
    scores = score(policy, prompts, rollouts.tokens, rollouts.mask, temperature=T, budget=60)
    torch.testing.assert_close(scores.logprob, rollouts.logprobs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_hidden_states_are_the_models(family: str) -> None:
    policy = Policy(AutoModelForCausalLM.from_config(FAMILIES[family]), make_tokenizer())
    for parameter in policy.model.parameters():
        parameter.data.mul_(5.0)
    ids = torch.tensor([[1, 2, 3, 0, 4]])
    with torch.no_grad():
        torch.testing.assert_close(policy.logits(policy.hidden(ids)[0]), policy.model(input_ids=ids).logits[0])


def test_every_token_of_the_tokenizer_is_in_the_vocabulary() -> None:
    tokenizer = make_tokenizer()
    check_tokenizer(tokenizer, [0], tokenizer.vocab_size, "a model")
    with pytest.raises(
        UsageError,
        match=f"below the vocabulary of {tokenizer.vocab_size - 1}, got {tokenizer.vocab_size - 1} in a model",
    ):
        check_tokenizer(tokenizer, [0], tokenizer.vocab_size - 1, "a model")


def test_a_head_that_is_not_understood_is_refused() -> None:
    policy = Policy(AutoModelForCausalLM.from_config(FAMILIES["granite"]), make_tokenizer())
    policy.head_options = policy.head_options._replace(logit_scale=1.0)
    with pytest.raises(UsageError, match="model: expected logits that are the product of the head"):
        policy.check()


def test_unreadable_models(tmp_path: Path, base: Path) -> None:
    (tmp_path / "empty").mkdir()
    for read in (lambda name: load_policy(name, torch.device("cpu"), torch.float32), read_model):
        with pytest.raises(
            UsageError, match=r"model: expected a directory with a model that transformers can load, got .*empty"
        ):
            read(str(tmp_path / "empty"))
    assert read_model(str(base)) == read_model(model_config())


def test_a_model_without_an_end_is_refused() -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    config: PretrainedConfig = model_config()
    config.eos_token_id = None
    with pytest.raises(
        UsageError, match="expected a tokenizer or a generation configuration with an end-of-sequence token"
    ):
        Policy(AutoModelForCausalLM.from_config(config), tokenizer)


def test_gradients_are_the_same_bits_each_time_on_several_threads(policy: Policy) -> None:
    """Responses share the state of their prompt's last token: what it gets from each must add up in the same order."""
    prompts = policy.encode(PROMPTS[:1]) * 256
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, 12, (len(prompts), 8), generator=generator)
    upstream = torch.randn(tokens.numel(), 64, generator=generator)
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        gradients = []
        for _ in range(8):
            policy.model.zero_grad()
            response_states(policy, prompts, tokens, torch.ones_like(tokens, dtype=torch.bool)).hidden.backward(
                upstream
            )
            gradients.append(torch.cat([each.grad.flatten() for each in policy.model.model.parameters()]))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(gradients[0], each) for each in gradients)
