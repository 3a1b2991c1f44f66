"""Sampling by vLLM servers, here or on other machines. The trainer's model is the master: they get a copy for every rollout."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mgrpo_kernels import MomentumModel
from mgrpo_kernels.train.config import VllmConfig
from mgrpo_kernels.train.errors import UsageError
from mgrpo_kernels.train.model.policy import Policy
from mgrpo_kernels.train.rollout.truncation import Truncation
from mgrpo_kernels.train.rollout.vllm import Completion, VllmEngine
from mgrpo_kernels.train.rollout.vllm_answers import Asked, ServerError, field
from mgrpo_kernels.train.rollout.vllm_batch import Batch
from mgrpo_kernels.train.rollout.vllm_control import Control, Source, check_server, join_transfer
from mgrpo_kernels.train.rollout.vllm_start import import_vllm
from mgrpo_kernels.train.text import one_line

logger = logging.getLogger("mgrpo_kernels")


class VllmServers(VllmEngine):
    """vLLM servers that divide the prompts among them; see :class:`mgrpo_kernels.train.rollout.vllm.VllmEngine`.

    A response has the same seed whichever server gives it, and however many there are. Before they sample, all of them get the weights
    of the model that is asked for, by vLLM's own weight transfer: over NCCL, or gloo where they have been started so, in one group with
    the trainer. Their prefix caches are emptied then.

    A server that fails or hangs is left out from then on, with a warning, and the others take its prompts. The run ends when none is
    left.

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
        urls = options.server_urls
        version = import_vllm()
        self._control = Control(urls, self.timeout)
        self._lost: dict[str, str] = {}  # servers that are left out, and why
        try:
            states = [check_server(url, policy, version, self.max_prompt + max_tokens, self._control) for url in urls]
            self._source = Source()
            self._untie, self._backend = states[0]
            if any(state != states[0] for state in states):
                kinds = ", ".join(f"{url} {state}" for url, state in zip(urls, states, strict=True))
                raise UsageError(
                    f"vllm_servers: expected servers that agree in (on a CPU, weight transfer), got {kinds}"
                )
            self._transfer: Any = join_transfer(self._control, self._source, self._backend, policy)
        except (ServerError, RuntimeError) as error:  # of gloo, too
            raise UsageError(f"vllm_servers: expected servers that can be used, got {error}") from error
        self._check()

    @property
    def _urls(self) -> list[str]:
        """The servers that are used."""
        return self._control.urls

    def _lose(self, url: str, reason: str) -> None:
        """Use a server no more.

        Raises:
            ServerError: none is left.
        """
        self._lost[url] = reason
        self._urls.remove(url)
        self._transfer = None  # its group has a member that is gone
        if not self._urls:
            raise ServerError("; ".join(self._lost.values()) + ": no server is left")
        logger.warning("%s. It is used no more; %s remain", reason, ", ".join(self._urls))

    def _synchronize(self, momentum: MomentumModel | None) -> None:
        """Copy the weights to every server; where one does not answer, to the others, in a new group."""
        while True:
            try:
                if self._transfer is None:
                    self._transfer = join_transfer(self._control, self._source, self._backend, self.policy)
                super()._synchronize(momentum)
                return
            except RuntimeError as error:  # ServerError, and gloo's
                silent = self._control.silent()
                if not silent:
                    raise
                for url, reason in silent.items():
                    self._lose(url, f"{reason} (after {one_line(str(error))})")

    def _send(self, weights: dict[str, Tensor]) -> None:
        self._source.weights = weights
        self._transfer.send_weights()
        self._source.weights = {}

    def _forget(self) -> None:
        for url, answer in zip(self._urls, self._control.all("reset_prefix_cache"), strict=True):
            if not field(url, answer, "success", kind=bool):
                raise ServerError(f"{url}: the prefix cache was in use and kept")

    def _generate(
        self,
        prompts: Sequence[Sequence[int]],
        copies: int,
        seeds: Sequence[int],
        temperature: float,
        deadline: float,
        truncation: Truncation,
    ) -> list[Completion]:
        """Return `copies` completions for each prompt; vLLM adds a copy's number to the seed of its prompt."""
        assert not truncation.active, "the configuration refuses it"
        each = 1 if temperature == 0 else copies  # more are refused where all are alike
        requests = [
            {
                "prompt": list(prompt),
                "n": each,
                "seed": seed,
                "temperature": temperature,
                "max_tokens": self.max_tokens,
                "stop_token_ids": self.policy.eos,
                "ignore_eos": True,  # the trainer's list of ends is the only one
                "logprobs": 0,
                "return_token_ids": True,
                "return_tokens_as_token_ids": True,
                "top_p": 1.0,
                "top_k": 0,
                "min_p": 0.0,
                "repetition_penalty": 1.0,
                "presence_penalty": 0.0,
                "frequency_penalty": 0.0,
            }
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        asked = Asked(each, self.max_tokens, self.policy.head()[0].shape[0], self.policy.eos)
        batch = Batch(requests, asked, self._urls, self._lose, self.check, deadline)
        answers = asyncio.run(batch.run())
        self._control.check_ours()
        return [completion for answer in answers for completion in answer * (copies // each)]
