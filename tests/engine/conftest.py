"""The suite of the vLLM engine, against vLLM itself. Where CI=true it fails without vLLM, elsewhere it is skipped with the reason."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "train"))  # the trainer's tests have the small model

import tiny
from absent import need

from mgrpo_kernels.train.config import VllmConfig
from mgrpo_kernels.train.data import demo
from mgrpo_kernels.train.model.policy import Policy, load_policy
from mgrpo_kernels.train.rollout.vllm import VllmEngine

R = 12  # longest response


@pytest.fixture(scope="session", autouse=True)
def vllm_is_there() -> None:
    need("vllm", "make vllm")


@pytest.fixture(scope="module", autouse=True)
def left_as_found(vllm_is_there: None) -> Iterator[None]:
    """Take down the process group that vLLM leaves to the rest of the process, where other suites make their own."""
    yield
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with the built-in model, briefly warm-started, so that it sometimes answers."""
    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("tiny") / "base"
    wide = demo.model_config()
    wide.num_attention_heads = wide.num_key_value_heads = 2
    wide.head_dim = 32  # the least that vLLM has for a CPU; the built-in model's is 16
    with mock.patch.object(demo, "model_config", return_value=wide):
        tiny.make_base(place)
    return place


@pytest.fixture(scope="module")
def shared(base: Path) -> VllmEngine:
    policy = load_policy(str(base), torch.device("cpu"), torch.float32)
    return VllmEngine(policy, R, 40, VllmConfig(vllm_cache_gib=0.1))


@pytest.fixture
def engine(shared: VllmEngine) -> Iterator[VllmEngine]:
    """Yield the one engine; its policy's weights are put back afterwards."""
    before = tiny.weights(shared.policy)
    timeout = shared.timeout
    yield shared
    shared.timeout = timeout
    shared.policy.model.load_state_dict(before)


@pytest.fixture
def policy(engine: VllmEngine) -> Policy:
    return engine.policy
