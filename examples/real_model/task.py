"""The task of the real model: sums of two numbers of two digits, as conversations with two answered questions in front.

The answered questions show the form ``12 + 25 = 37``. Without them SmolLM2-135M-Instruct answers in prose and is right on 3 of 100 such
sums, with them on about half.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

SHOWN = ((12, 25), (31, 19))
TRAINING, HELD_OUT = 512, 64


def conversation(a: int, b: int) -> list[dict[str, str]]:
    """Return the messages that ask for a + b."""
    messages = [{"role": "system", "content": "You are a calculator."}]
    for left, right in SHOWN:
        messages.append({"role": "user", "content": f"{left} + {right}"})
        messages.append({"role": "assistant", "content": f"{left} + {right} = {left + right}"})
    return [*messages, {"role": "user", "content": f"{a} + {b}"}]


def write_task(folder: Path, seed: int = 0) -> tuple[Path, Path]:
    """Write questions to train on and held-out questions, no sum of both, and return the files."""
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    random.Random(seed).shuffle(pairs)
    folder.mkdir(parents=True, exist_ok=True)
    files = folder / "questions.jsonl", folder / "held_out.jsonl"
    for file, part in zip(files, (pairs[:TRAINING], pairs[TRAINING : TRAINING + HELD_OUT]), strict=True):
        rows = ({"question": conversation(a, b), "answer": str(a + b)} for a, b in part)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return files
