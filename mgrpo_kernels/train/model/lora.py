"""LoRA (arXiv 2106.09685): a linear layer W is frozen, and two small matrices beside it train: ``W x + alpha / rank * B A x``.

The library peft replaces layers of the transformers model by its own. The trainer sees the same model with most weights frozen.
B starts at 0, so the initial model, which the KL penalty uses as its reference, is the model with the adapter disabled.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mgrpo_kernels.train.config import LoraConfig
from mgrpo_kernels.train.errors import UsageError
from mgrpo_kernels.train.extras import how_to_install, installed
from mgrpo_kernels.train.rng import generator_for

NAME = "default"  # peft's name of a model's only adapter
WHOLE = "base_model.model."  # peft's prefix of the names of weights


class Adapter:
    """The LoRA layers of a model.

    Args:
        model: transformers model in evaluation mode, which is changed in place.
        options: rank, alpha and targets.
        seed: random seed of the initial values of A.

    Raises:
        UsageError: peft is not installed, or a target matches no layer, is not a linear layer or is the head.
    """

    def __init__(self, model: Any, options: LoraConfig, seed: int) -> None:
        if not installed("peft"):
            raise UsageError(f"lora_rank: expected the package peft, got none: {how_to_install('peft')}")
        import peft

        head = model.get_output_embeddings()
        check_targets(model, options.targets)
        targets: Any = "all-linear" if options.targets == ["all-linear"] else options.targets
        rank: Any = options.lora_rank
        alpha: Any = options.lora_alpha  # peft declares an integer, but accepts any number
        settings = peft.LoraConfig(r=rank, lora_alpha=alpha, task_type="CAUSAL_LM", target_modules=targets)
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # between peft and transformers
            warnings.filterwarnings("ignore", "fan_in_fan_out", UserWarning)  # peft handles transposed weights
            torch.manual_seed(generator_for(seed, "LoRA", 0).initial_seed())
            self._wrapped: Any = peft.get_peft_model(
                model, settings, low_cpu_mem_usage=any(each.is_meta for each in model.parameters())
            )
        assert model.get_output_embeddings() is head, "peft has wrapped the head"
        self.model = model.eval()

    @contextlib.contextmanager
    def swapped_into(self, model: Any) -> Iterator[Any]:
        """Run the block with the adapter disabled. It is the counterpart of :meth:`mgrpo_kernels.MomentumModel.swapped_into`."""
        assert model is self.model
        with self._wrapped.disable_adapter():
            yield model

    def save(self, directory: Path, state: Mapping[str, Tensor]) -> None:
        """Write the adapter in peft's format; `state` is that of :func:`merged_weights`."""
        named = {WHOLE + name: tensor for name, tensor in state.items() if ".lora_" in name}
        self._wrapped.save_pretrained(directory, state_dict=named, save_embedding_layers=False)


def merged_weights(model: Any, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Return a model's weights under their names without LoRA. Where there is an adapter, they are new tensors ``W + alpha / rank * B A``.

    Args:
        model: model with or without an adapter.
        state: whole tensors to use instead of the model's state dict.
    """
    state = model.state_dict() if state is None else state
    weights = {}
    for name, tensor in state.items():
        module, base, kind = name.rpartition(".base_layer.")
        if base:
            layer = model.get_submodule(module)
            if kind == "weight":
                a, b = (state[f"{module}.{each}.{NAME}.weight"] for each in ("lora_A", "lora_B"))  # (r, in), (out, r)
                product = b @ a * layer.scaling[NAME]
                tensor = tensor + (product.T if layer.fan_in_fan_out else product)  # noqa: PLW2901
            weights[f"{module}.{kind}"] = tensor
        elif ".lora_" not in name:
            weights[name] = tensor
    return weights


def check_targets(model: Any, targets: list[str]) -> None:
    """Raise UsageError for an unusable LoRA target. peft would ignore it if another target matches."""
    if targets == ["all-linear"]:
        return
    modules, head = dict(model.named_modules()), model.get_output_embeddings()
    there = {
        name.rpartition(".")[2]
        for name, each in modules.items()
        if isinstance(each, (nn.Linear, Conv1D)) and each is not head
    }
    wanted = f"lora_targets: expected all-linear, or linear layers out of {', '.join(sorted(there))}"
    for target in targets:
        found = [each for name, each in modules.items() if name == target or name.endswith(f".{target}")]
        if any(each is head for each in found):
            raise UsageError(f"{wanted} (not the head, whose weight the fused loss takes as it is), got {target!r}")
        if not found:
            raise UsageError(f"{wanted}, got {target!r}, which matches nothing")
        if odd := [each for each in found if not isinstance(each, (nn.Linear, Conv1D))]:
            raise UsageError(f"{wanted}, got {target!r}, which is a {type(odd[0]).__name__}")
