"""Tokens a second of the trainer's own rollouts, of transformers' `generate` and of vLLM, on one model and the same prompts.

python benchmarks/rollout_engines.py "$(python scripts/real_model.py)" [--rounds 5] [--out benchmarks/results/rollout-engines.json]

The three take turns, so that a slow minute of the machine falls on all of them, and wait before each turn: vLLM's worker asks for work
without a pause for a second after its last. On a CPU vLLM gets all cores as the others do; left to itself it keeps one free. All run with
an allocator that keeps freed memory, as vLLM's documentation advises, where jemalloc is installed. Ours also returns log-probs, as training
needs them; all responses have the same length, so that the number of tokens is the same.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import machine
import torch
from transformers import AutoModelForCausalLM

from mgrpo_kernels.train.config import LoraConfig
from mgrpo_kernels.train.model.policy import Policy, load_policy
from mgrpo_kernels.train.rollout.transformers import TransformersEngine
from mgrpo_kernels.train.watch.report import environment

VLLM_MEMORY = 0.4
"""Share of the device's memory for vLLM, which on a CPU too refuses to start where less is free."""
REST = 2.0
"""Seconds before each turn."""
QUESTION = "Question: a farmer has {} rows of {} trees. How many trees are there? Think step by step.\nAnswer:"


def engines(
    model: str, policy: Policy, prompts: list[list[int]], copies: int, tokens: int
) -> dict[str, Callable[[], int]]:
    """Return for each engine a call that generates, and returns how many tokens it has generated. `policy` is the model, for ours."""
    device = policy.device
    policy.eos = (-1,)  # nothing ends early
    ours = TransformersEngine(policy, tokens, 10**6)
    generator = torch.Generator().manual_seed(0)
    peer = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).to(device).eval()
    width = max(map(len, prompts))
    padded = torch.tensor([[0] * (width - len(each)) + each for each in prompts], device=device)
    attended = torch.tensor([[0] * (width - len(each)) + [1] * len(each) for each in prompts], device=device)

    def generate() -> int:
        found = peer.generate(
            padded,
            attention_mask=attended,
            do_sample=True,
            top_k=0,
            num_return_sequences=copies,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            pad_token_id=0,
        )
        return found[:, width:].numel()

    calls = {
        "ours": lambda: int(ours.sample(prompts, copies, temperature=1.0, generator=generator).mask.sum()),
        "transformers": generate,
    }
    if importlib.util.find_spec("vllm"):
        cores = sorted(os.sched_getaffinity(0))
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores)))  # read when vLLM is imported
        import vllm

        engine = vllm.LLM(
            model,
            dtype="float32",
            max_model_len=width + tokens,
            enforce_eager=device.type == "cpu",
            gpu_memory_utilization=VLLM_MEMORY,
        )
        options = vllm.SamplingParams(n=copies, temperature=1.0, ignore_eos=True, max_tokens=tokens, logprobs=0)
        given = [{"prompt_token_ids": each} for each in prompts]

        def vllm_generate() -> int:
            found = engine.generate(given, options, use_tqdm=False)
            return sum(len(each.token_ids) for request in found for each in request.outputs)

        calls["vLLM"] = vllm_generate
    return calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--rollouts", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON file of the result")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    allocator = Path(os.environ.get("LD_PRELOAD") or "the C library's").name  # before vLLM adds its own libraries
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    policy = load_policy(options.model, device, torch.float32, LoraConfig(), 0)
    prompts = policy.encode([QUESTION.format(i + 2, i + 5) for i in range(options.prompts)])
    calls = engines(options.model, policy, prompts, options.rollouts, options.tokens)
    rates: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(options.rounds + 1):
        for name, call in calls.items():
            time.sleep(REST)
            begin = time.perf_counter()
            tokens = call()
            if turn:  # the first is not timed
                rates[name].append(tokens / (time.perf_counter() - begin))
    result = {
        name: {
            "tokens_per_second": statistics.median(each),
            "ours_over_it": statistics.median(ours / peer for ours, peer in zip(rates["ours"], each, strict=True)),
        }
        for name, each in rates.items()
    }
    for name, found in result.items():
        print(
            f"{name}: {found['tokens_per_second']:.0f} tokens a second; ours is {found['ours_over_it']:.2f} times as fast"
        )
    if options.out:
        written = {
            "environment": environment(device) | machine.stamp(),
            "allocator": allocator,
            "load_average": load,
            "model": Path(options.model).name,
            "shape": {name: vars(options)[name] for name in ("prompts", "rollouts", "tokens", "rounds")},
            "engines": result,
        }
        options.out.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    kept = machine.keeping_memory()
    if any(os.environ.get(name) != value for name, value in kept.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **kept})
    main()
