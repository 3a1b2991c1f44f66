"""Sampling by vLLM servers: real ones, two processes on this machine. What they give is what the engine in this process gives."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import tiny
import torch
from test_vllm_engine import COPIES, PROMPTS, draw, equal, mismatch, shaken, small
from transformers import AutoModelForCausalLM

from mgrpo_kernels.train import __main__ as command
from mgrpo_kernels.train import serve
from mgrpo_kernels.train.config import VllmConfig, build
from mgrpo_kernels.train.errors import EngineError, UsageError
from mgrpo_kernels.train.model.policy import Policy
from mgrpo_kernels.train.rollout import vllm as engine_module
from mgrpo_kernels.train.rollout import vllm_batch
from mgrpo_kernels.train.rollout import vllm_control as module
from mgrpo_kernels.train.rollout.vllm import VllmEngine
from mgrpo_kernels.train.rollout.vllm_server import VllmServers
from mgrpo_kernels.train.run.stopping import Abandoned

ROOT = Path(__file__).resolve().parents[2]
KEY = "a-key-of-the-tests"
HEADERS = {"Authorization": f"Bearer {KEY}"}
START = 240.0  # seconds that a server may take on a busy machine; alone it is 20


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.fixture(scope="module")
def started(
    base: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[tuple[str, subprocess.Popen[bytes]]]]:
    """Yield two servers, URL and process, each with the model of the other tests."""
    clean = {
        name: value for name, value in os.environ.items() if not name.startswith("VLLM_")
    }  # the engine here has set some
    clean |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_API_KEY": KEY}
    clean["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    servers, logs = [], tmp_path_factory.mktemp("servers")
    for _ in range(2):
        port = free_port()
        with (logs / f"{port}.log").open("wb") as log:
            process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "mgrpo_kernels.train.serve",
                    str(base),
                    "--port",
                    str(port),
                    "--kv-cache-memory-bytes",
                    "50000000",
                ],
                env=clean,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        servers.append((f"http://127.0.0.1:{port}", process))
    try:
        deadline = time.monotonic() + START
        for url, process in servers:
            while True:
                text = (logs / f"{url.rpartition(':')[2]}.log").read_text(errors="replace")[-3000:]
                assert process.poll() is None, text
                assert time.monotonic() < deadline, text
                try:
                    httpx.get(f"{url}/health", timeout=5.0).raise_for_status()
                    break
                except httpx.HTTPError:
                    time.sleep(0.2)
        yield servers
    finally:
        for _, process in servers:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
        for _, process in servers:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def urls(started: list[tuple[str, subprocess.Popen[bytes]]]) -> list[str]:
    return [url for url, _ in started]


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", KEY)


def connect(policy: Policy, urls: list[str], timeout: float = 180.0, longest: int = 12) -> VllmServers:
    return VllmServers(policy, longest, 12, VllmConfig(vllm_servers=",".join(urls), vllm_timeout=timeout))


@pytest.fixture
def servers(policy: Policy, urls: list[str]) -> VllmServers:
    """Return an engine of both servers."""
    return connect(policy, urls)


def test_same_as_the_engine_in_this_process(servers: VllmServers, engine: VllmEngine) -> None:
    for seed, temperature in ((0, 1.1), (3, 0.7)):
        got, want = (draw(each, seed, temperature=temperature) for each in (servers, engine))
        assert torch.equal(got.tokens, want.tokens)
        assert torch.equal(got.mask, want.mask)
        assert torch.equal(got.finished, want.finished)
        torch.testing.assert_close(got.logprobs, want.logprobs, atol=1e-5, rtol=0)
    assert len(set(want.mask.sum(-1).tolist())) > 1
    assert len({tuple(row.tolist()) for row in want.tokens[:COPIES]}) > 1  # a group's rollouts differ
    assert not torch.equal(draw(servers, 4).tokens, draw(servers, 0).tokens)


@pytest.mark.parametrize("temperature", [0.7, 1.1])
def test_logprobs_are_those_of_transformers(servers: VllmServers, policy: Policy, temperature: float) -> None:
    assert mismatch(policy, draw(servers, temperature=temperature), temperature) < 1e-4


def test_more_prompts_than_one_pass_takes(policy: Policy, urls: list[str]) -> None:
    texts = ["+".join(f"{number:020}") + "=" for number in range(200)]  # 40 tokens each, no two the same
    servers = VllmServers(policy, 12, 40, VllmConfig(vllm_servers=urls[0], vllm_timeout=60.0))
    got = servers.sample(policy.encode(texts), 1, temperature=1.0, generator=torch.Generator().manual_seed(0))
    assert got.mask.any(-1).all()


def test_greedy(servers: VllmServers, engine: VllmEngine) -> None:
    got, want = (draw(each, temperature=0.0) for each in (servers, engine))
    assert torch.equal(got.tokens, want.tokens)
    torch.testing.assert_close(got.logprobs, want.logprobs, atol=1e-5, rtol=0)


def test_policy_momentum_policy(servers: VllmServers, policy: Policy) -> None:
    momentum = shaken(policy)
    own, theirs, again = draw(servers), draw(servers, momentum=momentum), draw(servers)
    assert equal(own, again)
    assert mismatch(policy, theirs) > 0.1
    with momentum.swapped_into(policy.model):
        assert mismatch(policy, theirs) < 1e-4
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.mul_(1.05)
    synced = servers.sync_seconds
    assert mismatch(policy, draw(servers)) < 1e-4
    assert servers.sync_seconds > synced > 0


def test_order_of_an_exchange(servers: VllmServers, urls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts here are too short for vLLM's prefix cache to keep them: that it is emptied shows in what is asked."""
    asked: list[str] = []
    one = module.Control.one

    def noted(self: module.Control, url: str, path: str, *rest: Any, **options: Any) -> Any:
        if url == urls[0]:
            asked.append(path)
        return one(self, url, path, *rest, **options)

    monkeypatch.setattr(module.Control, "one", noted)
    draw(servers)
    exchange = ["start_weight_update", "update_weights", "finish_weight_update", "reset_prefix_cache"]
    assert asked == ["weight_info", *exchange, "weight_info"]


def test_how_many_servers_makes_no_difference(policy: Policy, urls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    complete = vllm_batch.complete

    async def counted(client: Any, url: str, *rest: Any) -> Any:
        asked.append(url)
        return await complete(client, url, *rest)

    monkeypatch.setattr(vllm_batch, "complete", counted)
    both = connect(policy, urls)
    asked.clear()
    want = draw(both)
    assert sorted(asked) == sorted(urls * 2)  # four prompts
    one = connect(policy, urls[1:])
    asked.clear()
    got = draw(one)
    assert set(asked) == {urls[1]}
    assert torch.equal(got.tokens, want.tokens)
    torch.testing.assert_close(got.logprobs, want.logprobs, atol=1e-5, rtol=0)
    with pytest.raises(EngineError, match=f"{urls[1]}: expected a server for this run alone, got one that another has"):
        draw(both)


def test_nan_weights_stop_the_rollout(servers: VllmServers, policy: Policy) -> None:
    policy.model.get_output_embeddings().weight.data[3] = torch.nan
    with pytest.raises(FloatingPointError, match="rollout: expected finite log-probs"):
        draw(servers)


def busy(url: str) -> float:
    """Return how many requests a server has."""
    text = httpx.get(f"{url}/metrics", timeout=30, headers=HEADERS).text
    rows = [
        row for row in text.splitlines() if row.startswith(("vllm:num_requests_running", "vllm:num_requests_waiting{"))
    ]
    assert len(rows) == 2
    return sum(float(row.rpartition(" ")[2]) for row in rows)


@pytest.mark.parametrize("reason", ["a signal", "the time limit"])
def test_requests_are_given_up(servers: VllmServers, urls: list[str], reason: str) -> None:
    looks = 0

    def check() -> None:
        nonlocal looks
        looks += 1
        if looks == 3:
            raise Abandoned

    def long() -> None:
        prompts = servers.policy.encode(PROMPTS)
        servers.sample(prompts, 2000, temperature=1.1, generator=torch.Generator().manual_seed(0))

    start = time.monotonic()
    if reason == "a signal":
        servers.check = check
        with pytest.raises(Abandoned):
            long()
    else:
        servers.timeout = 1.0
        with pytest.raises(EngineError, match=r"within 1 s \(vllm_timeout\), got those to 0 of 4 prompts"):
            long()
    assert time.monotonic() - start < 10
    servers.timeout = 60.0
    servers.check = lambda: None
    deadline = time.monotonic() + 20
    while any(busy(url) for url in urls):
        assert time.monotonic() < deadline, "the servers go on with what nobody waits for"
        time.sleep(0.1)
    assert equal(draw(servers), draw(servers))


def test_after_a_trainer_that_was_killed_in_an_exchange(policy: Policy, urls: list[str]) -> None:
    want = draw(connect(policy, urls))
    httpx.post(f"{urls[0]}/start_weight_update", timeout=30, headers=HEADERS).raise_for_status()
    assert equal(draw(connect(policy, urls)), want)


def altered(monkeypatch: pytest.MonkeyPatch, path: str, change: Callable[[Any], Any]) -> None:
    """Have what the servers say of themselves changed."""
    one = module.Control.one

    def told(self: module.Control, url: str, asked: str, *rest: Any, **options: Any) -> Any:
        answer = one(self, url, asked, *rest, **options)
        return change(answer) if asked.startswith(path) else answer

    monkeypatch.setattr(module.Control, "one", told)


def of_config(part: str, name: str, value: Any) -> Callable[[Any], Any]:
    def change(answer: Any) -> Any:
        answer["vllm_config"][part] = {**(answer["vllm_config"][part] or {}), name: value}
        return answer

    return change


SETTINGS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "expected the trainer's vLLM .* got 0.1.0: install": ("version", lambda _: {"version": "0.1.0"}),
    "expected --logprobs-mode processed_logprobs .* got raw_logprobs": (
        "server_info",
        of_config("model_config", "logprobs_mode", "raw_logprobs"),
    ),
    "expected --generation-config vllm .* got auto": (
        "server_info",
        of_config("model_config", "generation_config", "auto"),
    ),
    "expected --worker-extension-cls mgrpo.* got none": (
        "server_info",
        of_config("parallel_config", "worker_extension_cls", ""),
    ),
    "expected --weight-transfer-config with backend mgrpo_gloo .* got ipc": (
        "server_info",
        of_config("weight_transfer_config", "backend", "ipc"),
    ),
    "expected --dtype float32 .* got bfloat16": ("server_info", of_config("model_config", "dtype", "torch.bfloat16")),
    "expected enable_chunked_prefill False .* got True": (
        "server_info",
        of_config("scheduler_config", "enable_chunked_prefill", True),
    ),
    "expected --max-model-len at least 24, prompt and response, .* got 23": (
        "server_info",
        of_config("model_config", "max_model_len", 23),
    ),
    "expected tie_word_embeddings False .* got True": (
        "collective_rpc",
        lambda answer: {"results": [{**each, "tie_word_embeddings": True} for each in answer["results"]]},
    ),
    "expected --hf-overrides with head_dtype float32 .* got bfloat16": (
        "collective_rpc",
        lambda answer: {"results": [{**each, "head_dtype": "bfloat16"} for each in answer["results"]]},
    ),
    "expected the policy's vocab_size 15 .* got 16: start it with the policy's model": (
        "collective_rpc",
        lambda answer: {"results": [{**each, "vocab_size": 16} for each in answer["results"]]},
    ),
}


@pytest.mark.parametrize("message", SETTINGS)
def test_a_server_that_was_started_otherwise_is_refused(
    policy: Policy, urls: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    altered(monkeypatch, *SETTINGS[message])
    with pytest.raises(UsageError, match=f"vllm_servers: {message}"):
        connect(policy, urls)


def test_another_model_is_refused(urls: list[str]) -> None:
    with pytest.raises(UsageError, match=f"expected the policy's model_type qwen2 of {urls[0]}, got llama"):
        connect(small(), urls)
    with pytest.raises(UsageError, match=f"expected --max-model-len at least 82, .* of {urls[0]}, got 64: start it so"):
        connect(small(), urls, longest=70)


def test_weights_that_do_not_load_or_go_astray_are_noticed(
    policy: Policy, urls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    want = draw(connect(policy, urls))
    right, places = engine_module.checkpoint_weights, [f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1)]

    def crossed(model: Any, *, untie: bool) -> dict[str, torch.Tensor]:
        named = dict(right(model, untie=untie))
        named[places[0]], named[places[1]] = named[places[1]], named[places[0]]
        return named

    def unknown(model: Any, *, untie: bool) -> dict[str, torch.Tensor]:
        return {"model.layers.7.nowhere": torch.zeros(2), **right(model, untie=untie)}

    for wrong, message in (
        (crossed, "expected a model that vLLM and transformers read alike .* LlamaForCausalLM, which"),
        (
            unknown,
            r"expected a model that vLLM runs, with weights that it takes, got .*model\.layers\.7\.nowhere, \(2,\): ",
        ),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(engine_module, "checkpoint_weights", wrong)
            with pytest.raises(UsageError, match=message):
                connect(policy, urls)
    assert equal(draw(connect(policy, urls)), want)  # the servers took no harm


def test_without_the_key_only_health_answers(policy: Policy, urls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for path in ("v1/models", "weight_info", "server_info", "metrics"):
        assert httpx.get(f"{urls[0]}/{path}", timeout=30).status_code == 401
    assert httpx.post(f"{urls[0]}/collective_rpc", json={"method": "mgrpo_model"}, timeout=30).status_code == 401
    assert httpx.get(f"{urls[0]}/health", timeout=30).status_code == 200
    monkeypatch.setenv("VLLM_API_KEY", "wrong-key")
    with pytest.raises(UsageError, match=f"{urls[0]}/version: 401: expected the key, got none or another"):
        connect(policy, urls)


class Bare(BaseHTTPRequestHandler):
    """A server without vLLM's development mode."""

    def do_GET(self) -> None:
        import vllm

        known = self.path == "/version"
        self.send_response(200 if known else 404)
        self.end_headers()
        self.wfile.write(json.dumps({"version": vllm.__version__} if known else {"detail": "Not Found"}).encode())

    def log_message(self, *_: Any) -> None:
        pass


def test_what_is_no_server_is_refused(policy: Policy) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(
        UsageError, match=f"vllm_servers: expected servers that can be used, got {url}/version: ConnectError"
    ):
        connect(policy, [url])
    bare = HTTPServer(("127.0.0.1", 0), Bare)
    threading.Thread(target=bare.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{bare.server_port}"
    try:
        with pytest.raises(UsageError, match=f"expected VLLM_SERVER_DEV_MODE=1 in the environment of {url}, got .*404"):
            connect(policy, [url])
    finally:
        bare.shutdown()
        bare.server_close()


def test_ranks_of_servers_with_several_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two servers of two and three GPUs: the trainer is rank 0 of six."""
    from vllm.distributed.weight_transfer import WeightTransferTrainerFactory

    asked: list[tuple[str, Any]] = []
    sizes = {"http://a:1": 2, "http://b:1": 3}

    def one(self: module.Control, url: str, path: str, body: Any = None, **_: Any) -> Any:
        asked.append((url, body))
        return {"world_size": sizes[url]}

    def trainer_init(info: Any, *, client: Any, source: Any) -> Any:
        client.init_weight_transfer_engine({"rank_offset": 1})
        return info

    monkeypatch.setattr(module.Control, "one", one)
    monkeypatch.setattr(module, "own_address", lambda urls: ("10.0.0.1", 5000))
    monkeypatch.setattr(WeightTransferTrainerFactory, "trainer_init", trainer_init)
    info = module.join_transfer(module.Control(list(sizes), 1.0), module.Source(), "nccl", small())
    assert (info.backend, info.world_size, info.master_address, info.master_port) == ("nccl", 6, "10.0.0.1", 5000)
    ranks = {url: body["init_info"]["rank_offset"] for url, body in asked if body and "init_info" in body}
    assert ranks == {"http://a:1": 1, "http://b:1": 3}


def test_options() -> None:
    given = {"engine": "vllm", "vllm_servers": " http://a:1/ ,https://b:2"}
    assert build(given).vllm.server_urls == ["http://a:1", "https://b:2"]
    for value in ("a:1", "http://a:1,", "http://a:1,http://a:1/", ""):
        with pytest.raises(UsageError, match="vllm_servers: expected http://HOST:PORT, or several .* commas, got"):
            build({**given, "vllm_servers": value})
    with pytest.raises(UsageError, match="vllm_servers: expected --engine vllm with it"):
        build({**given, "engine": "transformers"})
    with pytest.raises(
        UsageError, match="vllm_memory: expected no value together with --vllm-servers, got 0.3: give vLLM's own"
    ):
        build({**given, "vllm_memory": 0.3})


def test_command_of_a_server() -> None:
    gpu, environment = serve.line(["some/model", "--dtype=bfloat16", "--port", "8001"], on_cpu=False)
    assert environment["VLLM_SERVER_DEV_MODE"] == "1"
    assert gpu[-3:] == ["--dtype=bfloat16", "--port", "8001"]
    assert "float32" not in gpu
    assert gpu[gpu.index("--weight-transfer-config") + 1] == '{"backend": "nccl"}'
    assert "--enforce-eager" not in gpu
    cpu, _ = serve.line(["some/model", "--logprobs_mode", "raw_logprobs"], on_cpu=True)
    assert "processed_logprobs" not in cpu
    assert cpu[cpu.index("--weight-transfer-config") + 1] == '{"backend": "mgrpo_gloo"}'
    assert {"--enforce-eager", "--no-enable-chunked-prefill"} <= set(cpu)


def test_command_line_of_a_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert serve.main(["--help"]) == 0
    assert "python -m mgrpo_kernels.train.serve MODEL" in capsys.readouterr().out
    assert serve.main(["--port", "8000"]) == 2
    assert "error: serve: expected MODEL first, got --port" in capsys.readouterr().err


def test_a_run_trains(base: Path, urls: list[str], tmp_path: Path) -> None:
    output = tiny.output_with(base, tmp_path / "run")
    flags = [
        *tiny.FLAGS,
        "--engine",
        "vllm",
        "--vllm-servers",
        ",".join(urls),
        "--steps",
        "3",
        "--lr-schedule",
        "constant",
    ]
    assert command.main([*flags, "--output", str(output)]) == 0
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().split("\n")[:-1]]
    assert [line["step"] for line in lines] == list(range(4))
    for line in lines[1:]:
        assert 0 < line["behaviour_mismatch"] < 1e-4
        assert line["time_rollout"] > 0
        assert line["time_sync"] > 0
        assert line["loss"] is not None
    before, after = (AutoModelForCausalLM.from_pretrained(output / name).state_dict() for name in ("base", "final"))
    assert any(not before[name].equal(value) for name, value in after.items())


def disturbed(servers: VllmServers, act: Callable[[], None]) -> Any:
    """Sample while `act` is done to a server whose requests are on their way."""
    first = servers.check

    def check() -> None:
        servers.check = first
        time.sleep(0.3)
        act()

    servers.check = check
    return servers.sample(
        servers.policy.encode(PROMPTS), 300, temperature=1.1, generator=torch.Generator().manual_seed(0)
    )


def test_y_a_server_that_hangs_is_left_out(
    servers: VllmServers, started: list[tuple[str, subprocess.Popen[bytes]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_batch, "SLOWEST", 1.0)
    want = draw(servers)
    url, process = started[1]
    try:
        got = disturbed(servers, lambda: os.killpg(process.pid, signal.SIGSTOP))
        assert got.tokens.shape[0] == 300 * len(PROMPTS)
        assert f"{url}: no answer to " in servers._lost[url]
        assert equal(draw(servers), want)
    finally:
        os.killpg(process.pid, signal.SIGCONT)
    assert equal(draw(connect(servers.policy, [each for each, _ in started])), want)  # it took no harm


def test_z_a_server_that_dies_is_left_out_and_the_last_one_ends_the_run(
    servers: VllmServers, started: list[tuple[str, subprocess.Popen[bytes]]], caplog: pytest.LogCaptureFixture
) -> None:
    """The last of this file: neither server is left after it."""
    want, (url, process) = draw(servers), started[1]
    got = disturbed(servers, lambda: os.killpg(process.pid, signal.SIGKILL))
    assert got.tokens.shape[0] == 300 * len(PROMPTS)
    assert f"{url}/v1/completions: " in servers._lost[url]
    assert f"It is used no more; {started[0][0]} remain" in caplog.text
    assert equal(draw(servers), want)  # the weights go to the other alone
    os.killpg(started[0][1].pid, signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(
        EngineError, match=rf"vllm: expected 24 responses .* got ServerError: {url}.*{started[0][0]}.*no server is left"
    ):
        draw(servers)
    assert time.monotonic() - start < 20
