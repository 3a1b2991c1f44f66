"""The options of the model and its LoRA adapter, one frozen dataclass per section."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from mgrpo_kernels.method.fields import option
from mgrpo_kernels.train.config.fields import Section


@dataclass(frozen=True)
class ModelConfig(Section):
    """model."""

    model: str | None = option(
        None,
        "directory or Hugging Face Hub name of a causal language model",
        if_none="the small built-in model",
        metavar="DIR_OR_HUB_NAME",
    )
    revision: str | None = option(
        None, "branch, tag or commit of a --model on the Hugging Face Hub", if_none="the main branch", metavar="NAME"
    )
    trust_remote_code: bool = option(
        False, "run the Python code that comes with the model, with your rights on this machine"
    )
    dtype: Literal["float32", "bfloat16"] = option(
        "float32",
        "data type of the matrix products; weights, optimizer state and momentum model are always float32",
    )
    gradient_checkpointing: bool = option(
        False, "recompute each layer's activations in the backward pass, which takes less memory but more time"
    )
    device: Literal["auto", "cpu", "cuda"] = option(
        "auto", "device that holds and runs the model; auto is cuda if a GPU is available, else cpu"
    )

    @property
    def loading(self) -> dict[str, Any]:
        """The keywords of ``from_pretrained`` for this model, its tokenizer and its configuration."""
        revision = {} if self.revision is None else {"revision": self.revision}
        return {"trust_remote_code": self.trust_remote_code, **revision}


@dataclass(frozen=True)
class LoraConfig(Section):
    """LoRA (requires --lora-rank)."""

    lora_rank: int | None = option(
        None,
        "rank of a LoRA adapter, which is then the only part that trains; the model's own weights are frozen",
        if_none="no adapter; all weights train",
        at_least=1,
    )
    lora_alpha: float = option(
        32.0, "scaling factor alpha of the LoRA adapter, whose output is multiplied by alpha / rank", above=0.0
    )
    lora_targets: str = option(
        "all-linear",
        "linear layers that get a LoRA adapter, as names separated by commas (q_proj,v_proj); all-linear selects all of them "
        "except the output head",
        metavar="NAMES",
    )

    def check(self) -> None:
        if not all(self.targets):
            raise ValueError(f"lora_targets: expected names separated by commas, got {self.lora_targets!r}")

    @property
    def targets(self) -> list[str]:
        """The names in `lora_targets`."""
        return [each.strip() for each in self.lora_targets.split(",")]
