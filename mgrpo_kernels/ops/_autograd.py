"""What the ops' autograd formulas share. Each op has a first derivative in reverse mode; every other derivative is an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import CustomOpDef

_LIBRARY = torch.library.Library("mgrpo_kernels", "FRAGMENT")


def register(
    op: CustomOpDef, backward_op: CustomOpDef, backward: Callable[..., Any], setup_context: Callable[..., None]
) -> None:
    """Give `op` its derivative, by way of `backward_op`, whose own derivative is an error. So are torch.func's transforms of `op`."""
    op.register_autograd(backward, setup_context=setup_context)

    def refuse_second(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(
            f"{backward_op._qualname} cannot be differentiated: expected a first derivative only, got a second"
        )

    backward_op.register_autograd(refuse_second, setup_context=lambda ctx, inputs, output: None)

    def refuse_transform(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError(
            f"{op._qualname}: expected a call outside of torch.func's transforms (vmap, grad, vjp, jvp, ...), got one inside. "
            "Use torch.autograd.grad for a gradient, and pass the whole batch in place of vmap"
        )

    # The key that PyTorch tries first wherever a transform is in force. Without this kernel jvp returns a tangent of 0.
    _LIBRARY.impl(op._qualname.partition("::")[2], refuse_transform, "FuncTorchDynamicLayerFrontMode")


def asked_again(grad: Tensor) -> bool:
    """Return whether what an op saved may be read again: by another backward pass, by a graph of this one, or for more gradients.

    Where it is not, a backward pass may overwrite it.
    """
    return (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or torch._C._autograd._get_current_graph_task_keep_graph()
        or torch._C._functorch.is_legacy_batchedtensor(grad)  # is_grads_batched
    )


def refuse_tangents(op: str, *tensors: Tensor | None) -> None:
    """Raise RuntimeError if a tensor carries a tangent of forward-mode differentiation, which `op` would drop."""
    for tensor in tensors:
        if tensor is not None and _has_tangent(tensor):
            raise RuntimeError(
                f"{op}: expected reverse-mode differentiation, got a tensor with a tangent (torch.autograd.forward_ad)"
            )


def _has_tangent(tensor: Tensor) -> bool:
    try:
        return forward_ad.unpack_dual(tensor).tangent is not None
    except RuntimeError:  # inside a dual level, but in a compiled graph, which cannot see tangents
        return True


def anchor(*tensors: Tensor | None) -> Tensor | None:
    """Return an empty tensor whose graph leads to every one of `tensors` that needs a gradient, but keeps none of them in memory.

    A backward pass that does not read an op's inputs takes this instead, so that its result is known to depend on them.
    """
    needed = [tensor[:0].flatten() for tensor in tensors if tensor is not None and tensor.requires_grad]
    return torch.cat(needed) if needed else None
