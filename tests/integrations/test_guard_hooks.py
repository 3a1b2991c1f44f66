"""The collapse guard for other libraries: the names of their logs, gold rewards, TRL's callback and verl's hook."""

import json
import logging
import sys
import types

import pytest
import tiny_trl

from mgrpo_kernels.integrations import IntegrationError, verl
from mgrpo_kernels.integrations.guard import CollapseError, GuardHook
from mgrpo_kernels.integrations.trl import GuardCallback
from mgrpo_kernels.train.watch.guard import REWARD_FALL, START, WINDOW


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_trl.make_base(tmp_path_factory.mktemp("base"))


def healthy(step):
    return {"reward": 0.5, "entropy": 0.8, "frac_reward_zero_std": 0.25, "loss": 0.0}


def collapsed(step):
    """Both the gold reward and the entropy have fallen: two signs."""
    return {"reward": 0.5 - REWARD_FALL - 0.01, "entropy": 0.07, "frac_reward_zero_std": 0.9, "loss": 0.0}


def warned(hook, steps=60, change=30):
    return [step for step in range(1, steps + 1) if hook(step, (healthy if step <= change else collapsed)(step))]


def test_a_falling_gold_reward_and_entropy_are_two_signs(caplog):
    hook = GuardHook(gold=True)
    with caplog.at_level(logging.WARNING, logger="mgrpo_kernels"):
        assert warned(hook) == [40]  # the window of 10 steps is then all of the collapse
    assert "collapse guard, step 40: entropy 0.800 -> 0.070; gold reward 0.390, below its best 0.500" in caplog.text
    assert hook.certificate()["warnings"][0]["label_free"] == ["entropy"]


def test_a_reward_that_is_not_gold_is_no_sign():
    assert warned(GuardHook()) == []


def test_a_gold_reward_that_falls_by_less_is_no_sign():
    hook = GuardHook(gold=True)
    for step in range(1, 60):
        reward = 0.5 if step <= 30 else 0.5 - REWARD_FALL + 0.01
        assert hook(step, {"reward": reward, "entropy": 0.8 if step <= 30 else 0.01}) == []


def test_names_of_other_libraries():
    hook = GuardHook(gold=True, accuracy="val-core/gsm8k/acc/mean@8", prompts=100, samples=8)
    logs = {"actor/entropy": 0.5, "critic/score/mean": 0.25, "mgrpo/vote_share": 0.7, "perf/throughput": 1e4}
    assert hook.line(3, logs) == {"step": 3, "entropy": 0.5, "gold_reward": 0.25, "vote_share": 0.7}
    assert hook.line(4, {"val-core/gsm8k/acc/mean@8": 0.5}) == {"step": 4, "eval_accuracy": 0.5}
    assert hook.line(5, {"frac_reward_zero_std": 0.25, "loss": 1.0}) == {"step": 5, "groups_with_signal": 0.75}
    assert hook(6, {"train_runtime": 3.0}) == []
    assert hook.lines == []


def test_a_fall_of_the_accuracy_of_a_log_warns_alone():
    hook = GuardHook(accuracy="eval_reward", prompts=1000, samples=8)
    assert [step for step in range(0, 50, 10) if hook(step, {"eval_reward": 0.6 if step < 30 else 0.5})] == [30]
    found = hook.certificate()
    assert (found["fall_step"], found["lead_steps"]) == (30, 0)


def test_options_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="action: expected one of warn, stop, got 'rollback'"):
        GuardHook("rollback")
    with pytest.raises(
        ValueError, match="prompts: expected the number of held-out prompts of accuracy 'eval_reward', got 0"
    ):
        GuardHook(accuracy="eval_reward")


def trainer_of(base, place, callback, **changes):
    trainer = tiny_trl.trainer_of(base, place, **changes)
    trainer.add_callback(callback)
    return trainer


def test_the_callback_stops_a_trainer_saves_and_certifies(base, tmp_path, monkeypatch):
    real = GuardHook.__call__
    monkeypatch.setattr(
        GuardHook,
        "__call__",
        lambda self, step, logs: real(self, step, (healthy if step <= WINDOW else collapsed)(step)),
    )
    callback = GuardCallback("stop", gold=True)
    trainer = trainer_of(base, tmp_path, callback, max_steps=2 * WINDOW + 3)
    trainer.train()
    assert trainer.state.global_step == 2 * WINDOW
    assert (tmp_path / f"checkpoint-{2 * WINDOW}").exists()
    found = json.loads((tmp_path / "certificate.json").read_text())
    assert [(each["step"], each["action"]) for each in found["warnings"]] == [(2 * WINDOW, "stop")]


def test_the_callback_reads_what_trl_logs_and_resumes(base, tmp_path):
    callback = GuardCallback(gold=True)
    options = {"max_steps": START + 1, "save_strategy": "steps", "save_steps": 2}
    trainer_of(base, tmp_path / "whole", callback, **options).train()
    lines = callback.hook.lines
    assert [line["step"] for line in lines] == list(range(1, START + 2))
    assert all({"entropy", "gold_reward", "groups_with_signal"} <= line.keys() for line in lines)
    other = GuardCallback(gold=True)
    resumed = trainer_of(base, tmp_path / "resumed", other, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert other.hook.lines[:4] == lines[:4]
    assert len(other.hook.lines) == len(lines)


def test_the_callback_needs_every_step(base, tmp_path):
    trainer = trainer_of(base, tmp_path, GuardCallback(), logging_steps=5)
    with pytest.raises(ValueError, match="logging_steps: expected 1 with GuardCallback, which reads every step, got 5"):
        trainer.train()


class Tracking:
    """As verl's: it logs what it is given."""

    def __init__(self):
        self.logged = []

    def log(self, data, step, backend=None):
        self.logged.append((step, dict(data), backend))


@pytest.fixture
def tracking(monkeypatch):
    module = types.ModuleType("verl.utils.tracking")
    module.Tracking = type("Tracking", (Tracking,), {"log": Tracking.log})
    for name in ("verl", "verl.utils"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "verl.utils.tracking", module)
    return module.Tracking


def test_verls_log_passes_through_the_guard(tracking):
    own, tracker, hook = tracking.log, tracking(), GuardHook("stop", gold=True)
    names = {"reward": "critic/score/mean", "entropy": "actor/entropy"}

    def train():
        for step in range(1, 60):
            logs = (healthy if step <= 30 else collapsed)(step)
            tracker.log(data={names.get(name, name): value for name, value in logs.items()}, step=step)

    with verl.guarded(hook), pytest.raises(CollapseError, match="collapse guard, step 40: entropy .* gold reward"):
        train()
    assert [step for step, _, _ in tracker.logged] == list(range(1, 41))  # the line of the collapse is logged first
    assert tracking.log is own
    with verl.guarded(GuardHook(gold=True)):
        tracker.log({"actor/entropy": 0.1}, 41, "console")
    assert tracker.logged[-1] == (41, {"actor/entropy": 0.1}, "console")


def test_a_log_of_another_shape_is_an_integration_error(tracking):
    tracking.log = lambda self, data: None
    with pytest.raises(IntegrationError, match="Tracking.log: expected the parameters"):
        verl.guarded(GuardHook())


def test_a_figure_that_is_not_finite_is_left_out(tmp_path):
    hook, whole = GuardHook(gold=True), GuardHook(gold=True)
    odd = {"reward": float("nan"), "entropy": float("inf"), "frac_reward_zero_std": 0.25}
    assert hook.line(1, odd) == {"step": 1, "groups_with_signal": 0.75}
    hook(0, odd)
    assert warned(hook) == warned(whole) == [40]
    hook.write_certificate(tmp_path)
    assert (tmp_path / "certificate.json").exists()


@pytest.mark.parametrize("value", [1.5, -0.25])
def test_a_sum_of_rewards_is_no_accuracy(value):
    hook = GuardHook(accuracy="eval_reward", prompts=10)
    hook(1, {"eval_reward": 1.0})
    with pytest.raises(ValueError, match=rf"accuracy: expected a figure in \[0, 1\].*, got eval_reward {value}"):
        hook(2, {"eval_reward": value})
