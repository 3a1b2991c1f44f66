"""Errors of the commands name what was typed and what is meant: options of other libraries, wrong paths, models in other formats."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from mgrpo_kernels.train import __main__ as command
from mgrpo_kernels.train import evaluate, export, extras
from mgrpo_kernels.train.data.files import read_rows
from mgrpo_kernels.train.errors import UsageError
from mgrpo_kernels.train.model.location import check_model, looks_like_path
from mgrpo_kernels.train.parser import ELSEWHERE


def refused(capsys: pytest.CaptureFixture[str], *arguments: str, main=command.main) -> str:
    """Return the one line with which a command refuses its arguments."""
    try:
        status = main(list(arguments))
    except SystemExit as stop:
        status = stop.code
    shown = capsys.readouterr()
    assert (status, shown.out) == (2, "")
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    return shown.err.removeprefix("error: ").rstrip("\n")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (["--num-generations", "8"], "--rollouts"),
        (["--num_generations=8"], "--rollouts"),
        (["--lr", "1e-6"], "--learning-rate"),
        (["--max-completion-length", "64"], "--max-response-tokens"),
        (["--beta", "0.04"], "--kl-coef"),
        (["--use-vllm"], "--engine vllm"),
        (["--lerning-rate", "1"], "--learning-rate"),
        (["--prompts-per-stp", "1"], "--prompts-per-step"),
    ],
)
def test_an_unknown_option_is_answered_with_ours(
    capsys: pytest.CaptureFixture[str], typed: list[str], meant: str
) -> None:
    first = typed[0].partition("=")[0]
    assert (
        refused(capsys, *typed)
        == f"{first}: expected an option that --help lists, got {typed[0]!r}; did you mean {meant}?"
    )


def test_the_answer_is_an_option_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, "--num-generations", "8", main=evaluate.main).endswith("did you mean --eval-samples?")
    assert "did you mean" not in refused(capsys, "--num-generations", "8", "--run", "x", "--to", "y", main=export.main)
    assert "did you mean" not in refused(capsys, "--entirely-unknown", "8")
    assert refused(capsys, "data.jsonl") == "data.jsonl: expected an option that begins with --, got 'data.jsonl'"


def test_every_answer_exists() -> None:
    known = command.make_parser().names() | evaluate.make_parser().names()
    assert {text.split()[0] for texts in ELSEWHERE.values() for text in texts} <= known
    assert not known & ELSEWHERE.keys()


def test_a_name_of_another_library_in_a_file_is_answered_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yaml").write_text("num_generations: 8\n")
    assert refused(capsys, "--config", str(tmp_path / "c.yaml")).startswith(
        "num_generations: expected one of the options"
    )
    assert refused(capsys, "--config", "papr").endswith("got 'papr'; did you mean paper?")


def test_an_error_spells_an_option_as_it_was_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text("rollouts: 1\nsteps: 3\n")
    message = "rollouts: expected at least 2, got 1"
    assert refused(capsys, "--rollouts", "1") == f"--{message}"
    assert refused(capsys, "--config", str(tmp_path / "c.yaml")) == message
    assert refused(capsys, "--config", str(tmp_path / "c.yaml"), "--rollouts", "1") == f"--{message}"
    assert refused(capsys, "--data", "x.jsonl").startswith("--model: expected a value with --data")
    assert refused(capsys, "--resume").startswith("--resume: expected --output DIR")


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["--rollouts", "many"], "--rollouts: expected a whole number, got 'many'"),
        (["--decay", "x"], "--decay: expected a number, got 'x'"),
        (["--rollouts"], "--rollouts: expected a value, got none"),
    ],
)
def test_a_value_of_another_type_is_refused_in_the_same_words(
    capsys: pytest.CaptureFixture[str], typed: list[str], message: str
) -> None:
    assert refused(capsys, *typed) == message
    assert refused(capsys, "--method", "x").startswith("--method: expected one of ")


# --- Models and data that are not there, or not what is needed


@pytest.mark.parametrize(
    ("name", "is_path"),
    [
        ("gpt2", False),
        ("Qwen/Qwen2.5-0.5B-Instruct", False),
        ("openai/gsm8k", False),
        ("./model", True),
        ("/a/model", True),
        ("~/model", True),
        ("runs/mine/final", True),
        ("model.gguf", True),
        ("questions.txt", True),
        ("a\\b", True),
    ],
)
def test_which_names_can_only_be_paths(name: str, is_path: bool) -> None:
    assert looks_like_path(name) == is_path


def test_a_mistyped_path_is_not_called_a_name_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "final").mkdir(parents=True)
    (tmp_path / "questions.txt").write_text("x")
    for name in (str(tmp_path / "runs" / "finl"), "runs/finl", "./runs/finl"):
        with pytest.raises(
            UsageError, match=r"^model: .*which does not exist; did you mean \S*runs/final\?$"
        ) as caught:
            check_model(name)
        assert "hub" not in str(caught.value).lower()
    with pytest.raises(
        UsageError, match=r"^data: expected a file, a directory or .*, got runs/x: runs/x, which does not exist$"
    ):
        read_rows("runs/x", "data")
    with pytest.raises(UsageError, match=r"got nowhere/at/all: nowhere/at/all, and there is no directory nowhere/at$"):
        read_rows("nowhere/at/all", "data")
    with pytest.raises(
        UsageError, match=r"readable JSONL file, got question.jsonl, which does not exist; did you mean questions.txt\?"
    ):
        read_rows("question.jsonl", "data")


def write_gguf(path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"GGUF\x03\x00\x00\x00")
    return path


def test_a_gguf_file_or_directory_says_how_to_convert_it(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "model" / "tiny.Q4_1.gguf")
    bare = shutil.copy(file, tmp_path / "without-ending")
    for name in (file, file.parent, bare):
        with pytest.raises(
            UsageError, match=r"^model: .*got the GGUF file .*after pip install gguf, with python -c"
        ) as caught:
            check_model(str(name))
        code = str(caught.value).partition('python -c "')[2].partition('"')[0]
        compile(code, "convert", "exec")
        assert "gguf_file=f" in code
    (file.parent / "config.json").write_text("{}")
    check_model(str(file.parent))  # has both formats


def test_a_directory_that_is_no_models_names_the_one_that_is(tmp_path: Path) -> None:
    for name in ("run/final", "run/checkpoints/step_4", "adapter", "outer/inner"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("run/final/config.json", "outer/inner/config.json", "adapter/adapter_config.json", "run/config.yaml"):
        (tmp_path / name).write_text("{}")
    for name, message in (
        ("run", "which is the output of a run; did you mean .*run/final?"),
        ("run/checkpoints/step_4", "train.export --run .*run --step 4 --to DIR"),
        ("adapter", "a LoRA adapter alone: merge it"),
        ("outer", "did you mean .*outer/inner?"),
        ("run/final/config.json", "expected the directory of a model, got the file .*; did you mean .*final?"),
    ):
        with pytest.raises(UsageError, match=message):
            check_model(str(tmp_path / name))


# --- What a reader does not read, and what is not installed


@pytest.mark.parametrize(
    "module", ["mgrpo_kernels", "mgrpo_kernels.train", "mgrpo_kernels.train.evaluate", "mgrpo_kernels.train.export"]
)
def test_a_reader_that_has_read_enough_is_no_error(module: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", module, "--help"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()  # before anything is written
    assert process.stderr.read() == ""
    assert process.wait() == 0


def test_in_a_checkout_the_command_that_installs_names_the_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extras, "CHECKOUT", tmp_path)
    assert extras.how_to_install("peft") == "pip install 'mgrpo_kernels[lora]'"
    (tmp_path / "pyproject.toml").touch()
    assert extras.how_to_install("peft") == f"pip install --no-build-isolation --editable '{tmp_path}[lora]'"


def test_the_record_of_a_command_line(tmp_path: Path) -> None:
    found = command.read_command_line([*tiny.FLAGS, "--output", str(tmp_path), "--dry-run"])
    assert (found.output, found.resume, found.dry_run, found.allow_changed) == (tmp_path, False, True, False)
    assert json.loads(json.dumps(found.config.values()))["rollouts"] == 8
