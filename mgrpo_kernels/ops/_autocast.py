"""A head's weight in the dtype of autocast, by autocast's own cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_VERSION = "mgrpo_kernels.version"


def cast_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `weight` ``(V, H)`` in `dtype`, which autocast has in force: as for ``torch.nn.functional.linear``, one cast a region.

    Autocast keeps what it casts of a float32 parameter until the outermost region ends, and drops it then, so that the weights of the next
    step are cast again. Everything else is cast on each call, as autocast itself does. A weight that was written to within the region
    is cast again, too, if its version shows it: after `weight.data` or a fused optimizer it does not, and the cast is the old one, as for
    ``torch.nn.functional.linear``. Optimizers step outside of autocast regions.
    """
    if torch.compiler.is_compiling():  # a compiled graph has each cast only once as it is
        return weight.to(dtype)
    kept = (
        type(weight) in (Tensor, nn.Parameter)
        and weight.dtype == torch.float32
        and weight.requires_grad
        and weight.is_leaf
        and not weight._is_view()
        and torch.is_autocast_cache_enabled()
    )
    cast = _through_autocast(weight, dtype) if kept else None
    if cast is None or cast.grad_fn is None:
        return weight.to(dtype)
    metadata: dict[str, Any] = cast.grad_fn.metadata  # type: ignore[assignment]  # PyTorch's stub has a method there
    version = metadata.setdefault(_VERSION, weight._version)
    return cast if version == weight._version else weight.to(dtype)


def _through_autocast(weight: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Return what autocast makes of `weight` for an op of its own; None where an outer region has cached it in another dtype.

    PyTorch has no function for that. An empty product makes autocast cast the weight or take it from its cache, and the product's autograd
    node has saved the result. Hooks of the caller's (checkpointing's, offloading's) must not see this saved tensor.
    """
    unchanged = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
    with torch.inference_mode(False), torch.enable_grad(), unchanged:
        nothing = torch.empty(0, weight.shape[0], dtype=dtype, device=weight.device, requires_grad=True)
        try:
            product = torch.mm(nothing, weight)
        except RuntimeError:  # two dtypes; torch.nn.functional.linear fails here
            return None
        assert product.grad_fn is not None
        cast: Tensor = product.grad_fn._saved_mat2  # type: ignore[attr-defined]
    return cast
