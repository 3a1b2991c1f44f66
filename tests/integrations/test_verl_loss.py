"""The fused loss under verl's name, held to verl's own: the loss itself, and the whole of its actor's."""

# ruff: noqa: E402 - what need() makes importable is imported after it
import copy
import logging

import pytest
import torch
from installed_peers import need

need("verl")

from tensordict import TensorDict
from verl.trainer.ppo import core_algos
from verl.utils import tensordict_utils as tu
from verl.workers.config import ActorConfig
from verl.workers.utils.losses import ppo_loss

from mgrpo_kernels.integrations import IntegrationError, verl

MODES = ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean"]


def batch(seed=0, rows=6, length=11):
    generator = torch.Generator().manual_seed(seed)
    old = -torch.rand(rows, length, generator=generator) * 4
    new = old + torch.randn(rows, length, generator=generator) * 0.6
    new[0, 0] = old[0, 0] + 3.0  # far outside every clip
    advantages = torch.randn(rows, 1, generator=generator).expand(rows, length).clone()
    advantages[0] = -1.0
    advantages[1, 3] = 0.0
    lengths = torch.tensor([length, 4, 1, 7, 0, length - 1])
    mask = torch.arange(length) < lengths.unsqueeze(-1)
    weights = torch.rand(rows, length, generator=generator) * 2
    weights[0, 1] = 0.0
    return old, new, advantages, mask, weights


def actor(mode="token-mean", low=0.2, high=0.28, most=3.0, name="vanilla", **batch_info):
    config = ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        loss_agg_mode=mode,
        clip_ratio_low=low,
        clip_ratio_high=high,
        clip_ratio_c=most,
    )
    config.global_batch_info.update(batch_info)
    config.policy_loss.__dict__["loss_mode"] = name
    return config


def run(function, config, old, new, advantages, mask, weights):
    new = new.clone().requires_grad_()
    loss, metrics = function(
        old_log_prob=old,
        log_prob=new,
        advantages=advantages,
        response_mask=mask,
        loss_agg_mode=config.loss_agg_mode,
        config=config,
        rollout_is_weights=weights,
    )
    loss.backward()
    return loss.detach(), new.grad, metrics


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "info",
    [
        {},
        {"dp_size": 4, "batch_num_tokens": 97, "global_batch_size": 24, "loss_scale_factor": None},
        {"dp_size": 1, "batch_num_tokens": 50, "global_batch_size": 8, "loss_scale_factor": 20},
    ],
    ids=["local", "ranks", "micro"],
)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_loss_is_verls_own(mode, info, weighted, seed):
    *inputs, weights = batch(seed)
    config = actor(mode, **info)
    want = run(core_algos.compute_policy_loss_vanilla, config, *inputs, weights if weighted else None)
    with verl.patched(strict=True, vanilla=False):
        got = run(core_algos.get_policy_loss_fn(verl.LOSS), config, *inputs, weights if weighted else None)
    torch.testing.assert_close(got[0], want[0], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(got[1], want[1], rtol=1e-5, atol=1e-8)
    assert got[1].abs().max() > 0
    assert got[2] == pytest.approx(want[2], rel=1e-5, abs=1e-7)
    assert got[2]["actor/pg_clipfrac"] > 0
    assert got[2]["actor/pg_clipfrac_lower"] > 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", verl.DPPO)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("info", [{}, {"dp_size": 4, "batch_num_tokens": 97, "global_batch_size": 24}])
def test_dppo_is_verls_own(mode, kind, weighted, info):
    old, new, *inputs, weights = batch()
    new = new.clamp(max=-1e-3)  # the log of a probability
    low, high = (0.04, 0.06) if kind == "dppo_tv" else (0.01, 0.02)
    config = actor(mode, low=low, high=high, most=1.2, **info)
    weights = weights if weighted else None
    own = getattr(core_algos, f"compute_policy_loss_{kind}")
    want = run(own, config, old, new, *inputs, weights)
    with verl.patched(strict=True, vanilla=False):
        assert core_algos.get_policy_loss_fn(kind) is own
        got = run(core_algos.get_policy_loss_fn(f"{verl.LOSS}_{kind}"), config, old, new, *inputs, weights)
    torch.testing.assert_close(got[0], want[0], rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(got[1], want[1], rtol=1e-5, atol=1e-8)
    assert got[1].abs().max() > 0
    assert got[2] == pytest.approx(want[2], rel=1e-5, abs=1e-7)
    assert got[2]["actor/pg_clipfrac"] > 0
    assert got[2]["actor/pg_clipfrac_lower"] > 0


@pytest.mark.parametrize("kind", verl.DPPO)
def test_dppo_does_not_read_what_a_masked_token_holds_and_takes_verls_names(kind):
    old, new, advantages, mask, _ = batch()
    config, own = actor(low=0.01, high=0.01, most=20.0), getattr(core_algos, f"compute_policy_loss_{kind}")
    with verl.patched() as patch:
        loss = getattr(core_algos, f"compute_policy_loss_{kind}")
        assert loss is core_algos.get_policy_loss_fn(kind) is patch.losses[f"{verl.LOSS}_{kind}"] is not own
        want = run(loss, config, old, new, advantages, mask, None)
        nan = torch.where(mask, new, float("nan"))
        got = run(loss, config, torch.where(mask, old, float("inf")), nan, advantages, mask, None)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
    assert got[2] == want[2]
    assert core_algos.get_policy_loss_fn(kind) is own is getattr(core_algos, f"compute_policy_loss_{kind}")


@pytest.mark.parametrize(("low", "high", "most"), [(0.2, 0.2, 1.2), (0.1, 0.5, 10.0), (0.0, 0.0, 1.5)])
def test_clip_ratios(low, high, most):
    *inputs, weights = batch()
    config = actor(low=low, high=high, most=most)
    want = run(core_algos.compute_policy_loss_vanilla, config, *inputs, weights)
    with verl.patched(strict=True):
        got = run(core_algos.compute_policy_loss_vanilla, config, *inputs, weights)
    torch.testing.assert_close(got[0], want[0], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(got[1], want[1], rtol=1e-5, atol=1e-8)


def test_a_missing_count_of_the_whole_batch_is_told_as_by_verl():
    *inputs, _ = batch()
    for mode in ("token-mean", "seq-mean-token-sum"):
        with (
            verl.patched(),
            pytest.raises(ValueError, match="expected the whole batch's count with dp_size 2, got None"),
        ):
            run(core_algos.get_policy_loss_fn(verl.LOSS), actor(mode, dp_size=2), *inputs, None)
    with pytest.raises(ValueError, match="loss_agg_mode: expected one of token-mean"):
        verl.aggregation("mean", inputs[3], {})


def test_what_a_masked_token_holds_is_not_read():
    old, new, advantages, mask, _ = batch()
    config = actor()
    with verl.patched():
        loss = core_algos.get_policy_loss_fn(verl.LOSS)
        want = run(loss, config, old, new, advantages, mask, None)
        nan = torch.where(mask, new, float("nan"))
        got = run(loss, config, torch.where(mask, old, float("inf")), nan, advantages, mask, None)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
    assert got[2] == want[2]


def test_everything_masked_is_a_loss_of_zero():
    old, new, advantages, mask, _ = batch()
    with verl.patched():
        for mode in MODES:
            loss, grad, metrics = run(
                core_algos.get_policy_loss_fn(verl.LOSS), actor(mode), old, new, advantages, mask & False, None
            )
            assert loss == 0
            assert not grad.any()
            assert set(metrics.values()) <= {0.0}


def test_where_the_clip_cannot_be_fused_verls_own_runs_and_says_so(caplog):
    *inputs, weights = batch()
    config = actor(high=0.3, most=1.1)
    want = run(core_algos.compute_policy_loss_vanilla, config, *inputs, weights)
    with verl.patched(), caplog.at_level(logging.WARNING, "mgrpo_kernels"):
        loss = core_algos.get_policy_loss_fn(verl.LOSS)
        got = [run(loss, config, *inputs, weights) for _ in range(3)][-1]
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
    said = [record.message for record in caplog.records]
    assert said == ["mgrpo_kernels runs verl's own code: expected clip_ratio_c >= 1 + clip_ratio_high = 1.3, got 1.1"]
    with verl.patched(strict=True), pytest.raises(IntegrationError, match="clip_ratio_c"):
        run(core_algos.get_policy_loss_fn(verl.LOSS), config, *inputs, weights)


def test_in_verls_ppo_loss():
    """The whole loss of verl's actor, on the nested tensors that its workers pass."""
    old, new, advantages, mask, weights = batch(seed=3)
    rows = [row for row in range(len(old)) if mask[row].any()]
    lengths = mask[rows].sum(-1).tolist()

    def nested(values):
        return torch.nested.as_nested_tensor(
            [values[r, :n] for r, n in zip(rows, lengths, strict=True)], layout=torch.jagged
        )

    data = TensorDict(
        {
            "prompts": torch.nested.as_nested_tensor([torch.ones(2).long() for _ in rows], layout=torch.jagged),
            "responses": nested(torch.ones_like(old).long()),
            "response_mask": nested(mask.long()),
            "attention_mask": torch.nested.as_nested_tensor(
                [torch.ones(n + 2).long() for n in lengths], layout=torch.jagged
            ),
            "old_log_probs": nested(old),
            "advantages": nested(advantages),
            "rollout_is_weights": nested(weights),
        },
        batch_size=len(rows),
    )
    tu.assign_non_tensor(data, dp_size=2, batch_num_tokens=60, global_batch_size=9)
    # The model scores prompt and response; position i scores token i + 1.
    scored = [torch.cat([torch.zeros(1), new[r, :n], torch.zeros(1)]) for r, n in zip(rows, lengths, strict=True)]
    values = torch.cat(scored).requires_grad_()
    offsets = torch.tensor([0] + [n + 2 for n in lengths]).cumsum(0)

    def loss(name):
        output = {"log_probs": torch.nested.nested_tensor_from_jagged(values, offsets)}
        found, metrics = ppo_loss(actor(name=name), output, copy.copy(data))
        return found.detach(), torch.autograd.grad(found, values)[0], metrics

    want = loss("vanilla")
    with verl.patched(strict=True, vanilla=False):
        got = loss(verl.LOSS)
    torch.testing.assert_close(got[0], want[0], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(got[1], want[1], rtol=1e-5, atol=1e-8)
    assert got[1].any()
    assert set(got[2]) == set(want[2])


@pytest.mark.parametrize("mode", MODES)
def test_the_default_dtype_changes_no_bit(mode):
    inputs, config, results = batch(), actor(mode), []
    with verl.patched(strict=True, vanilla=False):
        function = core_algos.get_policy_loss_fn(verl.LOSS)
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            torch.set_default_dtype(dtype)
            try:
                results.append(run(function, config, *inputs))
            finally:
                torch.set_default_dtype(torch.float32)
    for loss, gradient, metrics in results:
        assert loss.dtype == gradient.dtype == torch.float32
        assert torch.equal(loss, results[0][0])
        assert torch.equal(gradient, results[0][1])
        assert metrics == results[0][2]
