"""TRL 1.16: the fused head and losses under GRPOTrainer, GMPOTrainer and RLOOTrainer, and M-GRPO for a script that uses GRPOTrainer.

::

    from mgrpo_kernels.integrations import trl

    with trl.patched():
        trainer.train()  # a GRPOTrainer or RLOOTrainer of yours
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from mgrpo_kernels.integrations import Patch

if TYPE_CHECKING:
    from mgrpo_kernels.integrations.trl.config import MGRPOConfig
    from mgrpo_kernels.integrations.trl.guard import GuardCallback
    from mgrpo_kernels.integrations.trl.teacher import TeacherCallback
    from mgrpo_kernels.integrations.trl.trainer import MGRPOTrainer

INSTALL = "pip install 'trl==1.16.*'"
LIBRARY = "trl"

_HEAD = (
    "ctx",
    "hidden",
    "weight",
    "bias",
    "targets",
    "temperature",
    "chunk_size",
    "final_logit_softcapping",
    "logit_scale",
    "outputs",
)
_UTILS = "trl.trainer.utils"


def patched(strict: bool = False) -> Patch:
    """Put the fused ops under TRL's own names, for every trainer in the process; the returned patch takes them out again.

    - ``trl.trainer.utils._ChunkedLogProbFunction``, which scores tokens from hidden states, becomes :func:`linear_token_stats`. TRL hands
      it temperature, soft cap and the model family's logit multiplier, and an FSDP2 head already gathered.
    - ``GRPOTrainer._compute_loss``, ``RLOOTrainer._compute_loss`` and that of ``trl.experimental.gmpo.GMPOTrainer`` take their loss from
      :func:`policy_loss`.
    - On a CPU only the tokens that have a label are scored, as TRL does on a GPU.

    It works on trainers that exist already, and nests. Where the fused ops cannot run, TRL's own code runs, and one warning names it.

    Args:
        strict: raise IntegrationError where TRL's own code would run instead.

    Raises:
        IntegrationError: TRL is not installed, or one of these names has moved or takes other parameters.
    """
    from mgrpo_kernels.integrations.trl import head, loss

    patch = Patch(LIBRARY, install=INSTALL, strict=strict)
    own_head = patch.original(_UTILS, "_ChunkedLogProbFunction")
    if not isinstance(own_head, head.FusedHead):  # a patch within a patch
        patch.check(_UTILS, "_ChunkedLogProbFunction.forward", _HEAD)
    patch.replace(_UTILS, "_ChunkedLogProbFunction", head.FusedHead(patch, own_head))
    own_choice = patch.original(_UTILS, "_use_triton")
    patch.replace(_UTILS, "_use_triton", head.scores_labels_alone(own_choice), parameters=("device",))
    for name, place, fused, unsupported in (
        ("GRPO", "trl.trainer", loss.grpo_loss, loss.unsupported),
        ("RLOO", "trl.trainer", loss.rloo_loss, loss.unsupported_rloo),
        ("GMPO", "trl.experimental.gmpo", loss.gmpo_loss, loss.unsupported_gmpo),
    ):
        module, method = f"{place}.{name.lower()}_trainer", f"{name}Trainer._compute_loss"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that trl.experimental is imported
            own = patch.original(module, method)
        patch.check(module, f"{name}Trainer._get_per_token_logps_and_entropies", loss.SCORING)
        patch.replace(
            module,
            method,
            loss.replacement(patch, method, own, fused, unsupported),
            parameters=("self", "model", "inputs"),
        )
    return patch.apply()


def __getattr__(name: str) -> Any:  # these subclass TRL's own, which takes seconds to import
    if name == "MGRPOConfig":
        from mgrpo_kernels.integrations.trl.config import MGRPOConfig

        return MGRPOConfig
    if name == "MGRPOTrainer":
        from mgrpo_kernels.integrations.trl.trainer import MGRPOTrainer

        return MGRPOTrainer
    if name == "GuardCallback":
        from mgrpo_kernels.integrations.trl.guard import GuardCallback

        return GuardCallback
    if name == "TeacherCallback":
        from mgrpo_kernels.integrations.trl.teacher import TeacherCallback

        return TeacherCallback
    raise AttributeError(f"module {__name__} has no attribute {name}")


__all__ = ["GuardCallback", "MGRPOConfig", "MGRPOTrainer", "TeacherCallback", "patched"]
