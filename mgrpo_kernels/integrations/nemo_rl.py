"""NeMo-RL 0.7: the fused head in place of its chunked one.

:func:`patched` replaces the function that NeMo-RL's Megatron path calls where ``megatron_cfg.use_linear_ce_fusion_loss`` is set.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mgrpo_kernels import checks
from mgrpo_kernels.integrations import Patch
from mgrpo_kernels.ops.linear_token_stats import linear_token_stats

INSTALL = "install NeMo-RL 0.7 from its repository (what PyPI has under the name nemo-rl is empty)"

MODULE = "nemo_rl.distributed.model_utils"
NAME = "from_parallel_hidden_states_to_logprobs"
PARAMETERS = (
    "tensor_parallel_hidden_states",
    "output_weight_layer",
    "runtime_gather_output",
    "target",
    "vocab_start_index",
    "vocab_end_index",
    "tp_group",
    "inference_only",
    "cp_group",
    "chunk_size",
)
"""Of NeMo-RL 0.7.0. In 0.6 there is one more, in 0.5 no such function."""


def patched(strict: bool = False) -> Patch:
    """Put :func:`from_parallel_hidden_states_to_logprobs` under NeMo-RL's name, until ``undo()`` or the end of a ``with`` block.

    Args:
        strict: of no effect: nothing here falls back. What the fused head cannot take is an error.

    Raises:
        IntegrationError: NeMo-RL is not installed, or has moved the name or its parameters.
    """
    patch = Patch("nemo_rl", install=INSTALL, strict=strict)
    patch.replace(MODULE, NAME, from_parallel_hidden_states_to_logprobs, parameters=PARAMETERS)
    return patch.apply()


class _GatherSequence(torch.autograd.Function):
    """Every rank's part of the sequence, one after another along the first axis.

    The head that follows gives every rank the whole gradient, so a rank takes its own part of it, and no sum is needed.
    """

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.rank, ctx.length = dist.get_rank(group), part.shape[0]
        whole = part.new_empty(dist.get_world_size(group) * part.shape[0], *part.shape[1:])
        dist.all_gather_into_tensor(whole, part.contiguous(), group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].narrow(0, ctx.rank * ctx.length, ctx.length), None


def from_parallel_hidden_states_to_logprobs(
    tensor_parallel_hidden_states: Tensor,
    output_weight_layer: Tensor,
    runtime_gather_output: bool | None,
    target: Tensor,
    vocab_start_index: int,
    vocab_end_index: int,
    tp_group: dist.ProcessGroup,
    inference_only: bool = False,
    cp_group: dist.ProcessGroup | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Return the log-prob of each next token, without the logits.

    Args:
        tensor_parallel_hidden_states: ``(L / ranks, B, H)``, this rank's part of the sequence.
        output_weight_layer: ``(V / ranks, H)``, this rank's part of the vocabulary.
        runtime_gather_output: not read, as in NeMo-RL.
        target: ``(B, L)`` int32 or int64, the tokens themselves; the shift by one is made here.
        vocab_start_index: vocabulary entry of this rank's first row.
        vocab_end_index: not read: the weight says how many rows there are.
        tp_group: the ranks over which both are sharded.
        inference_only: without gradient.
        cp_group: of one rank, or None.
        chunk_size: not read: the head has its own bound.

    Returns:
        ``(B, L - 1)`` float32.

    Raises:
        TypeError, ValueError: as :func:`linear_token_stats` does; a context-parallel group of several ranks.
    """
    if cp_group is not None and dist.get_world_size(cp_group) > 1:
        raise ValueError(f"cp_group: expected one rank with the fused head, got {dist.get_world_size(cp_group)}")
    checks.check_tensor("tensor_parallel_hidden_states", tensor_parallel_hidden_states, dim=3)
    hidden, ranks = tensor_parallel_hidden_states, dist.get_world_size(tp_group)
    with torch.set_grad_enabled(torch.is_grad_enabled() and not inference_only):
        if ranks > 1:
            hidden = _GatherSequence.apply(hidden, tp_group)  # (L, B, H)
        checks.check_tensor("target", target, dtypes=checks.INTS, shape=(hidden.shape[1], hidden.shape[0]))
        logprob = linear_token_stats(
            hidden[:-1],
            output_weight_layer,
            target.t()[1:],
            stats=("logprob",),
            tp_group=tp_group if ranks > 1 else None,
            vocab_start=vocab_start_index,
        ).logprob
    assert logprob is not None
    return logprob.t()


__all__ = ["from_parallel_hidden_states_to_logprobs", "patched"]
