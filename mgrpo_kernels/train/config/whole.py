"""The whole configuration: every option, the checks across sections, and the values derived from several options."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from mgrpo_kernels.method.fields import fields_of
from mgrpo_kernels.ops.policy_loss.loss_types import LOSSES
from mgrpo_kernels.ops.policy_loss.options import DECLARED
from mgrpo_kernels.train.config.fields import Section
from mgrpo_kernels.train.config.model_sections import LoraConfig, ModelConfig
from mgrpo_kernels.train.config.run_sections import EvalConfig, RunConfig
from mgrpo_kernels.train.config.sections import (
    DataConfig,
    LossConfig,
    MethodConfig,
    OptimConfig,
    RolloutConfig,
    VllmConfig,
)
from mgrpo_kernels.train.rollout.engines import ENGINES
from mgrpo_kernels.train.rollout.truncation import NO_TRUNCATION


@dataclass(frozen=True)
class Config:
    """Every option by section, and the values derived from several options."""

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
            raise ValueError(f"{missing}: expected a value with --{given}, got none (the built-in task uses neither)")
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
        for name in self.rollout.truncation._fields:
            value, off = getattr(self.rollout, name), getattr(NO_TRUNCATION, name)
            if self.vllm.server_urls and value != off:
                raise ValueError(
                    f"{name}: expected {off} with vllm_servers, got {value}: a server's answers lack the kept entries, over which "
                    "log-probs and loss are computed; use vLLM in the training process or --engine transformers"
                )
        if self.profiled.stop > self.optim.steps + 1:
            raise ValueError(f"profile_steps: expected steps up to {self.optim.steps}, got {self.run.profile_steps!r}")
        self._check_unused()

    @property
    def profiled(self) -> range:
        """The steps that --profile-steps traces."""
        if self.run.profile_steps is None:
            return range(0)
        first, _, last = self.run.profile_steps.partition(":")
        if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
            raise ValueError(
                f"profile_steps: expected A:B, the first step and the last, 1 <= A <= B, got {self.run.profile_steps!r}"
            )
        return range(int(first), int(last) + 1)

    def _check_unused(self) -> None:
        """Raise ValueError for an option that was set but has no effect without another one."""
        self.method.check_use(momentum=self.needs_momentum)
        self.method.second_wording_count(self.rollout.rollouts)  # raises for too few rollouts
        if self.method.row.own_advantages and self.method.reward is not None and self.method.reward_share < 1.0:
            raise ValueError(
                f"reward_share: expected 1 with method {self.method.method}, whose advantages are not those of its rewards, got "
                f"{self.method.reward_share}"
            )
        values = self.values()
        for name, requirement, met in self._requirements():
            if not met and values[name] != DEFAULTS[name]:
                raise ValueError(
                    f"{name}: expected {requirement} with it, without which it has no effect, got {values[name]!r}"
                )

    def _requirements(self) -> Iterator[tuple[str, str, bool]]:
        """Yield options that may have no effect: the name, what it requires for an effect, and whether that is the case."""
        kept = "a momentum model or a copy of the weights for the KL term"
        yield "momentum_device", kept, self.needs_momentum or self.copies_base
        # The default of chat_template, and "off", are allowed with the built-in model.
        yield "chat_template", "--model", self.model.model is not None or self.data.chat_template != "on"
        yield (
            "paraphrase_field",
            "a method that reads two wordings of a question",
            self.method.row.second_wording != "no",
        )
        for name in ("revision", "trust_remote_code", "system_prompt", "chat_template_kwargs"):
            yield name, "--model", self.model.model is not None
        yield "reward_share", "--reward", self.method.reward is not None
        yield "gold_labels", "a reward of the method", self.method.reward is None or self.method.reward_share < 1.0
        watched = self.run.guard != "off" and self.eval.eval_every > 0
        yield "load_best", "--guard warn, stop or rollback, and evaluations", watched
        yield "kl_reference", "--kl-coef above 0", self.loss.kl_coef > 0 or self.loss.kl_reference != "momentum"
        yield "kl_bias_correction", "a KL term", self.needs_reference is not None
        weighted = self.corrects_behaviour or self.method.train_momentum_rollouts
        for name in ("behaviour_mode", "behaviour_cap", "behaviour_floor", "geometric_cap", "geometric_floor"):
            yield name, "--behaviour-correction or --train-momentum-rollouts", weighted
        off_policy = weighted or self.optim.updates_per_batch > 1
        needed = "--behaviour-correction, --train-momentum-rollouts or --updates-per-batch above 1"
        yield "off_policy_delta", needed, off_policy
        for each in DECLARED:
            readers = [name for name, row in LOSSES.items() if each.name in row.surrogate.options]
            # The clip range is accepted with every loss type.
            if readers and each.name not in ("clip_low", "clip_high"):
                yield each.name, f"--loss-type {' or '.join(readers)}", self.loss.loss_type in readers
        for engine, info in ENGINES.items():
            if info.section:
                for name in fields_of(SECTIONS[info.section]):
                    yield name, f"--engine {engine}", engine == self.rollout.engine
        for name in fields_of(LoraConfig):
            yield name, "--lora-rank", self.lora.lora_rank is not None

    @property
    def momentum_rollouts(self) -> int:
        """N, the number of rollouts of each prompt that the momentum model generates."""
        return self.method.momentum_count(self.rollout.rollouts)

    @property
    def second_wording_rollouts(self) -> int:
        """Number of rollouts of each prompt that answer the second wording of its question, the last ones."""
        return self.method.second_wording_count(self.rollout.rollouts)

    @property
    def policy_rollouts(self) -> int:
        """M = G - N, the number of rollouts of each prompt that the policy generates."""
        return self.rollout.rollouts - self.momentum_rollouts

    @property
    def filters(self) -> bool:
        """Whether the IQR filter prunes rollouts."""
        return self.method.filters

    @property
    def policy_scores_all(self) -> bool:
        """Whether the policy also scores the momentum model's rollouts."""
        return self.method.momentum_scored_by == "policy" or self.method.train_momentum_rollouts

    @property
    def corrects_behaviour(self) -> bool:
        """Whether the loss weights each token by its probability ratio of trainer to rollout engine."""
        given = self.loss.behaviour_correction
        return ENGINES[self.rollout.engine].rounds_differently if given is None else given

    @property
    def statistics(self) -> tuple[str, ...]:
        """The token statistics that the method needs."""
        certainty = ("self_certainty",) if self.method.row.needs_self_certainty else ()
        return ("logprob", "entropy", *certainty)

    @property
    def needs_momentum(self) -> bool:
        """Whether the run keeps a momentum model."""
        return self.momentum_rollouts > 0 or self.needs_reference == "momentum"

    @property
    def needs_reference(self) -> str | None:
        """The reference model of the KL penalty, base or momentum; None without a KL penalty."""
        return None if self.loss.kl_coef == 0 or self.loss.kl_reference == "none" else self.loss.kl_reference

    @property
    def copies_base(self) -> bool:
        """Whether a copy of the initial weights is kept for the KL penalty. With LoRA, they are the model without its adapter."""
        return self.needs_reference == "base" and self.lora.lora_rank is None

    @property
    def pass_k(self) -> int:
        """The k of pass@k."""
        return self.eval.eval_samples if self.eval.eval_pass_k is None else self.eval.eval_pass_k

    def derived(self) -> dict[str, Any]:
        """Return the values derived from several options, for the plan."""
        batch, method, lora = self.rollout.prompts_per_step * self.rollout.rollouts, self.method, self.lora
        parts = f"{self.policy_rollouts} policy + {self.momentum_rollouts} momentum model"
        iqr = f"k {method.iqr_k}, minimum spread {method.iqr_min_spread}, scope {method.filter_scope}"
        adapter = f"rank {lora.lora_rank}, alpha {lora.lora_alpha:g}"
        return {
            "rollouts per step": f"{batch} = {self.rollout.prompts_per_step} prompts x ({parts})",
            "response tokens per step": f"at most {batch * self.rollout.max_response_tokens:,}",
            "IQR filter": iqr if self.filters else "off",
            "momentum model": method.schedule_text if self.needs_momentum else "off",
            "KL reference model": self.needs_reference or "off",
            "LoRA": "off, all weights train" if lora.lora_rank is None else adapter,
            "behaviour correction": self.loss.behaviour_text if self.corrects_behaviour else "off",
            "warm-up": f"{self.optim.warmup_steps} of {self.optim.steps} steps",
        }

    def values(self) -> dict[str, Any]:
        """Return the value of every option by name."""
        return {name: value for _, section in self.sections() for name, value in section.items()}

    def sections(self) -> list[tuple[str, dict[str, Any]]]:
        """Return the title and the options of each section."""
        parts = [getattr(self, each.name) for each in dataclasses.fields(self)]
        return [((type(part).__doc__ or "").rstrip("."), dataclasses.asdict(part)) for part in parts]

    def to_yaml(self) -> str:
        """Return the text of a file that ``--config`` reads back as the same configuration."""
        return "\n".join(f"# {title}\n{yaml.safe_dump(options, sort_keys=False)}" for title, options in self.sections())


SECTIONS: dict[str, type[Section]] = {name: kinds[0] for name, (_, kinds, _) in fields_of(Config).items()}
"""The class of each section, by the name of its field in :class:`Config`."""
DEFAULTS = {name: each.field.default for section in SECTIONS.values() for name, each in fields_of(section).items()}
"""The default of every option."""
