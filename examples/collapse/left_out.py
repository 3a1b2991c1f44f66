"""Measure what a gradient tolerance of 2^-8 leaves out with the study's start models, whose vocabulary has 15 entries.

    python examples/collapse/left_out.py                          prints a line of JSON for each start model and seed
    python examples/collapse/left_out.py --bases DIR > FILE       keeps the start models, as study.py does

A line has three shares, over the tokens of responses to 64 sums: of the entries of the log-probability's gradient that are left out, of the
absolute gradient that they have, and of the tokens that lack one.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from cells import TOLERANCE
from study import base_of
from torch import Tensor

from mgrpo_kernels import linear_token_stats
from mgrpo_kernels.train.data import demo
from mgrpo_kernels.train.model.policy import Policy, load_policy
from mgrpo_kernels.train.rng import generator_for
from mgrpo_kernels.train.rollout.transformers import TransformersEngine
from mgrpo_kernels.train.score import response_states

STARTS = (("own", 3), ("own", 4), ("lazy", 2), ("lazy", 3), ("lazy", 5))
"""Start models and seeds of the runs of 3000 steps."""
PROMPTS, COPIES = 64, 8


def gradient(logits: Tensor, labels: Tensor, tolerance: float | None) -> Tensor:
    """Return the gradient of the labels' log-probabilities, ``(N, V)``: a head whose weight is the identity hands it on unchanged."""
    hidden = logits.clone().requires_grad_()
    stats = linear_token_stats(
        hidden,
        torch.eye(logits.shape[1]),
        labels,
        stats=("logprob",),
        gradient_tolerance=tolerance,
        backend="native",
    )
    assert stats.logprob is not None
    (found,) = torch.autograd.grad(stats.logprob.sum(), hidden)
    return found


def left_out(policy: Policy, seed: int) -> dict[str, float]:
    """Return the three shares over responses that the policy samples."""
    engine = TransformersEngine(policy, demo.OPTIONS["max_response_tokens"], cache_tokens=2**20)
    prompts = policy.encode([each.prompt for each in demo.make_task(seed).train[:PROMPTS]])
    rollouts = engine.sample(
        prompts, COPIES, temperature=1.0, generator=generator_for(seed, "left out", 0, policy.device)
    )
    asked = [prompt for prompt in prompts for _ in range(COPIES)]
    with torch.no_grad():
        states = response_states(policy, asked, rollouts.tokens, rollouts.mask)
        logits = states.hidden @ policy.head()[0].T
    exact = gradient(logits, states.labels, None)
    lacking = (gradient(logits, states.labels, TOLERANCE) == 0) & (exact != 0)
    return {
        "entries": float(lacking.float().mean()),
        "gradient": float(exact[lacking].abs().sum() / exact.abs().sum()),
        "tokens": float(lacking.any(1).float().mean()),
    }


def main() -> None:
    """Print the shares of each start model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bases", type=Path, metavar="DIR", help="directory of the start models (default: temporary)")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        bases = parser.parse_args().bases or Path(temporary)
        bases.mkdir(parents=True, exist_ok=True)
        for name, seed in STARTS:
            policy = load_policy(str(base_of(name, seed, bases)), torch.device("cpu"), torch.float32)
            print(json.dumps({"base": name, "seed": seed, **left_out(policy, seed)}), flush=True)


if __name__ == "__main__":
    main()
