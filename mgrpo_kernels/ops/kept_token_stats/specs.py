"""What the kernels of all backends share: which rows of the weight a token is multiplied with."""

from __future__ import annotations

import torch
from torch import Tensor

ABSENT = -1


def local_ids(kept: Tensor, mask: Tensor | None, first: int, vocab: int) -> Tensor:
    """Return int32 ``(N, K)``: each row's ids as indices of a weight whose `vocab` rows begin at entry `first`, in ascending order.

    ABSENT stands for what the row does not multiply: no id, an id that another shard holds or that is outside the vocabulary, a second copy
    of an id, and every id of a masked row.
    """
    ids = kept - first
    here = (ids >= 0) & (ids < vocab)
    if mask is not None:
        here &= mask.unsqueeze(-1)
    ids = torch.where(here, ids, ABSENT).int()
    if ids.device.type == "cpu":
        ids.numpy().sort(-1)  # in place; PyTorch also returns where each came from, in 40 times the time
    else:
        ids = ids.sort(-1).values
    ids[:, 1:].masked_fill_(ids[:, 1:] == ids[:, :-1], ABSENT)
    return ids


def label_columns(ids: Tensor, labels: Tensor, first: int) -> Tensor:
    """Return the column ``(N,)`` of each row of local `ids` that holds the row's label, -1 where there is none."""
    local = labels.long() - first
    hit = (ids == local.unsqueeze(-1)) & (local >= 0).unsqueeze(-1)
    return torch.where(hit.any(-1), hit.int().argmax(-1), -1)
