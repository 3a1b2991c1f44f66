"""Formulas for the memory of a run, from its options and its model's shape. docs/planning.md explains them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from mgrpo_kernels.ops._triton.tuning import Tuning
from mgrpo_kernels.ops.linear_policy_loss import native as fused_on_cpu
from mgrpo_kernels.ops.linear_token_stats import native as composed_on_cpu
from mgrpo_kernels.ops.linear_token_stats import triton as composed_on_gpu
from mgrpo_kernels.ops.linear_token_stats.specs import Head
from mgrpo_kernels.train.config import Config, ModelConfig
from mgrpo_kernels.train.plan.shape import Micro, Model, Work, count, width_of
from mgrpo_kernels.train.rollout.engines import engine_class

Parts = dict[str, int]  # what holds memory -> bytes

PROCESS_BYTES = 400 * 2**20
"""Of a process that has imported PyTorch, transformers and the trainer, and done nothing yet. A GPU's memory does not hold it."""

ENTRY_BYTES = 8
"""Of a logit that is listed for gradients to a tolerance, with its place in the vocabulary."""


class Memory(NamedTuple):
    """The memory of a rank in bytes, by what holds it."""

    held: Parts  # always, from the first step on
    moments: dict[str, Parts]  # additionally, in the phases that need most

    @property
    def moment(self) -> str:
        """The phase with the largest memory."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def total(self) -> int:
        """The memory in that phase, in bytes."""
        return sum(self.held.values()) + sum(self.moments[self.moment].values())


def memory_of(config: Config, model: Model, work: Work, ranks: int, device: str, *, flash: bool = False) -> Memory:
    """Return a rank's memory.

    Args:
        config: options of the run.
        model: shape of the model.
        work: work of the rank in a step.
        ranks: number of ranks among which the weights are sharded.
        device: cpu or cuda.
        flash: whether flash-attn computes the attention, which needs no mask.
    """
    engine = engine_class(config)
    engine_held, sampling = engine.memory(config, model, work, device)
    weights = sampling_weights(config.model, model, ranks, with_momentum=config.momentum_rollouts > 0)
    if not engine.samples_in_place:
        del weights["16-bit weights"]
    moments = {
        "rollout": weights | sampling,
        **({"score": scoring(config.model, model, work, ranks)} if config.needs_reference is not None else {}),
        **updating(config, model, work, ranks, device, flash=flash),
    }
    return Memory(
        nonzero(held(config, model, ranks, device) | engine_held),
        {name: nonzero(parts) for name, parts in moments.items()},
    )


def nonzero(parts: Parts) -> Parts:
    """Return the parts that take memory."""
    return {name: size for name, size in parts.items() if size}


def held(config: Config, model: Model, ranks: int, device: str) -> Parts:
    """Return what a rank holds from the first step on, the rollout engine's own memory left out."""
    mine, trained = count(model.groups, ranks), count([model.trained], ranks)
    away = device == "cuda" and config.method.momentum_device == "cpu"
    return {
        "Python and its packages": PROCESS_BYTES * (device == "cpu"),
        "weights": 4 * mine,
        "AdamW": 8 * trained,
        "momentum model": 4 * trained * (config.needs_momentum and not away),
        "KL reference": 4 * mine * (config.copies_base and not away),
    }


def sampling_weights(options: ModelConfig, model: Model, ranks: int, *, with_momentum: bool) -> Parts:
    """Return the copies of the weights during sampling or scoring. There is one more if other weights are swapped in."""
    c = width_of(options)
    gathered = c * model.parameters if ranks > 1 else 0
    return {
        "16-bit weights": cast_bytes(options, model, ranks),
        "gathered weights": gathered * (2 if with_momentum else 1),
    }


def cast_bytes(options: ModelConfig, model: Model, ranks: int) -> int:
    """Return the size of the copy of the weights that autocast keeps."""
    c = width_of(options)
    return c * model.parameters if c < 4 and ranks == 1 else 0


def scoring(options: ModelConfig, model: Model, work: Work, ranks: int) -> Parts:
    """Return the memory of scoring with the KL reference model."""
    c, T = width_of(options), max(map(work.tokens, work.micro))
    return sampling_weights(options, model, ranks, with_momentum=model.whole) | {
        "activations": T * (8 * model.width + 3 * model.inner * c + 3 * model.queries * c),
    }


def updating(config: Config, model: Model, work: Work, ranks: int, device: str, *, flash: bool) -> dict[str, Parts]:
    """Return the memory of the update at its two peaks: in the backward pass, and at the end of it."""
    options = config.model
    c, largest = width_of(options), max(work.micro, key=work.tokens)
    T, N = work.tokens(largest), largest.responses * work.response_tokens
    if config.optim.gradient_tolerance:
        workspace, weight = tolerant_head_bytes(options, model, N, device)
    else:
        workspace, weight = head_bytes(options, model, N, device)
    gradients, several = 4 * count([model.trained], ranks), len(work.micro) > 1
    layer = layer_bytes(options, model, work, largest, flash=flash)
    again = layer if options.gradient_checkpointing else 0
    kept = 4 * T * model.width * model.layers if options.gradient_checkpointing else layer * model.layers
    kept += 8 * T * model.width  # of the last norm
    passing = T * (4 * model.inner * c + 8 * model.width)  # gradients of a layer's activations
    at_head = workspace + N * model.width * (8 + (c if c < 4 else 0))
    weights = {
        "16-bit weights": cast_bytes(options, model, ranks),
        "gathered weights": unit_bytes(options, model) if ranks > 1 else 0,
    }
    in_backward = {
        "gradients": gradients if several else 0,
        "activations": kept,
        "head and backward": weight + max(at_head, again + passing),
    }
    at_end = {
        "gradients": gradients,
        "head and backward": (weight if several else 0) + 4 * model.vocabulary * model.width * model.whole,
    }
    return {"update": weights | in_backward, "end of backward": weights | at_end}


def layer_bytes(options: ModelConfig, model: Model, work: Work, micro: Micro, *, flash: bool = False) -> int:
    """Return what is kept of a layer for backward. Norms keep input and output in float32; matrix products keep inputs in c bytes."""
    T, c = work.tokens(micro), width_of(options)
    U, B, rest, P = micro.prompts, micro.responses, work.response_tokens - 1, work.prompt_tokens
    # A prompt with one response is one sequence. With several, each response has its own copy of the prompt's keys.
    alone = U == B
    keys = T if alone else U * P + B * (P + rest) * (rest > 0)
    mask = 0 if alone or flash else B * rest * (P + rest)
    inputs = 2 if c == 4 else 4 + model.gated  # autocast casts a norm's output again for each product
    norms = T * (model.width * (2 * 8 + inputs * c) + 8 * (model.queries + model.keys) * model.normed)
    attention = c * (3 * T * model.queries + 2 * keys * model.keys + mask) + 4 * T * model.heads
    return norms + attention + T * (4 if model.gated else 2) * model.inner * c


def head_bytes(options: ModelConfig, model: Model, tokens: int, device: str) -> tuple[int, int]:
    """Return the fused head's workspace, and the size of its weight's gradient before that is accumulated."""
    c, V = width_of(options), model.vocabulary
    weight = c * V * model.width * model.whole
    most = Tuning().workspace_bytes
    if device == "cpu":
        head = head_on_cpu(options, model)
        fused, _ = fused_on_cpu.fusion(torch.device(device), head.weight.dtype)
        if not fused:
            return composed_on_cpu.tile_bytes(tokens, head) + 4 * composed_on_cpu.logits_room(tokens, head), weight
        if 4 * tokens <= c * model.width * model.whole:  # the weight's gradient holds the logits
            return c * tokens * min(fused_on_cpu.COLUMNS, V), weight
        most = composed_on_cpu.WORKSPACE_BYTES
    of_sum = 4 * V * model.width * model.whole * (c < 4)  # a 16-bit weight's gradient in float32
    if of_sum and tokens <= model.width:  # the logits of all tokens take its place
        return 4 * V * tokens, weight
    return 4 * V * min(tokens, max(1, most // (4 * V))), weight + of_sum


def tolerant_head_bytes(options: ModelConfig, model: Model, tokens: int, device: str) -> tuple[int, int]:
    """Return the same for gradients to a tolerance: of each token the largest logits are listed, and on a CPU their gradients, too."""
    c, V = width_of(options), model.vocabulary
    weight = c * V * model.width * model.whole
    if device == "cpu":
        listed = 2 * ENTRY_BYTES * composed_on_cpu.entries_room(V) * tokens
        return composed_on_cpu.tile_bytes(tokens, head_on_cpu(options, model)) + listed, weight
    return Tuning().workspace_bytes + ENTRY_BYTES * composed_on_gpu.entries_room(V) * tokens, weight


def head_on_cpu(options: ModelConfig, model: Model) -> Head:
    """Return a head of the model's vocabulary and dtype, as far as its memory goes: without the width, and so without weights."""
    dtype = torch.float32 if width_of(options) == 4 else torch.bfloat16
    return Head(torch.empty(model.vocabulary, 0, dtype=dtype), None, 1.0, 1.0, None, 0, None)


def unit_bytes(options: ModelConfig, model: Model) -> int:
    """Return what FSDP2 gathers in an update: always the weights outside the layers, those of two layers, and one layer's gradient."""
    c, rest = width_of(options), count(model.groups[:1])
    layer = max((count([group]) for group in model.groups[1:]), default=0)
    return c * (rest + 2 * layer) + (c + 4) * max(rest, layer)
