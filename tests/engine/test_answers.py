"""What servers may answer, from a small HTTP server that answers anything; and who is let in. Nothing here needs vLLM."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from mgrpo_kernels.train import serve
from mgrpo_kernels.train.config import build
from mgrpo_kernels.train.errors import UsageError
from mgrpo_kernels.train.rollout import vllm_answers, vllm_batch, vllm_key
from mgrpo_kernels.train.rollout.vllm_answers import Asked, ServerError
from mgrpo_kernels.train.rollout.vllm_batch import Batch
from mgrpo_kernels.train.rollout.vllm_control import Control

KEY = "a-key-0123456789"
ASKED = Asked(copies=2, max_tokens=3, vocabulary=10, ends=[1])


@pytest.fixture(scope="session", autouse=True)
def vllm_is_there() -> None:
    """Stand in for the fixture of this directory that asks for vLLM."""


@pytest.fixture(scope="module", autouse=True)
def left_as_found() -> None:
    """Stand in for the fixture that tidies up after vLLM."""


def choice(index: int, tokens: list[Any], logprobs: Any = None) -> dict[str, Any]:
    values = [-0.5] * len(tokens) if logprobs is None else logprobs
    return {"index": index, "token_ids": tokens, "logprobs": {"token_logprobs": values}}


GOOD = {"choices": [choice(1, [2, 3, 4]), choice(0, [5, 1])]}


class Server:
    """Answers every request by `reply`, which gets the handler."""

    def __init__(self, reply: Callable[[BaseHTTPRequestHandler], None]) -> None:
        self.seen: list[dict[str, str]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                outer.seen.append(dict(self.headers))
                self.rfile.read(int(self.headers.get("content-length", 0)))
                reply(self)

            do_GET = do_POST

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign] - a client that has gone
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True, kwargs={"poll_interval": 0.02}).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def start() -> Iterator[Callable[[Callable[[BaseHTTPRequestHandler], None]], Server]]:
    servers: list[Server] = []

    def make(reply: Callable[[BaseHTTPRequestHandler], None]) -> Server:
        servers.append(Server(reply))
        return servers[-1]

    yield make
    for server in servers:
        server.close()


def sending(content: Any, status: int = 200, **headers: str) -> Callable[[BaseHTTPRequestHandler], None]:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()

    def reply(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)

    return reply


def dripping(handler: BaseHTTPRequestHandler) -> None:
    """Send a byte every tenth of a second, so that no single read takes long."""
    handler.send_response(200)
    handler.end_headers()
    for _ in range(100):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.1)


def endless(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    try:
        while True:
            handler.wfile.write(b" " * 2**16)
    except OSError:
        pass


WRONG: dict[str, tuple[Callable[[BaseHTTPRequestHandler], None], str]] = {
    "redirect": (
        sending(b"", 302, Location="http://elsewhere/"),
        "got 302, a redirect to http://elsewhere/, which is not followed",
    ),
    "HTML": (
        sending(b"<html>\x1b[2JLog in</html>", Content_Type="text/html"),
        r"expected a JSON object, got text/html: <html> \[2JLog in",
    ),
    "empty": (sending(b""), "expected a JSON object, got no type: "),
    "null": (sending(None), "expected a JSON object, got null"),
    "a list": (sending([1]), r"expected a JSON object, got \[1\]"),
    "its own error": (sending({"error": {"message": "no \x1b[31mmodel\r\n"}}, 404), r"404: no  \[31mmodel"),
    "an error of null": (sending({"error": None}, 500), '500: {"error": null}'),
    "an error in HTML": (sending(b"<p>busy</p>", 503), "503: <p>busy</p>"),
    "compressed": (
        sending(b"\x1f\x8b", Content_Encoding="gzip"),
        "expected an answer that is not compressed, got gzip",
    ),
    "a repeated key": (sending({"error": {"message": f"no access with {KEY}"}}, 403), r"403: no access with \*\*\*"),
    "dripping": (dripping, "expected a complete answer by now, got"),
    "endless": (endless, "expected at most 1000 bytes, got more"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_answer_names_the_server_and_what_came(start: Any, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    monkeypatch.setattr("mgrpo_kernels.train.rollout.vllm_control.LARGEST", 1000 if kind == "endless" else 10**6)
    reply, message = WRONG[kind]
    server = start(reply)
    begun = time.monotonic()
    with pytest.raises(ServerError, match=f"^{server.url}/version: .*{message}") as caught:
        Control([server.url], 1.0).one(server.url, "version", post=False)
    assert time.monotonic() - begun < 8
    assert str(caught.value).isprintable()
    assert KEY not in str(caught.value)
    assert server.seen[0]["Authorization"] == f"Bearer {KEY}"
    assert server.seen[0]["Accept-Encoding"] == "identity"


def changed(place: int, **values: Any) -> dict[str, Any]:
    choices = [dict(each) for each in GOOD["choices"]]
    choices[place] = {key: value for key, value in {**choices[place], **values}.items() if value is not ...}
    return {"choices": choices}


UNUSABLE = {
    "no choices": ({}, "expected choices of type list, got None"),
    "null": ({"choices": None}, "expected choices of type list, got None"),
    "a choice of null": ({"choices": [None, None]}, "expected index of type int, got None"),
    "one missing": ({"choices": GOOD["choices"][:1]}, r"expected choices 0 to 1, got \[1\]"),
    "one twice": ({"choices": GOOD["choices"][:1] * 2}, r"expected choices 0 to 1, got \[1, 1\]"),
    "no tokens": (changed(0, token_ids=...), "expected token_ids of type list, got None"),
    "an empty one": (changed(0, token_ids=[], logprobs={"token_logprobs": []}), "expected 1 to 3 tokens"),
    "too many": (changed(0, **choice(1, [2] * 4)), "expected 1 to 3 tokens .* got 4 and 4"),
    "fewer log-probs": (changed(0, logprobs={"token_logprobs": [-1.0]}), "got 3 and 1"),
    "log-probs of null": (changed(0, logprobs=None), "expected logprobs.token_logprobs of type list, got None"),
    "a token outside": (changed(0, token_ids=[2, 3, 10]), "expected tokens from 0 to 9, got 10"),
    "a negative token": (changed(0, token_ids=[2, 3, -1]), "expected tokens from 0 to 9, got -1"),
    "a boolean": (changed(0, token_ids=[2, 3, True]), "expected tokens from 0 to 9, got True"),
    "a text": (changed(0, token_ids=[2, 3, "\x1b4"]), "expected tokens from 0 to 9, got "),
    "a log-prob of null": (
        changed(0, logprobs={"token_logprobs": [None] * 3}),
        "expected numbers as log-probabilities, got None",
    ),
    "an end inside": (changed(0, token_ids=[2, 1, 3]), r"with such a token at \[1\]"),
    "cut short": (changed(0, **choice(1, [2, 3])), "got 2 tokens with such a token at none"),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_tokens_that_cannot_be_the_models_are_refused(kind: str) -> None:
    answer, message = UNUSABLE[kind]
    with pytest.raises(ServerError, match=f"^http://a:1: .*{message}"):
        vllm_answers.completions("http://a:1", answer, ASKED)


def test_good_tokens_are_taken_in_order() -> None:
    got = vllm_answers.completions("http://a:1", GOOD, ASKED)
    assert [each.tokens for each in got] == [[5, 1], [2, 3, 4]]
    for odd in (float("nan"), float("-inf")):
        with pytest.raises(FloatingPointError):
            vllm_answers.completions("", changed(0, logprobs={"token_logprobs": [odd] * 3}), ASKED)


# --- Servers that fail or hang in the midst of a batch


def running(urls: list[str], number: int = 6, seconds: float = 20.0) -> tuple[list[Any], dict[str, str]]:
    lost: dict[str, str] = {}
    left = list(urls)

    def lose(url: str, reason: str) -> None:
        lost[url] = reason
        left.remove(url)
        if not left:
            raise ServerError("; ".join(lost.values()))

    requests = [{"prompt": [number]} for number in range(number)]
    batch = Batch(requests, ASKED, left, lose, lambda: None, time.monotonic() + seconds)
    return asyncio.run(batch.run()), lost


def hanging(handler: BaseHTTPRequestHandler) -> None:
    time.sleep(15)


def dying(handler: BaseHTTPRequestHandler) -> None:
    time.sleep(0.1)
    handler.connection.close()


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (dying, "RemoteProtocolError"),
        (hanging, "no answer to 2 prompts after"),
        (sending({"choices": None}), "expected choices"),
    ],
)
def test_the_others_take_the_work_of_a_server_that_fails_or_hangs(
    start: Any, monkeypatch: pytest.MonkeyPatch, reply: Any, reason: str
) -> None:
    monkeypatch.setattr(vllm_batch, "SLOWEST", 0.5)
    good = [start(sending(GOOD)) for _ in range(2)]
    bad = start(reply)
    answers, lost = running([good[0].url, bad.url, good[1].url])
    assert [[each.tokens for each in one] for one in answers] == [[[5, 1], [2, 3, 4]]] * 6
    assert list(lost) == [bad.url]
    assert reason in lost[bad.url]


def test_a_slow_server_that_answers_first_after_all_is_kept(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its prompts are given to the other too, which is still slower with them."""
    monkeypatch.setattr(vllm_batch, "SLOWEST", 0.3)

    def slow(handler: BaseHTTPRequestHandler) -> None:
        time.sleep(1.0)
        sending(GOOD)(handler)

    def fast_once(handler: BaseHTTPRequestHandler) -> None:
        time.sleep(0.0 if len(quick.seen) <= 2 else 5.0)
        sending(GOOD)(handler)

    quick = start(fast_once)
    begun = time.monotonic()
    answers, lost = running([quick.url, start(slow).url], 4)
    assert len(answers) == 4
    assert lost == {}
    assert len(quick.seen) == 4  # its own two, and the slow one's two
    assert time.monotonic() - begun < 4


def test_no_server_left_ends_the_batch(start: Any) -> None:
    urls = [start(dying).url, start(dying).url]
    with pytest.raises(ServerError, match=f"{urls[0]}.*{urls[1]}|{urls[1]}.*{urls[0]}"):
        running(urls)
    with pytest.raises(TimeoutError, match="those to 0 of 6 prompts"):
        running([start(hanging).url], seconds=0.5)


# --- Who is let in


@pytest.mark.parametrize(
    "url",
    [
        "http://user:SECRET@a:1",
        "http://SECRET@a:1",
        "http://a:1/?token=SECRET",
        "http://user:SEC/RET@a:1",
        "x://u:SECRET@a",
    ],
)
def test_credentials_in_a_url_are_refused_and_not_shown(url: str) -> None:
    with pytest.raises(UsageError, match="vllm_servers: expected URLs without user, password or query") as caught:
        build({"engine": "vllm", "vllm_servers": f"http://b:1,{url}"})
    assert "VLLM_API_KEY_FILE" in str(caught.value)
    assert "SEC" not in str(caught.value)


def test_the_key_comes_from_the_environment_or_a_file(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    assert vllm_key.read_key() is None
    (tmp_path / "key").write_text(f"{KEY}\n")
    monkeypatch.setenv("VLLM_API_KEY_FILE", str(tmp_path / "key"))
    assert vllm_key.read_key() == KEY
    monkeypatch.setenv("VLLM_API_KEY_FILE", str(tmp_path / "none"))
    with pytest.raises(UsageError, match="VLLM_API_KEY_FILE: expected a readable file"):
        vllm_key.read_key()
    for odd in ("", "short", "two long words", "длинный-ключ", "escape-\x1b[2J"):
        monkeypatch.setenv("VLLM_API_KEY", odd)
        with pytest.raises(UsageError, match="expected a key of at least 8 visible ASCII characters"):
            vllm_key.read_key()


@pytest.mark.parametrize("host", [["--host", "0.0.0.0"], ["--host=10.0.0.1"], ["--host", "::"], ["--host", "a-name"]])
def test_an_address_that_others_reach_needs_a_key(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], host: list[str]
) -> None:
    monkeypatch.setattr(serve, "installed", lambda _: True)
    monkeypatch.setattr("os.execv", lambda *_: pytest.fail("it was started"))
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    assert serve.main(["model", *host]) == 2
    assert "expected a key in the environment, VLLM_API_KEY or VLLM_API_KEY_FILE" in capsys.readouterr().err
    assert serve.main(["model", "--api-key", "SECRET"]) == 2
    assert "SECRET" not in capsys.readouterr().err
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    assert serve.refusal(["model", *host]) is None
    command, environment = serve.line(["model", *host], on_cpu=True)
    assert command[command.index("--middleware") + 1] == vllm_key.MIDDLEWARE
    assert KEY not in " ".join([*command, *environment.values()])
    for name in ("127.0.0.1", "::1", "localhost", "127.1.2.3"):
        monkeypatch.delenv("VLLM_API_KEY", raising=False)
        assert serve.refusal(["model", "--host", name]) is None


@pytest.mark.parametrize(
    ("path", "header", "status"),
    [
        ("/update_weights", None, 401),
        ("/collective_rpc", b"Bearer wrong", 401),
        ("/v1/completions", f"bearer {KEY}".encode(), 401),
        ("/server_info", f"Bearer {KEY}".encode(), 200),
        ("/health", None, 200),
    ],
)
def test_every_endpoint_but_health_asks_for_the_key(
    monkeypatch: pytest.MonkeyPatch, path: str, header: bytes | None, status: int
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200})

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "path": path, "headers": [] if header is None else [(b"Authorization", header)]}
    asyncio.run(vllm_key.RequireKey(app)(scope, None, send))  # type: ignore[arg-type]
    assert sent[0]["status"] == status
