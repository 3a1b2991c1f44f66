"""The optimizer step: splits, losses, the schedule, and what is not finite."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import tiny
import torch
import yaml

from mgrpo_kernels import linear_policy_loss, policy_loss
from mgrpo_kernels.ops.policy_loss.loss_types import CLIP, LOSSES
from mgrpo_kernels.ops.policy_loss.options import DECLARED, LossOptions
from mgrpo_kernels.ops.policy_loss.specs import LOSS_TYPES
from mgrpo_kernels.train import update
from mgrpo_kernels.train.__main__ import make_parser
from mgrpo_kernels.train.config import LossConfig, RolloutConfig, build
from mgrpo_kernels.train.errors import UsageError
from mgrpo_kernels.train.model.policy import Policy
from mgrpo_kernels.train.rollout.transformers import TransformersEngine
from mgrpo_kernels.train.score import score
from mgrpo_kernels.train.update import Batch, accumulate_gradient, learning_rate, make_optimizer, take_step

ROOT = Path(__file__).parents[2]
R = 12


def batch(policy: Policy) -> Batch:
    prompts = [prompt for prompt in policy.encode(["3+4=", "1+2+3+4+5+6="]) for _ in range(4)]
    rollouts = TransformersEngine(policy, R, 10**6).sample(
        prompts, 1, temperature=1.5, generator=torch.Generator().manual_seed(0)
    )
    scores = score(policy, prompts, rollouts.tokens, rollouts.mask, temperature=1.0, budget=10**6)
    assert scores.logprob is not None
    torch.manual_seed(1)
    off = torch.randn(scores.logprob.shape) * rollouts.mask
    return Batch(
        prompts, rollouts.tokens, rollouts.mask, scores.logprob + 0.2 * off, scores.logprob - 0.1 * off, torch.randn(8)
    )


def gradient(policy: Policy, part: Batch, budget: int, **loss: object) -> tuple[dict[str, float], torch.Tensor]:
    policy.model.zero_grad()
    settings = tiny.config(**loss).loss
    sums = accumulate_gradient(policy, part, settings, max_tokens=R, temperature=1.0, budget=budget)
    return sums, torch.cat([parameter.grad.flatten() for parameter in policy.model.parameters()])


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_micro_batches_equal_the_whole_batch_and_plain_pytorch(policy: Policy, loss_type: str) -> None:
    part = batch(policy)
    options = {"loss_type": loss_type, "kl_coef": 0.1, "entropy_coef": 0.01}
    whole, whole_gradient = gradient(policy, part, 10**6, **options)
    for budget in (1, 45):
        split, split_gradient = gradient(policy, part, budget, **options)
        torch.testing.assert_close(split_gradient, whole_gradient, atol=1e-5, rtol=1e-4)
        assert split == pytest.approx(whole, abs=1e-4)
    policy.model.zero_grad()
    rows = [
        policy.model(torch.tensor([prompt + tokens[mask].tolist()])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        for prompt, tokens, mask in zip(part.prompts, part.tokens, part.mask, strict=True)
    ]
    logprobs, entropy = torch.zeros(part.tokens.shape), torch.zeros(part.tokens.shape)
    for row, logp in enumerate(rows):
        kept = part.mask[row]
        logprobs[row, kept] = logp.gather(-1, part.tokens[row][kept][:, None])[:, 0]
        entropy[row, kept] = -(logp.exp() * logp).sum(-1)
    loss = policy_loss(
        logprobs,
        part.old_logprobs,
        part.advantages,
        mask=part.mask,
        ref_logprobs=part.ref_logprobs,
        entropy=entropy,
        max_response_tokens=R,
        **options,
        backend="reference",
    ).loss
    loss.backward()
    want = torch.cat([parameter.grad.flatten() for parameter in policy.model.parameters()])
    assert whole["loss"] == pytest.approx(loss.item(), rel=1e-4, abs=1e-6)
    torch.testing.assert_close(whole_gradient, want, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_rollouts_without_a_gradient_are_counted_but_do_not_pass_through_the_model(
    policy: Policy, loss_type: str
) -> None:
    part = batch(policy)
    part = part._replace(advantages=torch.where(torch.arange(8) % 4 == 0, part.advantages, 0.0))
    options = {"loss_type": loss_type, "kl_coef": 0.0, "entropy_coef": 0.0}
    with mock.patch.object(update, "response_states", wraps=update.response_states) as states:
        sums, grad = gradient(policy, part, 10**6, **options)
    assert [len(call.args[1]) for call in states.call_args_list] == [2]
    with mock.patch.object(update, "rows_with_gradient", return_value=list(range(8))):
        of_all, grad_of_all = gradient(policy, part, 10**6, **options)
    assert (sums.pop("with_gradient"), of_all.pop("with_gradient")) == (2, 8)
    for name in ("loss", "tokens", "sequences", "clip_low_count", "clip_high_count"):
        assert sums[name] == pytest.approx(of_all[name], rel=1e-6, abs=1e-9)
    torch.testing.assert_close(grad, grad_of_all, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("budget", [45, 10**6])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_an_advantage_at_each_token_is_that_tokens(policy: Policy, loss_type: str, budget: int) -> None:
    part = batch(policy)
    options = {"loss_type": loss_type, "kl_coef": 0.1}
    constant = part._replace(advantages=part.advantages[:, None].expand(part.mask.shape))
    torch.testing.assert_close(gradient(policy, constant, budget, **options), gradient(policy, part, budget, **options))


@pytest.mark.parametrize("weight", [0.25, 0.75])
def test_the_gradient_of_an_answers_tokens_is_in_proportion_to_their_weight(policy: Policy, weight: float) -> None:
    part = batch(policy)
    span = (
        torch.arange(part.mask.shape[1]) >= part.mask.sum(-1, keepdim=True) - 2
    ) & part.mask  # the last two tokens of each response

    def grad(share: float) -> torch.Tensor:
        advantages = part.advantages[:, None] * torch.where(span, share, 1.0)
        return gradient(policy, part._replace(advantages=advantages), 45, kl_coef=0.0)[1]

    without, with_all = grad(0.0), grad(1.0)
    assert float((with_all - without).norm() / with_all.norm()) > 0.1
    torch.testing.assert_close(grad(weight), without + weight * (with_all - without), atol=1e-6, rtol=1e-4)


def test_a_rollout_of_which_only_one_token_has_an_advantage_passes_through_the_model(policy: Policy) -> None:
    part = batch(policy)
    advantages = torch.zeros(part.mask.shape)
    advantages[5, 0] = 1.0
    sums, grad = gradient(policy, part._replace(advantages=advantages, old_logprobs=None), 10**6, kl_coef=0.0)
    assert sums["with_gradient"] == 1
    assert grad.norm() > 0


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
def test_the_loss_is_given_the_number_of_tokens_with_a_gradient(policy: Policy, level: str, kl_coef: float) -> None:
    part = batch(policy)
    advantages = torch.where(torch.arange(part.mask.shape[1]) < 2, part.advantages[:, None], 0.0)
    advantages[:3] = 0.0
    part, options = part._replace(advantages=advantages), {"importance_level": level, "kl_coef": kl_coef}
    with mock.patch.object(update, "linear_policy_loss", wraps=linear_policy_loss) as loss:
        got = gradient(policy, part, 45, entropy_coef=0.0, **options)
    given = sum(call.kwargs["tokens_with_gradient"] for call in loss.call_args_list)
    of_tokens = int(((advantages != 0) & part.mask).sum())
    assert 0 < of_tokens < part.mask[3:].sum() < part.mask.sum()
    assert given == (part.mask.sum() if kl_coef else of_tokens if level == "token" else part.mask[3:].sum())

    def without(*arguments: Any, tokens_with_gradient: int, **keywords: Any) -> Any:
        return linear_policy_loss(*arguments, **keywords)

    with mock.patch.object(update, "linear_policy_loss", without):
        torch.testing.assert_close(got, gradient(policy, part, 45, entropy_coef=0.0, **options), rtol=0, atol=0)


@pytest.mark.parametrize("term", ["kl_coef", "entropy_coef"])
def test_a_rollout_whose_gradient_is_a_penaltys_alone_passes_through_the_model(policy: Policy, term: str) -> None:
    part = batch(policy)
    part = part._replace(advantages=torch.zeros(8))
    sums, grad = gradient(policy, part, 10**6, **{"kl_coef": 0.0, "entropy_coef": 0.0, term: 0.1})
    assert sums["with_gradient"] == 8
    assert grad.norm() > 0


def test_the_gradient_tolerance_reaches_the_loss(policy: Policy) -> None:
    part, config = batch(policy), tiny.config(gradient_tolerance=0.25)
    with mock.patch.object(update, "linear_policy_loss", wraps=linear_policy_loss) as loss:
        take_step(policy, make_optimizer(policy, config.optim), part, config, 1)
    assert {call.kwargs["gradient_tolerance"] for call in loss.call_args_list} == {0.25}
    with mock.patch.object(update, "linear_policy_loss", wraps=linear_policy_loss) as loss:
        take_step(policy, make_optimizer(policy, config.optim), part, tiny.config(), 1)
    assert {call.kwargs["gradient_tolerance"] for call in loss.call_args_list} == {None}


def test_a_batch_without_any_gradient_gives_one_of_zero(policy: Policy) -> None:
    part = batch(policy)
    part = part._replace(advantages=torch.zeros(8))
    sums, grad = gradient(policy, part, 10**6, kl_coef=0.0, entropy_coef=0.0)
    assert sums["with_gradient"] == 1
    assert bool((grad == 0).all())


OF_THE_LOSS = {
    "loss_type": "grpo",
    "importance_level": "sequence",
    "clip_low": 0.11,
    "clip_high": 0.12,
    "clip_delta": 1.13,
    "kl_coef": 0.14,
    "kl_estimator": "k1",
    "kl_bias_correction": True,
    "entropy_coef": 0.15,
    "behaviour_mode": "token_mask",
    "behaviour_cap": 1.16,
    "cispo_cap": 1.17,
    "sapo_temperature": [1.18, 1.19],
    "vespo_k": [1.2, 1.21],
    "vespo_lambda": [1.22, 1.23],
    "behaviour_floor": 0.96,
    "geometric_cap": 1.24,
    "geometric_floor": 0.25,
    "off_policy_delta": 0.26,
    "dppo_tv_bounds": [0.27, 0.28],
    "dppo_kl_bounds": [0.29, 0.30],
    "dppo_cap": 3.1,
}
READ_BY = {name: kind for kind, row in LOSSES.items() for name in row.surrogate.options if name not in CLIP.options}


@pytest.mark.parametrize("name", OF_THE_LOSS)
def test_every_option_reaches_the_loss(policy: Policy, name: str) -> None:
    value, part = OF_THE_LOSS[name], batch(policy)
    part = part._replace(behaviour_logprobs=part.old_logprobs)
    options = {"kl_coef": 0.1, "behaviour_correction": True, name: value}
    if name in READ_BY:
        options["loss_type"] = READ_BY[name]
    flags = [text for key in options for text in flag(key, options[key])]
    config = build(yaml.safe_load(tiny.config().to_yaml()), vars(make_parser().parse_args(flags)))
    assert yaml.safe_load(config.to_yaml()) == yaml.safe_load(tiny.config(**options).to_yaml())
    with mock.patch.object(update, "linear_policy_loss", wraps=linear_policy_loss) as loss:
        accumulate_gradient(policy, part, config.loss, max_tokens=R, temperature=1.0, budget=10**6)
    for call in loss.call_args_list:
        assert call.kwargs[name] == (tuple(value) if isinstance(value, list) else value)
        assert {each.name for each in DECLARED} - set(call.kwargs) == {"max_response_tokens"}  # the normalizer is given


def flag(name: str, value: object) -> list[str]:
    """Return an option as the command line has it."""
    return [
        f"--{name.replace('_', '-')}",
        *([] if value is True else map(str, value if isinstance(value, list) else [value])),
    ]


def test_the_trainers_options_are_those_of_the_loss() -> None:
    own = {each.name: each for each in dataclasses.fields(LossConfig)}
    changed = {"loss_type", "kl_coef", "entropy_coef"}  # another default, or a narrower range
    for each in dataclasses.fields(LossOptions):
        if each.name == "max_response_tokens":
            assert each.name in {field.name for field in dataclasses.fields(RolloutConfig)}
        elif each.name not in changed:
            assert own[each.name].metadata is each.metadata
            assert own[each.name].default == each.default
        assert f"`--{each.name.replace('_', '-')}" in (ROOT / "docs" / "options.md").read_text()
    assert set(OF_THE_LOSS) == {each.name for each in dataclasses.fields(LossOptions)} - {"max_response_tokens"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"cispo_cap": 2.0}, "cispo_cap: expected --loss-type cispo with it, without which it has no effect, got 2.0"),
        ({"vespo_k": [1.0, 1.0]}, "vespo_k: expected --loss-type vespo with it"),
        (
            {"loss_type": "vespo", "clip_delta": 2.0},
            "clip_delta: expected --loss-type grpo or bnpo or dapo or dr_grpo or luspo",
        ),
        ({"behaviour_cap": 3.0}, "behaviour_cap: expected --behaviour-correction or --train-momentum-rollouts with it"),
        ({"kl_bias_correction": True, "kl_coef": 0.0}, "kl_bias_correction: expected a KL term with it"),
        (
            {"loss_type": "vespo", "behaviour_mode": "sequence_mask"},
            "behaviour_mode: expected token_truncate, token_mask or none",
        ),
        ({"loss_type": "sapo", "sapo_temperature": [1.0]}, "sapo_temperature: expected two numbers, got [1.0]"),
        (
            {"loss_type": "sapo", "sapo_temperature": [1.0, 0.0]},
            "sapo_temperature: expected more than 0.0, got 0.0",
        ),
        ({"loss_type": "sapo", "sapo_temperature": ["hot", 1.0]}, "sapo_temperature: expected float, got 'hot'"),
        ({"behaviour_cap": 0.0}, "behaviour_cap: expected more than 0.0"),
        ({"entropy_coef": -0.1}, "entropy_coef: expected at least 0.0"),
    ],
)
def test_options_of_the_loss_that_make_no_sense(values: dict, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        build(values)
    assert str(caught.value).startswith(message)


def test_behaviour_weights_scale_the_gradient(policy: Policy) -> None:
    plain = batch(policy)
    plain = plain._replace(ref_logprobs=None)
    _, whole = gradient(policy, plain, 45, kl_coef=0.0)
    for weight, expected in ((0.5, 0.5), (1.5, 1.5), (4.0, 2.0)):  # truncated at 2
        weighted = plain._replace(behaviour_logprobs=plain.old_logprobs - math.log(weight))
        for budget in (45, 10**6):
            _, got = gradient(policy, weighted, budget, kl_coef=0.0)
            torch.testing.assert_close(got, expected * whole, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("budget", [45, 10**6])
def test_on_policy_the_pass_gives_its_own_old_logprobs(policy: Policy, budget: int) -> None:
    part = batch(policy)
    own = score(policy, part.prompts, part.tokens, part.mask, temperature=1.0, budget=10**6).logprob
    assert own is not None
    off = part._replace(old_logprobs=None, sampled_logprobs=(own + 0.25) * part.mask)
    sums, got = gradient(policy, off, budget, kl_coef=0.1)
    _, want = gradient(policy, part._replace(old_logprobs=own), budget, kl_coef=0.1)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    assert sums["ratio_sum"] == sums["tokens"]  # each exactly 1
    assert sums["mismatch_sum"] / sums["mismatch_tokens"] == pytest.approx(0.25, abs=1e-4)


def test_a_step_moves_the_weights_against_the_gradient(policy: Policy) -> None:
    part = batch(policy)
    config = tiny.config()
    before, (sums, grad) = tiny.weights(policy), gradient(policy, part, 10**6, kl_coef=0.05)
    updated = take_step(policy, make_optimizer(policy, config.optim), part, config, step=1)
    assert updated["loss"] == pytest.approx(sums["loss"])
    assert updated["grad_norm"] == pytest.approx(float(grad.norm()), rel=1e-4)
    moved = torch.cat([(p.detach() - before[name]).flatten() for name, p in policy.model.named_parameters()])
    assert (moved * grad)[grad.abs() > 1e-6].le(0).all()
    assert float(moved.abs().max()) == pytest.approx(config.optim.learning_rate, rel=1e-2)


def test_every_option_is_passed_to_the_loss(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, object]] = []
    real = update.linear_policy_loss
    monkeypatch.setattr(
        update, "linear_policy_loss", lambda *args, **options: calls.append(options) or real(*args, **options)
    )
    options = {
        "loss_type": "dr_grpo",
        "importance_level": "sequence",
        "clip_low": 0.11,
        "clip_high": 0.33,
        "kl_coef": 0.07,
        "kl_estimator": "k1",
        "entropy_coef": 0.013,
    }
    part, head = batch(policy), policy.head_options
    tokens = int(part.mask.sum())
    accumulate_gradient(policy, part, tiny.config(**options).loss, max_tokens=R, temperature=0.7, budget=45)
    want = {
        **options,
        "temperature": 0.7,
        "logit_scale": head.logit_scale,
        "softcap": head.softcap,
        "normalizer": 8 * R,
        "entropy_normalizer": tokens,
    }
    assert len(calls) > 1  # of each micro-batch, the normalizers of the whole
    assert all({name: call[name] for name in want} == want for call in calls)
    monkeypatch.setattr(policy, "head_options", head._replace(logit_scale=0.5, softcap=3.0))
    accumulate_gradient(policy, part, tiny.config(**options).loss, max_tokens=R, temperature=0.7, budget=10**6)
    assert (calls[-1]["logit_scale"], calls[-1]["softcap"]) == (0.5, 3.0)


def test_the_optimizer_has_its_options(policy: Policy) -> None:
    (group,) = make_optimizer(policy, tiny.config(learning_rate=0.3, weight_decay=0.2).optim).param_groups
    assert (group["lr"], group["weight_decay"]) == (0.3, 0.2)
    assert len(group["params"]) == len(list(policy.model.parameters()))


@pytest.mark.parametrize("step", [1, 3])
def test_a_gradient_that_is_too_large_is_scaled_down_to_the_norm(policy: Policy, step: int) -> None:
    config = tiny.config(max_grad_norm=0.01, steps=4, warmup=0.0, lr_schedule="cosine")
    before = tiny.weights(policy)
    updated = take_step(policy, torch.optim.SGD(policy.model.parameters(), lr=9.0), batch(policy), config, step=step)
    moved = torch.cat([(p.detach() - before[name]).flatten() for name, p in policy.model.named_parameters()])
    assert updated["grad_norm"] > 0.1
    assert float(moved.double().norm()) == pytest.approx(0.01 * learning_rate(config.optim, step), rel=1e-2)


def test_clipped_tokens_of_both_sides_are_counted(policy: Policy) -> None:
    part, config = batch(policy), tiny.config(clip_low=0.02, clip_high=0.05)
    sums, _ = gradient(policy, part, 10**6, clip_low=0.02, clip_high=0.05)
    assert sums["clip_low_count"] > 0
    assert sums["clip_high_count"] > 0
    updated = take_step(policy, make_optimizer(policy, config.optim), part, config, step=1)
    assert updated["clip_fraction"] == (sums["clip_low_count"] + sums["clip_high_count"]) / sums["tokens"]
    assert updated["kl"] == pytest.approx(sums["kl_sum"] / sums["tokens"])


def test_nothing_moves_where_the_gradient_alone_is_not_finite(policy: Policy) -> None:
    part = batch(policy)
    part = part._replace(advantages=part.advantages * 1e30)  # the square of such a gradient overflows
    before, optimizer = tiny.weights(policy), make_optimizer(policy, tiny.config().optim)
    with pytest.raises(FloatingPointError, match=r"got loss -?\d\S* and gradient norm inf"):
        take_step(policy, optimizer, part, tiny.config(), step=1)
    assert all(torch.equal(before[name], value) for name, value in policy.model.state_dict().items())
    assert not optimizer.state


@pytest.mark.parametrize("where", ["advantages", "old_logprobs"])
def test_nothing_moves_where_the_loss_is_not_finite(policy: Policy, where: str) -> None:
    part = batch(policy)
    broken = part._replace(**{where: torch.full_like(getattr(part, where), torch.nan)})
    before, optimizer = tiny.weights(policy), make_optimizer(policy, tiny.config().optim)
    with pytest.raises(FloatingPointError, match="update: expected a finite loss and gradient, got loss nan"):
        take_step(policy, optimizer, broken, tiny.config(), step=1)
    assert all(torch.equal(before[name], value) for name, value in policy.model.state_dict().items())
    assert not optimizer.state


def test_learning_rate() -> None:
    config = tiny.config(steps=100, warmup=0.1, learning_rate=1.0, lr_schedule="cosine")
    rates = [learning_rate(config.optim, step) for step in range(1, 101)]
    assert rates[:11] == pytest.approx([0.1 * step for step in range(1, 11)] + [1.0])
    assert rates[55] == pytest.approx(0.5 * (1 + math.cos(math.pi * 45 / 90)))
    assert 0 < rates[-1] < 1e-3
    constant = tiny.config(steps=100, warmup=0.0, learning_rate=1.0, lr_schedule="constant")
    assert {learning_rate(constant.optim, step) for step in range(1, 101)} == {1.0}


def test_masked_tokens_are_counted_where_a_correction_may_mask(policy: Policy) -> None:
    options = {
        "kl_coef": 0.0,
        "behaviour_correction": True,
        "behaviour_mode": "token_mask",
        "behaviour_floor": 1.0,
        "behaviour_cap": 1.01,
    }
    part, config = batch(policy), tiny.config(**options)
    assert "masked_fraction" not in take_step(policy, make_optimizer(policy, config.optim), part, config, step=1)
    assert part.old_logprobs is not None
    part = part._replace(behaviour_logprobs=part.old_logprobs + 0.3 * (part.tokens % 2))
    sums, _ = gradient(policy, part, 10**6, **options)
    assert sums["forward_tokens"] == sums["tokens"]
    before = {name: value.clone() for name, value in policy.model.state_dict().items()}
    updated = take_step(policy, make_optimizer(policy, config.optim), part, config, step=1)
    assert 0 < updated["masked_fraction"] == sums["masked_count"] / sums["tokens"] < 1
    # The same tokens once more, but without a gradient: they do not pass through the model, and change no fraction.
    policy.model.load_state_dict(before)
    names = [name for name, value in part._asdict().items() if isinstance(value, torch.Tensor)]
    twice = part._replace(
        prompts=[*part.prompts, *part.prompts], **{name: torch.cat([getattr(part, name)] * 2) for name in names}
    )
    twice.advantages[len(part.prompts) :] = 0.0
    again = take_step(policy, make_optimizer(policy, config.optim), twice, config, step=1)
    assert again["gradient_share"] == updated["gradient_share"] / 2
    assert again["masked_fraction"] == updated["masked_fraction"]
