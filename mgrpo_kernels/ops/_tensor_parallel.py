"""The two collectives of a vocabulary that is sharded over the ranks of a group."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def group(name: str) -> dist.ProcessGroup:
    """Return the process group of this name."""
    return torch._C._distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


def all_gather(state: Tensor, tp_group: str) -> Tensor:
    """Return every rank's state ``(ranks, rows, N)``: all that a sharded vocabulary has to exchange, in one collective."""
    ranks = group(tp_group)
    states = state.new_empty(dist.get_world_size(ranks) * state.shape[0], state.shape[1])
    dist.all_gather_into_tensor(states, state.contiguous(), group=ranks)
    return states.view(-1, *state.shape)
