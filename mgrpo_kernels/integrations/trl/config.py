"""MGRPOConfig: TRL's GRPOConfig and what M-GRPO adds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mgrpo_kernels import checks
from mgrpo_kernels.integrations import IntegrationError
from mgrpo_kernels.integrations.trl import INSTALL
from mgrpo_kernels.ops.iqr_filter import REDUCTIONS
from mgrpo_kernels.train.pruning import SCOPES, SCORERS
from mgrpo_kernels.vote import EQUIVALENCES

try:
    from trl import GRPOConfig
except ModuleNotFoundError as error:
    if error.name != "trl":
        raise
    raise IntegrationError(f"trl is not installed: {INSTALL}") from error

DTYPES = ("float32", "bfloat16", "float16")


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class MGRPOConfig(GRPOConfig):
    """GRPOConfig and M-GRPO's options, whose defaults are the paper's; every other default is TRL's.

    ``num_generations`` is G, all rollouts of a prompt: `momentum_rollouts` of them come from the momentum model, the others from the
    policy, and only these train. TRL's batch sizes count all G.

    Raises:
        ValueError, TypeError: an option out of range, or one of TRL's that M-GRPO cannot work with.
    """

    beta: float = _option(0.005, "KL coefficient (the paper's; TRL's default is 0: no reference model)")
    momentum_rollouts: int | None = _option(
        None, "of a prompt's num_generations, sampled from the momentum model; none: a quarter"
    )
    decay: float = _option(
        0.99, "m of the momentum model: theta_k = m theta_k + (1 - m) theta_q, after each optimizer step"
    )
    iqr_filter: bool = _option(True, "prune trajectories of low entropy")
    iqr_k: float = _option(0.75, "prune where entropy < Q1 - k (Q3 - Q1)")
    filter_scope: str = _option(
        "both", "both: pruned rollouts neither vote nor train; vote: they do not vote; penalise: their reward is 0"
    )
    entropy_reduction: str = _option("mean", "a trajectory's entropy over its tokens: mean or sum")
    momentum_scored_by: str = _option(
        "sampler", "which model's entropy counts for the momentum rollouts: sampler (the momentum model) or policy"
    )
    min_share: float = _option(0.0, "a majority with a smaller share of the votes gives no label")
    equivalence: str = _option("math", "which answers are equal: math or exact")
    momentum_dtype: str = _option("float32", "of the momentum model: float32, bfloat16 or float16")
    momentum_device: str | None = _option(None, "where the momentum model lies; none: beside the policy")

    def __post_init__(self) -> None:
        super().__post_init__()
        G = int(self.num_generations)  # type: ignore[arg-type]  # TRL has filled it in
        if self.momentum_rollouts is None:
            self.momentum_rollouts = G // 4
        checks.check_number("momentum_rollouts", self.momentum_rollouts, at_least=0)
        if self.momentum_rollouts > G - 2:
            raise ValueError(
                f"momentum_rollouts: want at most {G - 2} of num_generations {G}, since an advantage takes two of the policy's, "
                f"got {self.momentum_rollouts}"
            )
        checks.check_number("decay", self.decay, at_least=0.0, below=1.0)
        checks.check_number("iqr_k", self.iqr_k, at_least=0.0)
        checks.check_number("min_share", self.min_share, at_least=0.0, at_most=1.0)
        checks.check_choice("filter_scope", self.filter_scope, SCOPES)
        checks.check_choice("entropy_reduction", self.entropy_reduction, REDUCTIONS)
        checks.check_choice("momentum_scored_by", self.momentum_scored_by, SCORERS)
        checks.check_choice("equivalence", self.equivalence, EQUIVALENCES)
        checks.check_choice("momentum_dtype", self.momentum_dtype, DTYPES)
        if self.use_adaptive_entropy:
            raise ValueError("use_adaptive_entropy: want False with M-GRPO, got True")
        if self.multi_objective_aggregation != "sum_then_normalize":
            raise ValueError(
                "multi_objective_aggregation: want 'sum_then_normalize' with M-GRPO, "
                f"got {self.multi_objective_aggregation!r}"
            )
