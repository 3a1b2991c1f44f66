"""The fused head under NeMo-RL's name. NeMo-RL is not on PyPI and wants Python 3.13 and Megatron, so what stands here for it is the
signature of its version 0.7.0, and what that function returns, written down anew in plain PyTorch."""

import inspect
import runpy
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import two_ranks

from mgrpo_kernels.integrations import IntegrationError, nemo_rl

VERSION = "0.7.0"


def from_parallel_hidden_states_to_logprobs(
    tensor_parallel_hidden_states: torch.Tensor,  # (L, B, H)
    output_weight_layer: torch.Tensor,  # (V, H)
    runtime_gather_output: bool,
    target: torch.Tensor,  # (B, L)
    vocab_start_index: int,
    vocab_end_index: int,
    tp_group: Any,
    inference_only: bool = False,
    cp_group: Any = None,
    chunk_size: int | None = None,
) -> torch.Tensor:
    logp = torch.log_softmax((tensor_parallel_hidden_states @ output_weight_layer.T).float(), -1).transpose(0, 1)
    return logp[:, :-1].gather(-1, target[:, 1:].unsqueeze(-1)).squeeze(-1)


SIGNATURE = inspect.signature(from_parallel_hidden_states_to_logprobs)


@pytest.fixture
def library(monkeypatch):
    """Return NeMo-RL's module, where the real one is not installed: one function of the recorded signature."""
    for name in ("nemo_rl", "nemo_rl.distributed", nemo_rl.MODULE):
        module = types.ModuleType(name)
        module.__path__ = []
        monkeypatch.setitem(sys.modules, name, module)
    module.from_parallel_hidden_states_to_logprobs = from_parallel_hidden_states_to_logprobs
    return module


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def run(function, group, dtype=torch.float32, **options):
    h, w, tokens, weights = two_ranks.inputs(3, 12)
    h, w = h.to(dtype).requires_grad_(), w.to(dtype).requires_grad_()
    places = {"vocab_start_index": 0, "vocab_end_index": len(w), "tp_group": group, "chunk_size": 5}
    logprob = function(h, w, False, tokens, **places, **options)
    if not logprob.requires_grad:
        return logprob
    return logprob, *torch.autograd.grad((logprob * weights[0, :, 1:]).sum(), (h, w))


def test_the_adapter_has_the_recorded_parameters():
    mine = inspect.signature(nemo_rl.from_parallel_hidden_states_to_logprobs)
    assert tuple(mine.parameters) == tuple(SIGNATURE.parameters) == nemo_rl.PARAMETERS
    for name, parameter in SIGNATURE.parameters.items():
        assert mine.parameters[name].default == parameter.default
        assert mine.parameters[name].kind == parameter.kind


def test_undo_restores_the_very_same_object(library):
    with nemo_rl.patched():
        assert library.from_parallel_hidden_states_to_logprobs is nemo_rl.from_parallel_hidden_states_to_logprobs
    assert library.from_parallel_hidden_states_to_logprobs is from_parallel_hidden_states_to_logprobs


def test_it_computes_the_same(library, group):
    want = run(library.from_parallel_hidden_states_to_logprobs, group)
    with nemo_rl.patched(strict=True):
        got = run(library.from_parallel_hidden_states_to_logprobs, group)
    assert got[0].shape == (3, 11)
    for mine, own in zip(got, want, strict=True):
        torch.testing.assert_close(mine, own, rtol=1e-4, atol=1e-5)


def test_bfloat16_gives_float32(group):
    truth = run(from_parallel_hidden_states_to_logprobs, group)[0]
    got = run(nemo_rl.from_parallel_hidden_states_to_logprobs, group, torch.bfloat16)[0]
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, truth, rtol=0.05, atol=0.05)


def test_inference_has_no_gradient(group):
    result = run(nemo_rl.from_parallel_hidden_states_to_logprobs, group, inference_only=True)
    assert isinstance(result, torch.Tensor)  # `run` adds the gradients where there are any
    assert not result.requires_grad


def test_two_ranks_equal_one(group):
    parts = [found["nemo_head"] for found in two_ranks.results()]
    logprob, grad_hidden, grad_weight = run(from_parallel_hidden_states_to_logprobs, group)
    for part in parts:
        torch.testing.assert_close(part[0], logprob, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), grad_hidden, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.cat([part[2] for part in parts]), grad_weight, rtol=1e-4, atol=1e-5)


def test_wrong_calls_are_told(group, monkeypatch):
    h, w, tokens, _ = two_ranks.inputs(3, 12)
    call = nemo_rl.from_parallel_hidden_states_to_logprobs
    with pytest.raises(ValueError, match=r"target: expected shape \(3, 12\), got \(12, 3\)"):
        call(h, w, False, tokens.t(), 0, 130, group)
    other = object()
    monkeypatch.setattr(nemo_rl.dist, "get_world_size", lambda group: 2 if group is other else 1)
    with pytest.raises(ValueError, match="cp_group: expected one rank with the fused head, got 2"):
        call(h, w, False, tokens, 0, 130, group, cp_group=other)


def test_a_version_with_other_parameters_or_without_the_name_is_told(library):
    library.from_parallel_hidden_states_to_logprobs = lambda hidden, weight, output_weight: None  # 0.6 has one more
    with pytest.raises(IntegrationError, match="from_parallel_hidden_states_to_logprobs: expected the parameters"):
        nemo_rl.patched()
    del library.from_parallel_hidden_states_to_logprobs
    with pytest.raises(
        IntegrationError, match="from_parallel_hidden_states_to_logprobs: this version of nemo_rl has no"
    ):
        nemo_rl.patched()


def test_where_it_is_not_installed_the_error_says_what_to_do(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "nemo_rl"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(IntegrationError, match=f"nemo_rl is not installed: install NeMo-RL {VERSION[:3]}"):
        nemo_rl.patched()


def test_example(monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    runpy.run_path(str(Path(__file__).parents[2] / "examples" / "nemo_rl_head.py"), run_name="__main__")
    assert "1 rank(s): log-prob -10.0" in capsys.readouterr().out
