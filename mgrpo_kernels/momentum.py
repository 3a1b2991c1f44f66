"""The momentum model: an exponential moving average of a policy, kept beside it (M-GRPO, arXiv 2512.13070)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mgrpo_kernels import checks
from mgrpo_kernels.ops.ema import ema_update_
from mgrpo_kernels.sharded import is_dtensor, is_fsdp_module


class MomentumModel:
    """An exponential moving average of a model's parameters: ``theta_k = decay * theta_k + (1 - decay) * theta_q``.

    It holds one tensor for each parameter (tied ones once), of the parameter's shape and placement: with FSDP2 each rank keeps the
    average of its own shards. Buffers are not averaged.

    Args:
        model: the policy. The average starts as a copy of its parameters.
        decay: in [0, 1]; what :meth:`update` takes by default.
        dtype: of the average: float32, float64, or bfloat16 / float16, which are then rounded stochastically (the seed is the
            number of updates), so that small steps are not lost.
        device: where the average lives; None: beside each parameter. Elsewhere ("cpu"), an update copies the parameters there. From a
            GPU to "cpu" by page-locked memory, 4 bytes a float32 parameter beside the average, while the host continues.
        frozen: hold parameters without ``requires_grad`` too. False: only those that train now, as beside frozen weights with LoRA; the
            others are the same in both models.

    Raises:
        TypeError: no module, or no floating dtype.
        ValueError: decay out of range; nothing to hold.
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float = 0.99,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        *,
        frozen: bool = True,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        if dtype not in checks.FLOATS:
            raise TypeError(f"dtype: expected float32, float64, bfloat16 or float16, got {dtype}")
        self.decay = float(checks.check_number("decay", decay, at_least=0.0, at_most=1.0))
        self.updates = 0
        self._model = model
        self._swapped = False
        self._frozen = frozen
        self._transfer = Transfer()
        self._pending: tuple[float | Tensor, int] | None = (
            None  # decay and seed of an update whose copies are on their way
        )
        self._ema: dict[str, Tensor] = {
            name: held(parameter.detach(), dtype, device)
            for name, parameter in model.named_parameters()
            if parameter.is_floating_point() and (frozen or parameter.requires_grad)
        }
        if not self._ema:
            raise ValueError(
                f"model: expected parameters of a floating dtype to average, got none in {type(model).__name__}"
            )

    @property
    def ema(self) -> dict[str, Tensor]:
        """Name -> the average, once the last update is done."""
        self.wait()
        return self._ema

    def update(self, decay: float | Tensor | None = None, *, overlap: bool = False) -> None:
        """Move the average towards the model's parameters, once. `decay` overrides the model's own, for a schedule.

        From a GPU to the CPU the copies of the parameters have only begun when this returns; :meth:`wait`, which all that reads the
        average calls, ends the update. What the GPU is given next comes after the copies, as it may write to the parameters. With
        `overlap` it need not wait: the caller promises not to write to them before :meth:`wait`.

        Raises:
            RuntimeError: inside :meth:`swapped_into` of the tracked model, whose parameters are then the average itself.
            ValueError: decay out of range; parameters whose shape or placement has changed, or that train now and are not held.
        """
        if self._swapped:
            raise RuntimeError(
                "update: expected the policy's own parameters, got them swapped for the momentum model's (swapped_into)"
            )
        self.wait()
        decay = self.decay if decay is None else decay
        trained = {name for name, p in self._model.named_parameters() if p.requires_grad and p.is_floating_point()}
        if odd := sorted(trained - self._ema.keys()):
            raise ValueError(f"model: expected no other trained parameters than at first, got {', '.join(odd[:5])}")
        parameters = self._parameters(self._model)
        places = [ema.device for ema in self._ema.values()]
        if any(crosses(p.device, place) for p, place in zip(parameters, places, strict=True)):
            if not isinstance(decay, Tensor):
                checks.check_number("decay", decay, at_least=0.0, at_most=1.0)
            self._transfer.down(parameters, overlap=overlap)
            self._pending = decay.clone() if isinstance(decay, Tensor) else decay, self.updates
        else:
            self._average([p.to(place) for p, place in zip(parameters, places, strict=True)], decay, self.updates)
        self.updates += 1

    def wait(self) -> None:
        """Wait for copies between the CPU and a GPU, and end an update that has begun."""
        pending, self._pending = self._pending, None
        self._transfer.wait()
        if pending is not None:
            self._average(self._transfer.staged, *pending)

    def _average(self, parameters: list[Tensor], decay: float | Tensor, seed: int) -> None:
        rounded = any(ema.dtype in (torch.bfloat16, torch.float16) for ema in self._ema.values())
        ema_update_(
            list(self._ema.values()),
            parameters,
            decay,
            stochastic_rounding=rounded,
            seed=seed if rounded else None,
        )

    def _parameters(self, model: nn.Module) -> list[Tensor]:
        """Return the model's parameters in the average's order."""
        return [parameter.detach() for parameter in self._named(model).values()]

    def _named(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Return the parameters of `model` that are held, in the average's order."""
        parameters = {
            name: p
            for name, p in model.named_parameters()
            if p.is_floating_point() and (self._frozen or name in self._ema)
        }
        if parameters.keys() != self._ema.keys():
            odd = sorted(parameters.keys() ^ self._ema.keys())
            raise ValueError(
                f"model: expected the parameters that the momentum model tracks, got a difference in {', '.join(odd[:5])}"
            )
        return {name: parameters[name] for name in self._ema}

    def state_dict(self) -> dict[str, Any]:
        """Return ``{"decay", "updates", "ema": name -> tensor}``; tensors are the average's own, not copies."""
        return {"decay": self.decay, "updates": self.updates, "ema": dict(self.ema)}

    def load_state_dict(self, sd: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave. Checked as a whole before anything is written.

        Raises:
            ValueError: missing or unexpected entries, or a tensor of another shape.
        """
        if sd.keys() != {"decay", "updates", "ema"}:
            raise ValueError(f"state_dict: expected the keys decay, ema, updates, got {', '.join(sorted(sd))}")
        if sd["ema"].keys() != self.ema.keys():
            odd = sorted(sd["ema"].keys() ^ self.ema.keys())
            raise ValueError(
                f"state_dict: expected the parameters of this model, got a difference in {', '.join(odd[:5])}"
            )
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
                    f"model: expected {name} of shape {checks.shape_text(ema.shape)}, got {checks.shape_text(parameter.shape)}"
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
            raise RuntimeError("swapped_into: expected the policy's own parameters, got them swapped already")
        parameters, ema = self._named(model), self.ema
        if is_fsdp_module(model) and any(is_dtensor(p) for p in parameters.values()):
            raise RuntimeError(
                "swapped_into: expected a model whose weights are gathered (unshard), got shards of FSDP2"
            )
        own = {name: parameter.data for name, parameter in parameters.items()}
        self._swapped = True
        try:
            for name, parameter in parameters.items():
                if parameter.shape != ema[name].shape:
                    raise ValueError(
                        f"model: expected {name} of shape {checks.shape_text(ema[name].shape)}, "
                        f"got {checks.shape_text(parameter.shape)}"
                    )
                value = self._transfer.up(ema[name], parameter.device).to(dtype=parameter.dtype)
                if is_dtensor(value) and not is_dtensor(parameter):
                    value = value.full_tensor()
                parameter.data = value
            yield model
        finally:
            for name, parameter in parameters.items():
                parameter.data = own[name]
            self._swapped = False

    def distance(self, model: nn.Module) -> Tensor:
        """Return ||theta_q - theta_k|| / ||theta_q|| over the parameters held, 0-d float32: how far the average lags behind."""
        apart: list[Tensor] = []
        size: list[Tensor] = []
        with torch.no_grad():
            for ema, parameter in zip(self.ema.values(), self._parameters(model), strict=True):
                value = parameter.float()
                apart.append((value - self._transfer.up(ema, parameter.device).float()).square().sum())
                size.append(value.square().sum())
        return (_total(apart) / _total(size)).sqrt()


def held(parameter: Tensor, dtype: torch.dtype, device: torch.device | str | None) -> Tensor:
    """Return a copy of a parameter for the average, page-locked where it is copied to and from a GPU."""
    copy = parameter.to(device=device, dtype=dtype, copy=True)
    return page_locked(copy) if crosses(parameter.device, copy.device) else copy


def crosses(one: torch.device, two: torch.device) -> bool:
    """Return True if `one` is a GPU and `two` is the CPU: a copy to page-locked memory then need not block the host."""
    return one.type == "cuda" and two.type == "cpu"


@torch.no_grad()
def page_locked(tensor: Tensor) -> Tensor:
    """Move a CPU tensor, or this rank's shard of one, to page-locked memory, which a GPU reads and writes directly."""
    local = local_of(tensor)
    local.data = local.pin_memory()
    return tensor


@torch.no_grad()
def local_of(tensor: Tensor) -> Tensor:
    """Return this rank's shard itself, or the tensor."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


class Transfer:
    """Copies between GPUs and the CPU's page-locked memory, which the host does not wait for.

    Attributes:
        staged: the parameters on the CPU, as of the last :meth:`down`, after :meth:`wait`.
    """

    def __init__(self) -> None:
        self.staged: list[Tensor] = []
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._down: list[torch.cuda.Event] = []
        self._from: list[Tensor] = []  # what is being copied must not be freed
        self._up: dict[torch.device, torch.cuda.Event] = {}

    def down(self, parameters: list[Tensor], *, overlap: bool) -> None:
        """Begin to copy parameters to :attr:`staged`, on streams of their own.

        What the GPU has been given before is done first; what it is given next waits for the copies, unless they `overlap`.

        Raises:
            ValueError: other shapes than the first time.
        """
        if not self.staged:
            self.staged = [page_locked(p.to("cpu", copy=True)) for p in parameters]
        pairs = [(local_of(to), local_of(p)) for to, p in zip(self.staged, parameters, strict=True)]
        for number, (to, p) in enumerate(pairs):
            if to.shape != p.shape:
                want, got = checks.shape_text(to.shape), checks.shape_text(p.shape)
                raise ValueError(f"params[{number}]: expected the shape that it had, {want}, got {got}")
        for device in dict.fromkeys(p.device for _, p in pairs if p.device.type == "cuda"):
            current = torch.cuda.current_stream(device)
            if device not in self._streams:
                self._streams[device] = torch.cuda.Stream(device)
            stream = self._streams[device]
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                for to, p in pairs:
                    if p.device == device:
                        to.copy_(p, non_blocking=True)
                self._down.append(stream.record_event())
            if not overlap:
                current.wait_event(self._down[-1])
        for to, p in pairs:
            if p.device.type == "cpu":
                to.copy_(p)
        self._from = [p for _, p in pairs]

    def up(self, tensor: Tensor, device: torch.device) -> Tensor:
        """Return a tensor on a device; itself, where that is its own."""
        moved = tensor.to(device, non_blocking=True)
        if crosses(device, tensor.device):
            self._up[device] = torch.cuda.current_stream(device).record_event()
        return moved

    def wait(self) -> None:
        """Block the host until all copies are finished; CPU memory may then be read and written."""
        for event in [*self._down, *self._up.values()]:
            event.synchronize()
        self._down, self._up, self._from = [], {}, []


def _total(parts: list[Tensor]) -> Tensor:
    """Return the sum. Of shards each rank's are added up first: one collective, not one for each parameter."""
    first = parts[0]
    if is_dtensor(first) and all(
        is_dtensor(part) and (part.device_mesh, part.placements) == (first.device_mesh, first.placements)
        for part in parts
    ):
        from torch.distributed.tensor import DTensor

        local = torch.stack([part.to_local() for part in parts]).sum()  # type: ignore[attr-defined]
        return DTensor.from_local(local, first.device_mesh, first.placements, run_check=False).full_tensor()
    whole = [part.full_tensor() if is_dtensor(part) else part for part in parts]
    return torch.stack([part.to(whole[0].device) for part in whole]).sum()
