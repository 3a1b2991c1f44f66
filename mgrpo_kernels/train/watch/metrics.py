"""metrics.jsonl and samples.jsonl: one line per step without NaN, and the meaning of every key."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

KEYS = {
    "step": "number of the optimizer step, counted from 1; 0 is the evaluation before the first step",
    "loss": "loss of the step's batch, computed before the weights change",
    "gradient_share": "fraction of the trained rollouts that have a gradient; without KL penalty and entropy bonus the others, whose "
    "advantage is 0, do not pass through the model",
    "grad_norm": "L2 norm of the gradient, before it is scaled down to --max-grad-norm",
    "learning_rate": "learning rate of the step",
    "skipped_steps": "number of steps skipped so far in the run because their loss or gradient was not finite",
    "reward_mean": "mean reward of the rollouts that train",
    "training_fraction": "fraction of the rollouts that train",
    "groups_with_signal": "fraction of the prompts for which at least one advantage is not 0",
    "unparsed_fraction": "fraction of the responses in which no answer was found",
    "truncated_fraction": "fraction of the responses that were cut at the length limit",
    "distinct_answers": "number of different answers to a prompt, averaged over the prompts that have any",
    "vote_share": "fraction of the voters with an answer that gave the winning answer, averaged over the prompts",
    "vote_share_of_all": "fraction of all voters, including those without an answer, that gave the winning answer, averaged over the "
    "prompts",
    "labelled_fraction": "fraction of the prompts that got a label",
    "gold_fraction": "fraction of the prompts whose rollouts were rewarded by the true answer",
    "token_weight": "mean factor of the advantage over the tokens of a rollout that trains; below 1 where the method or --answer-weight "
    "weights tokens",
    "label_accuracy": "fraction of the labels that equal the true answer, among prompts with a known answer",
    "distinct_labels": "number of distinct labels divided by the number of distinct prompts",
    "top_answer_share": "fraction of all answers of the step that equal the most frequent one",
    "pruned_fraction": "fraction of the rollouts that the IQR filter pruned",
    "entropy": "mean token entropy of the policy's rollouts, in nats",
    "kl": "mean KL divergence from the reference model per trained token, in nats",
    "kl_answer": "mean KL divergence from the reference model per token of an answer, in nats, over at most 32 trained rollouts of a rank "
    "whose text contains their answer",
    "kl_reasoning": "mean KL divergence from the reference model per token before or after the answer, in nats, over the same rollouts",
    "clip_fraction": "fraction of the trained tokens whose importance ratio was clipped",
    "masked_fraction": "of the tokens of rollouts that have a gradient, the fraction whose policy loss an off-policy mask set to 0",
    "behaviour_mismatch": "mean absolute difference between the log-probabilities of the trainer and of the rollout engine, in nats per "
    "token; measured on the first micro-batch if the engine's own statistics are used",
    "momentum_distance": "||policy - momentum model|| / ||policy||, L2 norms of all trained weights, after the step",
    "teacher_agreement": "fraction of the prompts for which the most frequent answers of policy and momentum model are the same, "
    "among prompts to which both have an answer; null without rollouts of the momentum model",
    "teacher_vote_share": "fraction of the voters that are rollouts of the momentum model; null without such rollouts",
    "teacher_refreshes": "number of times that the momentum model has copied the policy so far; null with --teacher ema",
    "teacher_age": "number of steps since the momentum model last changed",
    "teacher_gate": "signs that keep the momentum model from a copy that is due with --teacher gated, with their values; null if none do",
    "response_tokens": "mean length of a response, in tokens",
    "tokens_per_second": "response tokens generated in the step, divided by the duration of the step in seconds",
    "peak_memory_bytes": "largest memory use so far in bytes: memory allocated on the GPU, or the process's resident memory without a GPU",
    "time_rollout": "time spent generating the responses, in seconds",
    "time_score": "time spent computing log-probabilities and entropies, in seconds; if the rollout engine returns them, only those of the "
    "reference model are computed",
    "time_vote": "time spent on the filter, the vote and the advantages, in seconds",
    "time_update": "time spent on the forward and backward passes and the optimizer, in seconds",
    "time_ema": "time spent updating the momentum model, in seconds",
    "time_sync": "time spent copying weights to the rollout engine, in seconds; null if the engine uses the model's own weights",
    "guard": "action of the collapse guard after the step: warn, stop or rollback; null if it found no new signs",
    "guard_signs": "signs of collapse that caused the guard's action, with their values; null without an action",
    "eval_accuracy": "avg@k: fraction of the sampled responses to held-out prompts that are correct",
    "eval_greedy": "fraction of the greedy responses to held-out prompts that are correct",
    "eval_pass_at_k": "pass@k: unbiased estimate of the probability that at least one of k sampled responses is correct",
    "eval_maj_at_k": "maj@k: fraction of the held-out prompts whose most frequent sampled answer is correct",
}
ACCURACIES = tuple(key for key in KEYS if key.startswith("eval_"))
KEYS |= {f"{key}_error": f"standard error of {key} over the held-out prompts" for key in ACCURACIES}
for _key in ACCURACIES:
    KEYS[f"{_key}_change"] = (
        f"{_key} minus that of the evaluation before the first step, on the same prompts with the same random numbers"
    )
    KEYS[f"{_key}_change_error"] = f"standard error of {_key}_change, from the differences prompt by prompt"
KEYS["eval_best_step"] = (
    "step of the evaluation with the highest eval_accuracy so far; null if this is not above the present one by more than two standard "
    "errors of the paired difference"
)
EVALUATION = tuple(key for key in KEYS if key.startswith("eval_"))
VARYING = tuple(key for key in KEYS if key.startswith("time_")) + ("tokens_per_second", "peak_memory_bytes")
"""Keys whose values differ between two otherwise identical runs."""


def metrics_line(values: Mapping[str, Any], evaluation: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a line with every key, in order; the keys of the evaluation only if there was one."""
    unknown = values.keys() - KEYS.keys()
    assert not unknown, f"metrics: {unknown} are not in KEYS"
    line = {key: values.get(key) for key in KEYS if key not in EVALUATION}
    if evaluation is None:
        return line
    # Of held-out sets with names, each key has a slash and the name behind it.
    of_sets = {key: value for key, value in evaluation.items() if "/" in key}
    return {**line, **{key: evaluation.get(key) for key in EVALUATION}, **of_sets}


def plain(value: Any) -> Any:
    """Return a value that JSON can represent: NaN and infinity become None."""
    if isinstance(value, torch.Tensor):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Clock:
    """Measures durations by name. On a GPU, it waits for the device, so that work counts where it was launched."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self._start = self._now()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # copies on other streams may continue
        return time.perf_counter()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = self._now()
        yield
        self.seconds[f"time_{name}"] = self.seconds.get(f"time_{name}", 0.0) + self._now() - start

    def metrics(self, tokens: int) -> dict[str, Any]:
        """Return the durations, the peak memory, and the rate of a step that generated `tokens` tokens."""
        rate = tokens / (self._now() - self._start)
        return {"tokens_per_second": rate, "peak_memory_bytes": peak_memory_bytes(self.device), **self.seconds}


def peak_memory_bytes(device: torch.device) -> int:
    """Return the largest memory use so far: the GPU's allocations, or the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # ru_maxrss is in kilobytes, except on macOS, where it is in bytes.
    return peak if sys.platform == "darwin" else peak * 1024
