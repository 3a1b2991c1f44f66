"""The whole configuration: every option, and what follows from them together."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from mgrpo_kernels.ops.policy_loss.loss_types import LOSSES
from mgrpo_kernels.ops.policy_loss.options import DECLARED
from mgrpo_kernels.train.config.fields import Section
from mgrpo_kernels.train.config.sections import (
    DataConfig,
    EvalConfig,
    LoraConfig,
    LossConfig,
    MethodConfig,
    ModelConfig,
    OptimConfig,
    RolloutConfig,
    RunConfig,
    VllmConfig,
)
from mgrpo_kernels.train.rollout.engines import ENGINES


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
            raise ValueError(f"{missing}: expected a value with --{given}, got none (the built-in task takes neither)")
        if self.data.eval_data is not None and self.data.data is None:
            raise ValueError(
                "eval_data: expected it together with --data, got it alone (the built-in task has its own)"
            )
        self.method.momentum_count(self.rollout.rollouts)
        least = ENGINES[self.rollout.engine].least_temperature
        for name, value in (
            ("temperature", self.rollout.temperature),
            ("eval_temperature", self.eval.eval_temperature),
        ):
            if value < least:
                raise ValueError(
                    f"{name}: expected >= {least}, below which {self.rollout.engine} samples at another temperature, got {value!r}"
                )
        if self.profiled.stop > self.optim.steps + 1:
            raise ValueError(f"profile_steps: expected steps up to {self.optim.steps}, got {self.run.profile_steps!r}")
        self._check_unused()

    @property
    def profiled(self) -> range:
        """The steps that are traced."""
        if self.run.profile_steps is None:
            return range(0)
        first, _, last = self.run.profile_steps.partition(":")
        if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
            raise ValueError(
                f"profile_steps: expected A:B, the first step and the last, 1 <= A <= B, got {self.run.profile_steps!r}"
            )
        return range(int(first), int(last) + 1)

    def _check_unused(self) -> None:
        """Raise ValueError for an option that was set and can have no effect."""
        self.method.check_use(momentum=self.needs_momentum)
        method, loss = self.method, self.loss
        of_engines = [
            (each.name, getattr(part, each.name) != each.default, f"--engine {engine}", engine == self.rollout.engine)
            for engine, info in ENGINES.items() if info.section
            for part in (getattr(self, info.section),) for each in dataclasses.fields(part)
        ]  # fmt: skip
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
            *of_engines,
            *((each.name, getattr(self.lora, each.name) != each.default, "--lora-rank", lora) for each in of_lora),
        ):
            if is_set and not met:
                got = self.values()[name]
                raise ValueError(f"{name}: expected {needs} with it, without which it has no effect, got {got!r}")

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
        return ENGINES[self.rollout.engine].rounds_differently if given is None else given

    @property
    def statistics(self) -> tuple[str, ...]:
        """The statistics of each token that the method reads."""
        certainty = ("self_certainty",) if self.method.row.needs_self_certainty else ()
        return ("logprob", "entropy", *certainty)

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


SECTIONS: dict[str, type[Section]] = {
    "model": ModelConfig, "lora": LoraConfig, "data": DataConfig, "method": MethodConfig, "rollout": RolloutConfig, "vllm": VllmConfig,
    "loss": LossConfig, "optim": OptimConfig, "eval": EvalConfig, "run": RunConfig,
}  # fmt: skip
