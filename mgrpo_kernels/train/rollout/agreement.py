"""Holds sampling and scoring to the model before a run: their log-probs must be those of the model on each sequence by itself.

An architecture can be wrong in silence: it may ignore positions and padding, keep state outside the cache, or call attention more than once
in a layer. A policy would then train on samples of another distribution.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mgrpo_kernels.train.errors import UsageError
from mgrpo_kernels.train.model.policy import Policy, first_line
from mgrpo_kernels.train.rollout.cache import Cache, NoCache, PaddedCache, SharedCache, UnpaddedCache
from mgrpo_kernels.train.score import score

LENGTHS, COPIES, TOKENS = (7, 2, 5), 3, 6
"""Lengths of the prompts that are sampled, the number of responses to each and the number of their tokens."""
KEPT = (0, 2), ((0, 2), (2, 1))
"""The prompts, and of each the responses, that remain after half of the tokens, as when the others have ended."""
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}
"""Largest mean difference of the log-probs at a position, weighted by probability. Faults differ by more than 0.5."""
ROUNDINGS = 3.0
"""Largest difference in bfloat16, in multiples of the model's own rounding, where that is more."""

log = logging.getLogger(__name__)


class Expected:
    """Prompts of unequal lengths with several responses each, and the model's log-probs of every next token.

    Tokens are random, and none is special. The model runs on sequences of the same length, so there is no padding.
    """

    def __init__(self, policy: Policy) -> None:
        vocabulary = policy.head()[0].shape[0]
        special = set(policy.tokenizer.all_special_ids) | set(policy.eos)
        usable = torch.tensor([token for token in range(min(vocabulary, 2000)) if token not in special] or [0])
        draw = torch.Generator().manual_seed(0)

        def tokens(*shape: int) -> Tensor:
            return usable[torch.randint(len(usable), shape, generator=draw)]

        self.prompts = [tokens(length).tolist() for length in LENGTHS]
        self.responses = tokens(len(LENGTHS), COPIES, TOKENS).to(policy.device)
        self.logprobs = []  # of each prompt (COPIES, TOKENS, V)
        for prompt, response in zip(self.prompts, self.responses, strict=True):
            start = torch.tensor(prompt, device=policy.device).expand(COPIES, -1)
            logits = policy.model(input_ids=torch.cat([start, response[:, :-1]], -1), use_cache=False).logits
            self.logprobs.append(logits[:, len(prompt) - 1 :].float().log_softmax(-1))

    def tolerance(self, dtype: torch.dtype, exact: Expected) -> float:
        """Return by how much the trainer may differ from these log-probs, which `dtype` has rounded where `exact` were not."""
        pairs = zip(self.logprobs, exact.logprobs, strict=True)
        rounding = max(float(difference(own.flatten(0, 1), want.flatten(0, 1))) for own, want in pairs)
        return max(TOLERANCE[dtype], ROUNDINGS * rounding)


def right_cache(policy: Policy) -> type[Cache]:
    """Return the fastest cache with which sampling gives the model's own log-probs.

    Raises:
        UsageError: there is none.
    """
    kinds: list[type[Cache]] = [PaddedCache, UnpaddedCache, NoCache]
    if policy.unpackable is None:
        kinds.insert(0, SharedCache)
    for kind in kinds:
        why = why_not(policy, kind)
        if why is None:
            return kind
        log.info("%s: not sampled %s: %s", type(policy.model).__name__, kind.HOW, why)
    raise UsageError(
        f"model: expected one that samples what it scores, got {type(policy.model).__name__}, of which {why}: choose a model of another "
        f"architecture"
    )


def why_not(policy: Policy, kind: type[Cache]) -> str | None:
    """Return None if sampling with a cache gives the model's own log-probs, or the reason why it does not."""
    exact: Expected | None = None
    for dtype in dict.fromkeys((torch.float32, policy.dtype)):
        with computing_in(policy, dtype):
            expected = Expected(policy)
            exact = exact or expected
            try:
                worst = sampled_difference(policy, kind, expected)
            except Exception as error:  # a model may raise any error for a cache or a mask that it does not support
                return f"sampling fails: {type(error).__name__}: {first_line(error)}"
        if not worst <= expected.tolerance(dtype, exact):
            return f"the log-probs of sampling and of scoring differ by {worst:.2g} in {dtype}"
    return None


def sampled_difference(policy: Policy, kind: type[Cache], expected: Expected) -> float:
    """Return the largest difference between the log-probs of a cache and the model's, at any position."""
    cache = kind(policy, expected.prompts, COPIES, TOKENS)
    prompts, copies = torch.arange(len(LENGTHS)), torch.arange(COPIES).expand(len(LENGTHS), -1)
    logits, differences = cache.start(), []
    for t in range(TOKENS):
        want = torch.cat([expected.logprobs[prompt][rows, t] for prompt, rows in zip(prompts, copies, strict=True)])
        differences.append(difference(logits, want))
        if t == TOKENS - 1:
            break
        if t == TOKENS // 2:
            kept, rows = (torch.tensor(each) for each in KEPT)
            cache.keep(kept.to(policy.device), rows.to(policy.device))
            prompts, copies = prompts[kept], copies[kept].gather(1, rows)
        logits = cache.extend(expected.responses[prompts[:, None], copies, t].flatten())
    return float(torch.stack(differences).max())  # NaN remains


def difference(logits: Tensor, want: Tensor) -> Tensor:
    """Return the largest mean difference of log-probs in a row of ``(N, V)``, weighted by the probabilities of `want`."""
    return (want.exp() * (logits.float().log_softmax(-1) - want).abs()).sum(-1).max()


def check_scoring(policy: Policy) -> None:
    """Raise UsageError if the scores of responses are not the model's own log-probs."""
    name = type(policy.model).__name__
    exact: Expected | None = None
    for dtype in dict.fromkeys((torch.float32, policy.dtype)):
        with computing_in(policy, dtype):
            expected = Expected(policy)
            exact = exact or expected
            prompts = [prompt for prompt in expected.prompts for _ in range(COPIES)]
            tokens = expected.responses.flatten(0, 1)
            want = torch.cat(expected.logprobs).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
            own = scores(policy, prompts, tokens)
            worst = float((own - want).abs().mean())
        if not worst <= expected.tolerance(dtype, exact):
            raise UsageError(
                f"model: expected one whose scores are its own log-probs, got {name}, whose scores differ by {worst:.2g} in {dtype}: "
                f"choose a model of another architecture"
            )


def scores(policy: Policy, prompts: Sequence[Sequence[int]], tokens: Tensor) -> Tensor:
    """Return the trainer's log-probs of responses ``(B, R)``, in two micro-batches of sequences of unequal lengths."""
    mask = torch.ones_like(tokens, dtype=torch.bool)
    budget = len(prompts) * (max(LENGTHS) + TOKENS) // 2
    found = score(policy, prompts, tokens, mask, temperature=1.0, budget=budget, stats=("logprob",)).logprob
    assert found is not None
    return found


@contextlib.contextmanager
def computing_in(policy: Policy, dtype: torch.dtype) -> Iterator[None]:
    """Run the block without gradients, and with matrix products in this data type instead of the policy's."""
    before, policy.dtype = policy.dtype, dtype
    try:
        with torch.no_grad(), policy.autocast():
            yield
    finally:
        policy.dtype = before
