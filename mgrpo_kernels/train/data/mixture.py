"""Several sources of training prompts, their weights, and the order and number of what is taken."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from mgrpo_kernels.train.errors import UsageError
from mgrpo_kernels.train.rng import generator_for

T = TypeVar("T")


class Source(NamedTuple):
    """A file or data set, and its weight in the mixture."""

    name: str
    weight: float | None
    label: str = ""  # of a held-out set, for its own accuracy


def parse_sources(named: str, option: str) -> list[Source]:
    """Return the sources that an option names, with a comma between: ``a.jsonl@3,b.parquet@1``.

    Raises:
        UsageError: an empty name, a weight of an evaluation, or weights for some of the sources only.
    """
    if Path(named).exists():
        return [Source(named, None)]
    sources = []
    for part in re.split(r",(?![^\[]*\])", named):
        match = re.fullmatch(r"(.+)@(\d+(?:\.\d+)?)", part.strip())
        name, weight = (match[1], float(match[2])) if match else (part.strip(), None)
        label = ""
        if (
            option == "eval_data"
            and (match := re.fullmatch(r"([A-Za-z][\w.-]*)=(.+)", name))
            and not Path(name).exists()
        ):
            label, name = match[1], match[2]
        if not name or weight == 0.0:
            raise UsageError(
                f"{option}: expected names with commas between, each with @WEIGHT > 0 or without, got {named!r}"
            )
        sources.append(Source(name, weight, label))
    labels = [source.label for source in sources]
    if any(labels) and (not all(labels) or len(set(labels)) < len(labels)):
        raise UsageError(
            f"{option}: expected different names for all sets or none, as in easy=FILE,hard=FILE, got {named!r}"
        )
    weighted = [source.weight is not None for source in sources]
    if any(weighted) and option != "data":
        raise UsageError(f"{option}: expected no weights, since every prompt is evaluated, got {named!r}")
    if any(weighted) and not all(weighted):
        raise UsageError(f"{option}: expected weights for all sources or for none, got {named!r}")
    return sources


def mixed(sources: Sequence[tuple[float | None, list[T]]], seed: int, *, shuffle: bool, most: int | None) -> list[T]:
    """Return the training examples: all of them, or in the proportions of the weights, as many as there are in all.

    A source with fewer examples than its part is repeated, one with more gives a random choice. Shuffling and choices follow from the
    seed. Without weights, the order is that of the sources.
    """
    total, whole = sum(len(examples) for _, examples in sources), math.fsum(weight or 0.0 for weight, _ in sources)
    taken: list[T] = []
    for number, (weight, examples) in enumerate(sources):
        if weight is None:
            taken += examples
            continue
        order = _order(len(examples), seed, f"mixture {number}")
        taken += [examples[i] for i in islice(cycle(order), max(1, round(total * weight / whole)))]
    if shuffle:
        taken = [taken[i] for i in _order(len(taken), seed, "shuffle")]
    return taken[:most]


def _order(size: int, seed: int, purpose: str) -> list[int]:
    order: list[int] = torch.randperm(size, generator=generator_for(seed, purpose, 0)).tolist()
    return order
