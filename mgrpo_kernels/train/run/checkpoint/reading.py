"""Finding and reading checkpoints.

Nothing in a checkpoint's files is executed: ``run.json`` is JSON whose structure is checked, ``.metadata``, which PyTorch writes as a
pickle, may name only the few classes that describe tensors, and the tensors are read by ``torch.load(weights_only=True)``.
"""

from __future__ import annotations

import contextlib
import json
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, TypedDict, cast

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata

from mgrpo_kernels.teacher import check_progress
from mgrpo_kernels.train import parallel
from mgrpo_kernels.train.errors import CheckpointError, UsageError
from mgrpo_kernels.train.run import files
from mgrpo_kernels.train.run.checkpoint.state import state_of
from mgrpo_kernels.train.step import Learner

FACTS = "run.json"
LATEST = "latest"
NONE_YET = "none_yet"
"""A file in a run's ``checkpoints/`` until the first checkpoint is complete. Only where it exists may a run start again from its first
step: a directory without checkpoints may also be one that was copied in part."""
NAME = re.compile(r"step_(0|[1-9][0-9]*)")


class Facts(TypedDict):
    """What a checkpoint contains beside its tensors."""

    step: int
    metrics_bytes: int  # size of metrics.jsonl at that step
    samples_bytes: int
    unwritten: dict[str, list[str]]  # lines of these two files that could not be written by then, by file name
    # Metrics and samples of a step whose evaluation is still to come.
    pending: tuple[dict[str, Any], list[dict[str, Any]]] | None
    ranks: int
    momentum_updates: int | None
    teacher: dict[str, Any] | None  # state of the momentum model's schedule; None in a checkpoint of an earlier version
    fingerprints: dict[str, str]  # of the data, the base model and its tokenizer
    files: dict[str, int]  # sizes
    path: Path


# --- Finding


def step_of(path: Path) -> int | None:
    """Return the step that a directory's name gives, None for a name that is no checkpoint's, such as ``step_4.bak``."""
    match = NAME.fullmatch(path.name)
    return None if match is None else int(match[1])


def candidates(directory: Path) -> list[Path]:
    """Return the directories that are named as checkpoints, complete or not, the newest first.

    The link ``latest`` is not needed. A directory of that name, which ``cp -rL`` makes of the link, counts as the oldest.

    Raises:
        CheckpointError: the directory exists and cannot be listed.
    """
    try:
        entries = list(directory.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(
            f"checkpoint: expected a directory that can be listed, got {files.reason(error)}"
        ) from error
    named = sorted(
        ((step, each) for each in entries if (step := step_of(each)) is not None and each.is_dir()), reverse=True
    )
    return [each for _, each in named] + [each for each in entries if each.name == LATEST and files.is_directory(each)]


def complete(directory: Path) -> list[Facts]:
    """Return the complete checkpoints, the newest first; see :func:`load`."""
    found = []
    for path in candidates(directory):
        with contextlib.suppress(CheckpointError):
            found.append(load(path))
    return sorted(found, key=lambda facts: facts["step"], reverse=True)


def saved_steps(directory: Path) -> list[int]:
    """Return the steps of the complete checkpoints, ascending."""
    return sorted({facts["step"] for facts in complete(directory) if facts["path"].name != LATEST})


def latest(directory: Path) -> Path | None:
    """Return the newest complete checkpoint, or None."""
    found = complete(directory)
    return found[0]["path"] if found else None


def load(path: Path) -> Facts:
    """Return what a checkpoint contains beside its tensors, which are not read.

    Raises:
        CheckpointError: a file is missing, is not as long as it was when it was written, or is not a checkpoint's.
    """
    try:
        facts = checked(json.loads((path / FACTS).read_text(encoding="utf-8")))
        for name, size in facts["files"].items():
            found = (path / name).stat().st_size
            if found != size:
                raise CheckpointError(f"checkpoint: expected {path / name} of {size} bytes, got {found}")
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"checkpoint: expected a complete one in {path}, got {files.reason(error)}") from error
    if step_of(path) not in (None, facts["step"]):
        raise CheckpointError(
            f"checkpoint: expected that of step {step_of(path)} in {path}, got that of step {facts['step']}"
        )
    return {**facts, "path": path}


def checked(facts: Any) -> Facts:
    """Return the content of run.json, with what earlier versions did not write filled in; raise ValueError where it is something else."""
    if not isinstance(facts, dict):
        raise ValueError(f"{FACTS}: expected an object, got {type(facts).__name__}")
    facts = {"unwritten": {}, "fingerprints": {}, "pending": None, "teacher": None, **facts}
    kinds: dict[str, tuple[type, ...]] = {
        "step": (int,),
        "metrics_bytes": (int,),
        "samples_bytes": (int,),
        "ranks": (int,),
        "momentum_updates": (int, type(None)),
        "teacher": (dict, type(None)),
        "unwritten": (dict,),
        "fingerprints": (dict,),
        "files": (dict,),
        "pending": (list, type(None)),
    }
    for name, wanted in kinds.items():
        if type(facts.get(name)) not in wanted or (wanted == (int,) and facts[name] < 0):
            raise ValueError(f"{FACTS}: expected {name} of type {wanted[0].__name__}, got {facts.get(name)!r}")
    if not all(Path(name).name == name and type(size) is int for name, size in facts["files"].items()):
        raise ValueError(f"{FACTS}: expected the names and sizes of files in its own directory, got {facts['files']!r}")
    if not all(isinstance(each, str) for each in facts["fingerprints"].values()):
        raise ValueError(f"{FACTS}: expected texts as fingerprints, got {facts['fingerprints']!r}")
    if not all(
        isinstance(lines, list) and all(isinstance(each, str) for each in lines)
        for lines in facts["unwritten"].values()
    ):
        raise ValueError(f"{FACTS}: expected lists of lines as unwritten, got {facts['unwritten']!r}")
    if facts["teacher"] is not None:
        check_progress(facts["teacher"])
    pending = facts["pending"]
    if pending is not None and not (
        len(pending) == 2 and isinstance(pending[0], dict) and isinstance(pending[1], list)
    ):
        raise ValueError(f"{FACTS}: expected metrics and samples as pending, got {pending!r}")
    return cast("Facts", facts)


# --- Reading


def restore(facts: Facts, learner: Learner) -> None:
    """Put a checkpoint's tensors into a learner that was built from the same configuration. Every rank must call.

    Raises:
        UsageError: the run had a momentum model and this configuration has none, or the reverse; or the weights are another model's.
        CheckpointError: it cannot be read.
    """
    if (learner.momentum is None) != (facts["momentum_updates"] is None):
        wanted = "no momentum model" if learner.momentum is None else "a momentum model"
        raise UsageError(f"resume: expected a run with {wanted}, as these options need, got one that differs")
    state = state_of(learner)
    shapes = {name: tensor.shape for name, tensor in state.items()}
    with reading(facts["path"]):
        stored = sizes(facts["path"])
    if shapes != stored:
        differing = next(each for each in sorted({*shapes, *stored}) if shapes.get(each) != stored.get(each))
        wanted, got = (str(each.get(differing, "nowhere")) for each in (shapes, stored))
        raise UsageError(f"resume: expected a checkpoint of this model, {differing} {wanted}, got {got}")
    with reading(facts["path"]):
        dcp.load(state, storage_reader=Reader(facts["path"]), no_dist=parallel.world() == 1)
    if learner.momentum is not None:
        updates = facts["momentum_updates"]
        assert updates is not None
        learner.momentum.updates = updates
        if facts["teacher"] is not None:
            learner.momentum.load_progress(facts["teacher"])


def resume(directory: Path, learner: Learner, warn: Callable[[str], None]) -> Facts | None:
    """Restore the newest checkpoint that can be read; return its facts, or None where there is no checkpoint. Every rank must call.

    Raises:
        CheckpointError: there are some, and none can be read.
    """
    with parallel.together():
        found = candidates(directory)
    paths = parallel.from_first(found)
    for path in paths:
        try:
            with parallel.together():
                facts = load(path)
            restore(facts, learner)
            return facts
        except (CheckpointError, RuntimeError) as error:
            warn(f"warning: {error}. An older checkpoint is used instead, if there is one")
    if paths:
        raise CheckpointError(f"checkpoint: expected one in {directory} that can be read, got {len(paths)} that cannot")
    return None


def read(path: Path, prefix: str) -> dict[str, Tensor]:
    """Return the whole tensors of a checkpoint whose name begins with `prefix`, without it: "model." or "momentum.".

    Raises:
        CheckpointError: it cannot be read.
    """
    with reading(path):
        stored = Reader(path).read_metadata().state_dict_metadata
        state = {
            name: torch.empty(each.size, dtype=each.properties.dtype)
            for name, each in stored.items()
            if name.startswith(prefix) and isinstance(each, metadata.TensorStorageMetadata)
        }
        dcp.load(state, storage_reader=Reader(path), no_dist=True)
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()}


def sizes(path: Path) -> dict[str, torch.Size]:
    """Return the shapes of a checkpoint's tensors by name."""
    stored = Reader(path).read_metadata().state_dict_metadata
    return {name: each.size for name, each in stored.items() if isinstance(each, metadata.TensorStorageMetadata)}


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn every error of torch about a damaged file into a CheckpointError."""
    try:
        yield
    except (Exception, dcp.api.CheckpointException) as error:  # torch's is no Exception
        raise CheckpointError(f"checkpoint: expected a readable one in {path}, got {cause(error)}") from error


def cause(error: BaseException) -> str:
    """Return what went wrong on the first rank that failed, in a line."""
    if isinstance(error, dcp.api.CheckpointException):
        number, (inner, _) = next(iter(error.failures.items()))
        return f"rank {number}: {cause(inner)}" if parallel.world() > 1 else cause(inner)
    return files.reason(error)


# --- The metadata, which is a pickle


class Unpickler(pickle.Unpickler):
    """Reads a pickle that contains only the classes that describe tensors, and refuses any other."""

    ALLOWED: Mapping[tuple[str, str], Any] = {
        **{
            (each.__module__, each.__name__): each
            for each in (
                metadata.Metadata, metadata.TensorStorageMetadata, metadata.ChunkStorageMetadata, metadata.TensorProperties,
                metadata.MetadataIndex, metadata.StorageMeta, metadata._MEM_FORMAT_ENCODING, filesystem._StorageInfo, torch.Size,
            )
        },
        # Where it was written, which nobody asks for.
        **{(module, name): PurePosixPath for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "PurePosixPath")},
        ("torch.serialization", "_get_layout"): {"torch.strided": torch.strided}.__getitem__,
        **{("torch", str(each).removeprefix("torch.")): each for each in vars(torch).values() if isinstance(each, torch.dtype)},
    }  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self.ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"expected the description of tensors, got a use of {module}.{name}") from None


class Reader(dcp.FileSystemReader):
    """PyTorch's reader, but for the metadata, which it reads by an unpickler that executes whatever the file asks for."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._directory = path

    def read_metadata(self, *_: Any, **__: Any) -> metadata.Metadata:
        """Return the metadata.

        Raises:
            ValueError: it is none, or refers to a file outside the checkpoint's directory.
        """
        with (self._directory / ".metadata").open("rb") as file:
            found = Unpickler(file).load()
        if not isinstance(found, metadata.Metadata) or not isinstance(found.storage_data, dict):
            raise ValueError(f"expected the description of tensors, got {type(found).__name__}")
        for each in found.state_dict_metadata.values():
            if not isinstance(each, metadata.TensorStorageMetadata):
                raise ValueError(f"expected tensors alone, got {type(each).__name__}")
        for info in found.storage_data.values():
            inside = isinstance(info, filesystem._StorageInfo) and Path(info.relative_path).name == info.relative_path
            if not inside or info.transform_descriptors:
                raise ValueError(f"expected plain files in its own directory, got {info!r}")
        found.storage_meta = metadata.StorageMeta(load_id=self.load_id)
        return found
