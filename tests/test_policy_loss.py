"""Group advantages and policy losses: TRL's own code as the oracle, every backend against the reference."""

import collections
import functools
import inspect
import itertools
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from absent import need_instructions
from contract import BACKENDS, each_backend, poisoned_memory
from torch._dynamo.testing import CompileCounterWithBackend

from mgrpo_kernels import group_advantages, grpo_loss, linear_policy_loss, policy_loss
from mgrpo_kernels.ops.policy_loss import OP, check_options, check_tokens, pack, policy_loss_op
from mgrpo_kernels.ops.policy_loss.specs import KL_ESTIMATORS, LOSS_TYPES, METRICS, LossOptions

B, L = 5, 7


def batch(seed=0, *, dtype=torch.float32, empty=True):
    generator = torch.Generator().manual_seed(seed)

    def noise(scale):
        return torch.randn(B, L, generator=generator) * scale

    mask = torch.rand(B, L, generator=generator) > 0.3
    mask[:, 0] = True
    mask[2] = not empty
    logprobs = noise(0.5) - 1.5
    old = logprobs + noise(0.3)
    tensors = {
        "logprobs": logprobs,
        "old_logprobs": old,
        "ref_logprobs": logprobs + noise(0.3),
        "behaviour_logprobs": old + noise(0.5),
        "entropy": noise(1.0).abs(),
    }
    advantages = torch.randn(B, generator=generator)
    advantages[1] = 0.0
    return {name: t.to(dtype) for name, t in tensors.items()}, mask, advantages.to(dtype)


def trl_loss(
    tensors, mask, advantages, *, loss_type, level, kl_coef, bias_correction, delta, behaviour_mode, cap, entropy_coef
):
    """GRPOTrainer._compute_loss itself, on a stand-in for the trainer."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    logprobs, entropy = tensors["logprobs"], tensors["entropy"]
    metrics = collections.defaultdict(lambda: collections.defaultdict(list))
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (logprobs, entropy, None),
        accelerator=SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x, num_processes=1, sync_gradients=True),
        args=SimpleNamespace(
            use_bias_correction_kl=bias_correction, delta=delta, steps_per_generation=1,
            sapo_temperature_pos=1.0, sapo_temperature_neg=1.05,
            vespo_k_pos=2.0, vespo_lambda_pos=3.0, vespo_k_neg=3.0, vespo_lambda_neg=2.0,
        ),
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None, importance_sampling_level=level,
        beta=kl_coef, loss_type=loss_type, epsilon_low=0.2, epsilon_high=5.0 if loss_type == "cispo" else 0.28,
        use_vllm=behaviour_mode is not None, vllm_importance_sampling_correction=True, model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1, max_completion_length=11, _entropy_bonus_enabled=entropy_coef != 0,
        use_adaptive_entropy=False, entropy_coef=entropy_coef, _metrics=metrics, get_gamma_weights=GRPOTrainer.get_gamma_weights,
    )  # fmt: skip
    inputs = {
        "prompt_ids": torch.zeros(B, 1, dtype=torch.int64),
        "prompt_mask": torch.ones(B, 1, dtype=torch.int64),
        "completion_ids": torch.zeros(B, L, dtype=torch.int64),
        "completion_mask": mask.long(),
        "advantages": advantages,
        "old_per_token_logps": tensors["old_logprobs"],
        "ref_per_token_logps": tensors["ref_logprobs"],
        "num_items_in_batch": mask.sum(),
    }
    if behaviour_mode is not None:  # as _generate_and_score_completions makes it
        difference = (tensors["old_logprobs"] - tensors["behaviour_logprobs"]) * mask
        ratio = (difference.sum(-1, keepdim=True) if behaviour_mode.startswith("sequence") else difference).exp()
        ratio = ratio.clamp(max=cap) if behaviour_mode.endswith("truncate") else ratio.masked_fill(ratio > cap, 0.0)
        inputs["importance_sampling_ratio"] = ratio
    return GRPOTrainer._compute_loss(trainer, None, inputs), metrics["train"]


TRL_LOSS_TYPES = [name for name in LOSS_TYPES if name not in ("dppo_tv", "dppo_kl", "gmpo")]
CASES = [
    case
    for case in itertools.product(
        TRL_LOSS_TYPES,
        ("token", "sequence"),
        (None, "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"),
        (0, 1, 2),
    )
    if not (case[0] == "vespo" and (case[2] or "").startswith("sequence"))
]


@each_backend(OP)
@pytest.mark.parametrize(("loss_type", "level", "mode", "variant"), CASES)
def test_means_what_trl_means(backend, loss_type, level, mode, variant):
    kl_coef, bias_correction, delta, entropy_coef = [
        (0.0, False, None, 0.0),
        (0.1, False, 1.1, 0.01),
        (0.1, True, None, 0.0),
    ][variant]
    tensors, mask, advantages = batch(variant)
    results = []
    for ours in (False, True):
        leaves = {**tensors, **{name: tensors[name].clone().requires_grad_() for name in ("logprobs", "entropy")}}
        if ours:
            given = {name: t if t.requires_grad else torch.where(mask, t, torch.nan) for name, t in leaves.items()}
            if mode is None:
                del given["behaviour_logprobs"]
            result = policy_loss(
                given.pop("logprobs"),
                given.pop("old_logprobs"),
                advantages,
                mask=mask,
                **given,
                loss_type=loss_type,
                importance_level=level,
                clip_low=0.2,
                clip_high=0.28,
                clip_delta=delta,
                kl_coef=kl_coef,
                kl_bias_correction=bias_correction,
                entropy_coef=entropy_coef,
                behaviour_mode=mode or "token_truncate",
                behaviour_cap=1.4,
                max_response_tokens=11,
                backend=backend,
            )
            loss, metrics = result
        else:
            loss, seen = trl_loss(
                leaves,
                mask,
                advantages,
                loss_type=loss_type,
                level=level,
                kl_coef=kl_coef,
                bias_correction=bias_correction,
                delta=delta,
                behaviour_mode=mode,
                cap=1.4,
                entropy_coef=entropy_coef,
            )
        grads = torch.autograd.grad(loss, [leaves["logprobs"], leaves["entropy"]], allow_unused=True)
        results.append((loss.detach(), grads[0], torch.zeros_like(mask.float()) if grads[1] is None else grads[1]))
    for theirs, mine in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=3e-5, atol=1e-6)
    tokens = mask.sum().item()
    if kl_coef:
        assert metrics["kl_sum"].item() / tokens == pytest.approx(seen["kl"][0], rel=1e-4)
    assert metrics["entropy_sum"].item() / tokens == pytest.approx(seen["entropy"][0], rel=1e-4)
    if level == "token" and "clip_ratio/low_mean" in seen:
        assert metrics["clip_low_count"].item() / tokens == pytest.approx(seen["clip_ratio/low_mean"][0])
        assert metrics["clip_high_count"].item() / tokens == pytest.approx(seen["clip_ratio/high_mean"][0])


@each_backend(OP)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_packed_is_padded(backend, loss_type, level):
    tensors, mask, advantages = batch()
    keep = mask.clone()
    keep[0, -1] = False
    offsets = torch.cat([torch.zeros(1, dtype=torch.int32), mask.sum(1).cumsum(0).int()])
    names = ("logprobs", "old_logprobs")
    padded_in, packed_in = [tensors[n] for n in names], [tensors[n][mask] for n in names]
    options = {
        "loss_type": loss_type,
        "importance_level": level,
        "max_response_tokens": L,
        "kl_coef": 0.1,
        "backend": backend,
    }
    padded_in[0], packed_in[0] = padded_in[0].clone().requires_grad_(), packed_in[0].clone().requires_grad_()
    padded = policy_loss(*padded_in, advantages, mask=keep, ref_logprobs=tensors["ref_logprobs"], **options)
    packed = policy_loss(
        *packed_in,
        advantages,
        mask=keep[mask],
        cu_seqlens=offsets,
        ref_logprobs=tensors["ref_logprobs"][mask],
        **options,
    )
    torch.testing.assert_close(padded.loss, packed.loss)
    a, b = torch.autograd.grad(padded.loss, padded_in[0])[0], torch.autograd.grad(packed.loss, packed_in[0])[0]
    torch.testing.assert_close(a[mask], b)
    for name in METRICS:
        torch.testing.assert_close(padded.metrics[name], packed.metrics[name])


@each_backend(OP)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_micro_batches_add_up(backend, loss_type):
    tensors, mask, advantages = batch()
    options = {
        "loss_type": loss_type,
        "max_response_tokens": L,
        "entropy_coef": 0.02,
        "kl_coef": 0.1,
        "backend": backend,
    }
    sequences = loss_type in ("grpo", "sapo", "luspo", "dr_grpo", "gmpo")
    normalizer = (B * L if loss_type == "dr_grpo" else B) if sequences else mask.sum().item()

    def part(rows, **more):
        cut = {name: t[rows] for name, t in tensors.items()}
        return policy_loss(
            cut.pop("logprobs"), cut.pop("old_logprobs"), advantages[rows], mask=mask[rows], **cut, **options, **more
        )

    whole = part(slice(None))
    parts = [part(rows, normalizer=normalizer, entropy_normalizer=mask.sum()) for rows in (slice(0, 2), slice(2, B))]
    torch.testing.assert_close(sum(p.loss for p in parts), whole.loss)
    for name in METRICS:
        values = [p.metrics[name] for p in parts]
        torch.testing.assert_close(max(values) if name == "ratio_max" else sum(values), whole.metrics[name])


@each_backend(OP)
def test_everything_masked(backend):
    logprobs = torch.full((B, L), torch.nan, requires_grad=True)
    for loss_type, level in itertools.product(LOSS_TYPES, ("token", "sequence")):
        result = policy_loss(
            logprobs,
            logprobs.detach(),
            torch.ones(B),
            mask=torch.zeros(B, L, dtype=torch.bool),
            loss_type=loss_type,
            importance_level=level,
            max_response_tokens=L,
            entropy=torch.full((B, L), torch.nan),
            entropy_coef=0.1,
            ref_logprobs=logprobs.detach(),
            kl_coef=0.1,
            behaviour_logprobs=logprobs.detach(),
            backend=backend,
        )
        assert result.loss == 0
        assert (torch.autograd.grad(result.loss, logprobs)[0] == 0).all()
        assert result.metrics["tokens"] == 0


@each_backend(OP)
def test_a_nan_that_counts_is_not_swallowed(backend):
    for loss_type in LOSS_TYPES:
        for advantage in (1.0, 0.0, -1.0):
            logprobs = torch.zeros(2, 3)
            logprobs[0, 1] = torch.nan
            logprobs.requires_grad_()
            result = policy_loss(
                logprobs,
                torch.zeros(2, 3),
                torch.full((2,), advantage),
                loss_type=loss_type,
                max_response_tokens=3,
                backend=backend,
            )
            assert result.loss.isnan(), (loss_type, advantage)


@each_backend(OP)
def test_on_policy(backend):
    tensors, mask, advantages = batch()
    logprobs = tensors["logprobs"].clone().requires_grad_()
    implicit = policy_loss(logprobs, None, advantages, mask=mask, backend=backend)
    explicit = policy_loss(logprobs, logprobs.detach(), advantages, mask=mask, backend=backend)
    assert torch.equal(implicit.loss, explicit.loss)
    assert torch.equal(*(torch.autograd.grad(each.loss, logprobs)[0] for each in (implicit, explicit)))
    assert implicit.metrics["ratio_max"] == 1


@each_backend(OP)
def test_advantages_per_token(backend):
    tensors, mask, advantages = batch()
    per_token = advantages.unsqueeze(1).expand(B, L)
    results = [
        policy_loss(tensors["logprobs"], tensors["old_logprobs"], a, mask=mask, backend=backend)
        for a in (advantages, per_token)
    ]
    torch.testing.assert_close(results[0].loss, results[1].loss)


@each_backend(OP)
def test_huge_ratios_stay_out_of_what_does_not_count(backend):
    logprobs = torch.tensor([[200.0, 0.0]]).requires_grad_()
    result = policy_loss(logprobs, torch.zeros(1, 2), torch.tensor([[0.0, 1.0]]), backend=backend)
    assert result.loss.isfinite()
    assert torch.autograd.grad(result.loss, logprobs)[0].isfinite().all()


def naive_advantages(rewards, offsets, mask, baseline, scale, eps):
    out = torch.zeros_like(rewards)
    kept_all = rewards[mask]
    for begin, end in itertools.pairwise(offsets):
        index = [i for i in range(begin, end) if mask[i]]
        members = rewards[index]
        if len(index) < 2 or members.min() == members.max():
            continue
        for i in index:
            others = members.mean() if baseline == "mean" else (members.sum() - rewards[i]) / (len(index) - 1)
            mean = members.mean().abs()
            divisor = {"std": members.std() + eps, "batch": kept_all.std() + eps, "none": 1.0, "mean": mean + eps}[
                scale
            ]
            out[i] = (rewards[i] - others) / divisor
    return out


@hypothesis.settings(deadline=None, max_examples=30)
@hypothesis.given(
    sizes=st.lists(st.integers(0, 6), min_size=1, max_size=5),
    seed=st.integers(0, 9999),
    baseline=st.sampled_from(["mean", "leave_one_out"]),
    scale=st.sampled_from(["std", "batch", "none", "mean"]),
    binary=st.booleans(),
)
@each_backend(OP)
def test_group_advantages(backend, sizes, seed, baseline, scale, binary):
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    rewards = torch.rand(int(offsets[-1]), generator=generator)
    rewards = rewards.round() if binary else rewards
    mask = torch.rand(rewards.shape, generator=generator) > 0.2
    want = naive_advantages(rewards.double(), offsets.tolist(), mask, baseline, scale, 1e-6)
    rewards[~mask] = torch.nan
    got = group_advantages(rewards, offsets, mask=mask, baseline=baseline, scale=scale, backend=backend)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)
    assert (got[~mask] == 0).all()


@each_backend(OP)
@pytest.mark.parametrize("scale", ["std", "none", "mean"])
def test_equal_rewards_teach_nothing_without_an_eps_either(backend, scale):
    """Their standard deviation of 0 divides nothing."""
    assert group_advantages(torch.full((6,), 0.1), 3, scale=scale, eps=0.0, backend=backend).tolist() == [0.0] * 6


@each_backend(OP)
def test_equal_rewards_teach_nothing(backend):
    assert (group_advantages(torch.full((12,), 0.1), 4, backend=backend) == 0).all()
    assert (group_advantages(torch.tensor([1.0]), 1, backend=backend) == 0).all()
    assert (
        group_advantages(torch.rand(4), 4, mask=torch.tensor([True, False, False, False]), backend=backend) == 0
    ).all()
    assert group_advantages(torch.zeros(0), torch.zeros(3, dtype=torch.int32), backend=backend).shape == (0,)


@each_backend(OP)
def test_a_nan_reward_reaches_its_group_alone(backend):
    got = group_advantages(torch.tensor([1.0, torch.nan, 1.0, 0.0]), 2, backend=backend)
    assert got[:2].isnan().all()
    assert got[2:].isfinite().all()


@each_backend(OP)
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@pytest.mark.parametrize("scale", ["std", "batch", "none", "mean"])
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "vespo", "gmpo"])
def test_grpo_loss_is_advantages_then_loss(backend, baseline, scale, loss_type):
    generator = torch.Generator().manual_seed(1)
    logprobs = torch.randn(6, 4, generator=generator)
    old, rewards = logprobs + 0.1, torch.rand(6, generator=generator)
    keep = torch.tensor([True, True, False, True, True, True])
    mask = torch.rand(6, 4, generator=generator) > 0.2
    rewards[2] = torch.nan
    mine, theirs = (logprobs.clone().requires_grad_() for _ in range(2))
    with poisoned_memory():
        got = grpo_loss(
            mine,
            old,
            rewards,
            3,
            rollout_mask=keep,
            mask=mask,
            baseline=baseline,
            scale=scale,
            loss_type=loss_type,
            backend=backend,
        )
    advantages = group_advantages(rewards, 3, mask=keep, baseline=baseline, scale=scale, backend=backend)
    want = policy_loss(
        theirs,
        old,
        advantages,
        mask=mask & keep.unsqueeze(1),
        loss_type=loss_type,
        backend=backend,
        normalizer=keep.sum() if loss_type in ("grpo", "gmpo") else None,
    )
    torch.testing.assert_close(got.loss, want.loss)
    torch.testing.assert_close(torch.autograd.grad(got.loss, mine)[0], torch.autograd.grad(want.loss, theirs)[0])
    assert got.metrics["sequences"] == 5
    assert got.metrics["tokens"] == want.metrics["tokens"]


@pytest.mark.parametrize(
    "loss_type", [name for name in LOSS_TYPES if name not in ("cispo", "vespo", "dppo_tv", "dppo_kl")]
)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("mode", [None, "token_mask", "sequence_truncate"])
@pytest.mark.parametrize("bias_correction", [False, True])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_gradcheck_in_float64(loss_type, level, mode, bias_correction, estimator):
    """Where the loss is the function whose derivative is wanted. (cispo, vespo and dppo hold their weights constant.)"""
    tensors, mask, advantages = batch(dtype=torch.float64)

    def function(logprobs, entropy):
        return policy_loss(
            logprobs,
            tensors["old_logprobs"],
            advantages,
            mask=mask,
            ref_logprobs=tensors["ref_logprobs"],
            entropy=entropy,
            behaviour_logprobs=None if mode is None else tensors["behaviour_logprobs"],
            behaviour_mode=mode or "token_truncate",
            loss_type=loss_type,
            importance_level=level,
            kl_coef=0.1,
            kl_estimator=estimator,
            kl_bias_correction=bias_correction,
            entropy_coef=0.1,
            clip_delta=1.3,
            max_response_tokens=L,
        ).loss

    inputs = tensors["logprobs"].requires_grad_(), tensors["entropy"].requires_grad_()
    # One random direction through all elements of an input, to a tolerance in which each of them counts.
    torch.autograd.gradcheck(function, inputs, fast_mode=True, rtol=1e-5, atol=1e-7)


@each_backend(OP)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_are_computed_in_float32(backend, dtype):
    tensors, mask, advantages = batch()
    logprobs = tensors["logprobs"].to(dtype)
    got = policy_loss(
        logprobs.clone().requires_grad_(), tensors["old_logprobs"], advantages, mask=mask, backend=backend
    )
    want = policy_loss(logprobs.float(), tensors["old_logprobs"], advantages, mask=mask, backend=backend)
    assert got.loss.dtype == torch.float32
    torch.testing.assert_close(got.loss.detach(), want.loss)


@each_backend(OP)
def test_opcheck(backend):
    tensors, mask, advantages = batch(empty=False)
    options = check_options(LossOptions(kl_coef=0.1, entropy_coef=0.1))
    tokens = check_tokens(
        tensors["logprobs"].requires_grad_(),
        tensors["old_logprobs"],
        mask,
        None,
        tensors["ref_logprobs"],
        tensors["entropy"].requires_grad_(),
        tensors["behaviour_logprobs"],
        None,
        3.0,
        options,
    )._replace(advantages=advantages)
    torch.library.opcheck(policy_loss_op, (*pack(tokens, None, options), backend))


@each_backend(OP)
def test_compiles_whole_and_recompiles_once(backend):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def function(logprobs, old, rewards):
        return grpo_loss(logprobs, old, rewards, 2, backend=backend).loss

    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for length in (4, 6, 9, 13):
        logprobs, rewards = torch.randn(6, length, requires_grad=True), torch.rand(6)
        old = logprobs.detach() + 0.1
        torch.testing.assert_close(
            *(torch.autograd.grad(f(logprobs, old, rewards), logprobs)[0] for f in (compiled, function))
        )
    assert counter.frame_count <= 2


def test_second_derivative_is_refused():
    logprobs = torch.randn(2, 3, requires_grad=True)
    loss = policy_loss(logprobs, None, torch.tensor([1.0, 2.0])).loss
    (grad,) = torch.autograd.grad(loss.square(), logprobs, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivative only"):
        grad.sum().backward()


# What vectors, blocks of tokens and threads could get wrong.

BLOCK = 1024  # of csrc/cpu/policy_loss.h
SIZES = (1, 2, 7, 8, 9, 15, 16, 17, 31, 33, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 21)


def ragged(tokens, generator):
    """Return offsets of sequences that are empty, short, or longer than a block."""
    cuts = torch.cat([torch.randint(0, tokens + 1, (9,), generator=generator), torch.tensor([0, tokens, tokens])])
    return torch.cat([torch.zeros(1, dtype=torch.int64), cuts]).sort().values


@each_backend(OP)
@pytest.mark.parametrize("tokens", SIZES)
@pytest.mark.parametrize(
    ("loss_type", "more"),
    [
        ("dapo", {"clip_delta": 1.3}),
        ("grpo", {"behaviour_mode": "token_mask"}),
        ("grpo", {"importance_level": "sequence", "behaviour_mode": "sequence_truncate"}),
        ("luspo", {"importance_level": "sequence", "kl_bias_correction": True, "behaviour_mode": "sequence_mask"}),
        ("cispo", {"cispo_cap": 1.1, "kl_estimator": "k2"}),
        ("sapo", {"kl_estimator": "k1"}),
        ("vespo", {"behaviour_mode": "token_mask"}),
        ("vespo", {}),
        ("grpo", {"behaviour_mode": "geometric_mask", "behaviour_floor": 0.9, "geometric_cap": 1.15}),
        ("sapo", {"behaviour_mode": "none", "off_policy_delta": 0.01}),
        ("vespo", {"behaviour_floor": 0.8, "geometric_floor": 0.95, "off_policy_delta": 0.01}),
        ("dppo_tv", {"dppo_tv_bounds": (0.02, 0.03), "behaviour_mode": "geometric_truncate"}),
        ("dppo_kl", {"dppo_kl_bounds": (0.002, 0.003), "dppo_cap": 1.2, "importance_level": "sequence"}),
        ("gmpo", {"clip_low": 0.1, "clip_high": 0.15, "kl_bias_correction": True}),
        ("gmpo", {"behaviour_mode": "geometric_truncate", "off_policy_delta": 0.01}),
    ],
)
@pytest.mark.parametrize("masked", [False, True])
def test_any_number_of_tokens(backend, tokens, loss_type, more, masked):
    generator = torch.Generator().manual_seed(tokens)
    offsets = ragged(tokens, generator)
    number = offsets.shape[0] - 1
    old = torch.randn(tokens, generator=generator) - 1.5
    names = ("logprobs", "ref_logprobs", "behaviour_logprobs")
    given = {name: old + 0.3 * torch.randn(tokens, generator=generator) for name in names}
    given |= {"old_logprobs": old, "entropy": torch.rand(tokens, generator=generator)}
    mask = torch.rand(tokens, generator=generator) > 0.4 if masked else None
    rewards = torch.randn(number, generator=generator)
    keep = torch.rand(number, generator=generator) > 0.3 if masked else None
    if masked:
        kept = mask & keep.repeat_interleave(offsets.diff())
        poison = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e38]).repeat(tokens)[:tokens]
        given = {name: torch.where(kept, values, poison) for name, values in given.items()}
    options = {
        "cu_seqlens": offsets,
        "mask": mask,
        "rollout_mask": keep,
        "loss_type": loss_type,
        "kl_coef": 0.1,
        **more,
    }
    results = []
    for name, dtype in (("reference", torch.float64), (backend, torch.float32)):
        tensors = {key: values.to(dtype) for key, values in given.items()}
        logprobs = tensors.pop("logprobs").requires_grad_()
        with poisoned_memory():
            result = grpo_loss(logprobs, rewards=rewards.to(dtype), groups=number, **tensors, **options, backend=name)
        results.append((result, torch.autograd.grad(result.loss, logprobs)[0].float()))
    (want, want_grad), (got, grad) = results
    torch.testing.assert_close(got.loss, want.loss.float(), rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(grad, want_grad, rtol=1e-4, atol=2e-5 * want_grad.abs().max().item())
    for name in METRICS:
        torch.testing.assert_close(got.metrics[name], want.metrics[name], rtol=2e-5, atol=2e-5)
    if masked:
        assert (grad[~kept] == 0).all()


ODD = list(
    itertools.product(
        [torch.nan, torch.inf, -torch.inf, 200.0, -200.0, 89.0, -100.0, 0.0, 0.1, -0.5, 0.5],  # log ratios
        [0.0, 1.0, -1.0, torch.nan, torch.inf, -torch.inf],  # advantages
    )
)


@functools.cache
def of_odd_numbers(backend, loss_type, clip, delta):
    """Return loss, gradient and metrics of each pair of `ODD` in the middle of three tokens."""
    found = []
    for ratio, advantage in ODD:
        logprobs = torch.tensor([[0.0, ratio, 0.0]], requires_grad=True)
        loss, metrics = policy_loss(
            logprobs,
            torch.zeros(1, 3),
            torch.tensor([[0.5, advantage, -0.5]]),
            loss_type=loss_type,
            clip_low=clip,
            clip_high=clip,
            clip_delta=delta,
            backend=backend,
        )
        found.append([loss.detach(), torch.autograd.grad(loss, logprobs)[0], *metrics.values()])
    return found


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
@pytest.mark.parametrize("loss_type", ["dapo", "cispo", "sapo", "vespo", "dppo_tv", "dppo_kl", "gmpo"])
@pytest.mark.parametrize(("clip", "delta"), [(0.2, None), (0.2, 1.5), (0.0, 1.0)])
def test_numbers_that_are_none(backend, loss_type, clip, delta):
    """NaN, infinities, overflow and ties, each on its own: what is NaN, infinite or nothing is so in the reference."""
    cases = (of_odd_numbers(name, loss_type, clip, delta) for name in ("reference", backend))
    for (ratio, advantage), *results in zip(ODD, *cases, strict=True):
        for want, got in zip(*results, strict=True):
            torch.testing.assert_close(
                got, want, rtol=1e-5, atol=1e-7, equal_nan=True, msg=f"{ratio} {advantage}: {got}, not {want}"
            )


def test_the_native_exponential():
    """The gradient of a loss that is the ratio: within about an ulp of the truth, subnormal, overflowed and NaN too."""
    x = torch.cat(
        [
            torch.linspace(-110, 95, 200_003),
            torch.linspace(-1, 1, 4099),
            torch.tensor([torch.inf, -torch.inf, torch.nan]),
        ]
    )
    logprobs = x.clone().requires_grad_()
    loss = policy_loss(
        logprobs,
        torch.zeros_like(x),
        torch.full_like(x, -1.0),
        cu_seqlens=torch.tensor([0, x.shape[0]]),
        loss_type="dapo",
        clip_low=1.0,
        clip_high=0.0,
        normalizer=1.0,
        backend="native",
    ).loss
    got, want = torch.autograd.grad(loss, logprobs)[0][:-1], x[:-1].double().exp()
    rounded = want.float()
    assert torch.equal(got.isinf(), rounded.isinf())
    finite = rounded.isfinite()
    ulp = (torch.nextafter(rounded, torch.tensor(torch.inf)) - rounded).double()[finite]
    assert (((got.double() - want)[finite]).abs() / ulp).max() < 1.1
    assert loss.isnan()


@each_backend(OP)
def test_the_number_of_threads_changes_no_bit(backend):
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(40, 999, generator=generator)
    logprobs = (old + 0.2 * torch.randn(40, 999, generator=generator)).requires_grad_()
    advantages, mask = torch.randn(40, generator=generator), torch.rand(40, 999, generator=generator) > 0.2
    before, seen = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            for level in ("token", "sequence"):
                loss, metrics = policy_loss(
                    logprobs, old, advantages, mask=mask, importance_level=level, backend=backend
                )
                seen.append((level, loss.detach(), torch.autograd.grad(loss, logprobs)[0], *metrics.values()))
        finally:
            torch.set_num_threads(before)
    for one, other in zip(seen[:-2], seen[2:], strict=True):
        assert one[0] == other[0]
        if backend == "native":
            assert all(map(torch.equal, one[1:], other[1:]))
        else:
            assert all(map(torch.allclose, one[1:], other[1:]))


OLDER = [isa for isa in ("default", "avx2") if isa.upper() != torch.backends.cpu.get_cpu_capability()]


@pytest.mark.parametrize("isa", OLDER)
def test_other_instruction_sets(isa):
    """The tests above as a CPU with another instruction set would run them."""
    need_instructions(isa.upper())
    names = "native and (any_number or none or exponential or trl)"
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", names, __file__],
        env={**os.environ, "ATEN_CPU_CAPABILITY": isa},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout


GOOD = {"logprobs": torch.zeros(2, 3), "old_logprobs": torch.zeros(2, 3), "advantages": torch.zeros(2)}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"logprobs": torch.zeros(6)},
            ValueError,
            r"logprobs: expected padded \(B, L\), or packed \(N,\) with cu_seqlens, got \(6,\) without",
        ),
        (
            {"cu_seqlens": torch.tensor([0, 2])},
            ValueError,
            r"logprobs: expected packed \(N,\) with cu_seqlens, got \(2, 3\)",
        ),
        ({"old_logprobs": torch.zeros(3, 2)}, ValueError, r"old_logprobs: expected shape \(2, 3\), got \(3, 2\)"),
        ({"advantages": torch.zeros(3)}, ValueError, r"advantages: expected shape \(2,\) or \(2, 3\), got \(3,\)"),
        ({"advantages": [1.0, 2.0]}, TypeError, "advantages: expected a tensor, got list"),
        ({"mask": torch.ones(2, dtype=torch.bool)}, ValueError, r"mask: expected shape \(2, 3\), got \(2,\)"),
        (
            {"loss_type": "ppo"},
            ValueError,
            "loss_type: expected one of grpo, bnpo, dapo, dr_grpo, cispo, sapo, vespo, luspo, dppo_tv, dppo_kl, gmpo, got 'ppo'",
        ),
        ({"importance_level": "word"}, ValueError, "importance_level: expected one of token, sequence"),
        ({"kl_estimator": "k4"}, ValueError, "kl_estimator: expected one of k1, k2, k3"),
        ({"behaviour_mode": "clip"}, ValueError, "behaviour_mode: expected one of"),
        ({"kl_coef": 0.1}, ValueError, "ref_logprobs: expected a tensor with kl_coef 0.1, got None"),
        ({"entropy_coef": 0.1}, ValueError, "entropy: expected a tensor with entropy_coef 0.1, got None"),
        ({"loss_type": "dr_grpo"}, ValueError, "max_response_tokens: expected an int with loss_type 'dr_grpo'"),
        ({"clip_low": -0.1}, ValueError, "clip_low: expected at least 0.0 and at most 1.0, got -0.1"),
        ({"clip_high": float("nan")}, ValueError, "clip_high: expected a finite number"),
        ({"clip_delta": 0.0}, ValueError, "clip_delta: expected more than 0.0"),
        ({"behaviour_cap": 0}, ValueError, "behaviour_cap: expected more than 0.0"),
        ({"cispo_cap": 0}, ValueError, "cispo_cap: expected more than 0.0"),
        ({"sapo_temperature": 1.0}, TypeError, "sapo_temperature: expected a pair"),
        ({"vespo_k": (1.0, -1.0)}, ValueError, "vespo_k: expected at least 0.0, got -1.0"),
        ({"vespo_lambda": (1.0,)}, TypeError, "vespo_lambda: expected a pair"),
        ({"normalizer": 0.0}, ValueError, "normalizer: expected more than 0.0, got 0.0"),
        ({"normalizer": torch.ones(2)}, ValueError, r"normalizer: expected 0 dimension\(s\), got shape \(2,\)"),
        ({"max_response_tokens": 0}, ValueError, "max_response_tokens: expected at least 1, got 0"),
        ({"kl_bias_correction": "yes"}, TypeError, "kl_bias_correction: expected a bool"),
        (
            {"loss_type": "vespo", "behaviour_logprobs": torch.zeros(2, 3), "behaviour_mode": "sequence_mask"},
            ValueError,
            "behaviour_mode: expected token_truncate, token_mask or none with loss_type 'vespo'",
        ),
    ],
)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        policy_loss(**{**GOOD, **change})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: group_advantages(torch.zeros(4), 3), ValueError, "groups: expected a group size >= 1 that divides the 4 rollouts, got 3"),
        (lambda: group_advantages(torch.zeros(4), 2, baseline="median"), ValueError, "baseline: expected one of mean, leave_one_out"),
        (lambda: group_advantages(torch.zeros(4), 2, scale="iqr"), ValueError, "scale: expected one of std, batch, none, mean"),
        (lambda: group_advantages(torch.zeros(4), 2, eps=-1), ValueError, "eps: expected at least 0.0, got -1"),
        (lambda: group_advantages(torch.zeros(2, 2), 2), ValueError, r"rewards: expected 1 dimension\(s\)"),
        (lambda: group_advantages(torch.zeros(4), 2, mask=torch.ones(4)), TypeError, "mask: expected dtype bool"),
        (lambda: grpo_loss(torch.zeros(2, 3), None, torch.zeros(4), 2), ValueError, r"rewards: expected shape \(2,\) on cpu, one for each sequence"),
        (lambda: policy_loss(torch.zeros(6), None, torch.zeros(2), cu_seqlens=torch.tensor([0, 7, 6])), ValueError, "cu_seqlens: expected ascending offsets"),
    ],
)  # fmt: skip
def test_bad_groups(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_bad_offsets_are_refused_before_the_backend():
    with pytest.raises(ValueError, match="cu_seqlens: expected ascending offsets"):
        policy_loss(torch.zeros(6), None, torch.zeros(3), cu_seqlens=torch.tensor([0, 4, 2, 6]), backend="reference")


@each_backend(OP)
def test_cispo_bounds_its_weight_from_above_alone_and_counts_advantages_above_0(backend):
    old = torch.zeros(1, 4)
    logprobs = torch.tensor([[3.0, 3.0, -3.0, -3.0]]).requires_grad_()  # ratios of 20 and of 0.05
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    options = {"loss_type": "cispo", "cispo_cap": 1.5, "normalizer": 1.0, "backend": backend}
    result = policy_loss(logprobs, old, advantages, **options)
    (grad,) = torch.autograd.grad(result.loss, logprobs)
    torch.testing.assert_close(grad, -advantages * torch.tensor([[1.5, 1.5, math.exp(-3.0), math.exp(-3.0)]]))
    assert result.metrics["clip_high_count"] == 1
    assert result.metrics["clip_low_count"] == 0


@pytest.mark.parametrize("function", [policy_loss, grpo_loss, linear_policy_loss])
def test_defaults_are_those_of_the_contract(function):
    parameters = inspect.signature(function).parameters
    want = {
        "loss_type": "grpo",
        "importance_level": "token",
        "clip_low": 0.2,
        "clip_high": 0.2,
        "clip_delta": None,
        "kl_coef": 0.0,
        "kl_estimator": "k3",
        "kl_bias_correction": False,
        "entropy_coef": 0.0,
        "behaviour_mode": "token_truncate",
        "behaviour_cap": 2.0,
        "behaviour_floor": 0.0,
        "geometric_cap": None,
        "geometric_floor": 0.0,
        "off_policy_delta": None,
        "cispo_cap": 5.0,
        "sapo_temperature": (1.0, 1.05),
        "vespo_k": (2.0, 3.0),
        "vespo_lambda": (3.0, 2.0),
        "dppo_tv_bounds": (0.15, 0.15),
        "dppo_kl_bounds": (0.05, 0.05),
        "dppo_cap": 20.0,
        "max_response_tokens": None,
        "normalizer": None,
        "entropy_normalizer": None,
    }
    assert {name: parameters[name].default for name in want} == want


@each_backend(OP)
def test_the_entropy_of_dropped_rollouts_and_masked_tokens_has_no_gradient(backend):
    logprobs, entropy = (torch.randn(4, 3, requires_grad=True) for _ in range(2))
    mask, rollouts = torch.ones(4, 3, dtype=torch.bool), torch.tensor([True, True, False, True])
    mask[0, 2] = False
    grpo_loss(
        logprobs,
        None,
        torch.tensor([0.0, 1.0, 1.0, 0.0]),
        4,
        rollout_mask=rollouts,
        mask=mask,
        entropy=entropy,
        entropy_coef=0.5,
        backend=backend,
    ).loss.backward()
    counts = mask & rollouts[:, None]
    torch.testing.assert_close(entropy.grad, torch.where(counts, -0.5 / counts.sum(), 0.0))


@each_backend(OP)
def test_a_masked_token_has_no_gradient_where_the_loss_is_scaled_to_infinity(backend):
    logprobs, mask = torch.randn(2, 3, requires_grad=True), torch.tensor([[True, True, False], [True, False, False]])
    loss = policy_loss(logprobs, None, torch.tensor([1.0, -1.0]), mask=mask, backend=backend).loss
    (grad,) = torch.autograd.grad(loss, logprobs, torch.tensor(torch.inf))
    assert (grad[~mask] == 0).all()
    assert grad[mask].isinf().all()


@each_backend(OP)
@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
@pytest.mark.parametrize("corrected", [False, True])
def test_kl_estimators_are_schulmans(backend, estimator, corrected):
    """Without advantages the loss is the KL term alone: k1, k2 and k3 of http://joschu.net/blog/kl-approx.html, and their gradients."""
    logprobs = (-torch.rand(3, 5)).requires_grad_()
    old, ref = logprobs.detach() + 0.3 * torch.randn(3, 5), logprobs.detach() + 0.5 * torch.randn(3, 5)
    mask = torch.rand(3, 5) > 0.3
    found = policy_loss(
        logprobs,
        old,
        torch.zeros(3),
        mask=mask,
        ref_logprobs=ref,
        loss_type="bnpo",
        kl_coef=0.7,
        kl_estimator=estimator,
        kl_bias_correction=corrected,
        backend=backend,
    )
    (got,) = torch.autograd.grad(found.loss, logprobs)
    apart = ref - logprobs
    kl = {"k1": -apart, "k2": apart.square() / 2, "k3": apart.exp() - apart - 1}[estimator]
    kl = torch.where(mask, kl * (logprobs - old).exp() if corrected else kl, 0.0)
    want = 0.7 * kl.sum() / mask.sum()
    torch.testing.assert_close(found.loss, want)
    torch.testing.assert_close(found.metrics["kl_sum"], kl.sum().detach())
    torch.testing.assert_close(got, torch.autograd.grad(want, logprobs)[0])


@each_backend(OP)
def test_vespos_weight_has_a_least_sequence_weight(backend):
    logprobs = torch.full(
        (1, 4), -30.0, requires_grad=True
    )  # far below the old ones: the sequence's weight is bounded by 1e-8
    loss = policy_loss(
        logprobs,
        torch.full((1, 4), -1.0),
        torch.ones(1),
        loss_type="vespo",
        vespo_k=(0.1, 0.1),
        vespo_lambda=(3.0, 2.0),
        backend=backend,
    ).loss
    (grad,) = torch.autograd.grad(loss, logprobs)
    weight = math.exp(3.0 + 0.1 * math.log(1e-8) - 3.0 * 1e-8)
    torch.testing.assert_close(grad, torch.full((1, 4), -weight / 4), rtol=1e-5, atol=0)
