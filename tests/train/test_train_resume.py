"""Resuming: no work is lost to a missing link, a foreign file, a failed attempt or a file that has changed."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
from small_models import make_answering_model

from mgrpo_kernels.train import __main__ as command
from mgrpo_kernels.train import export
from mgrpo_kernels.train.run import checkpoint

FLAGS = [
    *tiny.FLAGS,
    "--steps",
    "4",
    "--checkpoint-every",
    "2",
    "--eval-every",
    "0",
    "--keep-checkpoints",
    "0",
    "--plain",
]
ODD = "\u2028, \u2029, \u0085, \x0b, \x0c, \x1c"
"""Characters at which str.splitlines ends a line and a JSONL file does not."""


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tiny.output_with(base, tmp_path_factory.mktemp("whole") / "run")
    assert command.main([*FLAGS, "--output", str(output)]) == 0
    return output


@pytest.fixture
def halfway(whole: Path, tmp_path: Path) -> Path:
    """Return a copy of the run as a kill after step 3 leaves it: one checkpoint, of step 2."""
    output = tmp_path / "run"
    shutil.copytree(whole, output, symlinks=True)
    shutil.rmtree(output / "final")
    shutil.rmtree(output / "checkpoints" / "step_4")
    (output / "checkpoints" / "latest").unlink()
    (output / "checkpoints" / "latest").symlink_to("step_2")
    for name in ("metrics.jsonl", "samples.jsonl"):
        lines = (output / name).read_bytes().split(b"\n")[:-1]
        (output / name).write_bytes(b"".join(line + b"\n" for line in lines if json.loads(line)["step"] <= 3))
    return output


def contents(output: Path) -> dict[str, bytes]:
    return {str(each.relative_to(output)): each.read_bytes() for each in output.rglob("*") if each.is_file()}


def resume(output: Path, *flags: str) -> int:
    return command.main(["--output", str(output), "--resume", *flags])


# --- Which checkpoint


def without_a_link(output: Path) -> None:
    (output / "checkpoints" / "latest").unlink()


def copied_with_its_targets(output: Path) -> None:
    (output / "checkpoints" / "latest").unlink()
    shutil.copytree(output / "checkpoints" / "step_2", output / "checkpoints" / "latest")


def with_nothing_but_latest(output: Path) -> None:
    copied_with_its_targets(output)
    shutil.rmtree(output / "checkpoints" / "step_2")


def with_a_link_to_elsewhere(output: Path) -> None:
    (output / "checkpoints" / "latest").unlink()
    (output / "checkpoints" / "latest").symlink_to(output.parent)


def with_foreign_names(output: Path) -> None:
    for name in ("step_4.bak", "step_best", "step_", "step_9 (copy)", ".step_old.new"):
        shutil.copytree(output / "checkpoints" / "step_2", output / "checkpoints" / name)
    (output / "checkpoints" / "step_7").write_text("a file")


def with_newer_ones_that_are_none(output: Path) -> None:
    for step, content in ((5, "[]"), (6, "{}"), (7, '{"step": 7'), (8, "null"), (9, '{"step": "9", "files": {}}')):
        broken = output / "checkpoints" / f"step_{step}"
        broken.mkdir()
        (broken / "run.json").write_text(content)
    shutil.copytree(output / "checkpoints" / "step_2", output / "checkpoints" / "step_12")  # renamed


@pytest.mark.parametrize(
    "change",
    [
        without_a_link,
        copied_with_its_targets,
        with_nothing_but_latest,
        with_a_link_to_elsewhere,
        with_foreign_names,
        with_newer_ones_that_are_none,
    ],
)
def test_the_newest_complete_checkpoint_is_found_by_its_content(
    whole: Path, halfway: Path, capsys: pytest.CaptureFixture[str], change: Any
) -> None:
    change(halfway)
    assert resume(halfway) == 0
    used = "latest" if change is with_nothing_but_latest else "step_2"
    assert f"resuming after step 2, from {halfway}/checkpoints/{used}\n" in capsys.readouterr().out
    assert tiny.lines(halfway) == tiny.lines(whole)
    assert (halfway / "checkpoints" / "latest").is_symlink()
    assert checkpoint.load(halfway / "checkpoints" / "latest")["step"] == 4
    cut = [json.loads(line)["step"] for line in (halfway / "metrics.jsonl.cut").read_text().split("\n")[:-1]]
    assert cut == [3]  # what the steps that are taken again had written


@pytest.mark.parametrize("lost", ["every checkpoint", "the directory", "what is in them"])
def test_a_run_is_not_started_again_over_its_work(halfway: Path, capsys: pytest.CaptureFixture[str], lost: str) -> None:
    if lost == "the directory":
        shutil.rmtree(halfway / "checkpoints")
    elif lost == "every checkpoint":
        shutil.rmtree(halfway / "checkpoints" / "step_2")
    else:
        (halfway / "checkpoints" / "step_2" / "__0_0.distcp").unlink()
    before = contents(halfway)
    assert resume(halfway) in (1, 2)
    assert "expected a complete " in capsys.readouterr().err
    assert contents(halfway) == before


def test_a_directory_that_lost_its_configuration_is_no_new_one(
    halfway: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (halfway / "config.yaml").unlink()
    before = contents(halfway)
    assert command.main([*FLAGS, "--output", str(halfway)]) == 2
    assert "which contains step_2, metrics.jsonl, samples.jsonl" in capsys.readouterr().err
    assert contents(halfway) == before


def test_a_run_that_had_no_checkpoint_yet_starts_again(
    whole: Path, halfway: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What only the mark of such a run shows: its directory is otherwise like one that was copied in part."""
    shutil.rmtree(halfway / "checkpoints")
    (halfway / "checkpoints").mkdir()
    (halfway / "checkpoints" / checkpoint.NONE_YET).touch()
    assert resume(halfway) == 0
    assert "no checkpoint of this run was complete yet: it starts again from its first step" in capsys.readouterr().out
    assert tiny.lines(halfway) == tiny.lines(whole)
    assert not (halfway / "checkpoints" / checkpoint.NONE_YET).exists()


def test_metrics_that_are_shorter_than_the_checkpoint_says_stop_the_run(
    halfway: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (halfway / "metrics.jsonl").write_text("")
    before = contents(halfway)
    assert resume(halfway) == 2
    assert "metrics.jsonl: expected at least the" in capsys.readouterr().err
    assert contents(halfway) == before


# --- A failed attempt


@pytest.mark.parametrize("flags", [["--method", "srt"], ["--seed", "7"], ["--lora-rank", "4"], ["--wandb", ""]])
def test_a_refused_resume_changes_nothing(halfway: Path, flags: list[str]) -> None:
    before = contents(halfway)
    assert resume(halfway, *flags) == 2
    assert contents(halfway) == before


# --- Data, model and tokenizer


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with a model, data whose prompts contain every kind of line separator, and a finished run of two steps."""
    place = tmp_path_factory.mktemp("own")
    make_answering_model(place / "model")
    for name, digits in (("train", "0123"), ("test", "12")):
        rows = [{"question": f"{digit}{ODD}{digit}", "answer": digit} for digit in digits]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (place / f"{name}.jsonl").write_bytes(text.encode())
    assert command.main([*own_flags(place), "--output", str(place / "run")]) == 0
    return place


def own_flags(place: Path) -> list[str]:
    return [
        "--model", str(place / "model"), "--data", str(place / "train.jsonl"), "--eval-data", str(place / "test.jsonl"), "--steps", "2",
        "--prompts-per-step", "2", "--rollouts", "4", "--max-response-tokens", "8", "--tokens-per-microbatch", "1024", "--eval-samples", "2",
        "--checkpoint-every", "1", "--prompt-template", "{question}", "--learning-rate", "1e-3", "--plain",
    ]  # fmt: skip


def test_line_separators_in_prompts_are_no_ends_of_lines(own: Path, tmp_path: Path) -> None:
    shutil.copytree(own / "run", tmp_path / "run", symlinks=True)
    assert ODD in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert resume(tmp_path / "run", "--steps", "3") == 0
    assert [line["step"] for line in tiny.lines(tmp_path / "run")] == [0, 1, 2, 3]
    assert all(ODD in sample["prompt"] for sample in tiny.lines(tmp_path / "run", "samples.jsonl"))


def other_data(place: Path, name: str) -> None:
    text = (place / name).read_text(encoding="utf-8")
    (place / name).write_text(text.replace('"answer": "1"', '"answer": "3"'), encoding="utf-8")


def other_weights(place: Path, _: str) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(place / "model" / "model.safetensors")
    tensors["model.norm.weight"][3] += 2**-10
    save_file(tensors, place / "model" / "model.safetensors", {"format": "pt"})


def other_tokenizer(place: Path, _: str) -> None:
    file = place / "model" / "tokenizer.json"
    values = json.loads(file.read_text())
    vocabulary = values["model"]["vocab"]
    vocabulary["0"], vocabulary["1"] = vocabulary["1"], vocabulary["0"]
    file.write_text(json.dumps(values))


CHANGES: dict[str, tuple[Any, str]] = {
    "training prompts": (other_data, "train.jsonl"),
    "held-out prompts": (other_data, "test.jsonl"),
    "weights of the base model": (other_weights, ""),
    "tokenizer": (other_tokenizer, ""),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_changed_file_of_the_same_name_stops_the_run(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    place = tmp_path / "own"
    shutil.copytree(own, place, symlinks=True)
    config = (place / "run" / "config.yaml").read_text()
    (place / "run" / "config.yaml").write_text(config.replace(str(own), str(place)))
    change, name = CHANGES[what]
    change(place, name)
    before = contents(place / "run")
    assert resume(place / "run", "--steps", "3") == 2
    shown = capsys.readouterr().err
    assert f"got other {what} (" in shown
    assert "--allow-changed-data" in shown
    assert contents(place / "run") == before
    if what == "training prompts":
        assert resume(place / "run", "--steps", "3", "--allow-changed-data") == 0
        assert f"changed: {what} (4 prompts, sha256 " in capsys.readouterr().out
        assert resume(place / "run", "--steps", "3") == 0  # from here on the new data are the run's


# --- Code in a checkpoint


class Evil:
    """A pickle of this calls a function when it is read."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.witness,))


def test_a_checkpoint_of_someone_else_executes_nothing(
    halfway: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = halfway / "checkpoints" / "step_2" / ".metadata"
    facts = json.loads((file.parent / "run.json").read_text())
    witness = tmp_path / "executed"
    file.write_bytes(pickle.dumps(Evil(witness)))
    facts["files"][".metadata"] = file.stat().st_size
    (file.parent / "run.json").write_text(json.dumps(facts))
    assert resume(halfway) == 1
    assert export.main(["--run", str(halfway), "--to", str(tmp_path / "model")]) == 1
    assert "expected the description of tensors, got a use of " in capsys.readouterr().err
    assert not witness.exists()


def test_bytes_in_a_checkpoint_are_refused(halfway: Path, tmp_path: Path) -> None:
    """PyTorch reads an entry that is no tensor by torch.load(weights_only=False)."""
    import torch.distributed.checkpoint as dcp

    place, witness = halfway / "checkpoints" / "step_2", tmp_path / "executed"
    facts = json.loads((place / "run.json").read_text())
    shutil.rmtree(place)
    state: dict[str, Any] = {"model.lm_head.weight": Evil(witness)}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(place), no_dist=True)
    witness.unlink(missing_ok=True)
    facts["files"] = {each.name: each.stat().st_size for each in place.iterdir()}
    (place / "run.json").write_text(json.dumps(facts))
    assert resume(halfway) == 1
    assert export.main(["--run", str(halfway), "--to", str(tmp_path / "model")]) == 1
    assert not witness.exists()


def test_an_entry_that_is_neither_tensor_nor_bytes_is_refused(halfway: Path) -> None:
    file = halfway / "checkpoints" / "step_2" / ".metadata"
    content = pickle.loads(file.read_bytes())
    content.state_dict_metadata["model.extra"] = "a text"
    file.write_bytes(pickle.dumps(content))
    with pytest.raises(Exception, match="expected tensors alone, got str"):
        checkpoint.read(file.parent, "model.")


def test_a_checkpoint_does_not_refer_to_files_elsewhere(halfway: Path) -> None:
    file = halfway / "checkpoints" / "step_2" / ".metadata"
    content = pickle.loads(file.read_bytes())
    for info in content.storage_data.values():
        info.relative_path = f"../step_2/{info.relative_path}"
    file.write_bytes(pickle.dumps(content))
    with pytest.raises(Exception, match="expected plain files in its own directory"):
        checkpoint.read(file.parent, "model.")
    facts = json.loads((file.parent / "run.json").read_text())
    facts["files"] = {"../../metrics.jsonl": 1}
    (file.parent / "run.json").write_text(json.dumps(facts))
    with pytest.raises(Exception, match="expected the names and sizes of files in its own directory"):
        checkpoint.load(file.parent)
