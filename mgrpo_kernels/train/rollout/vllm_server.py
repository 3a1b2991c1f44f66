"""Sampling by vLLM servers, here or on other machines. The trainer's model is the master: they get a copy for every rollout."""

from __future__ import annotations

import asyncio
import itertools
import socket
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import httpx
import torch
from torch import Tensor

from mgrpo_kernels.train.config import VllmConfig
from mgrpo_kernels.train.errors import UsageError
from mgrpo_kernels.train.model.policy import Policy
from mgrpo_kernels.train.rollout.vllm import NOT_FINITE, Completion, VllmEngine, import_vllm
from mgrpo_kernels.train.serve import EXTENSION, GLOO

POLL = 0.1
"""Seconds between two looks at whether the run is to end."""
QUICK = 30.0
"""Seconds for an answer that takes no work."""
ALL_NEW = httpx.Limits(max_connections=None, max_keepalive_connections=0)
"""A connection for each request: a server closes one that has idled, or seen an error, without a word."""
START = "python -m mgrpo_kernels.train.serve sets it"


class ServerError(RuntimeError):
    """A server could not be reached, or could not do what it was asked."""


class VllmServers(VllmEngine):
    """vLLM servers that divide the prompts among them; see :class:`mgrpo_kernels.train.rollout.vllm.VllmEngine`.

    A response has the same seed whichever server gives it, and however many there are. Before they sample, all of them get the weights
    of the model that is asked for, by vLLM's own weight transfer: over NCCL, or gloo where they have been started so, in one group with
    the trainer. Their prefix caches are emptied then.

    Args:
        policy: the model.
        max_tokens: longest response.
        max_prompt: longest prompt, in tokens.
        options: vLLM's share of the configuration.

    Raises:
        UsageError: a server that is not reached, was not started as it must be, has another model than the policy, or gives other
            log-probs than the trainer.
    """

    def __init__(self, policy: Policy, max_tokens: int, max_prompt: int, options: VllmConfig) -> None:
        self._remember(policy, max_tokens, max_prompt, options)
        assert options.vllm_servers is not None
        self._urls = options.server_urls
        version = import_vllm()
        self._control = Control(self._urls, self.timeout)
        try:
            states = [
                check_server(url, policy, version, self.max_prompt + max_tokens, self._control) for url in self._urls
            ]
            self._source = Source()
            self._untie, backend = states[0]
            if any(state != states[0] for state in states):
                kinds = ", ".join(f"{url} {state}" for url, state in zip(self._urls, states, strict=True))
                raise UsageError(
                    f"vllm_servers: expected servers that agree in (on a CPU, weight transfer), got {kinds}"
                )
            self._transfer = join_transfer(self._control, self._source, backend, policy)
        except (ServerError, RuntimeError) as error:  # of gloo, too
            raise UsageError(f"vllm_servers: expected servers that can be used, got {error}") from error
        self._check()

    def _send(self, weights: dict[str, Tensor]) -> None:
        self._source.weights = weights
        self._transfer.send_weights()
        self._source.weights = {}

    def _forget(self) -> None:
        for url, answer in zip(self._urls, self._control.all("reset_prefix_cache"), strict=True):
            if not answer["success"]:
                raise ServerError(f"{url}: the prefix cache was in use and kept")

    def _generate(
        self,
        prompts: Sequence[Sequence[int]],
        copies: int,
        seeds: Sequence[int],
        temperature: float,
        deadline: float,
    ) -> list[Completion]:
        """Return `copies` completions for each prompt; vLLM adds a copy's number to the seed of its prompt."""
        each = 1 if temperature == 0 else copies  # more are refused where all are alike
        requests = [
            {
                "prompt": list(prompt), "n": each, "seed": seed, "temperature": temperature, "max_tokens": self.max_tokens,
                "stop_token_ids": self.policy.eos, "ignore_eos": True,  # the trainer's list of ends is the only one
                "logprobs": 0, "return_token_ids": True, "return_tokens_as_token_ids": True,
                "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
            }
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]  # fmt: skip
        answers = asyncio.run(self._ask(requests, deadline))
        self._control.check_ours()
        return [completion for answer in answers for completion in answer * (copies // each)]

    async def _ask(self, requests: Sequence[dict[str, Any]], deadline: float) -> list[list[Completion]]:
        """Return every request's completions. Where one fails, or the run is to end, the others are given up, and vLLM with them."""
        # The time limit is `deadline`, of all together.
        async with httpx.AsyncClient(timeout=None, limits=ALL_NEW) as client:
            servers = itertools.cycle(self._urls)
            tasks = [asyncio.create_task(complete(client, next(servers), request)) for request in requests]
            waiting = set(tasks)
            try:
                while waiting:
                    self.check()
                    done, waiting = await asyncio.wait(waiting, timeout=POLL, return_when=asyncio.FIRST_EXCEPTION)
                    for task in done:
                        task.result()
                    if waiting and time.monotonic() > deadline:
                        raise TimeoutError(f"those to {len(tasks) - len(waiting)} of {len(tasks)} prompts")
            finally:
                for task in waiting:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        return [task.result() for task in tasks]


async def complete(client: httpx.AsyncClient, url: str, request: dict[str, Any]) -> list[Completion]:
    """Return the completions of one request."""
    try:
        answer = await client.post(f"{url}/v1/completions", json=request)
    except httpx.HTTPError as error:
        raise ServerError(f"{url}: {reason_of(error)}") from error
    if answer.is_error:
        reason = what_is_wrong(answer)
        if "not JSON compliant" in reason:  # NaN and inf are not
            raise FloatingPointError(NOT_FINITE)
        raise ServerError(f"{url}: {reason}")
    choices = sorted(answer.json()["choices"], key=lambda choice: choice["index"])
    return [Completion(choice["token_ids"], choice["logprobs"]["token_logprobs"]) for choice in choices]


def reason_of(error: httpx.HTTPError) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def what_is_wrong(answer: httpx.Response) -> str:
    """Return a server's own words, where it has some."""
    try:
        return f"{answer.status_code}: {answer.json()['error']['message']}"
    except (ValueError, KeyError, TypeError):
        return f"{answer.status_code}: {answer.text[:200]}"


class Control:
    """What all servers are told together: the four calls that vLLM's trainer-side weight transfer makes, and others.

    Args:
        urls: of the servers.
        timeout: seconds that an answer may take.
    """

    def __init__(self, urls: Sequence[str], timeout: float) -> None:
        self.urls, self.timeout = urls, timeout
        self.sizes: list[int] = []
        """Workers of each server."""
        self.version = ""
        """Of the weights that the servers have: no other trainer's have the same."""
        self._client = httpx.Client(limits=ALL_NEW)
        self._pool = ThreadPoolExecutor(len(urls))
        self._run, self._count = uuid.uuid4().hex, itertools.count()

    def one(self, url: str, path: str, body: Any = None, *, post: bool = True, timeout: float | None = None) -> Any:
        """Return a server's answer.

        Raises:
            ServerError: none, or an error.
        """
        try:
            answer = self._client.request(
                "POST" if post else "GET", f"{url}/{path}", json=body, timeout=timeout or self.timeout
            )
        except httpx.HTTPError as error:
            raise ServerError(f"{url}/{path}: {reason_of(error)}") from error
        if answer.is_error:
            raise ServerError(f"{url}/{path}: {what_is_wrong(answer)}")
        return answer.json()

    def all(self, path: str, bodies: Sequence[Any] | None = None, *, post: bool = True) -> list[Any]:
        """Return every server's answer; they are asked at the same time."""
        each = [None] * len(self.urls) if bodies is None else bodies
        return list(self._pool.map(lambda url, body: self.one(url, path, body, post=post), self.urls, each))

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Have every worker join the group: those of a server come after those of the servers before it."""
        offsets = itertools.accumulate(self.sizes[:-1], initial=init_info["rank_offset"])
        self.all("init_weight_transfer_engine", [{"init_info": {**init_info, "rank_offset": each}} for each in offsets])

    def claim(self) -> None:
        """Make the servers this trainer's."""
        self.version = self._next_version()
        self.all("update_weight_version", [{"new_version": self.version}] * len(self.urls))

    def check_ours(self) -> None:
        """Raise ServerError where another trainer has made a server its own, or a server is not the process that it was."""
        for url, answer in zip(self.urls, self.all("weight_info", post=False), strict=True):
            if answer["weight_version"] != self.version:
                raise ServerError(
                    f"{url}: expected a server for this run alone, got one that another has taken, or a new one"
                )

    def _next_version(self) -> str:
        return f"{self._run}-{next(self._count)}"

    def start_weight_update(self) -> None:
        """Make the models ready for new weights."""
        self.check_ours()
        self.all("start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        """Have the workers receive them; returns when they have."""
        self.all("update_weights", [{"update_info": update_info}] * len(self.urls))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Put them to use, under a version of their own."""
        self.version = weight_version or self._next_version()
        self.all("finish_weight_update", [{"weight_version": self.version}] * len(self.urls))


class Source:
    """The weights that are to be sent, as vLLM's trainer side reads them."""

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}

    def metadata(self) -> list[Any]:
        """Return each weight's name, dtype and shape."""
        from vllm.distributed.weight_transfer import ParamMeta

        return [ParamMeta(name, value.dtype, tuple(value.shape)) for name, value in self.weights.items()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self.weights.items())


def check_server(url: str, policy: Policy, version: str, longest: int, control: Control) -> tuple[bool, str]:
    """Return whether a server gets tied embeddings as two weights, and its weight transfer.

    Raises:
        UsageError: it was not started as the trainer needs it, or with another model.
        ServerError: it does not answer.
    """
    from mgrpo_kernels.train.rollout.vllm_worker import sizes_of

    def want(name: str, wanted: Any, got: Any, flag: str, *, met: bool | None = None) -> None:
        if not (got == wanted if met is None else met):
            raise UsageError(f"vllm_servers: expected {name} {wanted} of {url}, got {got}: {flag}")

    def get(path: str) -> Any:
        return control.one(url, path, post=False, timeout=QUICK)

    theirs = get("version")["version"]
    want("the trainer's vLLM", version, theirs, "install that version there, or here")
    try:
        server = get("server_info?config_format=json")["vllm_config"]
    except ServerError as error:
        raise UsageError(
            f"vllm_servers: expected VLLM_SERVER_DEV_MODE=1 in the environment of {url}, got {error}: {START}"
        ) from error
    model, transfer = server["model_config"], str((server["weight_transfer_config"] or {}).get("backend"))
    on_cpu, on_gpus = server["device_config"]["device"] == "cpu", policy.device.type == "cuda"
    want("--logprobs-mode", "processed_logprobs", model["logprobs_mode"], START)
    want("--generation-config", "vllm", model["generation_config"], START)
    want("--worker-extension-cls", EXTENSION, server["parallel_config"]["worker_extension_cls"] or "none", START)
    usable = ("nccl", GLOO) if on_gpus and not on_cpu else (GLOO,)
    want("--weight-transfer-config with backend", " or ".join(usable), transfer, START, met=transfer in usable)
    want("--dtype", str(policy.dtype).removeprefix("torch."), model["dtype"].removeprefix("torch."), "as the trainer's")
    if on_cpu:
        want("enable_chunked_prefill", False, server["scheduler_config"]["enable_chunked_prefill"], START)
    length = model["max_model_len"]
    want("--max-model-len", f"at least {longest}, prompt and response,", length, "start it so", met=length >= longest)
    own = sizes_of(policy.model.config.get_text_config())
    for theirs in control.one(url, "collective_rpc", {"method": "mgrpo_model"})["results"]:
        for name, value in own.items():
            if name == "tie_word_embeddings" and on_cpu:  # vLLM 0.32 does not pack a tied head again
                want(name, False, theirs.get(name), START)
            else:
                want(f"the policy's {name}", value, theirs.get(name, value), "start it with the policy's model")
    return on_cpu, transfer


def join_transfer(control: Control, source: Source, backend: str, policy: Policy) -> Any:
    """Return vLLM's trainer side of the weight transfer, which has met every worker."""
    from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    from mgrpo_kernels.train.rollout.vllm_worker import GlooTrainerInitInfo

    for url in control.urls:
        try:
            control.one(url, "shutdown_weight_transfer_engine")  # of a trainer that has gone
        except ServerError:
            control.one(url, "finish_weight_update")  # which it had begun
            control.one(url, "shutdown_weight_transfer_engine")
    control.sizes = [answer["world_size"] for answer in control.all("get_world_size", post=False)]
    if policy.device.type == "cuda":
        torch.cuda.set_device(policy.device)
    info = {GLOO: GlooTrainerInitInfo, "nccl": NCCLTrainerInitInfo}[backend]
    host, port = own_address(control.urls)
    rendezvous = info(master_address=host, master_port=port, world_size=1 + sum(control.sizes), rank=0)
    any_source: Any = source
    transfer = WeightTransferTrainerFactory.trainer_init(rendezvous, client=control, source=any_source)
    control.claim()
    return transfer


def own_address(urls: Sequence[str]) -> tuple[str, int]:
    """Return this machine's address as the servers see it, those on other machines above all, and a port that is free."""
    addresses = []
    for url in urls:
        parts = urlsplit(url)
        try:
            family, kind, _, _, there = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, kind) as probe:
                probe.connect(there)  # sends nothing: it picks the interface
                addresses.append(probe.getsockname()[0])
        except OSError as error:
            raise ServerError(f"{url}: {error}") from error
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    return next((each for each in addresses if not each.startswith("127.") and each != "::1"), addresses[0]), port
