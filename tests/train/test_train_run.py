"""Whole runs in processes of their own: output, resume, Ctrl-C, own data, wrong use."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest
import tiny
import torch
from small_models import make_byte_model, write_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from mgrpo_kernels.method import METHODS
from mgrpo_kernels.train import __main__ as command
from mgrpo_kernels.train.config import build, read_yaml
from mgrpo_kernels.train.data import demo
from mgrpo_kernels.train.run import checkpoint
from mgrpo_kernels.train.run.output import with_truth
from mgrpo_kernels.train.watch.metrics import EVALUATION, KEYS

GSM8K = Path(__file__).resolve().parents[3] / "shared" / "data" / "gsm8k" / "train.jsonl"
STEPS = 12


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the output of a run that nobody disturbed."""
    output = tiny.output_with(base, tmp_path_factory.mktemp("whole") / "run")
    assert command.main([*tiny.FLAGS, "--steps", str(STEPS), "--output", str(output)]) == 0
    return output


def test_output_directory(whole: Path) -> None:
    assert {each.name for each in whole.iterdir()} == {
        "base",
        "certificate.json",
        "checkpoints",
        "config.yaml",
        "curves.png",
        "final",
        "held_out",
        "log.txt",
        "metrics.jsonl",
        "plan.txt",
        "report.html",
        "samples.jsonl",
    }
    assert build(read_yaml(whole / "config.yaml")) == build({**tiny.OPTIONS, "steps": STEPS})
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().split("\n")[:-1]]
    assert [line["step"] for line in lines] == list(range(STEPS + 1))
    for line in lines:
        evaluated = line["step"] % 2 == 0
        assert list(line) == [key for key in KEYS if evaluated or key not in EVALUATION]
    assert all(line["loss"] is not None and line["time_update"] > 0 for line in lines[1:])
    assert len((whole / "samples.jsonl").read_text().split("\n")[:-1]) == 4 * STEPS
    assert (whole / "curves.png").read_bytes().startswith(b"\x89PNG")
    report = (whole / "report.html").read_text()
    assert "data:image/png;base64," in report
    assert "://" not in report  # nothing outside the file
    assert "learning_rate: 0.001" in report


def test_the_last_step_is_evaluated_too(base: Path, tmp_path: Path) -> None:
    output = tiny.output_with(base, tmp_path / "run")
    assert command.main([*tiny.FLAGS, "--steps", "3", "--output", str(output)]) == 0
    assert [line["step"] for line in tiny.lines(output) if "eval_accuracy" in line] == [0, 2, 3]


def test_samples_say_whether_they_are_right_where_that_is_known() -> None:
    samples = [
        {"answer": "7", "gold": "7"},
        {"answer": "1", "gold": "7"},
        {"answer": None, "gold": "7"},
        {"answer": "7", "gold": None},
    ]
    shown = with_truth(samples, demo.make_task(0))
    assert [sample["correct"] for sample in shown] == [True, False, False, None]


def test_final_model_loads_and_is_the_last_checkpoint(whole: Path) -> None:
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(whole / "final"),
        AutoTokenizer.from_pretrained(whole / "final"),
    )
    assert tokenizer.decode(tokenizer("3+4=")["input_ids"]) == "3+4="
    place = whole / "checkpoints" / "latest"
    state = checkpoint.read(place, "model.")
    assert checkpoint.load(place)["step"] == STEPS
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert any(
        not torch.equal(value, other)
        for value, other in zip(
            model.state_dict().values(),
            AutoModelForCausalLM.from_pretrained(whole / "base").state_dict().values(),
            strict=True,
        )
    )


def test_evaluating_does_not_change_training(whole: Path, base: Path, tmp_path: Path) -> None:
    output = tiny.output_with(base, tmp_path / "run")
    flags = [*tiny.FLAGS, "--steps", str(STEPS), "--eval-every", "0", "--samples-per-step", "0"]
    assert command.main([*flags, "--output", str(output)]) == 0
    trained = [{key: value for key, value in line.items() if key not in EVALUATION} for line in tiny.lines(whole)[1:]]
    assert tiny.lines(output) == trained


def wait_for(output: Path, step: int) -> None:
    deadline = time.monotonic() + 60
    while (
        not (output / "metrics.jsonl").exists() or len((output / "metrics.jsonl").read_text().split("\n")[:-1]) <= step
    ):
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_saves_and_resume_gives_the_same_bits(
    whole: Path, base: Path, tmp_path: Path, number: signal.Signals
) -> None:
    output = tiny.output_with(base, tmp_path / "run")
    process = tiny.start(*tiny.FLAGS, "--steps", str(STEPS), "--checkpoint-every", "0", "--output", str(output))
    wait_for(output, 2)
    process.send_signal(number)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 130, text
    step = len(tiny.lines(output)) - 1
    assert text.splitlines()[-1] == (
        f"stopped after step {step} of {STEPS}; saved {output}/checkpoints/step_{step}; continue with --output {output} --resume"
    )
    assert 2 <= step < STEPS
    assert command.main(["--output", str(output), "--resume"]) == 0
    assert tiny.lines(output) == tiny.lines(whole)


def test_second_interrupt_stops_at_once(base: Path, tmp_path: Path) -> None:
    output = tiny.output_with(base, tmp_path / "run")
    flags = [
        "--steps",
        "5",
        "--rollouts",
        "512",
        "--prompts-per-step",
        "32",
        "--eval-every",
        "0",
    ]  # a step takes seconds
    process = tiny.start(*tiny.FLAGS, *flags, "--output", str(output))
    assert process.stdout is not None
    while not (output / "samples.jsonl").exists():  # made right before the first step
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    while "stopping after this step" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 130, text
    assert text.splitlines()[-1].startswith("interrupted; --resume continues from the last checkpoint")
    assert checkpoint.latest(output / "checkpoints") is None


def test_resuming_a_finished_run_changes_nothing(whole: Path) -> None:
    before = tiny.lines(whole)
    assert command.main(["--output", str(whole), "--resume"]) == 0
    assert tiny.lines(whole) == before


def test_resume_names_what_has_changed(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--output", str(whole), "--resume", "--steps", "20", "--dry-run"]) == 0
    assert "changed: steps: 12 -> 20" in capsys.readouterr().out
    assert command.main(["--output", str(whole), "--resume", "--seed", "1"]) == 2
    assert "seed: expected 0, which the run in" in capsys.readouterr().err
    assert build(read_yaml(whole / "config.yaml")).optim.steps == STEPS


def test_a_directory_with_another_run_is_refused(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {each: each.stat().st_mtime_ns for each in whole.rglob("*")}
    assert command.main([*tiny.FLAGS, "--output", str(whole)]) == 2
    assert (
        f"output: expected a directory without a run, or --resume to continue it, got {whole}"
        in capsys.readouterr().err
    )
    assert {each: each.stat().st_mtime_ns for each in whole.rglob("*")} == before


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "run"
    assert command.main([*tiny.FLAGS, "--output", str(output), "--dry-run"]) == 0
    text = capsys.readouterr().out
    for shown in (
        "rollouts per step: 24 = 3 prompts x (4 policy + 4 momentum model)",
        "KL reference model: base",
        "memory: ",
        "  seed: 0",
    ):
        assert shown in text
    assert not output.exists()


def test_a_run_that_is_no_longer_finite_says_so(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tiny.output_with(base, tmp_path / "run")
    flags = [
        *tiny.FLAGS,
        "--learning-rate",
        "1e18",
        "--lr-schedule",
        "constant",
        "--checkpoint-every",
        "1",
        "--eval-every",
        "0",
    ]
    assert command.main([*flags, "--output", str(output)]) == 1
    assert "finite" in capsys.readouterr().err
    taken = len(tiny.lines(output))
    assert taken < 4
    assert checkpoint.load(output / "checkpoints" / "latest")["step"] == taken
    assert not (output / "final").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--model", "{dir}/none", "--data", "{dir}/data.jsonl"],
            "error: --model: expected a directory with a model, got ",
        ),
        (["--model", "{dir}", "--data", "{dir}/data.jsonl"], "error: --model: expected a directory with a model"),
        (["--model", "{dir}", "--data", "{dir}/none.jsonl"], "error: --data: expected a readable JSONL file"),
        (["--model", "{dir}", "--data", "{dir}/broken.jsonl"], "broken.jsonl, line 2"),
        (
            ["--model", "{dir}", "--data", "{dir}/data.jsonl", "--prompt-field", "q"],
            "expected one of the fields answer, question",
        ),
        (
            ["--top-p", "0.9", "--engine", "vllm", "--vllm-servers", "http://127.0.0.1:8000"],
            "--top-p: expected 1.0 with vllm_servers, got 0.9",
        ),
        (["--max-response-tokens", "60"], "--max-response-tokens: expected at most 5"),
    ],
)
def test_wrong_use_stops_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, flags: list[str], message: str
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("mgrpo_kernels.train.data.demo.make_model", lambda *_: pytest.fail("work has begun"))
    (tmp_path / "data.jsonl").write_text('{"question": "x", "answer": "1"}\n')
    (tmp_path / "broken.jsonl").write_text('{"question": "x", "answer": "1"}\n{"question": \n')
    arguments = [flag.replace("{dir}", str(tmp_path)) for flag in flags]
    assert command.main([*arguments, "--output", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_unknown_flag_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command.main(["--lerning-rate", "1"])
    assert caught.value.code == 2
    assert "--lerning-rate" in capsys.readouterr().err


@pytest.mark.parametrize("method", METHODS)
def test_gsm8k(tmp_path: Path, method: str) -> None:
    if not GSM8K.exists():
        pytest.skip("gsm8k is not in ../shared/data")
    make_byte_model(tmp_path / "model")
    flags = [
        "--model", str(tmp_path / "model"), "--data", str(GSM8K), "--eval-data", str(GSM8K.with_name("test.jsonl")), "--eval-prompts", "2",
        "--eval-samples", "2", "--eval-every", "2", "--steps", "3", "--prompts-per-step", "2", "--rollouts", "4", "--learning-rate", "1e-3",
        "--max-response-tokens", "12", "--tokens-per-microbatch", "1024", "--method", method, "--output", str(tmp_path / "run"),
    ]  # fmt: skip
    if METHODS[method].second_wording != "no":  # the data have one
        flags += ["--paraphrase-field", "question"]
    assert command.main(flags) == 0
    lines = tiny.lines(tmp_path / "run")
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert [line["eval_accuracy"] is not None for line in lines if "eval_accuracy" in line] == [True] * 3
    assert all(line["behaviour_mismatch"] < 1e-4 for line in lines[1:])
    assert all(line["response_tokens"] <= 12 for line in lines[1:])
    assert all((line["label_accuracy"] is None) == (line["labelled_fraction"] == 0.0) for line in lines[1:])
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final").config.model_type == "qwen2"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"eos": False},
            "model: expected a tokenizer or a generation configuration with an end-of-sequence token, got none",
        ),
        (
            {"ends_prompts": True},
            "model: expected a tokenizer that does not end a prompt, got one that appends the end token 0 in ",
        ),
        ({"vocabulary": 100}, "model: expected a tokenizer whose ids are below the vocabulary of 100, got 258 in "),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: dict, message: str
) -> None:
    vocabulary = options.pop("vocabulary", None)
    make_byte_model(tmp_path / "model", **options)
    if vocabulary is not None:
        write_model(tmp_path / "model", vocabulary, eos=0, context=2048)
    (tmp_path / "data.jsonl").write_text('{"question": "x", "answer": "1"}\n')
    flags = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "data.jsonl"), "--max-response-tokens", "12"]
    assert command.main([*flags, "--output", str(tmp_path / "run")]) == 2
    assert f"error: --{message}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("preset", ["paper", "srt", "ttrl", "single_24gb", "gsm8k"])
def test_presets_with_a_small_model(tmp_path: Path, capsys: pytest.CaptureFixture[str], preset: str) -> None:
    (tmp_path / "data.jsonl").write_text('{"question": "x", "answer": "1"}\n')
    for context, status in ((4096, 0), (256 if preset == "gsm8k" else 1024, 2)):
        make_byte_model(tmp_path / "model", context=context)
        flags = [
            "--config",
            preset,
            "--model",
            str(tmp_path / "model"),
            f"--data={tmp_path}/data.jsonl",
            f"--eval-data={tmp_path}/data.jsonl",
            "--engine=transformers",
            "--dry-run",
        ]
        assert command.main([*flags, "--output", str(tmp_path / "run")]) == status
        got = capsys.readouterr()
        shown = (
            "derived:" if status == 0 else "error: max_response_tokens: expected at most "
        )  # the context - the prompt
        assert shown in got.out + got.err
    assert not (tmp_path / "run").exists()
