"""What a user adds to a run: rewards of their own, several held-out sets, the best weights at the end, an upload, several updates."""

from __future__ import annotations

import itertools
import json
import math
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import tiny
import torch
from small_models import make_answering_model

from mgrpo_kernels.method import MethodOptions, select
from mgrpo_kernels.train import __main__ as command
from mgrpo_kernels.train import evaluate
from mgrpo_kernels.train import step as steps
from mgrpo_kernels.train.data.mixture import parse_sources
from mgrpo_kernels.train.errors import OutputError, UsageError
from mgrpo_kernels.train.functions import make_reward
from mgrpo_kernels.train.model.policy import Policy
from mgrpo_kernels.train.run import checkpoint, hub, loop
from mgrpo_kernels.train.update import make_optimizer

CPU = torch.device("cpu")


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Return a function that makes another one importable, and returns its name."""

    def named(function: Any) -> str:
        module = types.ModuleType("rewards_of_a_test")
        module.score = function  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        return f"{module.__name__}:score"

    return named


# --- Rewards


def test_a_reward_alone_and_mixed_with_the_vote(policy: Policy, own: Callable[..., str]) -> None:
    calls: list[dict[str, Any]] = []

    def score(**given: Any) -> list[float | None]:
        calls.append(given)
        return [float(len(each)) for each in given["responses"][:-1]] + [None]

    name = own(score)
    for share in (1.0, 0.25):
        learner = tiny.learner(policy, reward=name, reward_share=share, method="srt")
        learner.task = learner.task._replace(reward=make_reward(name))
        seen = steps.roll_out(learner, learner.task.train[:3], 1)
        seen = seen._replace(rewards=steps.own_rewards(learner, learner.task.train[:3], seen))
        selection = steps.select_rollouts(learner, seen, steps.score_by_sampler(learner, seen), 1)
        assert selection.vote is not None
        lengths = torch.tensor([float(len(text)) for text in seen.texts])
        expected = share * lengths + (1 - share) * selection.vote.agrees
        torch.testing.assert_close(selection.rewards[:-1], expected[:-1])
        assert not selection.trains[-1]  # None: it does not train
    given = calls[0]
    assert set(given) == {"prompts", "responses", "answers", "golds"}
    assert {len(each) for each in given.values()} == {3 * learner.config.rollout.rollouts}
    assert given["prompts"][0] == learner.task.train[0].prompt
    assert given["golds"][-1] == learner.task.train[2].gold


def test_rewards_without_a_share_are_those_of_before() -> None:
    mask, rewards = torch.ones(4, 2, dtype=torch.bool), torch.tensor([1.0, 0.0, 3.0, 0.0])
    found = select(mask, ["7"] * 4, 2, MethodOptions(method="srt"), rewards=rewards)
    assert found.vote is None
    assert torch.equal(found.rewards, rewards)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0], "to return 2 numbers, one for each response, got 1"),
        ([1.0, math.nan], "to return finite numbers or None, got nan for the response 'b'"),
        ([1.0, math.inf], "got inf"),
        ([1.0, "1"], "got '1' for the response 'b'"),
        ([[1.0], 1.0], "got \\[1.0\\] for the response 'a'"),
        (3.0, "to return a list of numbers, got float"),
        (None, "to return a list of numbers, got NoneType"),
    ],
)
def test_what_a_reward_must_not_return_is_refused_with_its_name(
    own: Callable[..., str], returned: Any, message: str
) -> None:
    name = own(lambda **_: returned)
    reward = make_reward(name)
    assert reward is not None
    with pytest.raises(UsageError, match=f"^reward: expected {name} .*{message}"):
        reward(["p"] * 2, ["a", "b"], [None, "7"], ["7"] * 2)


def test_numbers_of_any_kind_are_rewards(own: Callable[..., str]) -> None:
    reward = make_reward(own(lambda **_: torch.tensor([1, 2])))
    assert reward is not None
    assert reward(["p"] * 2, ["a", "b"], ["7"] * 2, [None] * 2) == [1.0, 2.0]
    reward = make_reward(own(lambda prompts, **_: (True, None)))
    assert reward is not None
    found = reward(["p"] * 2, ["a", "b"], ["7"] * 2, [None] * 2)
    assert found[0] == 1.0
    assert math.isnan(found[1])


def test_a_reward_that_cannot_be_called_stops_before_the_run(
    tmp_path: Path, own: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(completions: Sequence[str]) -> list[float]:
        return [0.0 for _ in completions]

    for name, message in (
        (own(wrong), "expected a function that takes the keywords prompts, responses, answers, golds"),
        ("no_such_module:f", "expected module:function that can be imported, got 'no_such_module:f'"),
    ):
        assert command.main([*tiny.FLAGS, "--reward", name, "--output", str(tmp_path / "run")]) == 2
        assert f"error: --reward: {message}" in capsys.readouterr().err
        assert not (tmp_path / "run").exists()
    with pytest.raises(UsageError, match="reward_share: expected --reward with it"):
        tiny.config(reward_share=0.5)
    with pytest.raises(UsageError, match="gold_labels: expected a reward of the method with it"):
        tiny.config(gold_labels=True, reward="module:function")
    with pytest.raises(UsageError, match="reward_share: expected 1 with method restrain, whose advantages are not"):
        tiny.config(method="restrain", reward="module:function", reward_share=0.5)
    assert tiny.config(gold_labels=True, reward="module:function", reward_share=0.5).method.gold_labels


def test_a_run_with_a_reward_of_its_own_that_fails_later(
    base: Path, tmp_path: Path, own: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    counted: list[int] = []

    def score(responses: Sequence[str], **_: Any) -> list[float]:
        counted.append(1)
        return [float(len(each)) for each in responses][len(counted) > 1 :]

    output = tiny.output_with(base, tmp_path / "run")
    assert command.main([*tiny.FLAGS, "--reward", own(score), "--output", str(output)]) == 2
    assert "error: --reward: expected rewards_of_a_test:score to return 24 numbers" in capsys.readouterr().err
    assert [line["step"] for line in tiny.lines(output)] == [0, 1]
    assert tiny.lines(output)[1]["vote_share"] is not None


# --- Held-out sets


def test_names_of_held_out_sets() -> None:
    found = parse_sources("easy=a.jsonl,hard=b/c:main:test", "eval_data")
    assert [(each.label, each.name) for each in found] == [("easy", "a.jsonl"), ("hard", "b/c:main:test")]
    assert [each.label for each in parse_sources("a.jsonl,b.jsonl", "eval_data")] == ["", ""]
    for wrong in ("easy=a.jsonl,b.jsonl", "easy=a.jsonl,easy=b.jsonl"):
        with pytest.raises(UsageError, match="eval_data: expected different names for all sets or none"):
            parse_sources(wrong, "eval_data")


def test_each_held_out_set_has_its_accuracy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_answering_model(tmp_path / "model")
    for name, answers in (("easy", ["7", "7", "7"]), ("hard", ["x"] * 4)):
        rows = [json.dumps({"question": f"{name} {i}", "answer": each}) for i, each in enumerate(answers)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    sets = f"easy={tmp_path / 'easy.jsonl'},hard={tmp_path / 'hard.jsonl'}"
    flags = [
        "--model",
        str(tmp_path / "model"),
        "--eval-data",
        sets,
        "--eval-samples",
        "2",
        "--max-response-tokens",
        "8",
    ]
    assert evaluate.main([*flags, "--eval-prompts", "3", "--output", str(tmp_path / "e")]) == 0
    (line,) = tiny.lines(tmp_path / "e")
    assert line["eval_accuracy"] == pytest.approx((line["eval_accuracy/easy"] + line["eval_accuracy/hard"]) / 2)
    assert line["eval_accuracy/hard"] == 0.0
    assert line["eval_accuracy_error/hard"] == 0.0
    shown = capsys.readouterr().out
    assert f"eval_accuracy/easy: {line['eval_accuracy/easy']:.4f} ± " in shown
    rows = tiny.lines(tmp_path / "e", "questions.jsonl")
    assert [row["source"] for row in rows] == ["easy"] * 3 + ["hard"] * 3  # the first three of each
    run = [*flags, "--data", str(tmp_path / "easy.jsonl"), "--steps", "1", "--prompts-per-step", "2", "--rollouts", "4"]
    assert command.main([*run, "--output", str(tmp_path / "run")]) == 0
    last = tiny.lines(tmp_path / "run")[-1]
    assert last["eval_accuracy_change/hard"] == 0.0
    assert "  hard: 0.000 ± 0.000 -> 0.000 ± 0.000, change +0.000 ± 0.000" in capsys.readouterr().out


# --- The end of a run


@pytest.mark.parametrize("best", [2, None])
def test_the_best_weights_at_the_end(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], best: int | None
) -> None:
    monkeypatch.setattr(loop.HeldOut, "best_of_all", lambda _: best)
    monkeypatch.setattr(loop.Guard, "is_best", lambda _, step: step == 2)
    output = tiny.output_with(base, tmp_path / "run")
    flags = [*tiny.FLAGS, "--checkpoint-every", "0", "--keep-checkpoints", "0", "--load-best"]
    assert command.main([*flags, "--output", str(output)]) == 0
    from safetensors.torch import load_file

    final = load_file(output / "final" / "model.safetensors")
    chosen = checkpoint.read(output / "checkpoints" / f"step_{best or 4}", "model.")
    assert all(torch.equal(final[name], chosen[name]) for name in final)
    other = checkpoint.read(output / "checkpoints" / f"step_{4 if best else 2}", "model.")
    assert not all(torch.equal(final[name], other[name]) for name in final)
    shown = capsys.readouterr().out
    assert ("load_best: final/ has the weights of step 2, the best evaluation" in shown) == (best == 2)


def test_the_best_needs_evaluations_and_a_guard() -> None:
    for changes in ({"guard": "off"}, {"eval_every": 0}):
        with pytest.raises(
            UsageError, match="load_best: expected --guard warn, stop or rollback, and evaluations with it"
        ):
            tiny.config(load_best=True, **changes)


def test_an_upload_without_a_token_stops_before_the_run(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hub, "get_token", lambda: None)
    output = tmp_path / "run"
    assert command.main([*tiny.FLAGS, "--push-to-hub", "me/model", "--output", str(output)]) == 2
    assert "error: --push-to-hub: expected a token of the Hugging Face Hub" in capsys.readouterr().err
    assert not output.exists()
    with pytest.raises(UsageError, match="push_to_hub: expected OWNER/NAME, got 'model'"):
        tiny.config(push_to_hub="model")


class Hub:
    """Stands in for the hub's interface."""

    calls: ClassVar[list[Any]] = []
    fails = False

    def whoami(self) -> None:
        self.calls.append("whoami")

    def create_repo(self, name: str, **options: Any) -> str:
        self.calls.append((name, options))
        return f"https://hub/{name}"

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
        if self.fails:
            raise OSError("no network")
        self.calls.append((repo_id, sorted(each.name for each in folder_path.iterdir())))


def test_final_is_uploaded_to_a_private_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "HfApi", Hub)
    monkeypatch.setattr(hub, "get_token", lambda: "token")
    monkeypatch.setattr(Hub, "calls", [])
    (tmp_path / "model.safetensors").touch()
    hub.check_login("me/model")
    assert hub.push(tmp_path, "me/model") == "https://hub/me/model"
    assert Hub.calls == [
        "whoami",
        ("me/model", {"private": True, "exist_ok": True}),
        ("me/model", ["model.safetensors"]),
    ]
    monkeypatch.setattr(Hub, "fails", True)
    with pytest.raises(
        OutputError, match="push_to_hub: .* got OSError: no network; the directory is complete: hf upload me/model"
    ):
        hub.push(tmp_path, "me/model")


# --- Updates


def test_betas_reach_the_optimizer(policy: Policy) -> None:
    assert make_optimizer(policy, tiny.config(adam_betas=(0.8, 0.95)).optim).param_groups[0]["betas"] == (0.8, 0.95)
    assert make_optimizer(policy, tiny.config().optim).param_groups[0]["betas"] == (0.9, 0.999)


def test_several_updates_on_a_batch_move_the_ratios_and_the_clip(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = tiny.learner(policy, updates_per_batch=3, learning_rate=1e-2, clip_low=0.01, clip_high=0.01)
    batches, weights = [], [tiny.weights(policy)]
    real = steps.take_step

    def kept(policy: Policy, optimizer: Any, batch: Any, *rest: Any) -> Any:
        batches.append(batch)
        return real(policy, optimizer, batch, *rest)

    counted = learner.optimizer.step

    def step(*arguments: Any) -> Any:
        counted(*arguments)
        weights.append(tiny.weights(policy))

    monkeypatch.setattr(steps, "take_step", kept)
    monkeypatch.setattr(learner.optimizer, "step", step)
    values, _ = steps.train_step(learner, learner.task.train[:3], 1)
    assert len(weights) == 4
    assert all(any(not torch.equal(a[name], b[name]) for name in a) for a, b in itertools.pairwise(weights))
    (batch,) = batches
    assert batch.old_logprobs is not None  # of before the first update, for all of them
    assert values["clip_fraction"] > 0.0
    assert values["behaviour_mismatch"] < 1e-4  # of the first update alone


def test_one_update_needs_no_old_log_probs(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    learner = tiny.learner(policy)
    monkeypatch.setattr(
        steps,
        "take_step",
        lambda policy, optimizer, batch, *_: pytest.fail("some") if batch.old_logprobs is not None else {},
    )
    steps.train_step(learner, learner.task.train[:3], 1)


def test_a_resumed_run_with_several_updates_has_the_same_bits(base: Path, tmp_path: Path) -> None:
    flags = [*tiny.FLAGS, "--updates-per-batch", "2", "--learning-rate", "0.003"]
    whole, parts = (tiny.output_with(base, tmp_path / name) for name in ("whole", "parts"))
    assert command.main([*flags, "--output", str(whole)]) == 0
    assert command.main([*flags, "--output", str(parts), "--steps", "4", "--lr-schedule", "cosine"]) == 0
    last = parts / "checkpoints" / "step_4"
    for each in sorted(last.rglob("*"), reverse=True):
        each.unlink() if each.is_file() else each.rmdir()
    last.rmdir()
    (parts / "checkpoints" / "latest").unlink()
    assert command.main(["--output", str(parts), "--resume"]) == 0
    assert tiny.lines(parts) == tiny.lines(whole)
    first, second = (checkpoint.read(each / "checkpoints" / "step_4", "model.") for each in (whole, parts))
    assert all(torch.equal(first[name], second[name]) for name in first)
