"""Small models, data and trainers for the tests of the TRL integration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import LlamaForCausalLM
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.experimental.gmpo import GMPOConfig, GMPOTrainer

from mgrpo_kernels.train.data import demo

KINDS = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig), "gmpo": (GMPOTrainer, GMPOConfig)}


def make_base(place: Path, **changes: Any) -> str:
    """Leave a small random model with its tokenizer in `place`: sums of single characters, 15 tokens."""
    torch.manual_seed(0)
    config = demo.model_config()
    config.update(changes)
    model = LlamaForCausalLM(config)
    with torch.no_grad():  # a peaked distribution: log-probs that training moves
        model.lm_head.weight.mul_(8)
    model.save_pretrained(place)
    demo.make_tokenizer().save_pretrained(place)
    return str(place)


def prompts(number: int = 16) -> Dataset:
    return Dataset.from_list([{"prompt": each.prompt, "gold": each.gold} for each in demo.make_task(0).train[:number]])


def share_of_digits(completions: list[str], **_: Any) -> list[float]:
    return [sum(c.isdigit() for c in text) / max(1, len(text)) - 0.1 * len(text) for text in completions]


def settings(place: Path, **changes: Any) -> dict[str, Any]:
    return {
        "output_dir": str(place),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_generations": 4,
        "max_completion_length": 10,
        "max_steps": 3,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "report_to": [],
        "seed": 3,
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "lr_scheduler_type": "constant",
        **changes,
    }


def trainer_of(base: str, place: Path, kind: str = "grpo", model: Any = None, **changes: Any) -> Any:
    trainer, config = KINDS[kind]
    peft_config = changes.pop("peft_config", None)
    return trainer(
        model=base if model is None else model,
        reward_funcs=share_of_digits,
        args=config(**settings(place, **changes)),
        train_dataset=prompts(),
        peft_config=peft_config,
    )


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
