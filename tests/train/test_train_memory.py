"""The memory of scoring, of a whole training step and of an evaluation: their logits are bounded, whatever the number of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import tiny
import torch
from contract import Memory, watch_memory
from transformers import AutoModelForCausalLM

from mgrpo_kernels import linear_policy_loss
from mgrpo_kernels.ops.linear_token_stats import native, tiled
from mgrpo_kernels.train.data.demo import make_tokenizer, model_config
from mgrpo_kernels.train.model.policy import Policy
from mgrpo_kernels.train.plan.memory import memory_of
from mgrpo_kernels.train.plan.shape import Micro, Model, Work
from mgrpo_kernels.train.rollout import RolloutEngine, Rollouts, draws
from mgrpo_kernels.train.rollout import transformers as sampling
from mgrpo_kernels.train.rollout.transformers import TransformersEngine
from mgrpo_kernels.train.run.evaluation import examine
from mgrpo_kernels.train.score import score
from mgrpo_kernels.train.step import train_step

V, H = 8192, 16
WORKSPACE = 2**17
PER_TOKEN = 200 * H  # bytes of a token's activations and gradients in a model of one layer: a tenth of its logits
PARAMETERS = 4 * 2 * V * H
FEW, MANY = 4, 16  # tokens of a response


@pytest.fixture(autouse=True)
def small_workspace() -> Iterator[None]:
    with (
        mock.patch.object(native, "tile_shape", return_value=tiled.TileShape(64, 512)),
        mock.patch.object(native, "WORKSPACE_BYTES", WORKSPACE),
    ):
        yield


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def wide_policy(request: pytest.FixtureRequest) -> Policy:
    """Return a policy whose vocabulary outweighs all else."""
    torch.manual_seed(0)
    config = model_config()
    config.update(
        {
            "vocab_size": V,
            "hidden_size": H,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "head_dim": 16,
        }
    )
    return Policy(AutoModelForCausalLM.from_config(config), make_tokenizer(), request.param)


def hold(few: Memory, many: Memory, tokens: int, allowed: int) -> None:
    """Hold the growth by so many tokens to their activations, and the peak to these and what is allowed beside."""
    assert many.peak - few.peak <= PER_TOKEN * tokens + WORKSPACE
    assert PER_TOKEN * tokens + WORKSPACE < 2 * V * tokens / 2  # half of what 16-bit logits would add
    assert many.peak <= allowed + PER_TOKEN * 2 * tokens


def test_scoring(wide_policy: Policy) -> None:
    seen = []
    B = 16
    for length in (FEW, MANY):
        tokens, mask = torch.randint(2, V, (B, length)), torch.ones(B, length, dtype=torch.bool)
        with watch_memory() as memory:
            score(wide_policy, [[1, 2]] * B, tokens, mask, temperature=1.0, budget=10**6)
        seen.append(memory)
    hold(*seen, tokens=B * (MANY - FEW), allowed=WORKSPACE + PARAMETERS)
    assert seen[1].largest <= max(WORKSPACE, PARAMETERS)


class Given(RolloutEngine):
    """Gives random tokens: sampling is not what is watched here."""

    def __init__(self, length: int) -> None:
        self.length = length

    def sample(self, prompts: Any, copies: int, **_: Any) -> Rollouts:
        tokens = torch.randint(2, 12, (len(prompts) * copies, self.length))
        mask = torch.ones_like(tokens, dtype=torch.bool)
        return Rollouts(tokens, mask, torch.full(tokens.shape, -9.0), mask[:, 0])


def test_a_whole_step(wide_policy: Policy) -> None:
    seen = []
    changes = {
        "method": "random",
        "rollouts": 8,
        "prompts_per_step": 4,
        "kl_coef": 0.1,
        "iqr_filter": False,
        "max_response_tokens": MANY,
        "tokens_per_microbatch": 10**6,
        "momentum_rollouts": 2,
        "train_momentum_rollouts": True,
    }
    for length in (FEW, MANY):
        learner = tiny.learner(wide_policy, **changes)
        learner.engine = Given(length)
        train_step(learner, learner.task.train[:4], 1)  # the optimizer's state
        with watch_memory() as memory:
            values, _ = train_step(learner, learner.task.train[:4], 2)
        assert values["grad_norm"] > 0
        seen.append(memory)
    hold(*seen, tokens=4 * 8 * (MANY - FEW), allowed=WORKSPACE + 4 * PARAMETERS)
    assert seen[1].largest <= max(WORKSPACE, PARAMETERS)


@pytest.mark.parametrize("padded", [False, True])
def test_an_evaluation(wide_policy: Policy, padded: bool) -> None:
    """Sampling has the logits of each rollout's last token; those that wait for their statistics, and the noise, are bounded."""
    seen = []
    if padded:  # as for a model that cannot keep sequences in one row apart
        wide_policy.model.set_attn_implementation("sdpa")
        wide_policy.unpackable = "for this test"
    for length in (FEW, MANY):
        learner = tiny.learner(wide_policy, eval_prompts=4, eval_samples=2)
        engine = TransformersEngine(wide_policy, length, 10**6)
        with (
            mock.patch.dict(sampling.LOGITS_BYTES, {"cpu": 1}),
            mock.patch.object(draws, "NOISE_NUMBERS", 1),
            watch_memory() as memory,
        ):
            examine(wide_policy, engine, learner.task, learner.config)
        seen.append(memory)
    last = 4 * 2 * V * 4  # bytes of the logits of one position
    assert seen[1].peak - seen[0].peak <= last
    assert seen[1].largest <= 2 * last
    assert seen[1].peak <= 8 * last


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tolerance", [0.0, 2.0**-8])
@pytest.mark.parametrize("rows, room", [(600, 2**17), (600, 2**26), (32, 2**26), (16, 2**26)])
def test_the_plan_has_what_the_head_takes(dtype: torch.dtype, tolerance: float, rows: int, room: int) -> None:
    width = 32
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, width, generator=generator).to(dtype).requires_grad_() for n in (rows, V))
    labels, advantages = torch.randint(0, V, (rows,), generator=generator), torch.randn(rows, generator=generator)
    offsets = torch.tensor([0, rows])
    with mock.patch.object(native, "WORKSPACE_BYTES", room), watch_memory() as memory:
        loss = linear_policy_loss(
            hidden, weight, labels, None, advantages, cu_seqlens=offsets, gradient_tolerance=tolerance or None
        ).loss
        loss.backward()
    config = tiny.config(dtype=str(dtype).removeprefix("torch."), gradient_tolerance=tolerance)
    shapes = ((V, width),)
    model = Model((shapes,), shapes, 0, width, 0, 0, 0, 0, V, gated=False, normed=False)
    micro = Work(1, 1, rows, 1, 0, 0, 0, (Micro(1, 1),))
    with mock.patch.object(native, "WORKSPACE_BYTES", room):
        planned = memory_of(config, model, micro, 1, "cpu").moments["update"]["head and backward"]
    assert 0.7 < planned / memory.peak < 1.4
