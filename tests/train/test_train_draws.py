"""How tokens are drawn: the exact distribution, the same tokens for the same seed, and the rule for small vocabularies."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mgrpo_kernels.train.rollout.draws import BLOCK, Draws, from_blocks, inverted, is_in_blocks
from mgrpo_kernels.train.rollout.truncation import Truncation, keep

LARGE = 2 * BLOCK + 100  # the last block is not whole
NUMBER, TOKENS, T = 2000, 50, 0.7  # draws of a row of logits: NUMBER TOKENS


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def logits_of(vocabulary: int) -> Tensor:
    """Return logits ``(1, V)`` of very different probabilities, some of them 0."""
    logits = torch.randn(1, vocabulary, generator=generator(1)) * 2
    logits[:, ::7] = -torch.inf
    return logits


def drawn(vocabulary: int, truncation: Truncation | None = None) -> Tensor:
    """Return how often each entry is drawn of NUMBER TOKENS times."""
    logits, rows = logits_of(vocabulary).expand(NUMBER, -1), torch.arange(NUMBER)
    draws = Draws([generator()], NUMBER, vocabulary, TOKENS)
    kept = None if truncation is None else keep(logits, T, truncation)
    counts = torch.zeros(vocabulary, dtype=torch.float64)
    for t in range(TOKENS):
        if kept is None:
            tokens = draws.tokens(t, rows, logits, T)
        else:
            tokens = kept.ids.gather(1, draws.columns(t, rows, kept).unsqueeze(1)).squeeze(1)
        counts += torch.bincount(tokens, minlength=vocabulary)
    return counts


def misfit(counts: Tensor, probabilities: Tensor) -> float:
    """Return the chi-square statistic in standard deviations from its mean; entries that are expected less than 10 times count as one."""
    expected = probabilities * counts.sum()
    rare = expected < 10
    seen, want = (torch.cat([each[~rare], each[rare].sum().view(1)]) for each in (counts, expected))
    seen, want = seen[want > 0], want[want > 0]
    freedom = len(want) - 1
    return float((((seen - want) ** 2 / want).sum() - freedom) / (2 * freedom) ** 0.5)


@pytest.mark.parametrize("vocabulary", [50, LARGE])
def test_the_distribution_is_exact_and_a_planted_bias_is_seen(vocabulary: int) -> None:
    counts, p = drawn(vocabulary), (logits_of(vocabulary)[0].double() / T).softmax(-1)
    assert counts[p == 0].sum() == 0
    assert misfit(counts, p) < 5
    biased = p.clone()
    biased[: vocabulary // 2] *= 1.15  # as with a block that is too likely
    assert misfit(counts, biased / biased.sum()) > 5
    assert misfit(counts, p.roll(1)) > 5
    assert misfit(counts, (logits_of(vocabulary)[0].double() / (T * 1.03)).softmax(-1)) > 5


@pytest.mark.parametrize("vocabulary", [50, LARGE])
@pytest.mark.parametrize("truncation", [Truncation(top_k=20), Truncation(top_p=0.8), Truncation(min_p=0.05)])
def test_the_distribution_over_a_kept_set_is_exact(vocabulary: int, truncation: Truncation) -> None:
    kept = keep(logits_of(vocabulary), T, truncation)
    p = torch.zeros(vocabulary, dtype=torch.float64)
    p[kept.ids[0]] = kept.logprobs[0].double().exp()
    counts = drawn(vocabulary, truncation)
    assert counts[p == 0].sum() == 0
    assert misfit(counts, p) < 5


def test_every_part_of_the_unit_interval_is_its_entrys() -> None:
    """The number of points of a grid that choose an entry is the entry's share of them, to one point."""
    masses = torch.rand(1, 40, generator=generator()) * 3
    masses[:, [0, 7, 39]] = 0.0
    points = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    counts = torch.bincount(inverted(masses.expand(len(points), -1), points), minlength=40)
    assert (counts - masses[0] / masses.sum() * len(points)).abs().max() <= 1


def test_the_ends_of_the_unit_interval_are_entries_with_mass() -> None:
    p = torch.zeros(2, LARGE)
    p[:, BLOCK + 3], p[:, LARGE - 2] = 0.25, 0.75
    ends = torch.tensor([[0.0, 0.0], [1 - 2**-53, 1 - 2**-53]], dtype=torch.float64)
    assert from_blocks(p, ends).tolist() == [BLOCK + 3, LARGE - 2]


def test_a_row_of_nan_gives_an_entry_of_the_vocabulary() -> None:
    """The rollout is refused afterwards, for its log-probs."""
    logits = torch.full((3, LARGE), torch.nan)
    tokens = Draws([generator()], 3, LARGE, 1).tokens(0, torch.arange(3), logits, 1.0)
    assert ((tokens >= 0) & (tokens < LARGE)).all()


def test_up_to_one_block_the_largest_sum_of_log_prob_and_gumbel_noise_is_drawn() -> None:
    """With a seed such a vocabulary gives the tokens that it gave before larger ones were drawn in blocks."""
    copies, rows = 5, torch.arange(10)
    for vocabulary in (3, BLOCK):
        logits = torch.randn(10, vocabulary, generator=generator(9))
        draws = Draws([generator(1), generator(2)], copies, vocabulary, 2)
        exponential = [torch.empty(2, copies, vocabulary).exponential_(generator=generator(seed)) for seed in (1, 2)]
        for t in range(2):
            noise = torch.cat([each[t] for each in exponential]).clamp_min(torch.finfo(torch.float32).tiny).log().neg()
            want = torch.add(noise, logits, alpha=1 / T).argmax(-1)
            assert torch.equal(draws.tokens(t, rows, logits, T), want)


def test_larger_vocabularies_are_drawn_in_blocks_on_a_cpu_alone() -> None:
    assert [is_in_blocks(vocabulary, "cpu") for vocabulary in (BLOCK, BLOCK + 1)] == [False, True]
    assert not is_in_blocks(BLOCK + 1, "cuda")
    assert Draws([generator()], 4, BLOCK + 1, 3).numbers(0, torch.arange(4)).shape == (4, 2)


@pytest.mark.parametrize("vocabulary", [7, LARGE])
def test_random_numbers_are_new_for_every_token_and_of_the_prompt_alone(vocabulary: int) -> None:
    rows, tokens = torch.arange(6), 5
    both = Draws([generator(1), generator(2)], 3, vocabulary, tokens)
    alone = Draws([generator(2)], 3, vocabulary, tokens)
    both.steps, alone.steps = 2, 2  # blocks of two tokens
    both.block, alone.block = both.block[:2], alone.block[:2]
    seen = [(both.numbers(t, rows).clone(), alone.numbers(t, rows[:3]).clone()) for t in range(tokens)]
    for of_both, of_alone in seen:
        assert torch.equal(of_both[3:], of_alone)
    values = torch.cat([of_both.flatten() for of_both, _ in seen])
    assert len(values.unique()) == len(values)
    again = Draws([generator(1)], 3, vocabulary, 2).numbers(0, torch.tensor([2]))
    assert torch.equal(again, seen[0][0][2:3])


def test_the_default_device_changes_no_draw() -> None:
    p, uniform = torch.rand(4, LARGE).softmax(-1), torch.rand(4, 2, dtype=torch.float64)
    want = from_blocks(p, uniform)
    with torch.device("meta"):
        assert torch.equal(from_blocks(p, uniform), want)
