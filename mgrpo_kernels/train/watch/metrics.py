"""metrics.jsonl and samples.jsonl: a line a step, never NaN, and what their keys mean."""

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
    "step": "optimizer steps so far",
    "loss": "of the step, before it",
    "grad_norm": "L2 norm of the gradient, before it is scaled down",
    "learning_rate": "of the step",
    "skipped_steps": "steps of the run so far that were skipped, since their loss or gradient was not finite",
    "reward_mean": "mean reward of the rollouts that train",
    "training_fraction": "share of the rollouts that train",
    "vote_share": "mean share of the winning answer among the voters",
    "labelled_fraction": "share of the prompts' groups that got a label",
    "label_accuracy": "share of the labels that equal the true answer, where that is known",
    "distinct_labels": "distinct labels per distinct prompt",
    "top_answer_share": "share of the step's most frequent answer among all its answers",
    "pruned_fraction": "share of the rollouts that the filter pruned",
    "entropy": "mean token entropy of the policy's rollouts, nats",
    "kl": "mean KL term per trained token, against the reference, nats",
    "clip_fraction": "share of the trained tokens whose ratio was clipped",
    "behaviour_mismatch": "mean |log-prob of the trainer - log-prob of the sampler| per token of the first micro-batch that trains, nats",
    "momentum_distance": "||policy - momentum model|| / ||policy||, after the step",
    "response_tokens": "mean length of a response, tokens",
    "tokens_per_second": "response tokens of the step per second of it",
    "peak_memory_bytes": "most memory held so far: of the GPU where there is one, else of the process",
    "time_rollout": "seconds of sampling",
    "time_score": "seconds of scoring: of the reference alone where the sampler tells its statistics with the tokens",
    "time_vote": "seconds of filter, vote and advantages",
    "time_update": "seconds of the forward and backward passes and the optimizer",
    "time_ema": "seconds of the momentum update",
    "time_sync": "seconds of bringing weights to the sampler; null where it samples from the model in place",
    "guard": "what the collapse guard did after the step: warn, stop or rollback; null: nothing",
    "guard_signs": "the signs of collapse that made it, with their figures",
    "eval_accuracy": "avg@k: mean accuracy of k samples a held-out prompt",
    "eval_greedy": "accuracy of the greedy answer",
    "eval_pass_at_k": "unbiased estimate that one of k samples is right",
    "eval_maj_at_k": "accuracy of the samples' majority",
}
EVALUATION = tuple(key for key in KEYS if key.startswith("eval_"))
VARYING = tuple(key for key in KEYS if key.startswith("time_")) + ("tokens_per_second", "peak_memory_bytes")
"""What differs between two runs of the same bits."""


def metrics_line(values: Mapping[str, Any], evaluation: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a line with every key in its order; the evaluation's keys only where there was one."""
    unknown = values.keys() - KEYS.keys()
    assert not unknown, f"metrics: {unknown} are not in KEYS"
    line = {key: values.get(key) for key in KEYS if key not in EVALUATION}
    return line if evaluation is None else {**line, **{key: evaluation[key] for key in EVALUATION}}


def plain(value: Any) -> Any:
    """Return a value that JSON has: NaN and infinity become None."""
    if isinstance(value, torch.Tensor):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Clock:
    """Seconds by name. On a GPU the device's work counts for where it was asked for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self._start = self._now()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # copies on streams of their own go on
        return time.perf_counter()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = self._now()
        yield
        self.seconds[f"time_{name}"] = self.seconds.get(f"time_{name}", 0.0) + self._now() - start

    def metrics(self, tokens: int) -> dict[str, Any]:
        """Return what a step took, in which `tokens` were sampled."""
        rate = tokens / (self._now() - self._start)
        return {"tokens_per_second": rate, "peak_memory_bytes": peak_memory_bytes(self.device), **self.seconds}


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory held so far: the GPU's allocations, or the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # kilobytes, but on macOS bytes
    return peak if sys.platform == "darwin" else peak * 1024
