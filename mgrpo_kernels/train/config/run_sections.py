"""The options of evaluation, checkpoints, logging and the collapse guard."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from mgrpo_kernels import checks
from mgrpo_kernels.method.fields import option
from mgrpo_kernels.train.config.fields import Section
from mgrpo_kernels.train.config.sections import LEAST_TEMPERATURE


@dataclass(frozen=True)
class EvalConfig(Section):
    """evaluation."""

    eval_every: int = option(
        20,
        "number of steps from one evaluation to the next; there is also one before the first step and one after the last; 0 disables "
        "evaluation",
        unit="steps",
        at_least=0,
    )
    eval_samples: int = option(
        8,
        "number of responses sampled for each held-out prompt, from which avg@k, pass@k and maj@k are estimated; one greedy response "
        "is generated in addition",
        unit="responses",
        at_least=1,
    )
    eval_pass_k: int | None = option(
        None, "number k of responses in pass@k, at most --eval-samples", if_none="--eval-samples", at_least=1
    )
    eval_temperature: float = option(0.8, "sampling temperature of the evaluation", at_least=LEAST_TEMPERATURE)
    eval_prompts: int | None = option(
        None,
        "number of prompts of each held-out set to evaluate on, from the first on",
        if_none="all of them",
        at_least=1,
    )

    def check(self) -> None:
        if self.eval_pass_k is not None:
            checks.check_number("eval_pass_k", self.eval_pass_k, at_least=1, at_most=self.eval_samples)


@dataclass(frozen=True)
class RunConfig(Section):
    """run."""

    seed: int = option(0, "random seed for sampling, data order and initialisation", at_least=0, below=2**63)
    checkpoint_every: int = option(
        50,
        "number of steps from one checkpoint to the next; there is also one after the last step; 0 saves only that one",
        unit="steps",
        at_least=0,
    )
    keep_checkpoints: int = option(
        3, "number of checkpoints that are kept; older ones are deleted; 0 keeps all", unit="checkpoints", at_least=0
    )
    async_checkpoints: bool = option(
        True, "write checkpoints in the background, from a copy in CPU memory, while training continues"
    )
    max_skipped_steps: int = option(
        10,
        "number of steps that may be skipped because their loss or gradient is not finite; one more ends the run; the batch of each "
        "such step is saved",
        unit="steps",
        at_least=0,
    )
    rank_timeout: float = option(
        1800.0,
        "time limit for a rank that waits for the others under torchrun; after it, the run ends with an error",
        unit="seconds",
        above=0.0,
    )
    samples_per_step: int = option(
        4,
        "number of rollouts, of one prompt, that each step shows and writes to samples.jsonl",
        unit="rollouts",
        at_least=0,
    )
    log_every: int = option(
        1,
        "number of steps from one printed line to the next; the live view is updated in every step",
        unit="steps",
        at_least=1,
    )
    plain: bool = option(False, "print lines of text instead of the live view, even in a terminal")
    tensorboard: bool = option(False, "write TensorBoard event files to tensorboard/ in the output directory")
    wandb: str | None = option(
        None, "Weights & Biases project to which metrics are logged", if_none="not used", metavar="PROJECT"
    )
    trackio: str | None = option(
        None, "Trackio project to which metrics are logged", if_none="not used", metavar="PROJECT"
    )
    profile_steps: str | None = option(
        None,
        "first and last step, as A:B, of a torch.profiler trace that is written to trace.json in the output directory",
        if_none="no trace",
        metavar="A:B",
    )
    guard: Literal["off", "warn", "stop", "rollback"] = option(
        "warn",
        "what happens at signs of collapse: nothing (off), a warning (warn), a checkpoint and the end of the run with exit status 3 "
        "(stop), or a return to the best checkpoint (rollback)",
    )
    guard_rollbacks: int = option(
        1,
        "number of returns to the best checkpoint with --guard rollback, after which the guard stops the run",
        unit="rollbacks",
        at_least=0,
    )

    load_best: bool = option(
        False,
        "write the weights of the best evaluation to final/ at the end, if its accuracy is above that of the last one by more than two "
        "standard errors",
    )
    push_to_hub: str | None = option(
        None,
        "repository on the Hugging Face Hub, as OWNER/NAME, to which final/ is uploaded at the end; it is created as a private one if it "
        "does not exist",
        if_none="nothing is uploaded",
        metavar="OWNER/NAME",
    )

    def check(self) -> None:
        for name in ("wandb", "trackio"):
            if getattr(self, name) == "":
                raise ValueError(f"{name}: expected the name of a project, got ''")
        if self.push_to_hub is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", self.push_to_hub):
            raise ValueError(f"push_to_hub: expected OWNER/NAME, got {self.push_to_hub!r}")
