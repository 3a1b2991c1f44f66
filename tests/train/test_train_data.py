"""Prompts: what is read, what is refused with file and line, and the order of the steps."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import pytest
import tiny

from mgrpo_kernels.train.config import DEFAULT_TEMPLATE, UsageError
from mgrpo_kernels.train.data import equal_to_gold, load_task, prompts_of_step, read_examples, read_template


def write(path: Path, *rows: object) -> str:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return str(path)


def test_reads_questions_and_answers(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", {"q": "1+1 {x}", "a": "so\n#### 2"}, "", {"q": "2+2", "a": 4}, {"q": "none"})
    examples = read_examples(file, "q", "a", "<{question}>", needs_gold=False)
    assert [tuple(each) for each in examples] == [("<1+1 {x}>", "2"), ("<2+2>", "4"), ("<none>", None)]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (({"q": "x", "a": "1"}, '{"q": '), r"data: want a JSON object in .*a\.jsonl, line 2, got"),
        (({"q": "x", "a": "1"}, "", "[1]"), r"data: want a JSON object in .*a\.jsonl, line 3"),
        (
            ({"question": "x", "id": 1},),
            r"prompt_field: want one of the fields id, question of .*a\.jsonl, line 1, got 'q'",
        ),
        (({"q": "x", "id": 1},), r"answer_field: want one of the fields id, q of .*a\.jsonl, line 1, got 'a'"),
        (({"q": "x", "a": " "},), r"answer_field: want a text or a number in 'a' of .*a\.jsonl, line 1"),
        (({"q": ["x"], "a": "1"},), r"prompt_field: want a text or a number in 'q' of .*a\.jsonl, line 1"),
        (("",), r"data: want at least one example, got none in .*a\.jsonl"),
    ],
)
def test_broken_rows_name_file_and_line(tmp_path: Path, rows: tuple, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_examples(write(tmp_path / "a.jsonl", *rows), "q", "a", "{question}", needs_gold=True)


def test_unreadable_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"data: want a readable JSONL file, got .*none\.jsonl"):
        read_examples(str(tmp_path / "none.jsonl"), "q", "a", "{question}", needs_gold=False)


def test_a_line_separator_inside_a_text_ends_no_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes('{"q": "one\u2028two", "a": "1"}\r\n{"q": "3", "a": "4"}'.encode())
    examples = read_examples(str(tmp_path / "a.jsonl"), "q", "a", "{question}", needs_gold=True)
    assert [each.prompt for each in examples] == ["one\u2028two", "3"]


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_a_file_without_rows(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(UsageError, match=r"data: want at least one example, got none in .*a\.jsonl"):
        read_examples(str(tmp_path / "a.jsonl"), "q", "a", "{question}", needs_gold=False)


def test_an_empty_answer_is_refused_even_where_no_answer_is_needed(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", {"q": "x", "a": ""})
    with pytest.raises(UsageError, match=r"answer_field: want a text or a number in 'a' of .*line 1, got ''"):
        read_examples(file, "q", "a", "{question}", needs_gold=False)


def test_a_template_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "t.bin").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="prompt_template: want a readable text file"):
        read_template(str(tmp_path / "t.bin"))


def test_template_is_a_text_or_a_file(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("Q: {question}\nA:")
    assert read_template(str(tmp_path / "t.txt")) == "Q: {question}\nA:"
    assert read_template(DEFAULT_TEMPLATE) == DEFAULT_TEMPLATE
    with pytest.raises(UsageError, match="prompt_template: want a text, or a file that exists"):
        read_template("no placeholder")


def test_gold_method_and_evaluation_need_answers(tmp_path: Path) -> None:
    bare, full = (
        write(tmp_path / "bare.jsonl", {"question": "x"}),
        write(tmp_path / "full.jsonl", {"question": "x", "answer": "1"}),
    )
    assert load_task(tiny.config(model="m", data=bare)).train[0].gold is None
    for changes in ({"data": bare, "method": "gold"}, {"data": full, "eval_data": bare}):
        with pytest.raises(UsageError, match=r"answer_field: .*bare\.jsonl, line 1"):
            load_task(tiny.config(model="m", **changes))


def test_steps_go_through_the_data_epoch_by_epoch() -> None:
    drawn = [index for step in range(1, 8) for index in prompts_of_step(7, 3, step, seed=5)]
    epochs = [drawn[start : start + 7] for start in range(0, 21, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert drawn[:3] == prompts_of_step(7, 3, 1, seed=5)
    assert drawn != [index for step in range(1, 8) for index in prompts_of_step(7, 3, step, seed=6)]
    assert Counter(prompts_of_step(2, 5, 1, seed=0)).total() == 5  # more prompts than there are examples


def test_equal_to_gold() -> None:
    got = equal_to_gold(["1/2", "3", None, "4"], ["0.5", "4", "1", None], "math").tolist()
    assert got[:3] == [1.0, 0.0, 0.0]
    assert math.isnan(got[3])
