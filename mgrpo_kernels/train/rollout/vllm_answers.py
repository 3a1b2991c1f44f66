"""What servers answer: bounded in size and time, checked, and made safe to print. A server is trusted with none of it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mgrpo_kernels.train.rollout.vllm import NOT_FINITE, Completion
from mgrpo_kernels.train.rollout.vllm_key import read_key, without_key
from mgrpo_kernels.train.text import one_line

SHOWN = 200
"""Characters of an answer that a message repeats."""
LARGEST = 64 * 2**20
"""Bytes of an answer that holds no tokens."""


class ServerError(RuntimeError):
    """A server could not be reached, or its answer is not what was asked for. The message begins with the server's URL."""


def headers() -> dict[str, str]:
    """Return the headers of every request: the key, and no compression, in which a short answer could be a huge one."""
    key = read_key()
    return {"Accept-Encoding": "identity", **({} if key is None else {"Authorization": f"Bearer {key}"})}


class Answer:
    """An answer as it comes in.

    Args:
        where: URL of the server, and path.
        largest: bytes that it may have.
        deadline: the value of time.monotonic() at which it must be complete.
    """

    def __init__(self, where: str, largest: int, deadline: float) -> None:
        self.where, self._largest, self._deadline = where, largest, deadline
        self._parts: list[bytes] = []
        self._size = 0

    def add(self, part: bytes) -> None:
        """Take the next bytes.

        Raises:
            ServerError: it is too large or too slow.
        """
        self._parts.append(part)
        self._size += len(part)
        if self._size > self._largest:
            raise ServerError(f"{self.where}: expected at most {self._largest} bytes, got more")
        if time.monotonic() > self._deadline:
            raise ServerError(f"{self.where}: expected a complete answer by now, got {self._size} bytes of one")

    def read(self, status: int, about: Mapping[str, str]) -> dict[str, Any]:
        """Return the object that was sent, by its status and headers.

        Raises:
            ServerError: an error, a redirect, or no JSON object.
            FloatingPointError: vLLM could not express NaN or infinity in JSON.
        """
        content = b"".join(self._parts)
        text = shown(content.decode("utf-8", "replace"))
        encoding = about.get("content-encoding", "identity")
        if encoding != "identity":
            raise ServerError(f"{self.where}: expected an answer that is not compressed, got {shown(encoding)}")
        if 300 <= status < 400:
            to = shown(about.get("location", "nowhere"))
            raise ServerError(
                f"{self.where}: expected an answer, got {status}, a redirect to {to}, which is not followed"
            )
        try:
            value = json.loads(content)
        except (ValueError, RecursionError):
            if 200 <= status < 300:
                kind = shown(about.get("content-type", "no type"))
                raise ServerError(f"{self.where}: expected a JSON object, got {kind}: {text}") from None
            value = None
        if not 200 <= status < 300:
            error = value.get("error") if isinstance(value, dict) else None
            message = error.get("message") if isinstance(error, dict) else None
            reason = shown(message) if isinstance(message, str) else text
            if "not JSON compliant" in reason:
                raise FloatingPointError(NOT_FINITE)
            raise ServerError(f"{self.where}: {status}: {reason}")
        if not isinstance(value, dict):
            raise ServerError(f"{self.where}: expected a JSON object, got {text}")
        return value


def shown(text: str) -> str:
    """Return a server's words as a message repeats them: short, without control characters and without the key."""
    text = one_line(without_key(text))
    return text if len(text) <= SHOWN else f"{text[:SHOWN]} ..."


def field(where: str, answer: Any, *names: str, kind: type | tuple[type, ...]) -> Any:
    """Return a value from inside an answer.

    Raises:
        ServerError: it is missing, null, or of another type.
    """
    value = answer
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if type(value) not in kinds:
        wanted = " or ".join(each.__name__ for each in kinds)
        raise ServerError(f"{where}: expected {'.'.join(names)} of type {wanted}, got {shown(repr(value))}")
    return value


class Asked(NamedTuple):
    """What a request for completions asks for."""

    copies: int
    max_tokens: int
    vocabulary: int
    ends: Sequence[int]  # tokens that end a response

    @property
    def largest(self) -> int:
        """Bytes that the answer may have: vLLM's own have some hundred for each token."""
        return 2**20 + 1000 * self.copies * self.max_tokens


def completions(where: str, answer: dict[str, Any], asked: Asked) -> list[Completion]:
    """Return the completions in an answer.

    Raises:
        ServerError: there are more or fewer than were asked for, or one cannot be this model's.
        FloatingPointError: a log-probability is not finite.
    """
    choices = field(where, answer, "choices", kind=list)
    indices = [field(where, each, "index", kind=int) for each in choices]
    if sorted(indices) != list(range(asked.copies)):
        raise ServerError(f"{where}: expected choices 0 to {asked.copies - 1}, got {shown(str(indices))}")
    return [
        completion(where, choice, asked)
        for _, choice in sorted(zip(indices, choices, strict=True), key=lambda pair: pair[0])
    ]


def completion(where: str, choice: dict[str, Any], asked: Asked) -> Completion:
    tokens = field(where, choice, "token_ids", kind=list)
    logprobs = field(where, choice, "logprobs", "token_logprobs", kind=list)
    if not (1 <= len(tokens) <= asked.max_tokens and len(tokens) == len(logprobs)):
        raise ServerError(
            f"{where}: expected 1 to {asked.max_tokens} tokens and as many log-probabilities, got {len(tokens)} and {len(logprobs)}"
        )
    wrong = [each for each in tokens if type(each) is not int or not 0 <= each < asked.vocabulary]
    if wrong:
        raise ServerError(f"{where}: expected tokens from 0 to {asked.vocabulary - 1}, got {shown(repr(wrong[0]))}")
    ended = [place for place, each in enumerate(tokens) if each in asked.ends]
    if ended[:1] != [len(tokens) - 1] and (ended or len(tokens) < asked.max_tokens):
        raise ServerError(
            f"{where}: expected a response that ends with its first end-of-sequence token or after {asked.max_tokens} tokens, got "
            f"{len(tokens)} tokens with such a token at {ended or 'none'}"
        )
    odd = [each for each in logprobs if type(each) not in (int, float)]
    if odd:
        raise ServerError(f"{where}: expected numbers as log-probabilities, got {shown(repr(odd[0]))}")
    if not all(math.isfinite(each) for each in logprobs):
        raise FloatingPointError(NOT_FINITE)
    return Completion(tokens, logprobs)
