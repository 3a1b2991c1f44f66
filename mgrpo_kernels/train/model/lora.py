"""LoRA (arXiv 2106.09685): beside a linear layer W, which is frozen, two thin ones train: ``W x + alpha / rank * B A x``.

The layers are the library peft's, put into the transformers model in place of its own; what the trainer sees is the same model, of which
little trains. B starts at 0: the model at the start, and the base of the KL term, is the model with the adapter off.
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

NAME = "default"  # peft's, of a model's only adapter
WHOLE = "base_model.model."  # what peft puts before a weight's name


class Adapter:
    """The LoRA layers of a model.

    Args:
        model: a transformers model in evaluation mode, which gets them in place.
        options: rank, alpha and targets.
        seed: of A's first values.

    Raises:
        UsageError: peft is not installed; a target that matches nothing, is no linear layer or is the head.
    """

    def __init__(self, model: Any, options: LoraConfig, seed: int) -> None:
        if not installed("peft"):
            raise UsageError(f"lora_rank: expected the package peft, got none: {how_to_install('peft')}")
        import peft

        head = model.get_output_embeddings()
        check_targets(model, options.targets)
        wanted = peft.LoraConfig(
            r=options.lora_rank, lora_alpha=options.lora_alpha, task_type="CAUSAL_LM",  # type: ignore[arg-type]
            target_modules=options.targets[0] if options.targets == ["all-linear"] else options.targets,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft's talk with transformers
            warnings.filterwarnings("ignore", "fan_in_fan_out", UserWarning)  # it sees to transposed weights itself
            torch.manual_seed(generator_for(seed, "LoRA", 0).initial_seed())
            self._wrapped: Any = peft.get_peft_model(
                model, wanted, low_cpu_mem_usage=any(each.is_meta for each in model.parameters())
            )
        assert model.get_output_embeddings() is head, "peft has wrapped the head"
        self.model = model.eval()

    @contextlib.contextmanager
    def swapped_into(self, model: Any) -> Iterator[Any]:
        """Run the block with the adapter off, as :meth:`mgrpo_kernels.MomentumModel.swapped_into` does with other weights: the base."""
        assert model is self.model
        with self._wrapped.disable_adapter():
            yield model

    def save(self, directory: Path, state: Mapping[str, Tensor]) -> None:
        """Write the adapter as peft reads it; `state` as in :func:`merged_weights`."""
        named = {WHOLE + name: tensor for name, tensor in state.items() if ".lora_" in name}
        self._wrapped.save_pretrained(directory, state_dict=named, save_embedding_layers=False)


def merged_weights(model: Any, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Return a model's weights by the names that it has without LoRA: ``W + alpha / rank * B A`` where there is an adapter, in new tensors.

    Args:
        model: with an adapter or without.
        state: whole tensors in place of its state dict's.
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
    """Raise UsageError for a target of LoRA that is none. peft would pass over it where another one matches."""
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
