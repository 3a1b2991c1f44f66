"""The trainer's options: one frozen dataclass per concern, checked when built.

A field is an option: ``max_response_tokens`` is ``--max-response-tokens`` on the command line and ``max_response_tokens:`` in a YAML
file. Its metadata carries the help text, from which ``--help`` is made.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mgrpo_kernels import checks
from mgrpo_kernels.method import MethodOptions
from mgrpo_kernels.ops.policy_loss.inputs import check_behaviour_mode
from mgrpo_kernels.ops.policy_loss.loss_types import LOSS_TYPES, LOSSES
from mgrpo_kernels.ops.policy_loss.options import DECLARED, LossForm, check_option

PRESETS = Path(__file__).parent / "presets"
DTYPES = ("float32", "bfloat16")
DEFAULT_TEMPLATE = "{question}\nThink step by step, and end with the final answer inside \\boxed{}.\n"


class UsageError(ValueError):
    """What a user can put right: an option, a file, a directory. Shown without a traceback."""

    told = False  # whether another rank has shown it


class EngineError(RuntimeError):
    """What samples failed or hung. The run ends with the reason, and its last checkpoint stands."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or is damaged. Those before it are as they were."""


def option(
    default: Any,
    text: str,
    *,
    unit: str = "",
    choices: Sequence[str] | None = None,
    bounds: Mapping[str, float] | None = None,
) -> Any:
    """Return a dataclass field with what the command line needs to know about it."""
    return field(default=default, metadata={"help": text, "unit": unit, "choices": choices, "bounds": bounds or {}})


@dataclass(frozen=True)
class _Section:
    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            choices, value = each.metadata["choices"], getattr(self, each.name)
            if choices is not None and value is not None:
                checks.check_choice(each.name, value, choices)
        self.check()

    def check(self) -> None:
        """Raise ValueError for a value out of range."""


@dataclass(frozen=True)
class ModelConfig(_Section):
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
class LoraConfig(_Section):
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
            raise ValueError(f"lora_targets: want names with commas between them, got {self.lora_targets!r}")

    @property
    def targets(self) -> list[str]:
        return [each.strip() for each in self.lora_targets.split(",")]


@dataclass(frozen=True)
class DataConfig(_Section):
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
class MethodConfig(MethodOptions, _Section):
    """method."""

    momentum_device: str = option(
        "auto",
        "where the momentum model and the KL reference are held: beside the weights, or in the CPU's memory",
        choices=("auto", "cpu"),
    )


@dataclass(frozen=True)
class RolloutConfig(_Section):
    """rollouts."""

    engine: str = option("transformers", "what samples", choices=("transformers", "vllm"))
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
                    f"{name}: want {off} for training, got {getattr(self, name)}: cut off, the tokens come from another distribution than "
                    "the policy's, and log-probs, ratios and entropy are not theirs any more"
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
class VllmConfig(_Section):
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
                f"vllm_servers: want http://HOST:PORT, or several with commas between, none twice, got {self.vllm_servers!r}"
            )
        if urls:
            for each in dataclasses.fields(self):
                if each.name not in ("vllm_servers", "vllm_timeout") and getattr(self, each.name) != each.default:
                    raise ValueError(
                        f"{each.name}: want it given to the servers in vLLM's own words, since with vllm_servers it has no effect "
                        f"here, got {getattr(self, each.name)!r}"
                    )


@dataclass(frozen=True)
class LossConfig(_Section, LossForm):
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
class OptimConfig(_Section):
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
class EvalConfig(_Section):
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
class RunConfig(_Section):
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
                raise ValueError(f"{name}: want the name of a project, got ''")


@dataclass(frozen=True)
class Config:
    """Every option, and what follows from them together."""

    model: ModelConfig
    lora: LoraConfig
    data: DataConfig
    method: MethodConfig
    rollout: RolloutConfig
    vllm: VllmConfig
    loss: LossConfig
    optim: OptimConfig
    eval: EvalConfig
    run: RunConfig

    def __post_init__(self) -> None:
        if (self.model.model is None) != (self.data.data is None):
            missing, given = ("data", "model") if self.data.data is None else ("model", "data")
            raise ValueError(f"{missing}: want a value with --{given}, got none (the built-in task takes neither)")
        if self.data.eval_data is not None and self.data.data is None:
            raise ValueError("eval_data: want it together with --data, got it alone (the built-in task has its own)")
        self.method.momentum_count(self.rollout.rollouts)
        if self.rollout.engine == "vllm":
            for name, value in (
                ("temperature", self.rollout.temperature),
                ("eval_temperature", self.eval.eval_temperature),
            ):
                checks.check_number(f"{name} (below 0.01 vLLM changes it)", value, at_least=0.01)
        if self.profiled.stop > self.optim.steps + 1:
            raise ValueError(f"profile_steps: want steps up to {self.optim.steps}, got {self.run.profile_steps!r}")
        self._check_unused()

    @property
    def profiled(self) -> range:
        """The steps that are traced."""
        if self.run.profile_steps is None:
            return range(0)
        first, _, last = self.run.profile_steps.partition(":")
        if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
            raise ValueError(
                f"profile_steps: want A:B, the first step and the last, 1 <= A <= B, got {self.run.profile_steps!r}"
            )
        return range(int(first), int(last) + 1)

    def _check_unused(self) -> None:
        """Raise ValueError for an option that was set and can have no effect."""
        self.method.check_use(momentum=self.needs_momentum)
        method, loss = self.method, self.loss
        vllm, of_vllm = self.rollout.engine == "vllm", dataclasses.fields(self.vllm)
        lora, of_lora = self.lora.lora_rank is not None, dataclasses.fields(self.lora)
        weighted = self.corrects_behaviour or method.train_momentum_rollouts
        behaviour = "--behaviour-correction or --train-momentum-rollouts"
        of_behaviour = [
            (each.name, each.default) for each in DECLARED if each.name in ("behaviour_mode", "behaviour_cap")
        ]
        for name, is_set, needs, met in (
            (
                "momentum_device",
                self.method.momentum_device != "auto",
                "a momentum model or a copy of the weights for the KL term",
                self.needs_momentum or self.copies_base,
            ),
            ("chat_template", self.data.chat_template == "on", "--model", self.model.model is not None),
            ("kl_reference", loss.kl_reference == "momentum", "kl_coef > 0", loss.kl_coef > 0),
            ("kl_bias_correction", loss.kl_bias_correction, "a KL term", self.needs_reference is not None),
            *((name, getattr(loss, name) != default, behaviour, weighted) for name, default in of_behaviour),
            *self._unread_by_surrogate(),
            *((each.name, getattr(self.vllm, each.name) != each.default, "--engine vllm", vllm) for each in of_vllm),
            *((each.name, getattr(self.lora, each.name) != each.default, "--lora-rank", lora) for each in of_lora),
        ):
            if is_set and not met:
                got = self.values()[name]
                raise ValueError(f"{name}: want {needs} with it, without which it has no effect, got {got!r}")

    def _unread_by_surrogate(self) -> Iterator[tuple[str, bool, str, bool]]:
        """Yield the options of one surrogate only: name, whether it is set, the loss types that read it, whether this one does.

        The clip range is let pass: it has always been accepted with every loss type.
        """
        for each in DECLARED:
            readers = [name for name, row in LOSSES.items() if each.name in row.surrogate.options]
            if readers and each.name not in ("clip_low", "clip_high"):
                is_set = getattr(self.loss, each.name) != each.default
                yield each.name, is_set, f"--loss-type {' or '.join(readers)}", self.loss.loss_type in readers

    @property
    def momentum_rollouts(self) -> int:
        """N, the rollouts of each prompt that the momentum model samples."""
        return self.method.momentum_count(self.rollout.rollouts)

    @property
    def policy_rollouts(self) -> int:
        """M = G - N."""
        return self.rollout.rollouts - self.momentum_rollouts

    @property
    def filters(self) -> bool:
        """Whether trajectories are pruned."""
        return self.method.filters

    @property
    def policy_scores_all(self) -> bool:
        """Whether the policy, too, scores what the momentum model sampled."""
        return self.method.momentum_scored_by == "policy" or self.method.train_momentum_rollouts

    @property
    def corrects_behaviour(self) -> bool:
        """Whether the loss weights each token by trainer / sampler."""
        given = self.loss.behaviour_correction
        return self.rollout.engine == "vllm" if given is None else given

    @property
    def needs_momentum(self) -> bool:
        return self.momentum_rollouts > 0 or self.needs_reference == "momentum"

    @property
    def needs_reference(self) -> str | None:
        """Which model the KL term is measured against, or None."""
        return None if self.loss.kl_coef == 0 or self.loss.kl_reference == "none" else self.loss.kl_reference

    @property
    def copies_base(self) -> bool:
        """Whether the weights at the start are kept, for the KL term. With LoRA they are the model without its adapter."""
        return self.needs_reference == "base" and self.lora.lora_rank is None

    @property
    def warmup_steps(self) -> int:
        return -int(-self.optim.warmup * self.optim.steps // 1)  # rounded up

    @property
    def pass_k(self) -> int:
        return self.eval.eval_samples if self.eval.eval_pass_k is None else self.eval.eval_pass_k

    def derived(self) -> dict[str, Any]:
        """Return what follows from the options, for the plan."""
        batch, lora = self.rollout.prompts_per_step * self.rollout.rollouts, self.lora
        return {
            "rollouts of a step": f"{batch} = {self.rollout.prompts_per_step} prompts x "
            f"({self.policy_rollouts} policy + {self.momentum_rollouts} momentum)",
            "response tokens of a step": f"at most {batch * self.rollout.max_response_tokens:,}",
            "filter": f"k {self.method.iqr_k}, min spread {self.method.iqr_min_spread}, {self.method.filter_scope}"
            if self.filters
            else "off",
            "momentum model": f"decay {self.method.decay} -> {self.method.last_decay}"
            if self.needs_momentum
            else "off",
            "KL reference": self.needs_reference or "off",
            "LoRA": "off, all weights train"
            if lora.lora_rank is None
            else f"rank {lora.lora_rank}, alpha {lora.lora_alpha:g}",
            "behaviour correction": self.loss.behaviour_text if self.corrects_behaviour else "off",
            "warm-up": f"{self.warmup_steps} of {self.optim.steps} steps",
        }

    def values(self) -> dict[str, Any]:
        """Return every option by name."""
        return {name: value for _, section in self.sections() for name, value in section.items()}

    def sections(self) -> list[tuple[str, dict[str, Any]]]:
        """Return (title, options) of each concern."""
        parts = [getattr(self, each.name) for each in dataclasses.fields(self)]
        return [((type(part).__doc__ or "").rstrip("."), dataclasses.asdict(part)) for part in parts]

    def to_yaml(self) -> str:
        """Return the file that ``--config`` reads back as the same configuration."""
        return "\n".join(f"# {title}\n{yaml.safe_dump(options, sort_keys=False)}" for title, options in self.sections())


SECTIONS: dict[str, type[_Section]] = {
    "model": ModelConfig, "lora": LoraConfig, "data": DataConfig, "method": MethodConfig, "rollout": RolloutConfig, "vllm": VllmConfig,
    "loss": LossConfig, "optim": OptimConfig, "eval": EvalConfig, "run": RunConfig,
}  # fmt: skip


PAIR = tuple[float, float]
"""The type of an option that is two numbers: ``--vespo-k 2 3`` on the command line, ``vespo_k: [2, 3]`` in YAML."""


def fields_of(section: type[_Section]) -> dict[str, tuple[dataclasses.Field[Any], tuple[Any, ...]]]:
    """Return each option of a section with the types it may have."""
    hints = typing.get_type_hints(section)
    return {
        each.name: (
            each,
            typing.get_args(hints[each.name]) if isinstance(hints[each.name], types.UnionType) else (hints[each.name],),
        )
        for each in dataclasses.fields(section)
    }


def build(*layers: Mapping[str, Any]) -> Config:
    """Return the configuration that these layers of option -> value give, later ones over earlier ones, over the defaults.

    Raises:
        UsageError: an unknown option, or a value of the wrong type or out of range.
    """
    values = {name: value for layer in layers for name, value in layer.items()}
    try:
        # A run's own config.yaml has eval_data: null, which says that no evaluation is meant.
        if values.get("eval_every") and values.get("data") is not None and "eval_data" not in values:
            raise ValueError(f"eval_every: want --eval-data with it, got {values['eval_every']!r} alone")
        parts: dict[str, Any] = {}
        for key, section in SECTIONS.items():
            kinds = {name: kinds for name, (_, kinds) in fields_of(section).items()}
            parts[key] = section(
                **{name: _typed(name, values.pop(name), of) for name, of in kinds.items() if name in values}
            )
        if values:
            known = sorted(name for section in SECTIONS.values() for name in fields_of(section))
            raise ValueError(f"{next(iter(values))}: want one of the options {', '.join(known)}, got an unknown one")
        return Config(**parts)
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error


def _typed(name: str, value: Any, kinds: tuple[Any, ...]) -> Any:
    if float in kinds and isinstance(value, str):  # YAML reads 1e-6, without a point, as text
        try:
            return float(value)
        except ValueError:
            pass
    if float in kinds and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if PAIR in kinds:
        if not isinstance(value, (list, tuple)) or len(value) != 2:
            raise ValueError(f"{name}: want two numbers, got {value!r}")
        return tuple(_typed(name, one, (float,)) for one in value)
    if type(value) not in kinds:
        wanted = " or ".join("none" if kind is type(None) else kind.__name__ for kind in kinds)
        raise ValueError(f"{name}: want {wanted}, got {value!r}")
    return value


def find_config(name: str) -> Path:
    """Return the file that ``--config`` names: that file where there is one, else the preset of that name.

    Raises:
        UsageError: neither.
    """
    presets = {each.stem: each for each in sorted(PRESETS.glob("*.yaml"))}
    if not Path(name).is_file() and name not in presets:
        raise UsageError(f"config: want a YAML file that exists, or a preset ({', '.join(presets)}), got {name!r}")
    return Path(name) if Path(name).is_file() else presets[name]


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Return the options in a YAML file.

    Raises:
        UsageError: unreadable, or no mapping of option to value.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"config: want a readable YAML file, got {path}: {error}") from error
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise UsageError(f"config: want lines of 'option: value' in {path}, got {type(values).__name__}")
    return {name.replace("-", "_"): value for name, value in values.items()}
