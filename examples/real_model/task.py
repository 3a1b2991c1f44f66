"""The task of the real model: products of two numbers from 2 to 12, as conversations with one answered question in front.

The answered question, a sum, shows the form ``12 + 25 = 37``.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

FIRST, LAST = 2, 12
HELD_OUT = 24
"""Number of unordered pairs that are held out; both orders of a pair are."""


def conversation(a: int, b: int) -> list[dict[str, str]]:
    """Return the messages that ask for a times b."""
    return [
        {"role": "system", "content": "You are a calculator."},
        {"role": "user", "content": "12 + 25"},
        {"role": "assistant", "content": "12 + 25 = 37"},
        {"role": "user", "content": f"{a} * {b}"},
    ]


def write_task(folder: Path, seed: int = 0) -> tuple[Path, Path]:
    """Write the questions to train on and the held-out questions, none with the factors of another, and return the two files."""
    numbers = range(FIRST, LAST + 1)
    pairs = [(a, b) for a in numbers for b in numbers if a <= b]
    draw = random.Random(seed)
    draw.shuffle(pairs)
    folder.mkdir(parents=True, exist_ok=True)
    files = folder / "questions.jsonl", folder / "held_out.jsonl"
    for file, part in zip(files, (pairs[HELD_OUT:], pairs[:HELD_OUT]), strict=True):
        both_orders = sorted({order for a, b in part for order in ((a, b), (b, a))})
        draw.shuffle(both_orders)
        rows = ({"question": conversation(a, b), "answer": str(a * b)} for a, b in both_orders)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return files
