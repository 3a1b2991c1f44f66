"""A process of its own for test_trl_mgrpo.py: MGRPOTrainer with vLLM in TRL's colocate mode, on a CPU.

All of it is the installed packages but for three places that TRL has for GPUs only: the name of vLLM's package, options of its engine, and the
push of the weights, for which TRL calls the model's `load_weights`: the CPU build has repacked those layers, and wants `reload_weights`.
Prints, as JSON, how far vLLM's log-probs of what it sampled lie from transformers' under the model that should have sampled it.
"""

# ruff: noqa: E402 - TRL asks for vLLM's version when it is imported

import importlib.metadata
import json
import os
import sys
from pathlib import Path

from mgrpo_kernels.train.rollout.vllm_start import ENVIRONMENT

os.environ |= {**ENVIRONMENT, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
version = importlib.metadata.version
importlib.metadata.version = lambda name: version("vllm-cpu") + "+cpu" if name == "vllm" else version(name)

import tiny_trl
import torch
from test_trl_mgrpo import G, N, P, examples, first_digit, shake, trainer_of
from trl.generation import vllm_generation


def small_engine(*args, **options):
    return engine(*args, **options, enforce_eager=True, enable_chunked_prefill=False, dtype="float32")


def push(self):
    weights = ((name, parameter.detach().clone()) for name, parameter in self.model.named_parameters())
    self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
    self.llm.reset_prefix_cache()


engine, vllm_generation.LLM = vllm_generation.LLM, small_engine
vllm_generation.VLLMGeneration.sync_weights = push
TEMPERATURE = 1.1


def scored(trainer, prompt, response):
    """Return transformers' log-probs of a response under the weights that the trainer's model now has."""
    ids = torch.tensor([prompt + response])
    with torch.no_grad():
        logits = trainer.model(ids).logits[0, len(prompt) - 1 : -1] / TEMPERATURE
    return torch.log_softmax(logits, -1).gather(1, ids[0, len(prompt) :, None]).squeeze(1)


base, place = sys.argv[1:]
trainer = trainer_of(
    base,
    Path(place),
    use_vllm=True,
    vllm_mode="colocate",
    vllm_max_model_length=32,
    temperature=TEMPERATURE,
    extract=first_digit,
)
shake(trainer.momentum)
before = tiny_trl.weights(trainer.model)
far = {"own": [], "other": []}


def check():
    """Sample as a step does; every row's log-probs must be those of its sampler, and not those of the other model."""
    trainer.model.train()
    prompts = [trainer.processing_class(each["prompt"])["input_ids"] for each in examples(trainer)]
    responses, said = trainer._generate_single_turn(prompts, None, {}, G)
    momentum = trainer.by_momentum(P * G)
    assert momentum.sum() == P * N
    trainer.model.eval()

    def under(name, rows):
        for row in rows.nonzero().flatten().tolist():
            far[name].append(
                (torch.tensor(said[row]) - scored(trainer, prompts[row], responses[row])).abs().max().item()
            )

    under("own", ~momentum)
    under("other", momentum)
    with trainer.momentum.swapped_into(trainer._trained):
        under("own", momentum)
        under("other", ~momentum)


check()
assert all(torch.equal(value, before[name]) for name, value in tiny_trl.weights(trainer.model).items())
trainer.train()
moved = max((value - before[name]).abs().max().item() for name, value in tiny_trl.weights(trainer.model).items())
check()
print(
    json.dumps(
        {
            "own": max(far["own"]),
            "other": min(far["other"]),
            "rows": len(far["own"]),
            "moved": moved,
            "gradients": [line["grad_norm"] for line in trainer.state.log_history if "grad_norm" in line],
        }
    )
)
