"""The options, one frozen dataclass per concern."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

from mgrpo_kernels import checks
from mgrpo_kernels.method import MethodOptions
from mgrpo_kernels.ops.policy_loss.inputs import check_behaviour_mode
from mgrpo_kernels.ops.policy_loss.loss_types import LOSS_TYPES
from mgrpo_kernels.ops.policy_loss.options import DECLARED, LossForm, check_option
from mgrpo_kernels.train.config.fields import Section, option
from mgrpo_kernels.train.rollout.engines import ENGINES

DTYPES = ("float32", "bfloat16")
DEFAULT_TEMPLATE = "{question}\nThink step by step, and end with the final answer inside \\boxed{}.\n"


@dataclass(frozen=True)
class ModelConfig(Section):
    """model."""

    model: str | None = option(None, "directory or hub name of a causal language model; none: the built-in one")
    dtype: str = option(
        "float32", "what the matrix products run in; weights, optimizer and average stay float32", choices=DTYPES
    )
    gradient_checkpointing: bool = option(
        False, "the backward pass computes each layer's activations again: less memory, more time"
    )
    device: str = option("auto", "auto is cuda where there is one", choices=("auto", "cpu", "cuda"))


@dataclass(frozen=True)
class LoraConfig(Section):
    """LoRA, with --lora-rank."""

    lora_rank: int | None = option(
        None, "train an adapter of this rank beside frozen weights; none: all weights train", unit="rank"
    )
    lora_alpha: float = option(32.0, "the adapter's product counts alpha / rank times")
    lora_targets: str = option(
        "all-linear", "layers that get one, as names with commas (q_proj,v_proj); all-linear: each but the head"
    )

    def check(self) -> None:
        if self.lora_rank is not None:
            checks.check_number("lora_rank", self.lora_rank, at_least=1)
        checks.check_number("lora_alpha", self.lora_alpha, above=0.0)
        if not all(self.targets):
            raise ValueError(f"lora_targets: expected names with commas between them, got {self.lora_targets!r}")

    @property
    def targets(self) -> list[str]:
        return [each.strip() for each in self.lora_targets.split(",")]


@dataclass(frozen=True)
class DataConfig(Section):
    """data."""

    data: str | None = option(
        None,
        "training prompts: FILE.jsonl, FILE.json (a list of objects), FILE.parquet, or a data set, a directory or a hub name, "
        "as NAME, NAME:SPLIT or NAME:CONFIG:SPLIT, where the split is train unless named; none: the built-in sums",
    )
    eval_data: str | None = option(
        None, "held-out prompts with answers, like --data, but the split is test unless named; none: no evaluation"
    )
    prompt_field: str | None = option(
        None, "field that holds the question; none: question, or prompt or problem where the data have one of these"
    )
    answer_field: str | None = option(
        None,
        "field that holds the true answer, or a solution that ends in it; training reads it for --method gold and for "
        "label_accuracy; none: answer, or solution where the data have that alone",
    )
    prompt_template: str = option(
        DEFAULT_TEMPLATE, "text, or a file that holds it, in which {question} stands for the question"
    )
    chat_template: str = option(
        "auto",
        "whether a prompt, so made, is a user's turn in the tokenizer's chat template; auto: where the model ends its response "
        "as the template ends a turn, which a base model does not",
        choices=("auto", "on", "off"),
    )
    long_prompts: str = option(
        "stop",
        "where a prompt and the longest response exceed the model's context: stop before the run, or skip such prompts",
        choices=("stop", "skip"),
    )


@dataclass(frozen=True)
class MethodConfig(MethodOptions, Section):
    """method."""

    momentum_device: str = option(
        "auto",
        "where the momentum model and the KL reference are held: beside the weights, or in the CPU's memory",
        choices=("auto", "cpu"),
    )


@dataclass(frozen=True)
class RolloutConfig(Section):
    """rollouts."""

    engine: str = option("transformers", "what samples", choices=tuple(ENGINES))
    prompts_per_step: int = option(8, "of one step", unit="prompts")
    rollouts: int = option(32, "of each prompt, the momentum model's included", unit="rollouts")
    max_response_tokens: int = option(3072, "longest response", unit="tokens")
    truncated: str = option(
        "keep",
        "one cut at that length trains (keep) or not (mask); it votes either way",
        choices=("keep", "mask"),
    )
    temperature: float = option(1.1, "of sampling; log-probs, entropy and loss are at this temperature too")
    top_p: float = option(1.0, "only 1: training takes samples of the policy itself")
    top_k: int = option(0, "only 0, which is off, for the same reason")
    tokens_per_microbatch: int = option(16384, "most tokens in one forward pass, padding included", unit="tokens")

    def check(self) -> None:
        for name, off in (("top_p", 1.0), ("top_k", 0)):
            if getattr(self, name) != off:
                raise ValueError(
                    f"{name}: expected {off} for training, got {getattr(self, name)}: a truncated sampler draws tokens from "
                    "another distribution than the policy's, for which log-probs, ratios and entropy would be wrong"
                )
        for name, least in (
            ("prompts_per_step", 1),
            ("rollouts", 2),
            ("max_response_tokens", 1),
            ("tokens_per_microbatch", 1),
        ):
            checks.check_number(name, getattr(self, name), at_least=least)
        checks.check_number("temperature", self.temperature, above=0.0)


@dataclass(frozen=True)
class VllmConfig(Section):
    """vLLM, with --engine vllm."""

    vllm_memory: float = option(
        0.5, "its gpu_memory_utilization: weights, activations and cache", unit="share of the GPU"
    )
    vllm_cache_gib: float | None = option(
        None, "its key-value cache; none: what vllm_memory leaves on a GPU, 1 on a CPU", unit="GiB"
    )
    vllm_sleep: bool | None = option(
        None, "give its GPU memory back between rollouts, weights and cache; none: yes on a GPU"
    )
    vllm_eager: bool | None = option(None, "no compiled graphs, which take longer to start; none: yes on a CPU")
    vllm_timeout: float = option(3600.0, "sampling that takes longer ends the run with the reason", unit="s")
    vllm_servers: str | None = option(
        None,
        "URL[,URL ...] of servers that sample, each started by python -m mgrpo_kernels.train.serve; none: vLLM in this process",
    )

    @property
    def server_urls(self) -> list[str]:
        """The servers."""
        return [] if self.vllm_servers is None else [url.strip().rstrip("/") for url in self.vllm_servers.split(",")]

    def check(self) -> None:
        checks.check_number("vllm_memory", self.vllm_memory, above=0.0, at_most=1.0)
        checks.check_number("vllm_timeout", self.vllm_timeout, above=0.0)
        if self.vllm_cache_gib is not None:
            checks.check_number("vllm_cache_gib", self.vllm_cache_gib, above=0.0)
        urls = self.server_urls
        if len(set(urls)) < len(urls) or not all(re.fullmatch(r"https?://[^/\s]+(/\S*)?", url) for url in urls):
            raise ValueError(
                f"vllm_servers: expected http://HOST:PORT, or several with commas between, none twice, got {self.vllm_servers!r}"
            )
        if urls:
            for each in dataclasses.fields(self):
                if each.name not in ("vllm_servers", "vllm_timeout") and getattr(self, each.name) != each.default:
                    raise ValueError(
                        f"{each.name}: expected it given to the servers in vLLM's own words, since with vllm_servers it has no effect "
                        f"here, got {getattr(self, each.name)!r}"
                    )


@dataclass(frozen=True)
class LossConfig(Section, LossForm):
    """loss."""

    # The other options, their defaults and help texts are those of the policy loss.
    loss_type: str = option(
        "dapo",
        "surrogate and average of the loss, as in the table on the policy loss's page; dapo is the paper's mean over the "
        "step's tokens",
        choices=LOSS_TYPES,
    )
    kl_coef: float = option(
        0.005, "weight of the KL penalty; 0 disables it, so that no reference model is kept", bounds={"at_least": 0.0}
    )
    entropy_coef: float = option(0.0, "weight of the entropy bonus", bounds={"at_least": 0.0})
    kl_reference: str = option(
        "base", "the model at the start, the momentum model, or no KL term", choices=("base", "momentum", "none")
    )
    behaviour_correction: bool | None = option(
        None,
        "weight each token by trainer / sampler probability, bounded by behaviour_mode and behaviour_cap; none: yes with "
        "vllm, whose rounding is its own",
    )

    def check(self) -> None:
        own = {each.name: each for each in dataclasses.fields(self)}
        for each in DECLARED:
            if each.name in own:
                check_option(each._replace(bounds=own[each.name].metadata["bounds"]), getattr(self, each.name))
        check_behaviour_mode(self)

    @property
    def behaviour_text(self) -> str:
        """How tokens are weighted by trainer / sampler probability, for the plan."""
        level, _, bound = self.behaviour_mode.partition("_")
        bounded = "at most" if bound == "truncate" else "0 above"
        return f"{level} weights trainer / sampler, {bounded} {self.behaviour_cap:g}"

    def keywords(self) -> dict[str, Any]:
        """Return the options as keywords of the policy loss."""
        return {each.name: getattr(self, each.name) for each in dataclasses.fields(LossForm)}


@dataclass(frozen=True)
class OptimConfig(Section):
    """optimizer (AdamW)."""

    steps: int = option(500, "of the optimizer, one a batch", unit="steps")
    learning_rate: float = option(1e-6, "peak")
    lr_schedule: str = option("cosine", "after the warm-up", choices=("cosine", "constant"))
    warmup: float = option(0.1, "linear warm-up", unit="share of the steps")
    weight_decay: float = option(0.0, "of AdamW")
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm")

    def check(self) -> None:
        checks.check_number("steps", self.steps, at_least=1)
        checks.check_number("learning_rate", self.learning_rate, above=0.0)
        checks.check_number("warmup", self.warmup, at_least=0.0, below=1.0)
        checks.check_number("weight_decay", self.weight_decay, at_least=0.0)
        checks.check_number("max_grad_norm", self.max_grad_norm, above=0.0)


@dataclass(frozen=True)
class EvalConfig(Section):
    """evaluation."""

    eval_every: int = option(
        20, "evaluate after every so many steps, and before the first and after the last; 0: never", unit="steps"
    )
    eval_samples: int = option(8, "of each prompt, for avg@k, pass@k and maj@k; greedy takes one more", unit="samples")
    eval_pass_k: int | None = option(None, "k of pass@k, at most the samples; none: the samples")
    eval_temperature: float = option(0.8, "of these samples")
    eval_prompts: int | None = option(None, "evaluate on the first so many held-out prompts; none: all")

    def check(self) -> None:
        checks.check_number("eval_every", self.eval_every, at_least=0)
        checks.check_number("eval_samples", self.eval_samples, at_least=1)
        checks.check_number("eval_temperature", self.eval_temperature, above=0.0)
        if self.eval_pass_k is not None:
            checks.check_number("eval_pass_k", self.eval_pass_k, at_least=1, at_most=self.eval_samples)
        if self.eval_prompts is not None:
            checks.check_number("eval_prompts", self.eval_prompts, at_least=1)


@dataclass(frozen=True)
class RunConfig(Section):
    """run."""

    seed: int = option(0, "of everything random")
    checkpoint_every: int = option(50, "save after every so many steps, and after the last; 0: only then", unit="steps")
    keep_checkpoints: int = option(3, "older ones are deleted; 0 keeps all", unit="checkpoints")
    async_checkpoints: bool = option(True, "go on while a checkpoint is written, from a copy in the CPU's memory")
    max_skipped_steps: int = option(
        10, "steps whose loss or gradient is not finite are skipped, and their batch saved; after so many the run ends"
    )
    rank_timeout: float = option(
        1800.0, "under torchrun: a rank that waits so long for another ends the run", unit="seconds"
    )
    samples_per_step: int = option(4, "of one prompt, shown each step and kept in samples.jsonl", unit="rollouts")
    log_every: int = option(1, "print every so many steps; the live view shows each", unit="steps")
    plain: bool = option(False, "lines of text on a terminal too, in place of the live view")
    tensorboard: bool = option(False, "write TensorBoard's event files, to tensorboard/ in --output")
    wandb: str | None = option(None, "log to this project of Weights & Biases")
    trackio: str | None = option(None, "log to this project of Trackio")
    profile_steps: str | None = option(
        None, "A:B, write a torch.profiler trace of the steps A to B to trace.json in --output"
    )
    guard: str = option(
        "warn",
        "at signs of collapse: nothing (off), a message (warn), save and end with status 3 (stop), "
        "or go on from the best checkpoint (rollback)",
        choices=("off", "warn", "stop", "rollback"),
    )
    guard_rollbacks: int = option(1, "with --guard rollback: after so many, stop", unit="rollbacks")

    def check(self) -> None:
        checks.check_number("seed", self.seed, at_least=0, below=2**63)
        checks.check_number("rank_timeout", self.rank_timeout, above=0.0)
        for name in (
            "checkpoint_every",
            "keep_checkpoints",
            "max_skipped_steps",
            "samples_per_step",
            "guard_rollbacks",
        ):
            checks.check_number(name, getattr(self, name), at_least=0)
        checks.check_number("log_every", self.log_every, at_least=1)
        for name in ("wandb", "trackio"):
            if getattr(self, name) == "":
                raise ValueError(f"{name}: expected the name of a project, got ''")
