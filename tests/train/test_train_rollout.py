"""Sampling: against transformers' own generate, padding, chunks, endings."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from transformers import DynamicCache

from mgrpo_kernels import MomentumModel, linear_token_stats
from mgrpo_kernels.train.model.policy import Policy
from mgrpo_kernels.train.rollout import Rollouts, interleave, join
from mgrpo_kernels.train.rollout.transformers import TransformersEngine

PROMPTS = ["3+4=", "1+2+3+4+5+6=", "9+9+9=", "0+5="]
R = 12


def engine(policy: Policy, max_tokens: int = R, cache_tokens: int = 10**6) -> TransformersEngine:
    return TransformersEngine(policy, max_tokens, cache_tokens)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_greedy_equals_generate(policy: Policy) -> None:
    ids = policy.encode(PROMPTS)
    got = engine(policy).sample(ids, 1, temperature=0.0, generator=generator())
    for row, prompt in enumerate(ids):
        out = policy.model.generate(torch.tensor([prompt]), max_new_tokens=R, do_sample=False)[0, len(prompt) :]
        assert got.tokens[row][got.mask[row]].tolist() == out.tolist()


def test_left_padding_changes_nothing(policy: Policy) -> None:
    ids = policy.encode(PROMPTS)
    together = engine(policy).sample(ids, 1, temperature=0.0, generator=generator())
    for row, prompt in enumerate(ids):
        alone = engine(policy).sample([prompt], 1, temperature=0.0, generator=generator())
        length = int(alone.mask.sum())
        assert together.tokens[row, :length].tolist() == alone.tokens[0].tolist()
        torch.testing.assert_close(together.logprobs[row, :length], alone.logprobs[0], atol=1e-5, rtol=1e-5)


def test_logits_of_16_bit_models_are_float32_sums(policy: Policy) -> None:
    """As in the fused head that scores the tokens: a 16-bit head would round each logit."""
    narrow = Policy(policy.model, policy.tokenizer, torch.bfloat16)
    hidden, labels = torch.randn(5, narrow.model.config.hidden_size) * 8, torch.arange(5)
    with narrow.autocast():
        want = linear_token_stats(hidden, *narrow.head()[:1], labels, stats=("logprob",)).logprob
        for logits in (narrow.logits(hidden), _padded_logits(narrow, hidden)):
            assert logits.dtype == torch.float32
            got = logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
            torch.testing.assert_close(got, want, rtol=1e-6, atol=2e-6)
    rounded = torch.nn.functional.linear(hidden.bfloat16(), narrow.head()[0].bfloat16()).float().log_softmax(-1)
    assert (rounded.gather(-1, labels.unsqueeze(-1)).squeeze(-1) - want).abs().max() > 1e-3


def _padded_logits(policy: Policy, hidden: torch.Tensor) -> torch.Tensor:
    """Return the next tokens' logits of a model that is padded, whose last hidden states are these."""
    states = SimpleNamespace(last_hidden_state=hidden.unsqueeze(1))
    ids, mask = torch.zeros(len(hidden), 1, dtype=torch.long), torch.ones(len(hidden), 1, dtype=torch.bool)
    with mock.patch.object(policy, "_decoder", return_value=states):
        return policy.next_logits(ids, mask, torch.zeros_like(ids), DynamicCache())


def test_ends_and_lengths(policy: Policy) -> None:
    got = engine(policy).sample(policy.encode(PROMPTS), 16, temperature=1.5, generator=generator())
    eos = policy.eos[0]
    lengths = got.mask.sum(-1)
    assert got.tokens.shape == got.mask.shape == got.logprobs.shape
    assert got.mask.shape[1] == lengths.max()
    assert 0 < int(got.finished.sum()) < 64  # both kinds are there to be looked at
    for row, length in enumerate(lengths.tolist()):
        assert got.mask[row, :length].all()
        assert not got.mask[row, length:].any()
        assert (got.tokens[row, length:] == 0).all()
        assert (got.logprobs[row, length:] == 0).all()
        assert (got.logprobs[row, :length] < 0).all()
        assert eos not in got.tokens[row, : length - 1].tolist()
        assert bool(got.finished[row]) == (got.tokens[row, length - 1] == eos)
        assert got.finished[row] or length == R


def test_chunks_and_copies_keep_their_order(policy: Policy) -> None:
    ids = policy.encode(PROMPTS)
    small = engine(policy, cache_tokens=3 * (R + 12)).sample(ids, 5, temperature=0.0, generator=generator())
    whole = engine(policy).sample(ids, 5, temperature=0.0, generator=generator())
    single = engine(policy).sample(ids, 1, temperature=0.0, generator=generator())
    assert torch.equal(small.tokens, whole.tokens)
    assert torch.equal(whole.tokens, single.tokens.repeat_interleave(5, 0))
    one_at_a_time = engine(policy, cache_tokens=1).sample(ids, 1, temperature=0.0, generator=generator())
    assert torch.equal(one_at_a_time.tokens, single.tokens)


def test_same_generator_same_tokens(policy: Policy) -> None:
    ids = policy.encode(PROMPTS)
    first, again, other = (engine(policy).sample(ids, 4, temperature=1.0, generator=generator(s)) for s in (1, 1, 2))
    assert torch.equal(first.tokens, again.tokens)
    assert not (first.tokens.shape == other.tokens.shape and torch.equal(first.tokens, other.tokens))


def test_momentum_model_samples_and_leaves_the_policy_alone(policy: Policy) -> None:
    momentum = MomentumModel(policy.model, 0.9)
    before = {name: value.clone() for name, value in policy.model.state_dict().items()}
    ids = policy.encode(PROMPTS)
    same = engine(policy).sample(ids, 2, temperature=1.0, generator=generator(), momentum=momentum)
    own = engine(policy).sample(ids, 2, temperature=1.0, generator=generator())
    assert torch.equal(same.tokens, own.tokens)
    for value in momentum.ema.values():
        value.mul_(0.3)
    other = engine(policy).sample(ids, 2, temperature=1.0, generator=generator(), momentum=momentum)
    assert not torch.equal(other.logprobs.sum(), own.logprobs.sum())
    assert all(torch.equal(before[name], value) for name, value in policy.model.state_dict().items())


def test_nan_weights_stop_the_rollout(policy: Policy) -> None:
    policy.model.get_output_embeddings().weight.data[3] = torch.nan
    with pytest.raises(FloatingPointError, match="rollout: expected finite log-probs"):
        engine(policy).sample(policy.encode(PROMPTS), 1, temperature=1.0, generator=generator())


def rollouts(rows: int, width: int, start: int) -> Rollouts:
    tokens = torch.arange(start, start + rows)[:, None].expand(rows, width)
    return Rollouts(
        tokens, torch.ones(rows, width, dtype=torch.bool), torch.zeros(rows, width), torch.ones(rows, dtype=torch.bool)
    )


def test_join_and_interleave() -> None:
    joined = join([rollouts(1, 2, 5), rollouts(1, 3, 6)])
    assert joined.tokens.tolist() == [[5, 5, 0], [6, 6, 6]]
    assert joined.mask.tolist() == [[True, True, False], [True, True, True]]
    both = interleave(rollouts(6, 2, 0), rollouts(2, 1, 10), prompts=2)
    assert both.tokens[:, 0].tolist() == [0, 1, 2, 10, 3, 4, 5, 11]
    assert both.mask[3].tolist() == [True, False]


def test_copies_that_do_not_fit_at_once_are_drawn_apart(policy: Policy) -> None:
    prompts = policy.encode(["3+4="])
    engine = TransformersEngine(policy, 12, len(prompts[0]) + 12)  # one rollout at a time
    rollouts = engine.sample(prompts, 6, temperature=2.0, generator=torch.Generator().manual_seed(0))
    assert len({tuple(row) for row in rollouts.tokens.tolist()}) > 3
