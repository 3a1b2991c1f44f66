"""Formulas for the time of a step, from options, model shape and device rates. docs/planning.md explains them."""

from __future__ import annotations

import torch

from mgrpo_kernels.ops.linear_policy_loss import native as fused_on_cpu
from mgrpo_kernels.train.config import Config, ModelConfig
from mgrpo_kernels.train.plan.devices import Rates
from mgrpo_kernels.train.plan.memory import layer_bytes
from mgrpo_kernels.train.plan.shape import Micro, Model, Work, count, width_of
from mgrpo_kernels.train.rollout.engines import engine_class

OPERATIONS_LAYER, OPERATIONS_TOKEN = 100, 60
"""Operations in a layer's forward pass, and in sampling a token from the logits, including views. Backward has twice as many."""
BY_MODULES = 2.5
"""Factor on the time of operations if modules are called one by one, as FSDP2's hooks and gradient checkpointing require."""


def seconds(config: Config, model: Model, work: Work, ranks: int, rates: Rates) -> dict[str, float]:
    """Return the seconds of each phase of a step, under its name in metrics.jsonl without ``time_``; vote and evaluation are omitted."""
    samples = sum(
        sampling_seconds(config, model, work, copies, ranks, rates) for copies in (work.policy, work.momentum) if copies
    )
    c, whole, trained = width_of(config.model), model.parameters, count([model.trained], ranks)
    frozen = 0 if model.whole else 1  # matrix products for the gradients of weights, which frozen weights do not need
    fused, _ = fused_on_cpu.fusion(torch.device("cpu"), torch.float32 if c == 4 else torch.bfloat16)
    composed = rates.passes > 1 and not fused  # a CPU then computes the head's logits twice
    share = (ranks - 1) / ranks / rates.link  # seconds per byte that is gathered or summed
    update = score = 0.0
    for micro in work.micro:
        layers, head = forward_seconds(config.model, model, work, micro, ranks, rates)
        score += layers + head
        update += (3 - frozen + config.model.gradient_checkpointing) * layers + (3 - frozen + composed) * head
        update += share * (c * (2 * model.in_layers + count(model.groups[:1])) + 4 * whole)
    update += (40 + 8 * len(work.micro)) * trained / rates.bandwidth  # norm, clipping, AdamW; accumulating gradients
    return {
        "rollout": samples + share * whole * (c + 4 * (config.momentum_rollouts > 0)),
        "score": score + share * 4 * whole if config.needs_reference else 0.0,
        "update": update,
        "ema": 12 * trained / rates.bandwidth if config.needs_momentum else 0.0,
    }


def forward_seconds(
    options: ModelConfig, model: Model, work: Work, micro: Micro, ranks: int, rates: Rates
) -> tuple[float, float]:
    """Return the seconds of a micro-batch's forward pass, in the layers and in the head."""
    T, N = work.tokens(micro), micro.responses * work.response_tokens
    seen = work.prompt_tokens + work.response_tokens / 2  # mean number of tokens that a token attends to
    products = 2 * T * model.in_layers + 4 * T * seen * model.queries * model.layers
    # Activations are written and read; as many again are not kept for backward.
    moved = 4 * layer_bytes(options, model, work, micro) * model.layers / rates.bandwidth
    by = BY_MODULES if ranks > 1 or options.gradient_checkpointing else 1
    layers = products / rates.matmul + moved + by * OPERATIONS_LAYER * rates.operation * model.layers
    return layers, 2 * N * model.vocabulary * model.width / rates.head


def sampling_seconds(config: Config, model: Model, work: Work, copies: int, ranks: int, rates: Rates) -> float:
    """Return the seconds for `copies` responses to each prompt. A matrix product takes its operations plus reading its weight."""
    U, c = work.prompts, width_of(config.model)
    batch = engine_class(config).batch_of(config, work, U, copies)
    calls = -(-U // batch.prompts) * -(-copies // batch.copies)
    B, V = U * copies / calls, model.vocabulary
    weights = model.in_layers + V * model.width
    products = 2 * B * weights / rates.matmul + rates.passes * c * weights / rates.bandwidth
    # Tokens of the cache that are moved: those of the responses are copied, then read.
    own = 3 * B * work.response_tokens / 2 + U / calls * work.prompt_tokens
    cached = 2 * model.keys * c * own * model.layers / rates.bandwidth
    attended = 4 * B * (work.prompt_tokens + work.response_tokens / 2) * model.queries * model.layers / rates.matmul
    drawn = (
        B * V * (1 / rates.draws + 32 / rates.bandwidth)
    )  # noise or probabilities; logits are added or read, concatenated, and read
    by = BY_MODULES if ranks > 1 or config.model.gradient_checkpointing else 1
    operations = (by * OPERATIONS_LAYER * model.layers + OPERATIONS_TOKEN) * rates.operation
    prompt = 2 * U * work.prompt_tokens * model.in_layers / rates.matmul
    return calls * work.response_tokens * (products + cached + attended + drawn + operations) + prompt
