"""Rows of data, from files and data sets: JSONL, JSON, CSV, each also gzipped, Parquet, and whatever the package datasets loads."""

from __future__ import annotations

import csv
import gzip
import importlib
import io
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mgrpo_kernels.train.errors import UsageError
from mgrpo_kernels.train.extras import how_to_install
from mgrpo_kernels.train.model.location import absent, looks_like_path

SPLITS = {"data": "train", "eval_data": "test"}
"""Which part of a data set an option means, unless it names one."""


class Row(NamedTuple):
    """A row of data, and where it stands, for messages."""

    location: str
    values: dict[str, Any]


def read_rows(source: str, option: str) -> list[Row]:
    """Read the rows of a file, by its ending, or of a data set.

    Raises:
        UsageError: it cannot be read or has no rows; names the file and the line.
    """
    readers = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}
    path = Path(source)
    ending = Path(source.lower().removesuffix(".gz")).suffix
    zipped = source.lower().endswith(".gz")
    if ending in readers and not (zipped and ending == ".parquet"):
        rows = list(readers[ending](path, option))
    elif path.is_file():
        raise UsageError(
            f"{option}: expected a file that ends in {', '.join(readers)}, or .gz after the first three, got {source}"
        )
    else:
        rows = list(_data_set(source, option))
    if not rows:
        raise UsageError(f"{option}: expected at least one example, got none in {source}")
    return rows


def _jsonl(path: Path, option: str) -> Iterator[Row]:
    # Not splitlines(), which also ends a line at U+2028 and the like: JSON has them inside its texts.
    for number, line in enumerate(_text(path, option, "JSONL").split("\n"), 1):
        if line.strip():
            location = f"{path}, line {number}"
            yield _row(location, option, _parsed(line, f"a JSON object in {location}", option))


def _json(path: Path, option: str) -> Iterator[Row]:
    values = _parsed(
        _text(path, option, "JSON"), f"a list of JSON objects in {path} (one a line: call it .jsonl)", option
    )
    if not isinstance(values, list):
        raise UsageError(f"{option}: expected a list of JSON objects in {path}, got {type(values).__name__}")
    for number, value in enumerate(values, 1):
        yield _row(f"{path}, object {number}", option, value)


def _csv(path: Path, option: str) -> Iterator[Row]:
    lines = csv.DictReader(io.StringIO(_text(path, option, "CSV"), newline=""), strict=True)
    try:
        for number, values in enumerate(lines, 1):
            if None in values or None in values.values():
                raise UsageError(
                    f"{option}: expected {len(lines.fieldnames or ())} fields, as the first line names, in {path}, row {number}, got "
                    f"{sum(value is not None for name, value in values.items() if name is not None) + len(values.get(None, ()))}"
                )
            yield Row(f"{path}, row {number}", {name: value for name, value in values.items() if value.strip()})
    except csv.Error as error:
        raise UsageError(
            f"{option}: expected a readable CSV file, got {path}, line {lines.line_num}: {error}"
        ) from error


def _parquet(path: Path, option: str) -> Iterator[Row]:
    reader = _package("pyarrow.parquet", f"{option}: expected pyarrow to read {path}")
    try:
        values = reader.read_table(path).to_pylist()
    except (OSError, ValueError, NotImplementedError) as error:  # of pyarrow's own, all that are about files
        raise UsageError(f"{option}: expected a readable Parquet file, got {path}: {error}") from error
    return (_row(f"{path}, row {number}", option, value) for number, value in enumerate(values, 1))


def _data_set(source: str, option: str) -> Iterator[Row]:
    parts = [source] if Path(source).is_dir() else re.split(r":(?![^\[]*\])", source)  # train[:100] is one part
    name, split = parts[0], parts[-1] if len(parts) > 1 else SPLITS[option]
    if len(parts) > 3 or not all(parts):
        raise UsageError(f"{option}: expected NAME, NAME:SPLIT or NAME:CONFIG:SPLIT, got {source!r}")
    what = f"a file, a directory or a data set on the hub, with a split {split!r}"
    if not Path(name).exists() and looks_like_path(name):
        raise UsageError(f"{option}: expected {what}, got {source}: {absent(name).removeprefix('got ')}")
    datasets = _package("datasets", f"{option}: expected the package datasets for {source}, which is no file")
    try:
        values = datasets.load_dataset(name, parts[1] if len(parts) == 3 else None, split=split)
    except Exception as error:  # datasets has no common base for what can go wrong between here and a hub
        raise UsageError(f"{option}: expected {what}, got {source}: {str(error)[:400]}") from error
    return (_row(f"{source}, row {number}", option, value) for number, value in enumerate(values, 1))


def _package(name: str, wanted: str) -> Any:
    package = name.partition(".")[0]
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UsageError(f"{wanted}, got none installed: {how_to_install(package)}") from error


def _text(path: Path, option: str, kind: str) -> str:
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix.lower() == ".gz" else path.read_bytes()
    except FileNotFoundError as error:
        raise UsageError(f"{option}: expected a readable {kind} file, {absent(str(path))}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"{option}: expected a readable {kind} file, got {path}: {error}") from error
    try:
        return content.decode("utf-8-sig")  # Windows programs begin a file with a byte order mark
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UsageError(
            f"{option}: expected UTF-8 in {path}, got byte 0x{content[error.start]:02x} in line {line}: {error.reason}"
        ) from error


def _parsed(text: str, wanted: str, option: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{option}: expected {wanted}, got {shown(text)} ({error})") from error


def _row(location: str, option: str, value: Any) -> Row:
    if not isinstance(value, dict):
        raise UsageError(f"{option}: expected a JSON object in {location}, got {shown(value)}")
    return Row(location, value)


def shown(value: object) -> str:
    """Return a value as a message shows it, however long it is."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]} ..."
