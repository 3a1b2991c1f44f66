"""Schedules of the teacher in TRL: in MGRPOTrainer by options, in any trainer by a callback."""

import pytest
import tiny_trl
import torch
from trl import GRPOConfig, GRPOTrainer

from mgrpo_kernels import Teacher
from mgrpo_kernels.integrations.trl import MGRPOConfig, MGRPOTrainer, TeacherCallback
from mgrpo_kernels.integrations.trl.teacher import TEACHER_FILE
from mgrpo_kernels.teacher import Gate
from mgrpo_kernels.teacher.gate import WINDOW

G, N = 8, 4


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_trl.make_base(tmp_path_factory.mktemp("base"))


def first_digit(text):
    return next((each for each in text if each.isdigit()), None)


def mgrpo(base, place, reward_funcs=None, **changes):
    options = {
        "num_generations": G,
        "momentum_rollouts": N,
        "per_device_train_batch_size": G,
        "gradient_accumulation_steps": 2,
        "equivalence": "exact",
        "beta": 0.0,
        "iqr_filter": False,
        **changes,
    }
    args = MGRPOConfig(**tiny_trl.settings(place, **options))
    return MGRPOTrainer(base, reward_funcs, args, train_dataset=tiny_trl.prompts(), extract=first_digit)


def copied(weights):
    return {name: value.clone() for name, value in weights.items()}


def same(one, two):
    return all(torch.equal(value, two[name]) for name, value in one.items())


def test_a_hard_teacher_is_copied_by_the_clock_and_resumed(base, tmp_path):
    options = {"teacher": "hard", "teacher_every": 3, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = mgrpo(base, tmp_path / "whole", **options)
    whole.train()
    lines = [line for line in whole.state.log_history if "loss" in line]
    assert [line["mgrpo/teacher_refreshes"] for line in lines] == [0, 0, 1, 1]
    assert (whole.momentum.age, whole.momentum.updates) == (1, 1)
    assert all(0 <= line["mgrpo/teacher_agreement"] <= 1 for line in lines)
    resumed = mgrpo(base, tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert same(whole.momentum.ema, resumed.momentum.ema)
    assert whole.momentum.progress() == resumed.momentum.progress()


def test_the_gate_reads_each_batch_of_rollouts_once(base, tmp_path):
    """Two optimizer steps for each batch: the second brings no new signs."""
    trainer = mgrpo(base, tmp_path, teacher="gated", num_iterations=2, max_steps=4)
    trainer.train()
    state = trainer.momentum.gate.state_dict()
    assert {name: len(values) for name, values in state["recent"].items()} == dict.fromkeys(state["recent"], 2)
    assert (trainer.momentum.refreshes, trainer.momentum.age) == (0, 4)


def test_policy_rollouts_lose_their_votes(base, tmp_path):
    trainer = mgrpo(base, tmp_path, teacher_votes=1.0, max_steps=1)
    for agreement, voters in ((1.0, 4), (0.5, 1), (0.0, 0)):
        for _ in range(WINDOW):
            trainer.momentum.gate.look({"teacher_agreement": agreement})
        by_momentum = trainer.by_momentum(2 * G)
        want = torch.tensor(([True] * voters + [False] * (N - voters) + [True] * N) * 2)
        assert torch.equal(trainer._may_vote(by_momentum), want)
    trainer.train()


@pytest.mark.parametrize("options", [{"teacher": "gated"}, {"teacher_votes": 0.9}])
def test_a_schedule_that_reads_the_vote_is_refused_without_one(base, tmp_path, options):
    name = next(iter(options))
    with pytest.raises(ValueError, match=f"{name}: expected the method's own rewards, whose vote it reads"):
        mgrpo(base, tmp_path, tiny_trl.share_of_digits, **options)


def grpo(base, place, **changes):
    args = GRPOConfig(**tiny_trl.settings(place, beta=0.04, max_steps=4, **changes))
    return GRPOTrainer(base, tiny_trl.share_of_digits, args, train_dataset=tiny_trl.prompts())


def test_a_callback_refreshes_the_reference_of_a_trainer_of_trls(base, tmp_path):
    def start(place, resume_from=None):
        trainer = grpo(base, place, save_strategy="steps", save_steps=2)
        callback = TeacherCallback(Teacher(trainer.model, schedule="hard", every=3), trainer.ref_model, resume_from)
        trainer.add_callback(callback)
        return trainer, callback

    trainer, callback = start(tmp_path / "whole")
    before = copied(dict(trainer.ref_model.named_parameters()))
    trainer.train()
    after = dict(trainer.ref_model.named_parameters())
    assert not same(before, after)
    assert same(callback.teacher.ema, after)
    assert not same(dict(trainer.model.named_parameters()), after)  # frozen since step 3
    assert (callback.teacher.refreshes, callback.teacher.age) == (1, 1)

    checkpoint = tmp_path / "whole" / "checkpoint-2"
    resumed, other = start(tmp_path / "resumed", checkpoint)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert same(callback.teacher.ema, other.teacher.ema)
    assert same(after, dict(resumed.ref_model.named_parameters()))
    (checkpoint / TEACHER_FILE).unlink()
    broken, _ = start(tmp_path / "broken", checkpoint)
    with pytest.raises(ValueError, match=r"resume_from: expected a checkpoint with teacher.pt, got .*checkpoint-2"):
        broken.train(resume_from_checkpoint=str(checkpoint))


def test_the_gate_of_a_callback_reads_the_log_once(base):
    model = torch.nn.Linear(3, 3)
    signs = ("vote_share", "distinct_labels")
    callback = TeacherCallback(Teacher(model, schedule="gated", every=1, gate=Gate(signs=signs)))
    for _ in range(WINDOW):
        callback.on_log(None, None, None, {"mgrpo/vote_share": 0.5, "distinct_labels": 0.9, "loss": 1.0})
        assert callback.teacher.refreshes == 0
        callback.on_step_end(None, None, None)
    assert callback.teacher.refreshes == 1
    callback.on_step_end(None, None, None)  # nothing was logged since
    assert {len(each) for each in callback.teacher.gate.state_dict()["recent"].values()} == {0, WINDOW}


def test_a_callback_copies_at_the_step_of_a_refresh():
    model, target = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    callback = TeacherCallback(Teacher(model, schedule="hard", every=2), target)
    for step in range(1, 5):
        before = target.weight.detach().clone()
        with torch.no_grad():
            model.weight.add_(1.0)
        callback.on_step_end(None, None, None)
        assert torch.equal(target.weight, model.weight if step % 2 == 0 else before)


def test_the_log_of_an_evaluation_does_not_hide_that_of_its_step():
    callback = TeacherCallback(
        Teacher(torch.nn.Linear(3, 3), schedule="gated", every=1, gate=Gate(signs=["vote_share"]))
    )
    for _ in range(WINDOW):
        callback.on_log(None, None, None, {"mgrpo/vote_share": 0.5})
        callback.on_log(None, None, None, {"eval_reward": 0.5})
        callback.on_step_end(None, None, None)
    assert callback.teacher.refreshes == 1
