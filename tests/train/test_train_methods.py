"""Every method, whole: three steps through the command line on questions in the style of GSM8K, by a small model that often answers."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from small_models import make_answering_model
from transformers import AutoModelForCausalLM

from mgrpo_kernels.method import METHODS
from mgrpo_kernels.train import __main__ as command
from mgrpo_kernels.train.config import build
from mgrpo_kernels.train.watch.metrics import KEYS
from mgrpo_kernels.vote import answers_equal

ROLLOUTS, STEPS, VOCABULARY = 8, 3, 11
IN_0_1 = {
    "mgrpo",
    "srt",
    "ttrl",
    "soft_vote",
    "empo",
    "om_grpo",
    "restrain",
    "spine",
    "confident_vote",
    "co_rewarding",
    "co_rewarding_1",
    "co_rewarding_3",
    "self_harmony",
    "dcrl",
    "gold",
    "random",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("model")
    make_answering_model(place)
    return place


@pytest.fixture(scope="module")
def output_of(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return what trains by a method, once, and gives its output directory."""
    place = tmp_path_factory.mktemp("runs")
    rows = [  # their answers have one digit, so that chance hits them
        {
            "question": f"Ann has {a} pens and buys {b}.",
            "paraphrase": f"How many pens do {a} and {b} make?",
            "answer": f"{a}+{b}=<<{a}+{b}={a + b}>>{a + b} pens.\n#### {a + b}",
        }
        for a, b in ((1, 2), (2, 0), (3, 0), (1, 1), (0, 1), (0, 3))
    ]
    (place / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [
        "--model", str(model), "--data", str(place / "data.jsonl"), "--eval-data", str(place / "data.jsonl"), "--eval-every", "3",
        "--eval-samples", "2", "--steps", str(STEPS), "--prompts-per-step", "4", "--rollouts", str(ROLLOUTS), "--warmup", "0",
        "--learning-rate", "1e-2", "--lr-schedule", "constant", "--max-response-tokens", "6", "--samples-per-step", str(ROLLOUTS),
    ]  # fmt: skip

    @functools.cache
    def output(method: str) -> Path:
        assert command.main([*flags, "--method", method, "--output", str(place / method)]) == 0
        return place / method

    return output


@pytest.mark.parametrize("method", METHODS)
def test_trains(model: Path, output_of: Callable[[str], Path], method: str) -> None:
    output = output_of(method)
    lines = tiny.lines(output)
    assert [line["step"] for line in lines] == list(range(STEPS + 1))
    for line in lines:
        assert line.keys() <= KEYS.keys()
        assert all(math.isfinite(value) for value in line.values() if isinstance(value, (int, float)))
    for line in lines[1:]:
        assert line["vote_share"] > 0  # answers parse
        assert line["label_accuracy"] is not None
        assert line["reward_mean"] is not None
        assert line["grad_norm"] > 0  # rewards differ within a group, so there is something to learn
    base, final = (AutoModelForCausalLM.from_pretrained(each) for each in (model, output / "final"))
    moved = [not torch.equal(a, b) for a, b in zip(base.parameters(), final.parameters(), strict=True)]
    assert all(moved)  # coin flips, too, push somewhere
    assert all(each.isfinite().all() for each in final.parameters())


def test_a_few_gold_labels(model: Path, output_of: Callable[[str], Path], tmp_path: Path) -> None:
    data = output_of("srt").parent / "data.jsonl"
    rows = [json.loads(line) for line in data.read_text().split("\n")[:-1]]
    rows = [row if number % 2 else {"question": row["question"]} for number, row in enumerate(rows)]
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [
        "--model", str(model), "--data", str(tmp_path / "some.jsonl"), "--method", "srt", "--gold-labels", "--steps", "3",
        "--prompts-per-step", "4", "--rollouts", str(ROLLOUTS), "--warmup", "0", "--max-response-tokens", "6", "--samples-per-step", "8",
        "--output", str(tmp_path / "run"),
    ]  # fmt: skip
    assert command.main(flags) == 0
    fractions = [line["gold_fraction"] for line in tiny.lines(tmp_path / "run") if line["step"]]
    assert sum(fractions) == pytest.approx(1.5)  # half of the six prompts, each of which is seen twice
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().split("\n")[:-1]]
    known = [each for each in samples if each["gold"] is not None]
    assert 0 < len(known) < len(samples)
    assert all(each["reward"] == float(answers_equal(each["answer"], each["gold"])) for each in known)
    voted = [each for each in samples if each["gold"] is None]
    assert all(each["reward"] == float(answers_equal(each["answer"], each["label"])) for each in voted)


def test_rewards_of_the_first_step_are_what_the_methods_say(output_of: Callable[[str], Path]) -> None:
    shown = {}
    for method in METHODS:
        lines = (output_of(method) / "samples.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
        shown[method] = [each for each in map(json.loads, lines) if each["step"] == 1]
        assert len(shown[method]) == ROLLOUTS
    reward = {method: [each["reward"] for each in samples] for method, samples in shown.items()}
    for method, samples in shown.items():
        assert min(reward[method]) >= METHODS[method].lowest, method
        assert method not in IN_0_1 or (min(reward[method]) >= 0 and max(reward[method]) <= 1), method
        by_policy = [each for each in samples if each["sampled_by"] == "policy"]
        assert len(by_policy) == build({"method": method, "rollouts": ROLLOUTS}).policy_rollouts
        assert all(each["advantage"] == 0 for each in samples if each["sampled_by"] == "momentum" or each["pruned"])
        if METHODS[method].election == "crossed":
            labels = {
                wording: max(answers, key=answers.count)
                for wording in {each["prompt"] for each in samples}
                if (answers := [each["answer"] for each in samples if each["prompt"] == wording and each["answer"]])
            }
            others = [label for each in samples for wording, label in labels.items() if wording != each["prompt"]]
            assert reward[method] == [
                float(answers_equal(each["answer"], label)) for each, label in zip(samples, others, strict=True)
            ]
        elif METHODS[method].reads == "label":
            assert reward[method] == [float(answers_equal(each["answer"], each["label"])) for each in samples]
    answers = [each["answer"] for each in shown["srt"]]
    # These generate from the same model and the same prompt.
    asked = [name for name, row in METHODS.items() if row.second_wording != "no"]
    for method in asked:
        prompts = [each["prompt"] for each in shown[method]]
        half = ROLLOUTS // 2
        assert [prompts.count(each) for each in dict.fromkeys(prompts)] == [half, half]
        assert prompts[0] == shown["srt"][0]["prompt"] != prompts[-1]
    for method in (name for name, row in METHODS.items() if not row.momentum_share and name not in asked):
        assert [each["answer"] for each in shown[method]] == answers
    voters = [answer for answer in answers if answer is not None]
    shares = [sum(answers_equal(answer, other) for other in voters) / len(voters) for answer in answers]
    assert reward["soft_vote"] == pytest.approx(shares)
    assert reward["empo"] in (pytest.approx(shares), [0.0] * ROLLOUTS)
    assert reward["gold"] == [float(answers_equal(each["answer"], each["gold"])) for each in shown["gold"]]
    assert reward["rent"] == pytest.approx([-each["entropy"] for each in shown["rent"]])
    assert min(reward["intuitor"]) > math.log(VOCABULARY)  # logsumexp(z) - mean(z) >= log V
    assert set(reward["random"]) == {0.0, 1.0}
    assert sum(each["advantage"] != 0 for each in shown["ttrl"]) <= ROLLOUTS // 2
