"""Evaluation: its figures by hand, that it leaves training alone, and that it runs by itself."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from small_models import make_answering_model

from mgrpo_kernels.train import __main__ as command
from mgrpo_kernels.train import evaluate as by_itself
from mgrpo_kernels.train.config import PRESETS, Config, build, read_yaml
from mgrpo_kernels.train.data.demo import after_hash, make_task
from mgrpo_kernels.train.data.task import Example, Task, prompts_of_step
from mgrpo_kernels.train.model.policy import Policy, load_policy
from mgrpo_kernels.train.rng import generator_for
from mgrpo_kernels.train.rollout import RolloutEngine, Rollouts
from mgrpo_kernels.train.run.evaluation import Question, examine, figures, pass_at_k
from mgrpo_kernels.train.run.held_out import HeldOut
from mgrpo_kernels.train.run.output import result
from mgrpo_kernels.train.step import Learner, train_step
from mgrpo_kernels.train.watch.metrics import ACCURACIES, EVALUATION


@pytest.mark.parametrize(
    ("n", "correct", "k"), [(4, 0, 2), (4, 1, 1), (4, 1, 3), (5, 2, 2), (6, 3, 4), (3, 3, 3), (8, 8, 1)]
)
def test_pass_at_k_is_the_mean_over_all_choices(n: int, correct: int, k: int) -> None:
    samples = [1] * correct + [0] * (n - correct)
    choices = list(itertools.combinations(samples, k))
    assert pass_at_k(n, correct, k) == pytest.approx(sum(map(max, choices)) / len(choices))


class Scripted(RolloutEngine):
    """Two held-out prompts: one is right twice of four and by majority, the other once and not by majority."""

    texts: Sequence[str] = ("#7$", "#7$", "#1$", "#2$", "#3$", "#3$", "#5$", "77$")

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    def sample(
        self, prompts: Any, copies: int, *, temperature: float, generator: torch.Generator, momentum: Any = None
    ) -> Rollouts:
        texts = ["#7$", "#2$"] if temperature == 0 else self.texts
        assert len(texts) == len(prompts) * copies
        tokens = torch.tensor(self.policy.encode(list(texts)))
        mask = torch.ones(tokens.shape, dtype=torch.bool)
        return Rollouts(tokens, mask, torch.zeros(tokens.shape), torch.ones(len(texts), dtype=torch.bool))


def evaluate(policy: Policy, engine: RolloutEngine, task: Task, config: Config) -> dict[str, float | None]:
    return figures(examine(policy, engine, task, config), config.pass_k)


def test_figures_by_hand(policy: Policy) -> None:
    task = Task([], [Example("3+4=", "7"), Example("0+5=", "5")], after_hash, "exact")
    config = tiny.config(eval_samples=4, eval_pass_k=2)
    got = evaluate(policy, Scripted(policy), task, config)
    assert set(got) == {*ACCURACIES, *(f"{key}_error" for key in ACCURACIES)}
    assert got["eval_accuracy"] == 3 / 8
    assert got["eval_greedy"] == 1 / 2
    assert got["eval_maj_at_k"] == 1 / 2
    assert got["eval_pass_at_k"] == pytest.approx(((1 - 1 / 6) + (1 - 3 / 6)) / 2)
    # Of two values, the standard error of the mean is half of their distance.
    assert [got[f"{key}_error"] for key in ACCURACIES] == pytest.approx([1 / 8, 1 / 2, 1 / 6, 1 / 2])
    first, second = examine(policy, Scripted(policy), task, config)
    assert (first.right, first.majority, first.greedy, first.greedy_right) == (
        [True, True, False, False],
        "7",
        "7",
        True,
    )
    assert second.answers == ["3", "3", "5", None]
    assert (second.right, second.majority, second.majority_right) == ([False, False, True, False], "3", False)


def test_the_tasks_equivalence_decides_the_majority_too(policy: Policy) -> None:
    class Spread(Scripted):
        texts = ("#2$", "#1$", "#1$", "#3$", "#3$", "#3$", "#5$", "77$")

    task = Task(
        [], [Example("3+4=", "3"), Example("0+5=", "5")], after_hash, lambda a, b: {a, b} <= {"2", "3"} or a == b
    )
    first, second = examine(policy, Spread(policy), task, tiny.config(eval_samples=4))
    assert (first.majority, first.majority_right) == ("2", True)  # with 3 it has as many votes as 1, and came first
    assert (first.right, second.right) == ([True, False, False, True], [False, False, True, False])
    assert (second.majority, second.majority_right) == ("3", False)


def test_samples_are_drawn_at_the_evaluations_temperature(policy: Policy) -> None:
    given = []

    class Recorded(Scripted):
        def sample(self, prompts: Any, copies: int, *, temperature: float, **options: Any) -> Rollouts:
            given.append((copies, temperature))
            return super().sample(prompts, copies, temperature=temperature, **options)

    task = Task([], [Example("3+4=", "7"), Example("0+5=", "5")], after_hash, "exact")
    evaluate(policy, Recorded(policy), task, tiny.config(eval_samples=4, temperature=1.3, eval_temperature=0.6))
    assert given == [(4, 0.6), (1, 0.0)]


def test_nobody_answers(policy: Policy) -> None:
    task = Task([], [Example("3+4=", "7")] * 2, lambda text: None, "exact")
    questions = examine(policy, tiny.learner(policy).engine, task, tiny.config())
    assert set(figures(questions, 3).values()) == {0.0}
    assert [each.majority for each in questions] == [None, None]


def test_every_evaluation_uses_the_same_random_numbers(policy: Policy) -> None:
    learner = tiny.learner(policy)
    task = make_task(0)._replace(held_out=make_task(0).held_out[:64])
    first = examine(policy, learner.engine, task, learner.config)
    # What training has drawn, and what its engine has sampled, make no difference.
    torch.rand(7)
    prompts = policy.encode([each.prompt for each in task.train[:5]])
    learner.engine.sample(prompts, 3, temperature=1.0, generator=generator_for(0, "rollout", 1))
    assert examine(policy, learner.engine, task, learner.config) == first
    other = tiny.learner(policy, seed=1)
    assert examine(policy, other.engine, task, other.config) != first
    found = figures(first, learner.config.pass_k)
    assert 0 < found["eval_accuracy"] <= found["eval_pass_at_k"] < 1


def test_a_run_whose_weights_never_change_reports_no_change(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tiny.output_with(base, tmp_path / "run")
    assert command.main([*tiny.FLAGS, "--learning-rate", "1e-30", "--output", str(output)]) == 0
    evaluated = [line for line in tiny.lines(output) if "eval_accuracy" in line]
    assert len(evaluated) == 3
    for key in ACCURACIES:
        assert len({line[key] for line in evaluated}) == len({line[f"{key}_error"] for line in evaluated}) == 1
        assert {line[f"{key}_{change}"] for line in evaluated for change in ("change", "change_error")} == {0.0}
    assert {line["eval_best_step"] for line in evaluated} == {None}
    shown = capsys.readouterr().out
    assert "change, prompt by prompt: +0.000 ± 0.000\n" in shown
    assert "best" not in shown
    kept = [(output / "held_out" / f"step_{step}.jsonl").read_bytes() for step in (0, 2, 4)]
    assert kept[0].count(b"\n") == 6
    assert kept[0] == kept[1] == kept[2]


def question(prompt: str, right: Sequence[bool]) -> Question:
    answers = ["7" if each else None for each in right]
    return Question(Example(prompt, "7"), ["#7"] * len(right), answers, list(right), "7", right[0], "#7", "7", right[0])


def held_out_of(directory: Path, steps: Sequence[int] = (), samples: int = 4) -> HeldOut:
    return HeldOut(directory, tiny.config(eval_samples=samples, eval_pass_k=2), steps, pytest.fail)


def test_changes_are_paired_and_nothing_within_its_error_is_best(tmp_path: Path) -> None:
    def answered(*hits: int) -> list[Question]:
        return [question(str(number), [each < right for each in range(4)]) for number, right in enumerate(hits)]

    runs = {0: answered(0, 1, 2, 3, 4, 1), 10: answered(2, 3, 4, 4, 4, 3), 20: answered(2, 3, 3, 4, 4, 4)}
    kept = held_out_of(tmp_path / "kept")
    found = {step: kept.record(step, questions) for step, questions in runs.items()}
    differences = [0.5, 0.5, 0.5, 0.25, 0.0, 0.5]
    mean = sum(differences) / 6
    error = (sum((each - mean) ** 2 for each in differences) / 5 / 6) ** 0.5
    assert found[10]["eval_accuracy_change"] == pytest.approx(mean)
    assert found[10]["eval_accuracy_change_error"] == pytest.approx(error)
    unpaired = (found[0]["eval_accuracy_error"] ** 2 + found[10]["eval_accuracy_error"] ** 2) ** 0.5
    assert error < 0.5 * unpaired
    assert found[20]["eval_best_step"] is None  # step 10 has as many right answers, and others
    lucky = held_out_of(tmp_path / "lucky")
    lucky.record(0, answered(4, 0, 4, 0, 4, 1))
    assert lucky.record(10, answered(0, 4, 0, 4, 0, 4))["eval_best_step"] is None  # one more right answer is luck
    fallen = kept.record(30, answered(0, 1, 2, 3, 4, 1))
    assert fallen["eval_best_step"] == 20
    assert fallen["eval_accuracy_change"] == 0.0
    again = held_out_of(tmp_path / "kept", [0, 10, 20])
    assert again.record(30, answered(0, 1, 2, 3, 4, 1)) == fallen  # a resumed run compares with the same files


def test_a_change_that_may_be_chance_is_called_so() -> None:
    lines = [
        {"step": 0, "eval_accuracy": 0.4, "eval_accuracy_error": 0.02},
        {"step": 5, "eval_accuracy": 0.6, "eval_accuracy_error": 0.02},
        {
            "step": 9,
            "eval_accuracy": 0.43,
            "eval_accuracy_error": 0.02,
            "eval_accuracy_change": 0.03,
            "eval_accuracy_change_error": 0.02,
        },
    ]
    assert result(lines) == [
        "held-out accuracy 0.400 ± 0.020 -> 0.430 ± 0.020",
        "change, prompt by prompt: +0.030 ± 0.020, which may be chance (less than 2 standard errors)",
    ]
    lines[2] |= {"eval_accuracy_change_error": 0.01, "eval_best_step": 5}
    assert result(lines)[1:] == ["change, prompt by prompt: +0.030 ± 0.010", "best: 0.600 ± 0.020, at step 5"]
    assert result([]) == []


def test_one_prompt_has_no_standard_error(policy: Policy) -> None:
    assert figures([question("1", [True, False])], 2)["eval_accuracy_error"] is None


def test_another_set_of_prompts_is_not_compared(tmp_path: Path) -> None:
    right, wrong = [True] * 4, [False] * 4
    kept = held_out_of(tmp_path)
    kept.record(0, [question("a", right), question("b", right)])
    found = kept.record(5, [question("a", wrong), question("c", wrong)])
    assert "eval_accuracy_change" not in found
    assert found["eval_best_step"] is None
    resumed = held_out_of(tmp_path, [0, 5], samples=3)  # with another number of samples
    assert "eval_accuracy_change" not in resumed.record(9, [question("a", wrong[:3]), question("b", wrong[:3])])


def test_a_model_that_is_right_scores_one(policy: Policy) -> None:
    task = Task([], [Example("3+4=", "7")] * 2, lambda text: "7", "exact")
    assert set(evaluate(policy, tiny.learner(policy).engine, task, tiny.config()).values()) == {
        1.0,
        0.0,
    }  # 0 are the errors


def sampled(learner: Learner, step: int) -> None:
    prompts = learner.policy.encode([each.prompt for each in learner.task.held_out])
    generator = generator_for(0, "evaluation", step, learner.policy.device)
    learner.engine.sample(prompts, 3, temperature=1.0, generator=generator)


def greedy(learner: Learner, step: int) -> None:
    prompts = learner.policy.encode([each.prompt for each in learner.task.held_out])
    generator = generator_for(0, "evaluation", step, learner.policy.device)
    learner.engine.sample(prompts, 1, temperature=0.0, generator=generator)


def whole(learner: Learner, step: int) -> None:
    evaluate(learner.policy, learner.engine, learner.task, learner.config)


def everything(learner: Learner) -> list[torch.Tensor]:
    """Return weights, momentum model and optimizer state."""
    assert learner.momentum is not None
    state = [
        value
        for parameter in learner.optimizer.state.values()
        for value in parameter.values()
        if torch.is_tensor(value)
    ]
    return [*tiny.weights(learner.policy).values(), *tiny.weights(learner.momentum).values(), *state]


def trained(base: Path, evaluation: Callable[[Learner, int], None] | None) -> list[torch.Tensor]:
    learner = tiny.learner(load_policy(str(base), torch.device("cpu"), torch.float32))
    for step in range(1, 4):
        if evaluation is not None:
            before = torch.get_rng_state()
            evaluation(learner, step - 1)
            assert torch.equal(torch.get_rng_state(), before)
        chosen = prompts_of_step(len(learner.task.train), 3, step, seed=0)
        train_step(learner, [learner.task.train[each] for each in chosen], step)
    return everything(learner)


def test_evaluating_leaves_every_bit_of_training_as_it_is(base: Path) -> None:
    alone = trained(base, None)
    start = tiny.weights(load_policy(str(base), torch.device("cpu"), torch.float32)).values()
    assert not all(torch.equal(one, other) for one, other in zip(alone, start, strict=False))  # it did learn
    for evaluation in (sampled, greedy, whole):
        assert all(map(torch.equal, alone, trained(base, evaluation))), evaluation.__name__


def test_no_part_is_larger_than_the_budget(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    learner = tiny.learner(policy, eval_samples=8, tokens_per_microbatch=20)
    tokens, sample = [], learner.engine._sample

    def spy(prompts: Any, copies: int, *rest: Any) -> Rollouts:
        tokens.append(len(prompts) * (max(map(len, prompts)) + copies * learner.config.rollout.max_response_tokens))
        return sample(prompts, copies, *rest)

    monkeypatch.setattr(learner.engine, "_sample", spy)
    evaluate(policy, learner.engine, learner.task, learner.config)
    assert 160 < max(tokens) <= 320 == learner.engine.cache_tokens  # all at once would be 6 x 8 x 12, and the prompts
    assert len(tokens) >= 3 + 1


# --- By itself

DATA = Path(__file__).parent / "data" / "gsm8k.jsonl"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    place = tmp_path_factory.mktemp("answering")
    make_answering_model(place)
    return str(place)


def flags(model: str) -> list[str]:
    return [
        "--model",
        model,
        "--eval-data",
        str(DATA),
        "--eval-samples",
        "6",
        "--eval-pass-k",
        "2",
        "--eval-temperature",
        "1.5",
        "--max-response-tokens",
        "8",
        "--eval-prompts",
        "5",
        "--seed",
        "3",
    ]


def test_it_runs_by_itself_as_before_the_first_step_of_training(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "evaluation"
    assert by_itself.main([*flags(model), "--output", str(output)]) == 0
    assert {each.name for each in output.iterdir()} == {"metrics.jsonl", "questions.jsonl", "config.yaml"}
    (line,) = tiny.lines(output)
    shown = capsys.readouterr().out
    assert all(f"{key}: {line[key]:.4f} ± {line[f'{key}_error']:.4f}" in shown for key in ACCURACIES)
    training = ["--data", str(DATA), "--steps", "1", "--prompts-per-step", "2", "--rollouts", "4"]
    assert command.main([*flags(model), *training, "--output", str(tmp_path / "run")]) == 0
    before = tiny.lines(tmp_path / "run")[0]
    assert all(line[key] == before[key] for key in EVALUATION if "_change" not in key)

    questions = [json.loads(each) for each in (output / "questions.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]
    assert [each["gold"] for each in questions] == ["66", "1,080", "1,250,000", "-4", "$1.50"]
    assert all(len(each["responses"]) == len(each["answers"]) == len(each["right"]) == 6 for each in questions)
    assert line["eval_accuracy"] == pytest.approx(sum(sum(each["right"]) for each in questions) / 30)
    assert sum(answer is not None for each in questions for answer in each["answers"]) > 5
    assert all(each["greedy"] is None or each["greedy"] in each["greedy_response"] for each in questions)


def test_an_evaluation_shows_its_progress(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(by_itself, "SECONDS", 0.0)
    assert by_itself.main([*flags(model), "--output", str(tmp_path / "one")]) == 0
    shown = re.findall(r"^  (samples|greedy responses): (\d+)% after ", capsys.readouterr().out, re.MULTILINE)
    assert [phase for phase, _ in itertools.groupby(shown, key=lambda each: each[0])] == ["samples", "greedy responses"]
    for phase in ("samples", "greedy responses"):
        shares = [int(share) for name, share in shown if name == phase]
        assert shares == sorted(shares)
        assert len(set(shares)) > 2


def test_the_saved_options_repeat_it(model: str, tmp_path: Path) -> None:
    assert by_itself.main([*flags(model), "--output", str(tmp_path / "one")]) == 0
    assert by_itself.main(["--config", str(tmp_path / "one" / "config.yaml"), "--output", str(tmp_path / "two")]) == 0
    assert tiny.lines(tmp_path / "one", "questions.jsonl") == tiny.lines(tmp_path / "two", "questions.jsonl")


def test_it_passes_over_the_training_options_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        build({"model": "m", "data": "d.jsonl", "eval_data": None, "method": "gold"}).to_yaml()
    )
    config, _ = by_itself.read_command_line(["--config", str(tmp_path / "c.yaml"), "--eval-data", "e.jsonl"])
    assert (config.model.model, config.data.eval_data, config.method.method) == ("m", "e.jsonl", "mgrpo")
    assert set(yaml.safe_load((tmp_path / "c.yaml").read_text())) == set(read_yaml(tmp_path / "c.yaml"))


@pytest.mark.parametrize("preset", sorted(each.stem for each in PRESETS.glob("*.yaml")))
def test_an_evaluation_takes_the_presets_of_training(preset: str) -> None:
    config, _ = by_itself.read_command_line(["--config", preset, "--model", "m", "--eval-data", "e.jsonl"])
    of_preset = read_yaml(PRESETS / f"{preset}.yaml")
    shared = {
        name: value
        for name, value in of_preset.items()
        if name in by_itself.OPTIONS and name not in ("model", "eval_data")
    }
    assert {name: config.values()[name] for name in shared} == shared


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--eval-data", "x.jsonl"], "--model: expected a value, got none"),
        (["--model", "m"], "--eval-data: expected a value, got none"),
        (["--model", "{dir}/none", "--eval-data", str(DATA)], "--model: expected "),
        (["--model", "{dir}", "--eval-data", "{dir}/none.jsonl"], "--eval-data: expected a readable JSONL file"),
        (["--model", "{dir}", "--eval-data", "{dir}/bare.jsonl"], "--answer-field: expected one of the fields question of"),
        (["--model", "{dir}", "--eval-data", str(DATA), "--eval-pass-k", "9"], "--eval-pass-k: expected at least 1 and at most 8"),
        (["--config", "{dir}/typo.yaml", "--model", "m", "--eval-data", "x.jsonl"], "eval_sample: expected one of the options"),
        (["--config", "{dir}/none.yaml"], "--config: expected a YAML file that exists, or a preset"),
        (["--model", "{model}", "--eval-data", str(DATA), "--max-response-tokens", "250"], "--max-response-tokens: expected at most"),
        (["--model", "{model}", "--eval-data", str(DATA), "--output", "{dir}/run"], "--output: expected a directory without a run"),
    ],
)  # fmt: skip
def test_wrong_use_writes_nothing(
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "bare.jsonl").write_text('{"question": "x"}\n')
    (tmp_path / "typo.yaml").write_text("eval_sample: 3\n")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("steps: 1\n")
    before = set(tmp_path.rglob("*"))
    chosen = [each.replace("{dir}", str(tmp_path)).replace("{model}", model) for each in arguments]
    chosen = chosen if "--output" in chosen else [*chosen, "--output", str(tmp_path / "out")]
    assert by_itself.main(chosen) == 2
    assert f"error: {message}" in capsys.readouterr().err
    assert set(tmp_path.rglob("*")) == before


def test_an_option_of_training_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        by_itself.main(["--model", "m", "--eval-data", "x.jsonl", "--steps", "3"])
    assert caught.value.code == 2
    assert "--steps" in capsys.readouterr().err
