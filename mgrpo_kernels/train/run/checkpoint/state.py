"""The tensors that a checkpoint holds: everything that training changes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from mgrpo_kernels.train import parallel
from mgrpo_kernels.train.step import Learner


def state_of(learner: Learner) -> dict[str, Tensor]:
    """Return every tensor that training changes, by name: the learner's own, into which a checkpoint is read back.

    Optimizer states that do not exist yet are created, as AdamW creates them. With LoRA the frozen weights are left out.
    """
    model, optimizer = learner.policy.model, learner.optimizer
    everything = learner.policy.adapter is None
    # A tied parameter is named once.
    parameters = {name: each for name, each in model.named_parameters() if everything or each.requires_grad}
    buffers = dict(model.named_buffers())
    values = model.state_dict()
    state = {f"model.{name}": values[name] for name in values if name in parameters or name in buffers}
    fused = {id(each): group.get("fused") for group in optimizer.param_groups for each in group["params"]}
    for name, parameter in parameters.items():
        if id(parameter) not in fused:
            continue  # frozen
        own = optimizer.state[parameter]
        if not own:
            device = parameter.device if fused[id(parameter)] else "cpu"
            own["step"] = torch.tensor(0.0, device=device, dtype=torch.float32)
            own.update({key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")})
        state.update({f"optimizer.{name}.{key}": value.detach() for key, value in own.items()})
    if learner.momentum is not None:
        state.update({f"momentum.{name}": value for name, value in learner.momentum.ema.items()})
    return state


def not_finite(learner: Learner) -> str | None:
    """Return the name of a weight of the policy or the momentum model with NaN or infinity in it, or None. Every rank must call."""
    weights = {name: each for name, each in state_of(learner).items() if not name.startswith("optimizer.")}
    bad = None
    for name, each in weights.items():
        values = each.to_local() if isinstance(each, DTensor) else each
        if values.is_floating_point() and not bool(values.isfinite().all()):
            bad = name
            break
    return next((name for name in parallel.all_gather(bad) if name is not None), None)
