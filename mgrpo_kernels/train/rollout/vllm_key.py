"""The key of vLLM servers: where it comes from, and what asks for it at a server.

vLLM's own ``--api-key`` protects the endpoints below /v1 alone. Those that exchange the weights, which a trainer needs, stay open with
it. :class:`RequireKey` asks for the key at every endpoint but /health.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from mgrpo_kernels.train.errors import UsageError

VARIABLE, FILE_VARIABLE = "VLLM_API_KEY", "VLLM_API_KEY_FILE"
MIDDLEWARE = f"{__name__}.RequireKey"
SHORTEST = 8


def read_key() -> str | None:
    """Return the key in the environment variable VLLM_API_KEY, or in the file that VLLM_API_KEY_FILE names; None without either.

    Raises:
        UsageError: the file cannot be read, or the key is not one word of visible ASCII characters.
    """
    key, source = os.environ.get(VARIABLE), VARIABLE
    if key is None and (file := os.environ.get(FILE_VARIABLE)) is not None:
        source = f"{FILE_VARIABLE} ({file})"
        try:
            key = Path(file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{FILE_VARIABLE}: expected a readable file, got {file}: {error}") from None
    if key is not None and not (len(key) >= SHORTEST and all("!" <= character <= "~" for character in key)):
        raise UsageError(
            f"{source}: expected a key of at least {SHORTEST} visible ASCII characters, without spaces, got {len(key)} characters"
        )
    return key


def without_key(text: str) -> str:
    """Return text in which the key, which a server may repeat, is replaced by stars."""
    key = read_key()
    return text if key is None else text.replace(key, "***")


Message = MutableMapping[str, Any]
Application = Callable[
    [Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]
]


class RequireKey:
    """ASGI middleware that answers 401 to a request without ``Authorization: Bearer KEY``, whatever it asks for but /health."""

    def __init__(self, app: Application) -> None:
        key = read_key()
        if key is None:
            raise UsageError(f"serve: expected {VARIABLE} or {FILE_VARIABLE} in the environment, got neither")
        self._app, self._wanted = app, f"Bearer {key}".encode()

    async def __call__(
        self, scope: Message, receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Awaitable[None]]
    ) -> None:
        given = b"".join(value for name, value in scope.get("headers", ()) if name.lower() == b"authorization")
        if scope["type"] == "lifespan" or scope["path"] == "/health" or hmac.compare_digest(given, self._wanted):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            headers = [(b"content-type", b"application/json"), (b"www-authenticate", b"Bearer")]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send(
                {
                    "type": "http.response.body",
                    "body": b'{"error": {"message": "expected the key, got none or another"}}',
                }
            )
        else:
            await send({"type": "websocket.close", "code": 1008})
