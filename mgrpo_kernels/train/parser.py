"""The parser of every command of the trainer: its errors say what to type instead, and a reader that stops reading is no error."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Collection
from typing import Any

from mgrpo_kernels.train.text import print_line

ELSEWHERE = {
    "adam_beta1": ("adam_betas",), "adam_beta2": ("adam_betas",), "base_model": ("model",), "batch_size": ("prompts_per_step",),
    "beta": ("kl_coef",), "bf16": ("dtype bfloat16",), "completions": ("rollouts", "eval_samples"), "dataset": ("data", "eval_data"),
    "dataset_name": ("data", "eval_data"), "delta": ("clip_delta",), "ema_decay": ("decay",), "epochs": ("steps",),
    "epsilon": ("clip_low",), "epsilon_high": ("clip_high",), "eval_dataset": ("eval_data",), "eval_strategy": ("eval_every",),
    "eval_steps": ("eval_every",), "fp32": ("dtype float32",), "generation_batch_size": ("prompts_per_step",),
    "gpu_memory_utilization": ("vllm_memory",), "gradient_accumulation_steps": ("tokens_per_microbatch",),
    "group_size": ("rollouts", "eval_samples"), "hub_model_id": ("push_to_hub",), "importance_sampling_level": ("importance_level",),
    "k": ("eval_pass_k",), "kl_loss_coef": ("kl_coef",), "limit": ("eval_prompts",), "load_best_model_at_end": ("load_best",),
    "logging_steps": ("log_every",), "lora_r": ("lora_rank",), "lora_target_modules": ("lora_targets",), "lr": ("learning_rate",),
    "lr_scheduler_type": ("lr_schedule",), "mask_truncated_completions": ("truncated mask",),
    "max_completion_length": ("max_response_tokens",), "max_length": ("max_response_tokens",),
    "max_new_tokens": ("max_response_tokens",), "max_prompt_length": ("long_prompts",), "max_steps": ("steps",),
    "max_tokens": ("max_response_tokens",), "max_train_samples": ("max_examples",), "micro_batch_size": ("tokens_per_microbatch",),
    "mini_batch_size": ("tokens_per_microbatch",), "model_name": ("model",), "model_name_or_path": ("model",),
    "model_revision": ("revision",), "n": ("rollouts", "eval_samples"), "num_generations": ("rollouts", "eval_samples"),
    "num_generations_eval": ("eval_samples",), "num_iterations": ("updates_per_batch",), "num_samples": ("rollouts", "eval_samples"),
    "num_train_epochs": ("steps",), "output_dir": ("output",), "per_device_eval_batch_size": ("tokens_per_microbatch",),
    "per_device_train_batch_size": ("prompts_per_step",), "ppo_epochs": ("updates_per_batch",), "prompt_column": ("prompt_field",),
    "report_to": ("wandb",), "resume_from_checkpoint": ("resume",), "reward_fn": ("reward",), "reward_funcs": ("reward",),
    "reward_func": ("reward",), "rollout_n": ("rollouts",), "run_name": ("output",), "save_steps": ("checkpoint_every",),
    "save_total_limit": ("keep_checkpoints",), "shuffle_dataset": ("shuffle_data",), "sync_ref_model": ("kl_reference momentum",),
    "tokenizer": ("model",), "torch_dtype": ("dtype",), "total_epochs": ("steps",), "train_batch_size": ("prompts_per_step",),
    "train_data": ("data",), "train_dataset": ("data",), "train_file": ("data",), "use_peft": ("lora_rank",),
    "use_vllm": ("engine vllm",), "val_data": ("eval_data",), "vllm_gpu_memory_utilization": ("vllm_memory",),
    "vllm_server_base_url": ("vllm_servers",), "vllm_server_host": ("vllm_servers",), "warmup_ratio": ("warmup",),
    "warmup_steps": ("warmup",),
}  # fmt: skip
"""Names of options in TRL, verl and others, and ours, with a value where that belongs to it. The first that a command has counts."""


def suggestion(name: str, known: Collection[str]) -> str | None:
    """Return which of the `known` options is meant by an unknown one, as it is typed; None if that is not clear."""
    name = name.lower().replace("-", "_")
    for text in ELSEWHERE.get(name, ()):
        if text.split()[0] in known:
            return flag_of(text)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    return flag_of(close[0]) if close else None


def flag_of(name: str) -> str:
    """Return an option's name as it is typed: --kl-coef for kl_coef."""
    first, space, rest = name.partition(" ")
    return f"--{first.replace('_', '-')}{space}{rest}"


def did_you_mean(text: str | None) -> str:
    """Return the end of a message that suggests something; empty without a suggestion."""
    return "" if text is None else f"; did you mean {text}?"


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line: what was expected, what was given, and what is probably meant."""

    def names(self) -> set[str]:
        """Return the names of its options, as they are written in a file."""
        return {
            text.removeprefix("--").replace("-", "_") for text in self._option_string_actions if text.startswith("--")
        }

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse the arguments, and name the option that is meant by an unknown one."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            first = unknown[0].partition("=")[0]
            wanted = "an option that --help lists" if first.startswith("-") else "an option that begins with --"
            self.error(
                f"{first}: expected {wanted}, got {unknown[0]!r}{did_you_mean(suggestion(first.strip('-'), self.names()))}"
            )
        return found

    def error(self, message: str) -> Any:
        """Print a message of argparse as one line in our words, and exit with status 2."""
        for pattern, words in PATTERNS:
            message = re.sub(pattern, words, message)
        print_line(f"error: {message}", error=True)
        raise SystemExit(2)

    def _print_message(self, message: str, file: Any = None) -> None:
        # Of help texts; a pipe to head closes before they end.
        print_line(message.rstrip("\n"), error=file is sys.stderr)


PATTERNS = (
    (r"^argument ([^:]+): ", r"\1: "),
    (r"invalid int value: (.*)", r"expected a whole number, got \1"),
    (r"invalid float value: (.*)", r"expected a number, got \1"),
    (r"invalid choice: (.*) \(choose from (.*)\)", r"expected one of \2, got \1"),
    (r"expected one argument$", "expected a value, got none"),
    (r"the following arguments are required: (.*)", r"expected values of \1, got none"),
)
"""How argparse words an error, and how we do."""


class Spelling:
    """Spells the option that an error is about as it was given: ``--rollouts`` on the command line, ``rollouts`` in a file."""

    def __init__(self) -> None:
        self.on_command_line: set[str] = set()
        """Names that an error spells with dashes."""

    def read(self, parser: Parser, file: Collection[str], given: Collection[str]) -> None:
        """Take note of a command's options, of those in its file and of those on its command line, which override the former."""
        self.on_command_line = parser.names() - (set(file) - set(given))

    def __call__(self, text: str) -> str:
        """Return the text of an error, spelled."""
        name, colon, rest = text.partition(":")
        return f"{flag_of(name)}{colon}{rest}" if colon and name in self.on_command_line else text
