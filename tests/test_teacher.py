"""The teacher: its schedules, its gate, its share of the votes, and its state."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mgrpo_kernels import MomentumModel, Teacher, ema_update_
from mgrpo_kernels.method import teacher_agreement, top_answer_share
from mgrpo_kernels.teacher import SIGNS, Gate
from mgrpo_kernels.train.watch.guard import LABELS_LEFT, START, TOP_ANSWER_RISE, WINDOW

HEALTHY = {"vote_share": 0.6, "top_answer_share": 0.2, "distinct_labels": 0.9, "teacher_agreement": 0.8}


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))


def move(policy: nn.Module, seed: int) -> None:
    """Change a policy's weights, as an optimizer step does."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn_like(parameter))


def weights(teacher: MomentumModel) -> list[Tensor]:
    return [value.clone() for value in teacher.ema.values()]


def equal(one: list[Tensor], two: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def moves(teacher: Teacher, policy: nn.Module, steps: int, metrics: Callable[[int], dict[str, Any]]) -> list[int]:
    """Return the steps, from 1 to `steps`, whose end changed the teacher's weights."""
    found = []
    for step in range(1, steps + 1):
        move(policy, step)
        before = weights(teacher)
        assert teacher.advance(metrics(step)) is not equal(before, teacher.ema.values())
        if not equal(before, teacher.ema.values()):
            found.append(step)
            if teacher.schedule != "ema":
                assert equal(weights(teacher), policy.parameters())
    return found


def test_ema_is_the_momentum_model() -> None:
    policy = model()
    teacher, plain = Teacher(policy, 0.9), MomentumModel(policy, 0.9)
    for step, decay in enumerate((None, 0.5, None)):
        move(policy, step)
        assert teacher.advance(decay=decay)
        plain.update(decay)
        assert equal(weights(plain), teacher.ema.values())
    assert (teacher.updates, teacher.age, teacher.refreshes) == (3, 0, None)


def test_hard_copies_every_k_steps_and_is_frozen_in_between() -> None:
    policy = model()
    teacher = Teacher(policy, schedule="hard", every=3)
    assert moves(teacher, policy, 10, lambda _: {}) == [3, 6, 9]
    assert (teacher.refreshes, teacher.age) == (3, 1)


def test_hard_in_bfloat16_copies_to_the_nearest_two_values() -> None:
    policy = model()
    teacher = Teacher(policy, dtype=torch.bfloat16, schedule="hard", every=1)
    move(policy, 1)
    teacher.advance()
    for value, parameter in zip(teacher.ema.values(), policy.parameters(), strict=True):
        assert ((value.float() - parameter).abs() <= 2**-7 * parameter.abs()).all()


def test_gated_copies_a_healthy_policy_once_the_gate_has_seen_enough() -> None:
    policy = model()
    teacher = Teacher(policy, schedule="gated", every=4)
    assert moves(teacher, policy, 20, lambda _: HEALTHY) == [WINDOW, WINDOW + 4, WINDOW + 8]


@pytest.mark.parametrize(
    ("sign", "bad", "good", "message"),
    [
        ("vote_share", 0.59, 0.61, "vote share 0.590, below the 0.600 of the last refresh"),
        ("top_answer_share", 0.2 + TOP_ANSWER_RISE + 0.01, 0.2 + TOP_ANSWER_RISE - 0.01, "top answer 0.200 -> 0.410"),
        ("distinct_labels", 0.9 * LABELS_LEFT - 0.01, 0.9 * LABELS_LEFT + 0.01, "distinct labels 0.900 -> 0.620"),
        ("teacher_agreement", 0.49, 0.51, "agreement of policy and teacher 0.490, below 0.500"),
    ],
)
def test_each_sign_alone_closes_the_gate(sign: str, bad: float, good: float, message: str) -> None:
    for value, is_open in ((good, True), (bad, False)):
        policy = model()
        teacher = Teacher(policy, schedule="gated", every=WINDOW)
        changed = {**HEALTHY, sign: value}
        found = moves(teacher, policy, 2 * WINDOW, lambda step, c=changed: HEALTHY if step <= WINDOW else c)
        assert found == ([WINDOW, 2 * WINDOW] if is_open else [WINDOW])
        assert len(teacher.waits_for) == (not is_open)
        assert all(message in each for each in teacher.waits_for)


def test_small_changes_do_not_pass_one_after_the_other() -> None:
    """An EMA follows each of these changes; the gate compares with the first steps, so it closes for good."""
    policy = model()
    teacher = Teacher(policy, schedule="gated", every=1)
    drift = moves(
        teacher,
        policy,
        300,
        lambda step: {**HEALTHY, "distinct_labels": 0.9 * 0.99**step, "vote_share": 0.6 + step / 1000},
    )
    start = sum(0.9 * 0.99**step for step in range(1, START + 1)) / START
    last = next(
        step
        for step in range(WINDOW, 300)
        if sum(0.9 * 0.99**each for each in range(step - WINDOW + 1, step + 1)) / WINDOW < LABELS_LEFT * start
    )
    assert drift == list(range(WINDOW, last))


def test_a_refresh_that_is_due_waits_until_the_gate_opens() -> None:
    policy = model()
    teacher = Teacher(policy, schedule="gated", every=2)
    apart = {**HEALTHY, "teacher_agreement": 0.0}
    found = moves(teacher, policy, 60, lambda step: apart if 20 < step <= 30 else HEALTHY)
    # Of the window of 10 steps, 4 with an agreement of 0 leave a mean below 0.5.
    assert [step for step in found if 18 < step < 42] == [20, 22, 37, 39, 41]


def test_a_sign_that_is_not_a_number_is_one_that_is_missing() -> None:
    gate = Gate(signs=["vote_share"])
    for value in [float("nan"), *[0.5] * (WINDOW - 1)]:
        gate.look({"vote_share": value})
    assert gate.reasons() == [f"vote_share has values of {WINDOW - 1} steps, of the {WINDOW} that the gate needs"]
    gate.look({"vote_share": 0.5})
    assert gate.reasons() == []


@pytest.mark.parametrize("missing", SIGNS)
def test_a_sign_that_is_not_measured_keeps_the_gate_closed(missing: str) -> None:
    policy = model()
    teacher = Teacher(policy, schedule="gated", every=1)
    assert moves(teacher, policy, 15, lambda _: {**HEALTHY, missing: None}) == []
    assert teacher.waits_for == [f"{missing} has values of 0 steps, of the {WINDOW} that the gate needs"]
    without = Teacher(policy, schedule="gated", every=1, gate=Gate(signs=[each for each in SIGNS if each != missing]))
    assert moves(without, policy, 12, lambda _: {**HEALTHY, missing: None}) == [10, 11, 12]


def test_the_teacher_gets_more_votes_the_less_it_agrees() -> None:
    teacher = Teacher(model(), most_votes=1.0)
    assert teacher.policy_voters(8, 8) == 8  # nothing is known yet
    for agreement, share, voters in ((1.0, 0.5, 8), (0.5, 0.75, 3), (0.0, 1.0, 0)):
        for _ in range(WINDOW):
            teacher.advance({"teacher_agreement": agreement})
        assert teacher.vote_share(8, 8) == pytest.approx(share)
        assert teacher.policy_voters(8, 8) == voters
    assert Teacher(model()).policy_voters(6, 2) == 6
    assert Teacher(model(), most_votes=0.5).policy_voters(6, 0) == 6  # no rollouts of its own, no votes to weigh


def test_the_share_of_the_votes_never_falls_below_that_of_the_rollouts() -> None:
    teacher = Teacher(model(), most_votes=0.4)
    teacher.advance({"teacher_agreement": 0.0})
    assert teacher.policy_voters(8, 8) == 8


def script(step: int) -> dict[str, Any]:
    return {**HEALTHY, "vote_share": 0.6 + 0.05 * (step % 3), "teacher_agreement": 0.3 + 0.1 * (step % 5)}


@pytest.mark.parametrize(
    "options",
    [
        {"schedule": "ema", "most_votes": 0.9},
        {"schedule": "hard", "every": 4},
        {"schedule": "gated", "every": 3, "dtype": torch.bfloat16},
    ],
)
@pytest.mark.parametrize("stop", [1, 11, 17])
def test_resumed_from_its_state_gives_the_same_bits(options: dict[str, Any], stop: int) -> None:
    policy = model()
    teacher = Teacher(policy, **options)
    for step in range(1, 31):
        if step == stop:
            saved = json.loads(json.dumps(teacher.progress()))
            state = {**teacher.state_dict(), "ema": {name: value.clone() for name, value in teacher.ema.items()}}
            state["schedule"] = saved
        move(policy, step)
        teacher.advance(script(step))
    again = model()
    other = Teacher(again, **options)
    for step in range(1, stop):
        move(again, step)
    other.load_state_dict(state)
    for step in range(stop, 31):
        move(again, step)
        other.advance(script(step))
    assert equal(weights(teacher), other.ema.values())
    assert (teacher.updates, teacher.age, teacher.waits_for) == (other.updates, other.age, other.waits_for)
    assert teacher.progress() == other.progress()
    assert teacher.vote_share(6, 2) == other.vote_share(6, 2)


def test_a_state_of_a_momentum_model_begins_a_schedule_anew() -> None:
    policy = model()
    plain, teacher = MomentumModel(policy), Teacher(model(1), schedule="hard", every=5)
    teacher.advance()
    teacher.load_state_dict(plain.state_dict())
    assert equal(weights(plain), teacher.ema.values())
    assert teacher.age == 0


@pytest.mark.parametrize(
    "progress",
    [
        {"age": 1},
        {"age": -1, "gate": Gate().state_dict()},
        {"age": 1.5, "gate": Gate().state_dict()},
        {"age": 1, "gate": {}},
        {"age": 1, "gate": {**Gate().state_dict(), "recent": {}}},
        {"age": 1, "gate": {**Gate().state_dict(), "level": float("nan")}},
        [],
    ],
)
def test_a_state_that_is_something_else_changes_nothing(progress: Any) -> None:
    policy = model()
    teacher = Teacher(policy)
    before, state = weights(teacher), teacher.state_dict()
    move(policy, 1)
    with pytest.raises(ValueError, match="state_dict: expected"):
        teacher.load_state_dict({**state, "ema": dict(policy.named_parameters()), "schedule": progress})
    assert equal(before, teacher.ema.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "soft"}, "schedule: expected one of ema, hard, gated, got 'soft'"),
        ({"schedule": "hard", "every": 0}, "every: expected at least 1, got 0"),
        ({"gate": Gate()}, "gate: expected None with schedule ema"),
        ({"most_votes": 1.5}, "most_votes: expected"),
    ],
)
def test_options_that_are_wrong_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Teacher(model(), **options)


def test_a_step_that_lacks_what_the_schedule_reads_is_refused() -> None:
    with pytest.raises(ValueError, match="metrics: expected the metrics of the step .* with schedule gated, got None"):
        Teacher(model(), schedule="gated").advance()
    with pytest.raises(ValueError, match="with most_votes, got None"):
        Teacher(model(), most_votes=0.9).advance()
    with pytest.raises(ValueError, match=r"decay: expected None with schedule hard, which copies the policy, got 0\.5"):
        Teacher(model(), schedule="hard").advance({}, 0.5)
    with pytest.raises(ValueError, match="signs: expected one of"):
        Gate(signs=["kl"])


def test_agreement_is_of_the_most_frequent_answers() -> None:
    momentum = torch.tensor([False, False, False, True, True] * 4)
    cluster = torch.tensor(
        [0, 1, 1, 1, 0] + [0, 0, 1, 1, 1] + [0, 1, -1, 0, -1] + [0, 0, 0, -1, -1]
    )  # of the first prompt, the teacher's first answer is its most frequent one
    assert teacher_agreement(cluster, 5, momentum) == pytest.approx(2 / 3)  # the last prompt does not count
    offsets = torch.tensor([0, 5, 5, 10])
    assert teacher_agreement(cluster[:10], offsets, momentum[:10]) == 0.5
    assert teacher_agreement(cluster, 5, torch.zeros(20, dtype=torch.bool)) is None


def test_the_share_of_the_top_answer_is_of_those_that_answered() -> None:
    assert top_answer_share(["1", None, "2", "1"]) == pytest.approx(2 / 3)
    assert top_answer_share([None]) is None


def test_lora_and_frozen_weights() -> None:
    """Only the weights that train are held, as with LoRA."""
    policy = model()
    policy[0].requires_grad_(False)  # type: ignore[index]
    teacher = Teacher(policy, frozen=False, schedule="hard", every=1)
    assert list(teacher.ema) == ["1.weight", "1.bias"]
    move(policy, 1)
    assert teacher.advance()
    assert torch.equal(teacher.ema["1.weight"], policy[1].weight)  # type: ignore[index]


def test_a_copy_by_the_op_at_decay_0_is_exact() -> None:
    """A refresh is an update with decay 0, in one launch."""
    a, b = torch.full((5,), 1e30), torch.full((5,), 1e-30)
    ema_update_([a], [b], 0.0)
    assert torch.equal(a, b)
