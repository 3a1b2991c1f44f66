"""Control of vLLM servers: whether they were started as the trainer needs it, and the exchange of weights."""

from __future__ import annotations

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

from mgrpo_kernels.train.errors import UsageError
from mgrpo_kernels.train.model.policy import Policy
from mgrpo_kernels.train.rollout.vllm_answers import LARGEST, Answer, ServerError, field, headers, shown
from mgrpo_kernels.train.rollout.vllm_batch import ALL_NEW, reason_of
from mgrpo_kernels.train.serve import EXTENSION, GLOO

QUICK = 30.0
"""Seconds for an answer that takes no work."""
START = "python -m mgrpo_kernels.train.serve sets it"


class Control:
    """The calls that go to all servers at once: the four of vLLM's trainer-side weight transfer, and others.

    Args:
        urls: of the servers.
        timeout: seconds that an answer may take.
    """

    def __init__(self, urls: Sequence[str], timeout: float) -> None:
        self.urls, self.timeout = list(urls), timeout
        self.sizes: list[int] = []
        """Workers of each server."""
        self.version = ""
        """Of the weights that the servers have: no other trainer's have the same."""
        self._client = httpx.Client(limits=ALL_NEW, headers=headers())
        self._pool = ThreadPoolExecutor(len(urls))
        self._run, self._count = uuid.uuid4().hex, itertools.count()

    def one(self, url: str, path: str, body: Any = None, *, post: bool = True, timeout: float | None = None) -> Any:
        """Return a server's answer.

        Raises:
            ServerError: none, an error, or none that can be read.
        """
        seconds = timeout or self.timeout
        answer = Answer(f"{url}/{path}", LARGEST, time.monotonic() + seconds)
        try:
            with self._client.stream(
                "POST" if post else "GET", f"{url}/{path}", json=body, timeout=seconds
            ) as response:
                for part in response.iter_raw():
                    answer.add(part)
        except httpx.HTTPError as error:
            raise ServerError(f"{url}/{path}: {reason_of(error)}") from error
        return answer.read(response.status_code, response.headers)

    def all(
        self, path: str, bodies: Sequence[Any] | None = None, *, post: bool = True, timeout: float | None = None
    ) -> list[Any]:
        """Return every server's answer; they are asked at the same time."""
        each = [None] * len(self.urls) if bodies is None else bodies
        return list(
            self._pool.map(lambda url, body: self.one(url, path, body, post=post, timeout=timeout), self.urls, each)
        )

    def silent(self) -> dict[str, str]:
        """Return the servers that do not answer a question that takes no work, and the reason for each."""

        def reason(url: str) -> str | None:
            try:
                self.one(url, "weight_info", post=False, timeout=QUICK)
            except ServerError as error:
                return str(error)
            return None

        reasons = zip(self.urls, self._pool.map(reason, self.urls), strict=True)
        return {url: found for url, found in reasons if found is not None}

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
        for url, answer in zip(self.urls, self.all("weight_info", post=False, timeout=QUICK), strict=True):
            if answer.get("weight_version") != self.version:
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

    theirs = field(url, get("version"), "version", kind=str)
    want("the trainer's vLLM", version, shown(theirs), "install that version there, or here")
    try:
        server = field(url, get("server_info?config_format=json"), "vllm_config", kind=dict)
    except ServerError as error:
        raise UsageError(
            f"vllm_servers: expected VLLM_SERVER_DEV_MODE=1 in the environment of {url}, got {error}: {START}"
        ) from error

    def setting(*names: str, kind: Any) -> Any:
        value = field(url, server, *names, kind=kind)
        return shown(value) if isinstance(value, str) else value

    transfer = str((server.get("weight_transfer_config") or {}).get("backend"))
    on_cpu, on_gpus = setting("device_config", "device", kind=str) == "cpu", policy.device.type == "cuda"
    want("--logprobs-mode", "processed_logprobs", setting("model_config", "logprobs_mode", kind=str), START)
    want("--generation-config", "vllm", setting("model_config", "generation_config", kind=str), START)
    extension = setting("parallel_config", "worker_extension_cls", kind=(str, type(None)))
    want("--worker-extension-cls", EXTENSION, extension or "none", START)
    usable = ("nccl", GLOO) if on_gpus and not on_cpu else (GLOO,)
    want("--weight-transfer-config with backend", " or ".join(usable), transfer, START, met=transfer in usable)
    dtype = setting("model_config", "dtype", kind=str).removeprefix("torch.")
    want("--dtype", str(policy.dtype).removeprefix("torch."), dtype, "as the trainer's")
    if on_cpu:
        want("enable_chunked_prefill", False, setting("scheduler_config", "enable_chunked_prefill", kind=bool), START)
    length = setting("model_config", "max_model_len", kind=int)
    want("--max-model-len", f"at least {longest}, prompt and response,", length, "start it so", met=length >= longest)
    own = sizes_of(policy.model.config.get_text_config()) | {"head_dtype": "float32"}
    for theirs in field(url, control.one(url, "collective_rpc", {"method": "mgrpo_model"}), "results", kind=list):
        if not isinstance(theirs, dict):
            raise ServerError(f"{url}: expected the sizes of a model, got {shown(repr(theirs))}")
        for name, value in own.items():
            if name == "tie_word_embeddings" and on_cpu:  # vLLM 0.32 does not pack a tied head again
                want(name, False, theirs.get(name), START)
            elif name == "head_dtype":
                want("--hf-overrides with head_dtype", value, theirs.get(name), START)
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
            control.one(url, "shutdown_weight_transfer_engine")  # of a trainer that has ended
        except ServerError:
            control.one(url, "finish_weight_update")  # which it had begun
            control.one(url, "shutdown_weight_transfer_engine")
    sizes = control.all("get_world_size", post=False, timeout=QUICK)
    control.sizes = [
        field(url, answer, "world_size", kind=int) for url, answer in zip(control.urls, sizes, strict=True)
    ]
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
                probe.connect(there)  # picks the interface, and sends no packet
                addresses.append(probe.getsockname()[0])
        except OSError as error:
            raise ServerError(f"{url}: {error}") from error
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    return next((each for each in addresses if not each.startswith("127.") and each != "::1"), addresses[0]), port
