"""TRL with our ops under its names, beside TRL as it is: the same runs, the same losses."""

import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_trl
import torch
import transformers
import trl.trainer.utils
from trl import GRPOTrainer, RLOOTrainer
from trl.experimental.gmpo import GMPOTrainer
from trl.trainer.utils import add_fused_lm_head

from mgrpo_kernels.integrations import IntegrationError
from mgrpo_kernels.integrations.trl import loss, patched

# Twelve micro-batches from one generation: the ratios leave 1, and the clip binds.
OFF_POLICY = {"steps_per_generation": 4, "num_iterations": 2}
LOSSES = {
    "grpo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "delta": 1.25, **OFF_POLICY},
    "grpo, token": {"loss_type": "grpo", "delta": 1.25, **OFF_POLICY},
    "bnpo": {"loss_type": "bnpo", "entropy_coef": 0.05, "top_entropy_quantile": 0.6, **OFF_POLICY},
    "dapo": {"loss_type": "dapo", "beta": 0.2, "use_bias_correction_kl": True, "epsilon_high": 0.28, **OFF_POLICY},
    "dapo, on-policy": {"loss_type": "dapo", "beta": 0.1, "gradient_checkpointing": True, "entropy_coef": 0.01},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none", "off_policy_mask_threshold": 0.05, **OFF_POLICY},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.2, **OFF_POLICY},
    "sapo": {"loss_type": "sapo", "mask_truncated_completions": True, **OFF_POLICY},
    "vespo": {"loss_type": "vespo", "learning_rate": 3e-4, **OFF_POLICY},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence", **OFF_POLICY},
    "gmpo": {"kind": "gmpo", "beta": 0.1, "epsilon": 0.1, "epsilon_high": 0.05, **OFF_POLICY},
    "gmpo, forking tokens": {"kind": "gmpo", "beta": 0.1, "top_entropy_quantile": 0.5, "epsilon": 0.02, **OFF_POLICY},
    "gmpo, on-policy": {"kind": "gmpo"},
    "rloo": {"kind": "rloo", "beta": 0.1, "num_iterations": 2},
    "rloo, normalized": {"kind": "rloo", "normalize_advantages": True, "epsilon": 0.05, "num_iterations": 3},
}
SAME = (
    "loss",
    "grad_norm",
    "entropy",
    "kl",
    "reward",
    "completions/mean_length",
    "policy_loss",
    "cispo_clip_ratio",
    "vespo/phi_seq_mean",
)
CLIPS = tuple(f"clip_ratio/{name}" for name in ("low_mean", "low_min", "high_mean", "high_max", "region_mean"))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_trl.make_base(tmp_path_factory.mktemp("base"))


def run(base, place, **changes):
    trainer = tiny_trl.trainer_of(base, place, **changes)
    trainer.train()
    return [line for line in trainer.state.log_history if "loss" in line], tiny_trl.weights(trainer.model)


def assert_same_run(plain, fused):
    assert len(plain) == len(fused) >= 2
    seen = set()
    for want, got in zip(plain, fused, strict=True):
        assert want.keys() == got.keys()  # every metric of TRL's is there
        for name in set(want) & {*SAME, *CLIPS}:
            seen.add(name)
            assert got[name] == pytest.approx(want[name], rel=1e-3, abs=1e-5), (name, want, got)
    return seen


@pytest.mark.parametrize("name", LOSSES)
def test_a_run_is_that_of_plain_trl(base, tmp_path, name):
    plain, plain_weights = run(base, tmp_path, **LOSSES[name])
    with patched(strict=True):
        fused, fused_weights = run(base, tmp_path, **LOSSES[name])
    seen = assert_same_run(plain, fused)
    assert {"loss", "grad_norm", "entropy"} <= seen
    assert all(line["grad_norm"] > 1e-3 for line in plain)
    for key, want in plain_weights.items():
        torch.testing.assert_close(fused_weights[key], want, rtol=1e-3, atol=1e-4)


def test_an_adapter_trains_as_in_plain_trl_and_one_on_the_head_is_refused(base, tmp_path):
    import peft

    def adapter(*modules):
        torch.manual_seed(1)  # of the adapter's first weights
        return {"peft_config": peft.LoraConfig(r=4, target_modules=list(modules)), "beta": 0.1, "learning_rate": 5e-2}

    plain, _ = run(base, tmp_path, **adapter("q_proj", "down_proj"), gradient_checkpointing=True)
    with patched(strict=True):
        fused, _ = run(base, tmp_path, **adapter("q_proj", "down_proj"), gradient_checkpointing=True)
        assert_same_run(plain, fused)
        with pytest.raises(ValueError, match="PEFT adapter to `lm_head` is not supported"):
            tiny_trl.trainer_of(base, tmp_path, **adapter("q_proj", "lm_head"))


@pytest.fixture(scope="module")
def trainer(base, tmp_path_factory):
    made = tiny_trl.trainer_of(base, tmp_path_factory.mktemp("out"), beta=0.1)
    made.current_gradient_accumulation_steps = 2  # what transformers sets when training starts
    return made


def batch(ratio_shape=None, advantages_shape=(4,)):
    """A micro-batch as TRL's generation leaves it: off-policy, rows of different lengths, one of them empty."""
    torch.manual_seed(2)
    lengths = torch.tensor([7, 3, 0, 5])
    mask = (torch.arange(7) < lengths.unsqueeze(1)).long()
    inputs = {
        "prompt_ids": torch.randint(2, 15, (4, 4)),
        "prompt_mask": torch.ones(4, 4, dtype=torch.long),
        "completion_ids": torch.randint(1, 15, (4, 7)),
        "completion_mask": mask,
        "advantages": torch.randn(advantages_shape),
        "num_items_in_batch": mask.sum() * 2,
        "old_per_token_logps": -3 + torch.randn(4, 7) * mask,
        "ref_per_token_logps": -3 + torch.randn(4, 7) * mask,
        "sampling_per_token_logps": -3 + torch.randn(4, 7) * mask,
        "tool_mask": torch.ones(4, 7, dtype=torch.long).index_fill(1, torch.tensor([1]), 0),
    }
    if ratio_shape is not None:
        ratio = torch.rand(ratio_shape) * 2
        ratio = torch.where(ratio < 0.3, 0.0, ratio)  # as the two mask modes leave it
        sampled = (mask * inputs["tool_mask"]).bool()
        inputs["importance_sampling_ratio"] = torch.where(sampled, ratio, 1.0) if ratio_shape == (4, 7) else ratio
    return inputs


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "luspo"])
@pytest.mark.parametrize("case", ["tools", "vllm by token", "vllm by sequence", "advantage by token"])
def test_a_batch_has_plain_trls_loss_gradient_and_metrics(trainer, monkeypatch, loss_type, case):
    if loss_type == "vespo" and case == "vllm by sequence":
        return  # TRL refuses it when the trainer is made
    shape = {"vllm by token": (4, 7), "vllm by sequence": (4, 1)}.get(case)
    inputs = batch(shape, (4, 7) if case == "advantage by token" else (4,))
    monkeypatch.setattr(trainer, "loss_type", loss_type)
    monkeypatch.setattr(trainer, "importance_sampling_level", "sequence" if loss_type == "luspo" else "token")
    monkeypatch.setattr(trainer, "epsilon_high", 1.5 if loss_type == "cispo" else 0.2)
    if shape is not None:
        monkeypatch.setattr(trainer, "use_vllm", True)
        monkeypatch.setattr(trainer, "vllm_importance_sampling_correction", True)
    head = trainer.model.lm_head.weight

    def measure():
        trainer.model.train()
        trainer._metrics["train"].clear()
        loss = trainer._compute_loss(trainer.model, inputs)
        (gradient,) = torch.autograd.grad(loss, head)
        return loss.item(), gradient, {name: values[-1] for name, values in trainer._metrics["train"].items()}

    loss, gradient, metrics = measure()
    with patched(strict=True):
        fused_loss, fused_gradient, fused_metrics = measure()
    assert fused_loss == pytest.approx(loss, rel=1e-4, abs=1e-6)
    assert gradient.norm() > 1e-4
    torch.testing.assert_close(fused_gradient, gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item())
    assert fused_metrics.keys() == metrics.keys()
    for name, value in metrics.items():
        assert fused_metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-6, nan_ok=True), name


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo", "gmpo"])
def test_the_default_dtype_changes_no_bit(trainer, monkeypatch, loss_type):
    monkeypatch.setattr(trainer, "loss_type", loss_type)
    trainer.model.train()
    inputs, results = batch(), []
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            value = loss.grpo_loss(trainer, trainer.model, inputs)
            results.append([value, *torch.autograd.grad(value, trainer.model.lm_head.weight)])
        finally:
            torch.set_default_dtype(torch.float32)
    for found in results:
        assert all(map(torch.equal, found, results[0]))
        assert found[0].dtype == torch.float32


def test_a_batch_has_gmpos_loss_gradient_and_metrics(trainer, monkeypatch):
    """Ratios far from 1, a tool mask and an empty completion; and the same as ``loss_type="gmpo"`` of MGRPOTrainer."""
    monkeypatch.setattr(trainer, "epsilon_low", 0.6)
    monkeypatch.setattr(trainer, "epsilon_high", 1.2)
    inputs = batch()
    inputs["advantages"][2] = 0.0  # of the empty one, whose ratio is 1 in TRL
    trainer.model.train()

    def measure(compute_loss):
        trainer._metrics["train"].clear()
        value = compute_loss(trainer, trainer.model, inputs)
        (gradient,) = torch.autograd.grad(value, trainer.model.lm_head.weight)
        return value.item(), gradient, {name: values[-1] for name, values in trainer._metrics["train"].items()}

    want, gradient, metrics = measure(GMPOTrainer._compute_loss)
    assert 0 < metrics["clip_ratio/high_mean"] < 0.5
    assert gradient.norm() > 1e-4
    with patched(strict=True):
        fused = measure(GMPOTrainer._compute_loss)
    monkeypatch.setattr(trainer, "loss_type", "gmpo")
    monkeypatch.setattr(trainer.args, "use_bias_correction_kl", False)  # GMPOTrainer does not read it
    for found in (fused, measure(loss.grpo_loss)):
        assert found[0] == pytest.approx(want, rel=1e-4, abs=1e-6)
        torch.testing.assert_close(found[1], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item())
        assert found[2] == pytest.approx(metrics, rel=1e-4, abs=1e-6, nan_ok=True)


def logprobs(model, tokens, labels):
    found = model(input_ids=tokens, labels=labels, fused_lm_head=True)
    (found.log_probs.sum() + found.entropy.square().sum()).backward()
    head = model.get_output_embeddings()
    gradient, head.weight.grad = head.weight.grad, None
    return found.log_probs.detach(), found.entropy.detach(), gradient


FAMILIES = {
    "cohere's logit_scale": (transformers.CohereConfig, {"logit_scale": 0.3}),
    "granite's logits_scaling": (transformers.GraniteConfig, {"logits_scaling": 4.0}),
    "gemma's soft cap": (transformers.Gemma2Config, {"head_dim": 16, "final_logit_softcapping": 2.0}),
    "phi's bias": (transformers.PhiConfig, {"num_key_value_heads": 2}),
    "output_multiplier": (transformers.LlamaConfig, {"output_multiplier": 0.4}),
    "falcon_h1's lm_head_multiplier": (transformers.LlamaConfig, {"lm_head_multiplier": 0.5}),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_multiplier_that_trl_honours(family, dtype):
    config, options = FAMILIES[family]
    sizes = {
        "vocab_size": 199,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config(**{**sizes, **options})).to(dtype)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    add_fused_lm_head(model, temperature=0.7, outputs=("log_probs", "entropy"))
    tokens = torch.randint(0, 199, (2, 9))
    labels = tokens.masked_fill(torch.arange(9) < 3, -100)
    want = logprobs(model, tokens, labels)
    with patched(strict=True):
        got = logprobs(model, tokens, labels)
    tolerance = 1e-4 if dtype == torch.float32 else 0.04  # TRL rounds bf16 logits to bf16
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance * theirs.abs().max().item())


def test_a_head_that_fsdp2_has_sharded(base):
    """Two processes, a mesh over both: each holds half of the head, uneven at 15 words."""
    results = subprocess.run(
        [sys.executable, str(Path(__file__).parents[1] / "forked_ranks.py"), "trl.trainer.utils",
         str(Path(__file__).with_name("sharded_head.py")), base],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300, check=False,
    )  # fmt: skip
    assert results.returncode == 0, results.stderr[-3000:]
    assert results.stdout.count("the same") == 2


def test_a_batch_in_which_nothing_counts(trainer):
    inputs = batch()
    inputs["completion_mask"] = torch.zeros_like(inputs["completion_mask"])
    with patched(strict=True):
        loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    assert loss.item() == 0
    assert all((p.grad == 0).all() for p in trainer.model.parameters() if p.grad is not None)


def test_undo_restores_the_very_same_objects():
    def now():
        names = (trl.trainer.utils._ChunkedLogProbFunction, trl.trainer.utils._use_triton)
        return (*names, GRPOTrainer.__dict__["_compute_loss"], RLOOTrainer.__dict__["_compute_loss"])

    before = now()
    handle = patched()
    assert all(a is not b for a, b in zip(before, now(), strict=True))
    with patched(strict=True):
        pass
    handle.undo()
    assert all(a is b for a, b in zip(before, now(), strict=True))


def test_what_moved_is_named(monkeypatch):
    before = GRPOTrainer._compute_loss
    with monkeypatch.context() as patch:
        patch.delattr(trl.trainer.utils, "_ChunkedLogProbFunction")
        with pytest.raises(
            IntegrationError, match=r"trl.trainer.utils._ChunkedLogProbFunction: this version of trl has no such name"
        ):
            patched()
    monkeypatch.setattr(RLOOTrainer, "_compute_loss", lambda self, model, batch: None)
    with pytest.raises(
        IntegrationError, match=r"RLOOTrainer._compute_loss: expected the parameters \(self, model, inputs\)"
    ):
        patched()
    assert GRPOTrainer._compute_loss is before


def test_gmpo_clips_logarithms_of_ratios():
    """Between log(1 + epsilon) and epsilon a bound of the ratio itself would clip, and between log(1 - epsilon) and -epsilon it would not."""
    trainer = SimpleNamespace(epsilon_low=0.4, epsilon_high=0.4)
    moved = torch.tensor([[0.39, 0.41, -0.39, -0.41]]).repeat(2, 1)
    inputs = {"old_per_token_logps": torch.full((2, 4), -3.0), "advantages": torch.tensor([1.0, -1.0])}
    low, high = loss.clipped_by_log_ratio(trainer, inputs, moved - 3.0, torch.ones(2, 4, dtype=torch.bool))
    assert low.tolist() == [[False] * 4, [False, False, False, True]]
    assert high.tolist() == [[False, True, False, False], [False] * 4]


@pytest.mark.parametrize("loss_type", ["gmpo", "dppo_tv"])
def test_a_loss_that_trls_trainer_does_not_have_is_refused_by_trl(trainer, monkeypatch, loss_type):
    monkeypatch.setattr(trainer, "loss_type", loss_type)
    with patched(), pytest.raises(ValueError, match=f"Unknown loss type: {loss_type}"):
        trainer._compute_loss(trainer.model, batch())


def test_what_cannot_run_fused_says_so_once(trainer, base, monkeypatch, caplog):
    monkeypatch.setattr(trainer, "use_adaptive_entropy", True)
    inputs = batch()
    del inputs["tool_mask"]
    reason = (
        "GRPOTrainer._compute_loss runs trl's own code: the controller of use_adaptive_entropy lives inside that method"
    )
    with patched(strict=True), pytest.raises(IntegrationError, match=reason):
        trainer._compute_loss(trainer.model, inputs)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    tokens = torch.randint(2, 15, (2, 6))
    want = model(input_ids=tokens, labels=tokens, fused_lm_head=True)
    head = "_ChunkedLogProbFunction runs trl's own code: the fused head has no is_top1"
    with patched(), caplog.at_level(logging.WARNING, logger="mgrpo_kernels"):
        for _ in range(2):
            trainer._compute_loss(trainer.model, inputs)
            got = model(input_ids=tokens, labels=tokens, fused_lm_head=True)
    assert [r.getMessage() for r in caplog.records if "own code" in r.getMessage()] == [reason, head]
    assert torch.equal(got.is_top1, want.is_top1)
    with patched(strict=True), pytest.raises(IntegrationError, match=head):
        model(input_ids=tokens, labels=tokens, fused_lm_head=True)
    double = transformers.AutoModelForCausalLM.from_pretrained(base).double()
    add_fused_lm_head(double)
    with patched(strict=True), pytest.raises(IntegrationError, match=r"no kernel runs torch.float64 on cpu"):
        double(input_ids=tokens, labels=tokens, fused_lm_head=True)


def test_a_head_without_a_kernel_runs_trls_code(trainer, monkeypatch, caplog):
    from mgrpo_kernels import _native

    monkeypatch.setattr(_native, "missing", lambda: "the extension is not built")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with (
        patched(strict=True),
        pytest.raises(IntegrationError, match="no kernel runs torch.float32 on cpu .*the extension is not built"),
    ):
        trainer._compute_loss(trainer.model, batch())
    want = trainer._compute_loss(trainer.model, batch())
    with patched(), caplog.at_level(logging.WARNING, logger="mgrpo_kernels"):
        assert trainer._compute_loss(trainer.model, batch()).item() == pytest.approx(want.item(), rel=1e-5)
    assert sum("_ChunkedLogProbFunction runs trl's own code" in r.getMessage() for r in caplog.records) == 1
