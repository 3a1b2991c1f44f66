"""Starting vLLM in this process."""

from __future__ import annotations

import copy
import os
import tempfile
import warnings
from typing import Any

import torch

from mgrpo_kernels.train.config import VllmConfig
from mgrpo_kernels.train.errors import UsageError
from mgrpo_kernels.train.extras import how_to_install
from mgrpo_kernels.train.model.policy import Policy
from mgrpo_kernels.train.rollout.truncation import MOST_KEPT

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in this process: weights are handed over as tensors
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the threads are the trainer's, too
    "VLLM_NO_USAGE_STATS": "1",
}


def start(policy: Policy, max_length: int, sleeps: bool, options: VllmConfig) -> Any:
    """Return vLLM's engine for the policy's configuration, its weights not yet the policy's.

    Raises:
        UsageError: it does not start.
    """
    os.environ.update(ENVIRONMENT)
    version = import_vllm()
    from vllm import LLM

    on_cpu = policy.device.type == "cpu"
    cache_gib = 1.0 if on_cpu and options.vllm_cache_gib is None else options.vllm_cache_gib
    model_config = copy.deepcopy(policy.model.config)
    model_config.architectures = [type(policy.model).__name__]
    model_config.head_dtype = "float32"  # as the trainer's logits
    if unties(policy):
        model_config.tie_word_embeddings = False
    dtype: Any = str(policy.dtype).removeprefix("torch.")
    set_num_threads = torch.set_num_threads
    try:
        with tempfile.TemporaryDirectory() as directory:
            model_config.save_pretrained(directory)
            return LLM(
                directory,
                load_format="dummy",
                skip_tokenizer_init=True,
                generation_config="vllm",  # not the model's own top-p
                dtype=dtype,
                logprobs_mode="processed_logprobs",
                max_logprobs=MOST_KEPT,
                max_model_len=max_length,
                enforce_eager=on_cpu if options.vllm_eager is None else options.vllm_eager,
                enable_sleep_mode=sleeps,
                gpu_memory_utilization=options.vllm_memory,
                # For a CPU's prompts that are prefilled in parts it would turn back the generator of a seed, which a CPU's cannot (0.32).
                enable_chunked_prefill=False if on_cpu else None,
                kv_cache_memory_bytes=None if cache_gib is None else int(cache_gib * 2**30),
            )
    except Exception as error:
        raise UsageError(
            f"engine: expected a model and memory with which vLLM {version} starts, got {name_of(policy)} and "
            f"{type(error).__name__}: {error}"
        ) from error
    finally:
        torch.set_num_threads = set_num_threads  # vLLM's CPU worker replaces it by a function without effect


def import_vllm() -> str:
    """Import vLLM and return its version.

    Raises:
        UsageError: there is none.
    """
    # What matters is raised, and the rest hides the trainer's lines.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")
    try:
        from vllm import __version__
    except ImportError as error:
        raise UsageError(
            f"engine: expected the package vllm, got none that can be imported ({error}): {how_to_install('vllm')}"
        ) from error
    return __version__


def name_of(policy: Policy) -> str:
    return type(policy.model).__name__


def unties(policy: Policy) -> bool:
    """Return whether vLLM gets tied embeddings as two weights.

    On a CPU, vLLM 0.32 packs the head's weight separately, and does not pack it again when the embedding that it is tied to changes.
    """
    return policy.device.type == "cpu"
