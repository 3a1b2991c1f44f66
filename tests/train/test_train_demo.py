"""The built-in task, its tokenizer and its lessons; and that a few steps of the demonstration run."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch

from mgrpo_kernels.train import __main__ as command
from mgrpo_kernels.train.data import demo
from mgrpo_kernels.train.model.policy import Policy


def test_held_out_sums_are_not_trained_on() -> None:
    task = demo.make_task(3)
    assert (len(task.train), len(task.held_out)) == (demo.TRAIN_SIZE, demo.HELD_OUT_SIZE)
    assert not {each.prompt for each in task.train} & {each.prompt for each in task.held_out}
    assert demo.make_task(3).train == task.train
    assert demo.make_task(4).train != task.train
    for prompt, gold, paraphrase in task.train[:200]:
        assert sorted(paraphrase) == sorted(prompt)
        assert paraphrase[-2::-1] == prompt[:-1]
        digits = [int(digit) for digit in prompt.removesuffix("=").split("+")]
        assert 2 <= len(digits) <= 6
        assert gold == str(sum(digits) % 10)


def test_lessons() -> None:
    draw = random.Random(0)
    lessons = [demo.lesson(draw, {"1+1="}) for _ in range(4000)]
    direct = [(prompt, response) for prompt, response in lessons if response.startswith("#")]
    assert 0.45 < len(direct) / len(lessons) < 0.55
    right = 0
    for prompt, response in lessons:
        digits = [int(digit) for digit in prompt.removesuffix("=").split("+")]
        answer = demo.after_hash(response.removesuffix("$"))
        assert answer is not None
        scratch = response.split("#")[0]
        assert len(scratch) in (0, len(digits))
        assert not scratch or scratch[-1] == answer
        right += answer == str(sum(digits) % 10)
    assert 0.85 < right / len(lessons) < 0.97
    assert "1+1=" not in {prompt for prompt, _ in lessons}


@pytest.mark.parametrize(("share", "least", "most"), [(0.0, 0.17, 0.23), (0.5, 0.57, 0.63), (1.0, 1.0, 1.0)])
def test_scratchpads_of_the_longest_sums(share: float, least: float, most: float) -> None:
    draw = random.Random(0)
    scratchpads = [
        response for _, response in (demo.lesson(draw, set(), share) for _ in range(6000)) if response[0] != "#"
    ]
    longest = sum(response.index("#") == 6 for response in scratchpads)
    assert least <= longest / len(scratchpads) <= most


def test_tokenizer_is_one_of_characters() -> None:
    tokenizer = demo.make_tokenizer()
    ids = tokenizer("3+4=7#$")["input_ids"]
    assert len(ids) == 7
    assert tokenizer.decode(ids, skip_special_tokens=True) == "3+4=7#"
    assert tokenizer.eos_token_id == ids[-1]


def test_the_warm_start_is_the_same_each_time_and_learns(base: Path, policy: Policy, tmp_path: Path) -> None:
    torch.rand(1)  # the state of the global generator makes no difference
    tiny.make_base(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
    lessons = [demo.lesson(random.Random(9), set()) for _ in range(32)]
    fresh = Policy(type(policy.model)(demo.model_config()), demo.make_tokenizer())
    assert float(demo.warm_loss(policy, lessons).detach()) < 0.6 * float(demo.warm_loss(fresh, lessons).detach())


def test_the_warm_start_ends_where_it_is_good_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked = []

    def accuracy(policy: Policy, seed: int) -> float:
        looked.append(seed)
        return demo.WARM_ACCURACY if len(looked) == 3 else 0.1

    monkeypatch.setattr(demo, "warm_accuracy", accuracy)
    monkeypatch.setattr(demo, "WARM_CHECK", 2)
    steps = []
    real = demo.warm_loss
    monkeypatch.setattr(demo, "warm_loss", lambda *arguments: steps.append(1) or real(*arguments))
    demo.make_model(tmp_path / "base", 0, torch.device("cpu"), 100)
    assert (len(looked), len(steps)) == (3, 4)


def test_a_few_steps_of_the_demonstration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "WARM_STEPS", 5)
    monkeypatch.chdir(tmp_path)
    assert command.main(["--steps", "3", "--eval-every", "0"]) == 0
    text = capsys.readouterr().out
    (output,) = (tmp_path / "runs").iterdir()
    assert output.name.startswith("mgrpo-")
    assert len(tiny.lines(output)) == 3
    assert "warm start, step 0 of at most 5:" in text
    assert "\x1b" not in text  # plain where there is no terminal
    assert text.splitlines()[-4] == "try next:"
    assert text.splitlines()[-5].startswith(f"written: {Path('runs') / output.name}/report.html")


def test_the_demonstration_keeps_its_promise(tmp_path: Path) -> None:
    """The whole of it, as `make train` runs it; `python benchmarks/demo_seeds.py` does five seeds and compares the bits of two runs."""
    began, before = time.monotonic(), os.times()
    done = subprocess.run(
        [sys.executable, "-m", "mgrpo_kernels.train"],
        cwd=tmp_path,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    seconds, after = time.monotonic() - began, os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    assert done.returncode == 0, done.stdout
    (output,) = (tmp_path / "runs").iterdir()
    lines = [line for line in tiny.lines(output) if line.get("eval_accuracy") is not None]
    for key, rise in demo.RISE.items():
        assert lines[-1][key] - lines[0][key] >= rise, (key, [line[key] for line in lines])
    # It keeps what it has learned.
    assert lines[-1]["eval_accuracy"] > max(line["eval_accuracy"] for line in lines) - 0.05
    assert min(seconds, cpu) < demo.LONGEST, (seconds, cpu)  # of a busy machine CPU time alone tells
    assert (output / "report.html").stat().st_size > 0
    try_next = done.stdout.splitlines()[-3:]
    assert all(line.startswith("  python -m mgrpo_kernels.train --") and len(line) <= 80 for line in try_next), try_next


def test_the_demonstration_explains_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for method, warm_steps, shown, said in (
        ("mgrpo", 101, 2, "there are no labels, and the true answers only measure it"),  # steps 0 and 100
        ("gold", 1, 1, "the true answers are the reward"),
    ):
        monkeypatch.setattr(demo, "WARM_STEPS", warm_steps)
        assert command.main([*tiny.FLAGS, "--steps", "1", "--method", method, "--output", str(tmp_path / method)]) == 0
        lines = capsys.readouterr().out.splitlines()
        (end,) = [number for number, line in enumerate(lines) if line.startswith("end of the warm start. From here on")]
        assert said in lines[end]
        before = "\n".join(lines[:end])
        assert "4+3+3= may be answered by 360#0: running sums from the right, modulo 10; # marks the answer" in before
        assert before.count("warm start, step ") == shown
        assert lines[end + 1].startswith("step 0/1")
    running, text = 0, ""
    for digit in reversed(["4", "3", "3"]):  # the example in the explanation is right
        running = (running + int(digit)) % 10
        text += str(running)
    assert f"{text}#{running}" == "360#0"
