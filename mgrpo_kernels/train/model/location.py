"""What the name of a model or of data refers to, so that a wrong one is refused with what is wrong about it."""

from __future__ import annotations

import difflib
import shlex
from pathlib import Path

from mgrpo_kernels.train.errors import UsageError
from mgrpo_kernels.train.parser import did_you_mean

FILE_ENDINGS = (
    ".arrow", ".bin", ".csv", ".gguf", ".gz", ".json", ".jsonl", ".parquet", ".pt", ".pth", ".safetensors", ".tsv", ".txt", ".yaml",
    ".yml", ".zip", ".zst",
)  # fmt: skip
"""Endings of names that are files and not names on the hub, which may contain a dot, as in Qwen2.5."""
CONVERT = (
    "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; d, f, to = {folder!r}, {file!r}, 'converted'; "
    "m = M.from_pretrained(d, gguf_file=f); m.hf_quantizer = None; m.config.__dict__.pop('quantization_config', None); "
    "m.save_pretrained(to); T.from_pretrained(d, gguf_file=f).save_pretrained(to)"
)


def trust_warning(model: str) -> str:
    """Return what a command prints with --trust-remote-code."""
    return (
        f"warning: --trust-remote-code runs the Python code that comes with {model}, with your rights on this machine"
    )


def looks_like_path(name: str) -> bool:
    """Return whether a name can only be that of a file or a directory, since the hub has none like it: OWNER/NAME or NAME."""
    first, slash, _ = name.partition("/")
    return (
        name.startswith(("/", ".", "~"))
        or "\\" in name
        or name.count("/") > 1
        or name.lower().endswith(FILE_ENDINGS)
        or bool(slash and (first == "" or Path(first).is_dir()))
    )


def absent(name: str) -> str:
    """Return the end of a message about a path that does not exist, with the existing one that is meant if there is one like it."""
    path = Path(name)
    folder = path.parent
    if not folder.is_dir():
        return f"got {name}, and there is no directory {folder}"
    close = difflib.get_close_matches(path.name, [each.name for each in folder.iterdir()], n=1)
    return f"got {name}, which does not exist{did_you_mean(str(folder / close[0]) if close else None)}"


def check_model(name: str) -> None:
    """Raise UsageError for a path that does not exist, or that has a model in another format than that of transformers."""
    path = Path(name)
    if not path.exists():
        if looks_like_path(name):
            raise UsageError(f"model: expected a directory with a model, {absent(name)}")
        return  # a name on the hub
    if gguf := gguf_of(path):
        code = CONVERT.format(folder=str(gguf.parent), file=gguf.name)
        raise UsageError(
            f"model: expected a directory with a model of transformers (config.json, *.safetensors), got the GGUF file {gguf}: convert it "
            f'once, after pip install gguf, with python -c "{code}", and give --model converted'
        )
    if path.is_file():
        raise UsageError(f"model: expected the directory of a model, got the file {name}; did you mean {path.parent}?")
    if not (path / "config.json").exists():
        raise UsageError(f"model: expected a directory with a model (config.json), got {name}{instead_of(path)}")


def gguf_of(path: Path) -> Path | None:
    """Return the GGUF file that a path names or, as a directory without a model of transformers, contains."""
    if path.is_dir():
        found = [] if (path / "config.json").exists() else sorted(path.glob("*.gguf"))
        return found[0] if found else None
    with path.open("rb") as file:
        return path if file.read(4) == b"GGUF" else None


def instead_of(path: Path) -> str:
    """Return what to give in place of a directory that is no model's, if it is one of those that a run or peft writes."""
    if (path / "adapter_config.json").exists():
        return ", which has a LoRA adapter alone: merge it into its model first (peft's merge_and_unload)"
    if (path / "final" / "config.json").exists():
        return f", which is the output of a run; did you mean {path / 'final'}?"
    if path.parent.name == "checkpoints" and (path.parent.parent / "config.yaml").exists():
        run, step = shlex.quote(str(path.parent.parent)), path.resolve().name.removeprefix("step_")
        return f", which is a checkpoint: write its model with python -m mgrpo_kernels.train.export --run {run} --step {step} --to DIR"
    below = [each.parent for each in sorted(path.glob("*/config.json"))]
    return did_you_mean(str(below[0])) if len(below) == 1 else ""
