"""LoRA: what trains is the adapter, to the gradient that peft and plain PyTorch give; the rest keeps its bits."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
import torture
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from mgrpo_kernels import MomentumModel, ema_update_
from mgrpo_kernels.train import __main__ as command
from mgrpo_kernels.train import export, parallel, update
from mgrpo_kernels.train import step as steps
from mgrpo_kernels.train.config import LoraConfig
from mgrpo_kernels.train.errors import UsageError
from mgrpo_kernels.train.extras import how_to_install
from mgrpo_kernels.train.model.lora import Adapter, merged_weights
from mgrpo_kernels.train.model.policy import Policy, load_policy
from mgrpo_kernels.train.rollout.vllm import checkpoint_weights
from mgrpo_kernels.train.run import checkpoint
from mgrpo_kernels.train.score import score
from mgrpo_kernels.train.step import Learner, train_step
from mgrpo_kernels.train.update import Batch

RANK, ALPHA = 3, 6.0
LORA = {"lora_rank": RANK, "lora_alpha": ALPHA}
# Six of eight rollouts are the policy's, so that most groups teach something: the adapter moves far enough to be seen.
FLAGS = ["--lora-rank", str(RANK), "--lora-alpha", str(ALPHA), "--momentum-rollouts", "2"]
CPU = torch.device("cpu")
PROMPTS, TOKENS = [[3, 4, 12, 5]] * 2, torch.tensor([[2, 3, 4, 1], [5, 6, 1, 0]])


def load(base: Path, dtype: torch.dtype = torch.float32, targets: str = "all-linear", *, moved: bool = True) -> Policy:
    """Return the built-in model with an adapter; `moved`: one that does something."""
    policy = load_policy(str(base), CPU, dtype, LoraConfig(RANK, ALPHA, targets), seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, value in policy.model.named_parameters():
        if moved and ".lora_B." in name:
            value.data.normal_(0.0, 0.1, generator=generator)
    return policy


def adapter_of(model: Any) -> dict[str, Tensor]:
    return {name: value for name, value in model.named_parameters() if ".lora_" in name}


def plain(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


def copies(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in weights.items()}


def assert_same(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    assert [name for name, value in one.items() if not torch.equal(value, two[name])] == []


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([[3, 4, 12, 5, 2, 3, 4, 1]])).logits


def loss_by_hand(model: Any, batch: Batch, temperature: float, kl_coef: float) -> Tensor:
    """Return the loss of an on-policy step, a sequence at a time, from the whole logits of peft's own model."""

    def logprobs(row: int) -> Tensor:
        response = batch.tokens[row][batch.mask[row]]
        ids = torch.cat([torch.tensor(batch.prompts[row]), response])
        out = model(ids[None]).logits[0, -len(response) - 1 : -1] / temperature
        return out.log_softmax(-1).gather(-1, response[:, None])[:, 0]

    total = torch.zeros(())
    for row in range(len(batch.prompts)):
        own = logprobs(row)
        with torch.no_grad(), model.disable_adapter():
            reference = logprobs(row)
        apart = reference - own
        ratio = (own - own.detach()).exp()  # on policy: never clipped
        total = total - (ratio * batch.advantages[row]).sum() + kl_coef * (apart.exp() - apart - 1).sum()
    return total / batch.mask.sum()


def batch_of(learner: Learner, monkeypatch: pytest.MonkeyPatch) -> Batch:
    """Return what a step would train on."""
    taken: list[Batch] = []
    monkeypatch.setattr(steps, "take_step", lambda policy, optimizer, batch, *rest: taken.append(batch) or {})
    train_step(learner, learner.task.train[:3], 1)
    monkeypatch.undo()
    return taken[0]


def gradient(policy: Policy, batch: Batch, config: Any) -> dict[str, Tensor]:
    policy.model.zero_grad()
    update.accumulate_gradient(
        policy,
        batch,
        config.loss,
        max_tokens=config.rollout.max_response_tokens,
        temperature=config.rollout.temperature,
        budget=64,
    )
    return {name: value.grad.clone() for name, value in policy.model.named_parameters() if value.grad is not None}


def test_the_gradient_is_that_of_peft_and_pytorch(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = load(base)
    learner = tiny.learner(policy, **LORA)
    batch = batch_of(learner, monkeypatch)
    assert (batch.advantages != 0).any()
    got = gradient(policy, batch, learner.config)
    assert got.keys() == adapter_of(policy.model).keys()

    own = peft.get_peft_model(plain(base), peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear"))  # type: ignore[arg-type]
    own.base_model.model.load_state_dict(policy.model.state_dict())
    loss_by_hand(own, batch, learner.config.rollout.temperature, learner.config.loss.kl_coef).backward()
    for name, value in adapter_of(own.base_model.model).items():
        scale = float(value.grad.abs().max())
        assert scale > 0, name
        torch.testing.assert_close(
            got[name], value.grad, rtol=1e-3, atol=1e-4 * scale, msg=lambda text, n=name: f"{n}: {text}"
        )

    parallel.checkpoint_activations(policy.model)
    for name, value in gradient(policy, batch, learner.config).items():
        torch.testing.assert_close(value, got[name], rtol=1e-4, atol=1e-5 * float(value.abs().max()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_moves_the_adapter_alone_and_the_average_is_of_it(base: Path, dtype: str) -> None:
    policy = load(base, getattr(torch, dtype))
    learner = tiny.learner(policy, dtype=dtype, decay=0.9, **LORA)
    momentum, before = learner.momentum, copies(dict(policy.model.named_parameters()))
    assert momentum is not None
    assert momentum.ema.keys() == adapter_of(policy.model).keys()
    want = copies(momentum.ema)
    for step in (1, 2):
        line, _ = train_step(learner, learner.task.train[3 * step : 3 * step + 3], step)
        now = adapter_of(policy.model)
        ema_update_(list(want.values()), [now[name].detach() for name in want], 0.9)
    assert line["grad_norm"] > 0
    assert line["kl"] > 0  # the base is another model than the one at the start of this test
    assert_same(momentum.ema, want)
    moved = {name for name, value in policy.model.named_parameters() if not torch.equal(value, before[name])}
    assert moved == adapter_of(policy.model).keys()
    assert float(momentum.distance(policy.model)) > 0


def test_the_reference_is_the_base_without_a_copy(base: Path) -> None:
    policy, start = load(base), load_policy(str(base), CPU, torch.float32)
    start._lean = None  # its few calls round differently
    learner = tiny.learner(policy, **LORA)
    assert learner.reference is policy.adapter

    def scored(policy: Policy) -> Tensor | None:
        return score(policy, PROMPTS, TOKENS, TOKENS > 0, temperature=1.1, budget=64, stats=("logprob",)).logprob

    own = scored(policy)
    assert learner.reference is not None
    with learner.reference.swapped_into(policy.model):
        off = scored(policy)
    assert torch.equal(off, scored(start))
    assert torch.equal(own, scored(policy))
    assert (own - off).abs().max() > 0.01
    with pytest.raises(KeyError), learner.reference.swapped_into(policy.model):
        raise KeyError
    assert torch.equal(own, scored(policy))
    assert all(value.requires_grad for value in adapter_of(policy.model).values())


def test_layers_run_by_their_own_modules(base: Path) -> None:
    for targets in ("all-linear", "down_proj"):
        policy = load(base, targets=targets)
        assert policy.unpackable is None
        assert "lean decoder" not in policy.how()
    assert "lean decoder" in load_policy(str(base), CPU, torch.float32).how()


def test_the_first_adapter_follows_from_the_seed(base: Path) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one, two = (adapter_of(load(base, moved=False).model) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)  # the caller's random numbers are left alone
    assert_same(copies(one), copies(two))
    other = adapter_of(load_policy(str(base), CPU, torch.float32, LoraConfig(RANK, ALPHA), seed=1).model)
    assert all(torch.equal(value, other[name]) == (".lora_B." in name) for name, value in one.items())
    assert torch.equal(logits(load(base, moved=False).model), logits(plain(base)))


# --- Runs


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the output of a run that nobody disturbed."""
    output = tiny.output_with(base, tmp_path_factory.mktemp("lora") / "run")
    assert command.main([*torture.flags(), *FLAGS, "--output", str(output)]) == 0
    return output


def test_a_run_trains(whole: Path, base: Path) -> None:
    lines = tiny.lines(whole)[1:]
    assert any(line["grad_norm"] for line in lines)
    assert lines[-1]["momentum_distance"] > 0
    assert lines[-1]["kl"] > 0
    saved = checkpoint.sizes(whole / "checkpoints" / "latest")
    trained = adapter_of(load(base).model)
    want = {
        f"{part}.{name}{key}"
        for name in trained
        for part, key in (
            ("model", ""),
            ("momentum", ""),
            ("optimizer", ".step"),
            ("optimizer", ".exp_avg"),
            ("optimizer", ".exp_avg_sq"),
        )
    }
    assert saved.keys() == want  # nothing of the frozen weights


def test_killed_and_resumed_gives_the_same_bits(whole: Path, base: Path, tmp_path: Path) -> None:
    output = tiny.output_with(base, tmp_path / "run")
    assert torture.killed("checkpoint", 14, output, *FLAGS)
    assert command.main(["--output", str(output), "--resume"]) == 0
    assert torture.differences(whole, output) == []
    name = "adapter_model.safetensors"
    assert (output / "final/adapter" / name).read_bytes() == (whole / "final/adapter" / name).read_bytes()


def test_resuming_wants_the_same_adapter(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags, name in (
        (["--lora-rank", "4"], "lora_rank"),
        (["--lora-alpha", "7"], "lora_alpha"),
        (["--lora-targets", "q_proj"], "lora_targets"),
    ):
        assert command.main(["--output", str(whole), "--resume", *flags]) == 2
        assert f"error: --{name.replace('_', '-')}: expected " in capsys.readouterr().err


@pytest.mark.parametrize("weights", ["policy", "momentum"])
def test_export_is_the_trained_model_merged_and_its_adapter(
    whole: Path, base: Path, tmp_path: Path, weights: str
) -> None:
    place = tmp_path / "exported"
    assert export.main(["--run", str(whole), "--weights", weights, "--to", str(place)]) == 0
    trained = load(base)
    found = checkpoint.read(whole / "checkpoints" / "latest", export.WEIGHTS[weights])
    missing, odd = trained.model.load_state_dict(found, strict=False)
    assert not odd
    assert not any(".lora_" in name for name in missing)
    want = logits(trained.model)
    assert (want - logits(plain(base))).abs().max() > 1e-2
    model = plain(place)
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in plain(base).named_parameters()}
    torch.testing.assert_close(logits(model), want, rtol=0, atol=2e-5)
    by_peft = peft.PeftModel.from_pretrained(plain(base), place / "adapter")
    assert torch.equal(logits(by_peft), want)
    final = plain(whole / "final").state_dict()
    assert all(torch.equal(value, final[name]) for name, value in model.state_dict().items()) == (weights == "policy")


def test_export_wants_every_part_of_the_adapter(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = checkpoint.read(whole / "checkpoints" / "latest", "model.")
    lost = next(name for name in found if ".lora_B." in name)
    for tensors in ({name: value for name, value in found.items() if name != lost}, {**found, "odd": torch.zeros(1)}):
        monkeypatch.setattr(checkpoint, "read", lambda place, prefix, tensors=tensors: tensors)
        with pytest.raises(UsageError, match="run: expected a checkpoint of .*, got one that differs in "):
            export.export(whole, None, "policy", tmp_path / "to")
    assert not (tmp_path / "to").exists()


def test_vllm_gets_merged_weights_of_whichever_model(base: Path) -> None:
    policy = load(base)
    momentum = MomentumModel(policy.model, frozen=False)
    for value in momentum.ema.values():
        value.mul_(0.5)
    own, start = checkpoint_weights(policy.model, untie=True), plain(base)
    with momentum.swapped_into(policy.model):
        others = checkpoint_weights(policy.model, untie=True)
        want = logits(policy.model)
    assert own.keys() == others.keys() == start.state_dict().keys()
    start.load_state_dict(own)
    torch.testing.assert_close(logits(start), logits(policy.model), rtol=0, atol=2e-5)
    start.load_state_dict(others)
    torch.testing.assert_close(logits(start), want, rtol=0, atol=2e-5)
    assert (want - logits(policy.model)).abs().max() > 1e-2


def test_what_the_plan_says_trains(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for targets in ("all-linear", "q_proj, v_proj"):
        output = tmp_path / targets
        assert command.main([*tiny.FLAGS, *FLAGS, "--lora-targets", targets, "--output", str(output), "--dry-run"]) == 0
        trained = sum(value.numel() for value in load(base, targets=targets).model.parameters() if value.requires_grad)
        assert f"  trained parameters: {trained:,} of the adapter" in capsys.readouterr().out
        assert not output.exists()


# --- Refused


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lora-rank", "0"], "error: --lora-rank: expected at least 1, got 0"),
        (["--lora-rank", "2", "--lora-alpha", "0"], "error: --lora-alpha: expected more than 0.0, got 0.0"),
        (["--lora-alpha", "2"], "error: --lora-alpha: expected --lora-rank with it"),
        (
            ["--lora-rank", "2", "--lora-targets", "q_proj,"],
            "error: --lora-targets: expected names separated by commas, got 'q_proj,'",
        ),
        (["--lora-rank", "2", "--lora-targets", "q_proj,qproj"], "v_proj, got 'qproj', which matches nothing"),
        (["--lora-rank", "2", "--lora-targets", "embed_tokens"], "got 'embed_tokens', which is a Embedding"),
        (
            ["--lora-rank", "2", "--lora-targets", "q_proj,lm_head"],
            "(not the head, whose weight the fused loss takes as it is), got 'lm_head'",
        ),
    ],
)
def test_refused(flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([*tiny.FLAGS, *flags, "--output", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_peft_is_asked_for_where_it_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    real: Callable[..., Any] = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "peft" else real(name, *rest))
    assert command.main([*tiny.FLAGS, *FLAGS, "--output", str(tmp_path / "run")]) == 2
    assert f"--lora-rank: expected the package peft, got none: {how_to_install('peft')}" in capsys.readouterr().err


def test_weights_that_are_transposed_are_merged() -> None:
    """GPT-2 has its weights as (in, out), and its head tied."""
    shape = GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(shape).eval()
    Adapter(model, LoraConfig(2, 4.0, "all-linear"), 0)
    for value in adapter_of(model).values():
        value.data.normal_()
    other = GPT2LMHeadModel(shape).eval()
    other.load_state_dict(merged_weights(model))
    ids = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(other(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    assert len(adapter_of(model)) == 8  # four layers


def test_weights_unfrozen_later_are_not_left_out_in_silence(base: Path) -> None:
    policy = load(base)
    momentum = MomentumModel(policy.model, frozen=False)
    policy.model.get_output_embeddings().weight.requires_grad_(True)
    with pytest.raises(
        ValueError, match=r"model: expected no other trained parameters than at first, got .*lm_head.weight"
    ):
        momentum.update()
    other = plain(base)
    with pytest.raises(ValueError, match="model: expected the parameters that the momentum model tracks"):
        momentum.copy_to(other)


def test_an_unknown_base_is_told(whole: Path, base: Path, tmp_path: Path) -> None:
    run = tiny.output_with(base, tmp_path / "run")
    for name in ("config.yaml", "checkpoints"):
        (run / name).symlink_to(whole / name)
    (run / "base" / "model.safetensors").unlink()
    with pytest.raises(UsageError, match="model: expected a directory with a model that transformers can load"):
        export.export(run, None, "policy", tmp_path / "to")
