"""MGRPOConfig: TRL's GRPOConfig and what M-GRPO adds."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from typing import Any, TypeVar

from mgrpo_kernels import checks
from mgrpo_kernels.integrations import IntegrationError
from mgrpo_kernels.integrations.trl import INSTALL
from mgrpo_kernels.method import MethodOptions, help_of

try:
    from trl import GRPOConfig
except ModuleNotFoundError as error:
    if error.name != "trl":
        raise
    raise IntegrationError(f"trl is not installed: {INSTALL}") from error

DTYPES = ("float32", "bfloat16", "float16")
T = TypeVar("T")


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


def with_method_options(config: type[T]) -> type[T]:
    """Declare every field of :class:`MethodOptions` on a class that is about to become a dataclass.

    A dataclass that is not frozen, as TRL's, cannot inherit from one that is.
    """
    types = typing.get_type_hints(MethodOptions)
    for each in dataclasses.fields(MethodOptions):
        config.__annotations__[each.name] = types[each.name]
        setattr(config, each.name, _option(each.default, help_of(each)))
    return config


@dataclass
@with_method_options
class MGRPOConfig(GRPOConfig):
    """GRPOConfig and the options of the method (:class:`mgrpo_kernels.method.MethodOptions`); every other default is TRL's.

    ``num_generations`` is G, all rollouts of a prompt: `momentum_rollouts` of them come from the momentum model, the others from the
    policy, and only these train. TRL's batch sizes count all G.

    Raises:
        ValueError, TypeError: an option out of range, or one of TRL's that M-GRPO cannot work with.
    """

    beta: float = _option(0.005, "KL coefficient (the paper's; TRL's default is 0: no reference model)")
    answer_field: str | None = _option(
        None,
        "column with the true answer, for method gold, gold_labels and label_accuracy; none: answer or solution, where there is one",
    )
    paraphrase_field: str | None = _option(
        None,
        "column with the question in another wording, for the methods that ask it in two; none: paraphrase, rephrased_question or "
        "rewritten_question, where there is one",
    )
    momentum_dtype: str = _option("float32", "dtype in which the momentum model is kept: float32, bfloat16 or float16")
    momentum_device: str | None = _option(None, "device on which the momentum model is kept; none: the policy's")

    def __post_init__(self) -> None:
        super().__post_init__()
        options = self.method_options()
        if self.paraphrase_field is not None and options.row.second_wording == "no":
            raise ValueError(
                f"paraphrase_field: expected None with method {options.method}, which asks each question in one wording, got "
                f"{self.paraphrase_field!r}"
            )
        G = int(self.num_generations)  # type: ignore[arg-type]  # TRL has filled it in
        count = options.momentum_count(G)
        options.second_wording_count(G)  # raises for too few rollouts
        options.check_prompts(int(self.generation_batch_size) // G)  # type: ignore[arg-type]  # TRL has filled it in
        options.check_use(momentum=count > 0)
        if options.train_momentum_rollouts:
            raise ValueError(
                "train_momentum_rollouts: expected False with MGRPOTrainer, since TRL's loss has no weights for rollouts of another model, "
                "got True"
            )
        self.momentum_rollouts = count
        checks.check_choice("momentum_dtype", self.momentum_dtype, DTYPES)
        if self.use_adaptive_entropy:
            raise ValueError("use_adaptive_entropy: expected False with M-GRPO, got True")
        if self.multi_objective_aggregation != "sum_then_normalize":
            raise ValueError(
                "multi_objective_aggregation: expected 'sum_then_normalize' with M-GRPO, "
                f"got {self.multi_objective_aggregation!r}"
            )

    def method_options(self) -> MethodOptions:
        """Return the options of the method, checked."""
        return MethodOptions(**{each.name: getattr(self, each.name) for each in dataclasses.fields(MethodOptions)})
