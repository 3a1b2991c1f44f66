"""The momentum model: an exponential moving average of a policy, kept beside it (M-GRPO, arXiv 2512.13070)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from mgrpo_kernels import checks
from mgrpo_kernels.ops.ema import ema_update_


class MomentumModel:
    """An exponential moving average of a model's parameters: ``theta_k = decay * theta_k + (1 - decay) * theta_q``.

    It holds one tensor for each parameter (tied ones once, frozen ones too), of the parameter's shape and placement: with FSDP2
    each rank keeps the average of its own shards. Buffers are not averaged.

    Args:
        model: the policy. The average starts as a copy of its parameters.
        decay: in [0, 1]; what :meth:`update` takes by default.
        dtype: of the average: float32, float64, or bfloat16 / float16, which are then rounded stochastically (the seed is the
            number of updates), so that small steps are not lost.
        device: where the average lives; None: beside each parameter. Elsewhere ("cpu"), an update copies the parameters there.

    Raises:
        TypeError: no module, or no floating dtype.
        ValueError: decay out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float = 0.99,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: want a torch.nn.Module, got {type(model).__name__}")
        if dtype not in checks.FLOATS:
            raise TypeError(f"dtype: want float32, float64, bfloat16 or float16, got {dtype}")
        self.decay = float(checks.check_number("decay", decay, at_least=0.0, at_most=1.0))
        self.updates = 0
        self._model = model
        self._swapped = False
        self._elsewhere = device is not None
        self.ema: dict[str, Tensor] = {
            name: parameter.detach().to(device=device, dtype=dtype, copy=True)
            for name, parameter in model.named_parameters()
            if parameter.is_floating_point()
        }

    def update(self, decay: float | Tensor | None = None) -> None:
        """Move the average towards the model's parameters, once. `decay` overrides the model's own, for a schedule.

        Raises:
            RuntimeError: inside :meth:`swapped_into` of the tracked model, whose parameters are then the average itself.
            ValueError: decay out of range; parameters whose shape or placement has changed.
        """
        if self._swapped:
            raise RuntimeError(
                "update: want the policy's own parameters, got them swapped for the momentum model's (swapped_into)"
            )
        parameters = self._parameters(self._model)
        if self._elsewhere:
            parameters = [
                p.to(ema.device, non_blocking=True) for p, ema in zip(parameters, self.ema.values(), strict=True)
            ]
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # the copies must have arrived before a CPU kernel reads them
        rounded = any(ema.dtype in (torch.bfloat16, torch.float16) for ema in self.ema.values())
        ema_update_(
            list(self.ema.values()),
            parameters,
            self.decay if decay is None else decay,
            stochastic_rounding=rounded,
            seed=self.updates if rounded else None,
        )
        self.updates += 1

    def _parameters(self, model: nn.Module) -> list[Tensor]:
        """Return the model's parameters in the average's order."""
        parameters = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
        if parameters.keys() != self.ema.keys():
            odd = sorted(parameters.keys() ^ self.ema.keys())
            raise ValueError(
                f"model: want the parameters that the momentum model tracks, got a difference in {', '.join(odd[:5])}"
            )
        return [parameters[name].detach() for name in self.ema]

    def state_dict(self) -> dict[str, Any]:
        """Return ``{"decay", "updates", "ema": name -> tensor}``; tensors are the average's own, not copies."""
        return {"decay": self.decay, "updates": self.updates, "ema": dict(self.ema)}

    def load_state_dict(self, sd: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave. Checked as a whole before anything is written.

        Raises:
            ValueError: missing or unexpected entries, or a tensor of another shape.
        """
        if sd.keys() != {"decay", "updates", "ema"}:
            raise ValueError(f"state_dict: want the keys decay, ema, updates, got {', '.join(sorted(sd))}")
        if sd["ema"].keys() != self.ema.keys():
            odd = sorted(sd["ema"].keys() ^ self.ema.keys())
            raise ValueError(f"state_dict: want the parameters of this model, got a difference in {', '.join(odd[:5])}")
        for name, tensor in sd["ema"].items():
            checks.check_tensor(f"state_dict[{name}]", tensor, shape=self.ema[name].shape)
        self.decay = float(checks.check_number("decay", sd["decay"], at_least=0.0, at_most=1.0))
        self.updates = int(sd["updates"])
        for name, tensor in sd["ema"].items():
            self.ema[name].copy_(tensor)

    def copy_to(self, model: nn.Module) -> None:
        """Write the average into the parameters of `model`, which must have the same names and shapes, in their dtypes.

        Raises:
            ValueError: other names or shapes; nothing is written then.
        """
        parameters = self._parameters(model)
        for (name, ema), parameter in zip(self.ema.items(), parameters, strict=True):
            if ema.shape != parameter.shape:
                raise ValueError(
                    f"model: want {name} of shape {checks.shape_text(ema.shape)}, got {checks.shape_text(parameter.shape)}"
                )
        with torch.no_grad():
            for ema, parameter in zip(self.ema.values(), parameters, strict=True):
                parameter.copy_(ema)

    @contextlib.contextmanager
    def swapped_into(self, model: nn.Module) -> Iterator[nn.Module]:
        """Run the block with the average in place of the parameters of `model`, which is bit-equal again afterwards, whatever happens.

        Parameters keep their identity; only their storage is exchanged, and nothing is copied where dtype and device agree.
        The block must not write to them: they may be the average itself. With FSDP2 the model's own weights must be gathered (its
        shards are what FSDP keeps, whatever a parameter says); the average is then gathered beside them, for the block.

        Raises:
            RuntimeError: already swapped; sharded by FSDP2 and not gathered.
            ValueError: other names or shapes.
        """
        if self._swapped:
            raise RuntimeError("swapped_into: want the policy's own parameters, got them swapped already")
        self._parameters(model)
        parameters = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
        if isinstance(model, FSDPModule) and any(isinstance(p, DTensor) for p in parameters.values()):
            raise RuntimeError("swapped_into: want a model whose weights are gathered (unshard), got shards of FSDP2")
        own = {name: parameter.data for name, parameter in parameters.items()}
        self._swapped = True
        try:
            for name, parameter in parameters.items():
                if parameter.shape != self.ema[name].shape:
                    raise ValueError(
                        f"model: want {name} of shape {checks.shape_text(self.ema[name].shape)}, "
                        f"got {checks.shape_text(parameter.shape)}"
                    )
                ema = self.ema[name]
                if isinstance(ema, DTensor) and not isinstance(parameter, DTensor):
                    ema = ema.full_tensor()
                parameter.data = ema.to(device=parameter.device, dtype=parameter.dtype)
            yield model
        finally:
            for name, parameter in parameters.items():
                parameter.data = own[name]
            self._swapped = False

    def distance(self, model: nn.Module) -> Tensor:
        """Return ||theta_q - theta_k|| / ||theta_q|| over all parameters, 0-d float32: how far the average lags behind."""
        apart: list[Tensor] = []
        size: list[Tensor] = []
        with torch.no_grad():
            for ema, parameter in zip(self.ema.values(), self._parameters(model), strict=True):
                value = parameter.to(device=ema.device, dtype=torch.float32)
                apart.append((value - ema.float()).square().sum())
                size.append(value.square().sum())
        return (_total(apart) / _total(size)).sqrt()


def _total(parts: list[Tensor]) -> Tensor:
    """Return the sum. Of shards each rank's are added up first: one collective, not one for each parameter."""
    first = parts[0]
    if isinstance(first, DTensor) and all(
        isinstance(part, DTensor) and (part.device_mesh, part.placements) == (first.device_mesh, first.placements)
        for part in parts
    ):
        local = torch.stack([part.to_local() for part in parts]).sum()  # type: ignore[attr-defined]
        return DTensor.from_local(local, first.device_mesh, first.placements, run_check=False).full_tensor()
    whole = [part.full_tensor() if isinstance(part, DTensor) else part for part in parts]
    return torch.stack([part.to(whole[0].device) for part in whole]).sum()
