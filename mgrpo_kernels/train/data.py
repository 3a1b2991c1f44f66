"""Prompts: JSONL files, the prompt template, and which prompts a step gets."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mgrpo_kernels import extract_answer
from mgrpo_kernels.train.config import Config, UsageError
from mgrpo_kernels.train.labels import METHODS
from mgrpo_kernels.train.streams import stream
from mgrpo_kernels.vote import Equivalence, answers_equal


class Example(NamedTuple):
    """One question."""

    prompt: str  # as the model sees it
    gold: str | None  # the true answer, where it is known


class Task(NamedTuple):
    """What is trained on, and how an answer is read and compared."""

    train: list[Example]
    held_out: list[Example]  # may be empty: no evaluation
    extract: Callable[[str], str | None] = extract_answer
    equivalence: Equivalence = "math"


def load_task(config: Config) -> Task:
    """Return the task that the configuration names.

    Raises:
        UsageError: unreadable file, broken line, missing field, no rows, or a template without {question}.
    """
    assert config.data.data is not None
    template = read_template(config.data.prompt_template)
    needs_gold = METHODS[config.method.method].needs_gold
    train = read_examples(config.data.data, config.data.prompt_field, config.data.answer_field, template, needs_gold)
    held_out: list[Example] = []
    if config.data.eval_data is not None:
        held_out = read_examples(
            config.data.eval_data, config.data.prompt_field, config.data.answer_field, template, True
        )
    return Task(train, held_out)


def read_template(text_or_file: str) -> str:
    """Return the template, read from a file where the argument names one.

    Raises:
        UsageError: no {question} in it.
    """
    is_file = "{question}" not in text_or_file and "\n" not in text_or_file and Path(text_or_file).is_file()
    try:
        template = Path(text_or_file).read_text(encoding="utf-8") if is_file else text_or_file
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"prompt_template: want a readable text file, got {text_or_file}: {error}") from error
    if "{question}" not in template:
        raise UsageError(
            f"prompt_template: want a text, or a file that exists, with {{question}} in it, got {template!r}"
        )
    return template


def read_examples(path: str, prompt_field: str, answer_field: str, template: str, needs_gold: bool) -> list[Example]:
    """Read a JSONL file: one object a line; empty lines are passed over.

    Raises:
        UsageError: names the file and the line.
    """
    examples: list[Example] = []
    try:
        # Not splitlines(), which also ends a line at U+2028 and the like: JSON has them inside its texts.
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"data: want a readable JSONL file, got {path}: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UsageError(f"data: want a JSON object in {place}, got {line[:60]!r} ({error})") from error
        if not isinstance(row, dict):
            raise UsageError(f"data: want a JSON object in {place}, got {line[:60]!r}")
        question = _field(row, "prompt_field", prompt_field, place)
        gold = (
            _field(row, "answer_field", answer_field, place)
            if needs_gold or row.get(answer_field) is not None
            else None
        )
        examples.append(
            Example(
                template.replace("{question}", question), None if gold is None else extract_answer(gold) or gold.strip()
            )
        )
    if not examples:
        raise UsageError(f"data: want at least one example, got none in {path}")
    return examples


def _field(row: dict[str, Any], option: str, name: str, place: str) -> str:
    if name not in row:
        raise UsageError(
            f"{option}: want one of the fields {', '.join(sorted(row)) or '(none)'} of {place}, got {name!r}"
        )
    value = row[name]
    if isinstance(value, bool) or not isinstance(value, (str, int, float)) or not str(value).strip():
        raise UsageError(f"{option}: want a text or a number in {name!r} of {place}, got {value!r}")
    return str(value)


def prompts_of_step(size: int, per_step: int, step: int, seed: int) -> list[int]:
    """Return which of `size` examples step `step` (from 1) trains on: epoch after epoch, each in an order of its own."""
    order: dict[int, list[int]] = {}
    chosen = []
    for position in range((step - 1) * per_step, step * per_step):
        epoch, place = divmod(position, size)
        if epoch not in order:
            order[epoch] = torch.randperm(size, generator=stream(seed, "data", epoch)).tolist()
        chosen.append(order[epoch][place])
    return chosen


def equal_to_gold(answers: Sequence[str | None], gold: Sequence[str | None], equivalence: Equivalence) -> Tensor:
    """Return 1 where an answer equals the true one, 0 where not, NaN where that is not known: ``(B,)`` float32."""
    pairs = list(zip(answers, gold, strict=True))
    known = {
        (a, g): math.nan if g is None else float(answers_equal(a, g, equivalence)) for a, g in dict.fromkeys(pairs)
    }
    return torch.tensor([known[pair] for pair in pairs])
