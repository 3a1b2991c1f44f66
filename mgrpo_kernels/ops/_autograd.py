"""What the ops' autograd formulas share."""

from __future__ import annotations

from typing import Any

from torch.library import CustomOpDef


def forbid_second_derivative(backward_op: CustomOpDef) -> None:
    """Make a derivative of `backward_op` an error that says so, not one about a missing formula."""

    def refuse(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(
            f"{backward_op._qualname} cannot be differentiated: expected a first derivative only, got a second"
        )

    backward_op.register_autograd(refuse, setup_context=lambda ctx, inputs, output: None)
