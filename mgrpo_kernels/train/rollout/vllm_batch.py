"""Completions from several servers: who is asked for what, and what happens when a server fails or hangs."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import httpx

from mgrpo_kernels.train.rollout.vllm import Completion
from mgrpo_kernels.train.rollout.vllm_answers import Answer, Asked, ServerError, completions, headers, shown

POLL = 0.1
"""Seconds between two checks of whether the run is to end."""
SLOWEST = 10.0
"""Seconds that a server may at least take longer than the others before its prompts are given to them too."""
ALL_NEW = httpx.Limits(max_connections=None, max_keepalive_connections=0)
"""A connection for each request: a server closes one that has idled, or seen an error, without a word."""


class Batch:
    """Requests for completions that are divided among servers.

    Args:
        requests: one for each prompt.
        asked: what each of them asks for.
        urls: of the servers; `lose` removes one.
        lose: called with a server that failed or hangs, and why; raises if none is left.
        check: called often; may raise, and ends the batch.
        deadline: the value of time.monotonic() at which all must be done.
    """

    def __init__(
        self,
        requests: Sequence[dict[str, Any]],
        asked: Asked,
        urls: Sequence[str],
        lose: Callable[[str, str], None],
        check: Callable[[], None],
        deadline: float,
    ) -> None:
        self.requests, self.asked, self.urls, self.lose, self.check = requests, asked, urls, lose, check
        self.deadline = deadline
        self._answers: dict[int, list[Completion]] = {}  # by the request's number
        self._tasks: dict[asyncio.Task[list[Completion]], tuple[int, str]] = {}  # which request, to which server
        self._helping: set[asyncio.Task[list[Completion]]] = set()  # those that repeat what a slow server was asked
        self._start = time.monotonic()
        self._idle_since: float | None = None  # since when a server has had no request

    async def run(self) -> list[list[Completion]]:
        """Return every request's completions. Where the run is to end, or no server is left, the others are given up."""
        async with httpx.AsyncClient(timeout=None, limits=ALL_NEW, headers=headers()) as client:
            try:
                self._send(client, range(len(self.requests)), self.urls)
                while len(self._answers) < len(self.requests):
                    self.check()
                    done, _ = await asyncio.wait(self._tasks, timeout=POLL, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        self._take(client, task)
                    self._help_the_slow(client)
                    if len(self._answers) < len(self.requests) and time.monotonic() > self.deadline:
                        raise TimeoutError(f"those to {len(self._answers)} of {len(self.requests)} prompts")
            finally:
                await self._give_up(list(self._tasks))
        return [self._answers[number] for number in range(len(self.requests))]

    def _send(self, client: httpx.AsyncClient, numbers: Iterable[int], urls: Sequence[str]) -> None:
        for number, url in zip(numbers, itertools.cycle(urls), strict=False):
            call = complete(client, url, self.requests[number], self.asked, self.deadline)
            self._tasks[asyncio.create_task(call)] = (number, url)

    def _take(self, client: httpx.AsyncClient, task: asyncio.Task[list[Completion]]) -> None:
        """Keep a request's answer, or give all requests of a server that failed to the others."""
        if task not in self._tasks:  # it has been given up
            return
        number, url = self._tasks.pop(task)
        try:
            self._answers.setdefault(number, task.result())
        except ServerError as error:
            self._leave_out(client, url, str(error), [number])
            return
        for other in [each for each, (which, _) in self._tasks.items() if which == number and each in self._helping]:
            other.cancel()
            del self._tasks[other]

    def _leave_out(self, client: httpx.AsyncClient, url: str, reason: str, numbers: Iterable[int] = ()) -> None:
        """Lose a server, and give its requests, and those of these numbers, to the others."""
        self.lose(url, reason)
        theirs = [task for task, (_, server) in self._tasks.items() if server == url]
        again = {*numbers, *(self._tasks.pop(task)[0] for task in theirs)}
        for task in theirs:
            task.cancel()
        self._send(
            client, sorted(again - self._answers.keys() - {which for which, _ in self._tasks.values()}), self.urls
        )

    def _help_the_slow(self, client: httpx.AsyncClient) -> None:
        """Ask idle servers what another has not answered for long. Leave a server out if they answered all of it first."""
        for url in list(self.urls):
            numbers = {number for number, server in self._tasks.values() if server == url}
            if numbers and numbers <= self._answers.keys():
                waited = time.monotonic() - self._start
                self._leave_out(
                    client,
                    url,
                    f"{url}: no answer to {len(numbers)} prompts after {waited:.0f} s, which others have answered",
                )
        idle = [url for url in self.urls if url not in {server for _, server in self._tasks.values()}]
        if not idle:
            self._idle_since = None
            return
        now = time.monotonic()
        self._idle_since = now if self._idle_since is None else self._idle_since
        if not self._helping and now - self._idle_since > max(SLOWEST, self._idle_since - self._start):
            before = set(self._tasks)
            self._send(client, sorted({number for number, _ in self._tasks.values()} - self._answers.keys()), idle)
            self._helping = set(self._tasks) - before

    async def _give_up(self, tasks: Sequence[asyncio.Task[list[Completion]]]) -> None:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def complete(
    client: httpx.AsyncClient, url: str, request: dict[str, Any], asked: Asked, deadline: float
) -> list[Completion]:
    """Return the completions of one request."""
    path = f"{url}/v1/completions"
    answer = Answer(path, asked.largest + 1000 * len(request["prompt"]), deadline)
    try:
        async with client.stream("POST", path, json=request) as response:
            async for part in response.aiter_raw():
                answer.add(part)
    except httpx.HTTPError as error:
        raise ServerError(f"{path}: {reason_of(error)}") from error
    return completions(path, answer.read(response.status_code, response.headers), asked)


def reason_of(error: httpx.HTTPError) -> str:
    return shown(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)
