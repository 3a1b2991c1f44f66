"""Schedules of the momentum model in the trainer: what moves it, what it votes, and how a run is resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from mgrpo_kernels.teacher import SIGNS
from mgrpo_kernels.train import __main__ as command
from mgrpo_kernels.train import step as steps
from mgrpo_kernels.train.config import build
from mgrpo_kernels.train.model.policy import load_policy
from mgrpo_kernels.train.run import checkpoint
from mgrpo_kernels.train.step import Learner, train_step
from mgrpo_kernels.train.watch.metrics import VARYING

CPU = torch.device("cpu")
SCHEDULES: dict[str, dict[str, Any]] = {
    "hard": {"teacher": "hard", "teacher_every": 3},
    "gated": {"teacher": "gated", "teacher_every": 2, "teacher_agreement": 0.0},
    "votes": {"teacher": "ema", "teacher_votes": 1.0, "iqr_filter": False},
    "offloaded": {"teacher": "hard", "teacher_every": 2, "momentum_device": "cpu"},
    "lora": {"teacher": "hard", "teacher_every": 2, "lora_rank": 2},
}


def fresh(base: Path, **options: Any) -> Learner:
    settings = tiny.config(**options).lora
    return tiny.learner(load_policy(str(base), CPU, torch.float32, settings, 0), **options)


def take(learner: Learner, step: int) -> dict[str, Any]:
    values, _ = train_step(learner, learner.task.train[3 * step : 3 * step + 3], step)
    return {key: value for key, value in values.items() if key not in VARYING}


def teacher_weights(learner: Learner) -> dict[str, Tensor]:
    assert learner.momentum is not None
    return tiny.weights(learner.momentum)


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, two[name]) for name, value in one.items())


@pytest.mark.parametrize("name", SCHEDULES)
def test_resumed_gives_the_same_bits(base: Path, tmp_path: Path, name: str) -> None:
    options = {**SCHEDULES[name], "steps": 14, "kl_coef": 0.0}
    last = 13 if name == "gated" else 5
    learner, lines = fresh(base, **options), []
    for step in range(1, last + 1):
        lines.append(take(learner, step))
        if step == last - 3:  # in between two copies of each schedule
            checkpoint.save(tmp_path / "run", learner, step, 0, 0, keep=0)
    other = fresh(base, **options)
    checkpoint.restore(checkpoint.load(tmp_path / "run" / "latest"), other)
    assert [take(other, step) for step in range(last - 2, last + 1)] == lines[-3:]
    assert same(teacher_weights(learner), teacher_weights(other))
    assert learner.momentum is not None
    assert other.momentum is not None
    assert learner.momentum.progress() == other.momentum.progress()


def test_a_hard_teacher_is_frozen_between_its_copies(base: Path) -> None:
    learner = fresh(base, **SCHEDULES["hard"], learning_rate=1e-2)
    assert learner.momentum is not None
    before, found = teacher_weights(learner), []
    for step in range(1, 5):
        line = take(learner, step)
        now = teacher_weights(learner)
        found.append((same(before, now), line["teacher_refreshes"], line["teacher_age"]))
        if step == 3:
            assert same(now, tiny.weights(learner.policy))
            assert line["momentum_distance"] == 0.0
        before = now
    assert found == [(True, 0, 1), (True, 0, 2), (False, 1, 0), (True, 1, 1)]


def test_a_gated_teacher_waits_for_the_signs_and_says_so(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate opens by the metrics of the step itself, which metrics.jsonl has."""
    signs = {"vote_share": 0.6, "top_answer_share": 0.2, "distinct_labels": 0.9, "teacher_agreement": 0.8}
    real = steps.step_metrics

    def healthy(*args: Any) -> dict[str, Any]:
        assert set(SIGNS) <= real(*args).keys()
        return {**real(*args), **signs}

    monkeypatch.setattr(steps, "step_metrics", healthy)
    learner = fresh(base, teacher="gated", teacher_every=2, steps=20)
    lines = [take(learner, step) for step in range(1, 11)]
    assert [line["teacher_refreshes"] for line in lines] == [0] * 9 + [1]
    assert lines[0]["teacher_gate"] is None  # no copy is due
    assert "vote_share has values of 9 steps, of the 10 that the gate needs" in lines[8]["teacher_gate"]
    signs["teacher_agreement"] = -9.0  # the mean of ten steps is then below 0.5
    take(learner, 11)
    line = take(learner, 12)
    assert line["teacher_refreshes"] == 1
    assert line["teacher_gate"].startswith("agreement of policy and teacher -1.160, below 0.500")


def test_policy_rollouts_lose_their_votes_as_the_agreement_falls(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learner = fresh(base, momentum_rollouts=4, teacher_votes=1.0, iqr_filter=False)
    assert learner.momentum is not None
    taken = []
    real = steps.select

    def spy(*args: Any, **options: Any) -> Any:
        found = real(*args, **options)
        taken.append((options["by_momentum"], found.voters, found.trains, found.nonempty))
        return found

    monkeypatch.setattr(steps, "select", spy)
    for agreement, voters in ((1.0, 4), (0.5, 1), (0.0, 0)):  # of 4, beside 4 of the teacher
        for _ in range(10):
            learner.momentum.gate.look({"teacher_agreement": agreement})
        line = take(learner, 1)
        momentum, voted, trains, nonempty = (each.view(3, 8) for each in taken.pop())
        assert (voted == (nonempty & (momentum | (torch.arange(8) < voters)))).all()
        assert (trains == (nonempty & ~momentum)).all()  # all of the policy's train, whether they vote or not
        assert line["teacher_vote_share"] == pytest.approx(float(momentum[voted].float().mean()))


def test_a_run_is_resumed_with_its_schedule(base: Path, tmp_path: Path) -> None:
    """By the command: the run that is stopped half way and resumed has the lines of the one that was not."""
    flags = [*tiny.FLAGS, "--momentum-rollouts", "2", "--teacher", "hard", "--teacher-every", "3"]
    whole, parts = (tiny.output_with(base, tmp_path / name) for name in ("whole", "parts"))
    assert command.main([*flags, "--output", str(whole)]) == 0
    assert [line["teacher_refreshes"] for line in tiny.lines(whole)] == [None, 0, 0, 1, 1]
    assert command.main([*flags, "--output", str(parts)]) == 0
    for each in ("step_4", "latest"):
        place = parts / "checkpoints" / each
        if place.is_symlink():
            place.unlink()
        else:
            for file in place.iterdir():
                file.unlink()
            place.rmdir()
    assert command.main(["--output", str(parts), "--resume"]) == 0
    assert tiny.lines(parts) == tiny.lines(whole)
    read = [checkpoint.read(run / "checkpoints" / "latest", "momentum.") for run in (whole, parts)]
    assert same(*read)


def test_a_checkpoint_of_an_earlier_version_begins_the_schedule_anew(base: Path, tmp_path: Path) -> None:
    learner = fresh(base)
    take(learner, 1)
    checkpoint.save(tmp_path / "run", learner, 1, 0, 0, keep=0)
    facts = checkpoint.load(tmp_path / "run" / "latest")
    assert facts["teacher"] is not None
    text = (tmp_path / "run" / "latest" / "run.json").read_text()
    (tmp_path / "run" / "latest" / "run.json").write_text(text.replace('"teacher"', '"unknown"'))
    facts = checkpoint.load(tmp_path / "run" / "latest")
    assert facts["teacher"] is None
    checkpoint.restore(facts, fresh(base))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher": "soft"}, "teacher: expected one of ema, hard, gated, got 'soft'"),
        ({"method": "srt", "teacher": "hard"}, "teacher: expected a momentum model with it"),
        (
            {"teacher": "hard", "decay": 0.9},
            "decay: expected teacher ema with it, without which it has no effect, got 0.9",
        ),
        ({"teacher": "gated", "decay_end": 0.9}, "decay_end: expected teacher ema with it"),
        ({"teacher_every": 5}, "teacher_every: expected teacher hard or gated with it"),
        ({"teacher": "hard", "teacher_agreement": 0.7}, "teacher_agreement: expected teacher gated with it"),
        (
            {"momentum_rollouts": 0, "kl_reference": "momentum", "kl_coef": 0.1, "teacher": "gated"},
            r"teacher: expected momentum rollouts \(for their agreement with the policy\) with it",
        ),
        ({"method": "srt", "teacher_votes": 0.7}, "teacher_votes: expected momentum rollouts with it"),
        (
            {"method": "co_rewarding", "teacher_votes": 0.7},
            "teacher_votes: expected a method in which policy and momentum",
        ),
        ({"momentum_rollouts": 8, "teacher_votes": 0.5}, "teacher_votes: expected more than 0.5, the share of 8 of 16"),
    ],
)
def test_options_without_effect_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build({"rollouts": 16, **options})


def test_schedules_of_a_reference_alone() -> None:
    """Without rollouts of its own, the momentum model is the reference of the KL penalty, by any schedule that reads no votes."""
    config = build({"momentum_rollouts": 0, "kl_reference": "momentum", "kl_coef": 0.1, "teacher": "hard"})
    assert config.derived()["momentum model"] == "copies the policy every 10 steps"
    assert build({"teacher": "gated"}).derived()["momentum model"] == (
        "copies the policy every 10 steps, if healthy and its agreement is at least 0.5"
    )
