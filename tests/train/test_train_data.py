"""Prompts: what is read, what is refused with file and line, and the order of the steps."""

from __future__ import annotations

import json
import logging
import math
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
import tiny
from pyarrow import parquet
from small_models import make_byte_model

from mgrpo_kernels import extract_answer
from mgrpo_kernels.method import equal_to_gold, read_gold
from mgrpo_kernels.train.config import DEFAULT_TEMPLATE, Config
from mgrpo_kernels.train.data.files import read_rows
from mgrpo_kernels.train.data.task import (
    Example,
    Task,
    check_lengths,
    fitting,
    load_task,
    prompts_of_step,
    read_examples,
    read_sources,
    read_template,
)
from mgrpo_kernels.train.errors import UsageError
from mgrpo_kernels.train.extras import how_to_install
from mgrpo_kernels.vote import answers_equal

FIXTURES = Path(__file__).parent / "data"
SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


def write(path: Path, *rows: object) -> str:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return str(path)


def read(source: str | Path, *, needs_gold: bool = False, option: str = "data", **options: Any) -> list[Example]:
    chosen = {"model": "m", "data": str(source), "eval_data": None, "prompt_template": "{question}", **options}
    return read_examples(tiny.config(**chosen), option, needs_gold)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    place = tmp_path_factory.mktemp("model")
    make_byte_model(place)
    return str(place)


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Any:
    """Return what gives the log's lines so far."""
    caplog.set_level(logging.WARNING, "mgrpo_kernels")
    return lambda: [record.getMessage() for record in caplog.records]


# --- Files


def test_reads_questions_and_answers(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", {"q": "1+1 {x}", "a": "so\n#### 2"}, "", {"q": "2+2", "a": 4}, {"q": "none"})
    examples = read(file, prompt_field="q", answer_field="a", prompt_template="<{question}>")
    assert [each[:2] for each in examples] == [("<1+1 {x}>", "2"), ("<2+2>", "4"), ("<none>", None)]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (({"q": "x", "a": "1"}, '{"q": '), r"data: expected a JSON object in .*a\.jsonl, line 2, got"),
        (({"q": "x", "a": "1"}, "", "[1]"), r"data: expected a JSON object in .*a\.jsonl, line 3, got \[1\]"),
        (({"q": "x"}, "[" * 100000), r"data: expected a JSON object in .*a\.jsonl, line 2, got '\[+ \.\.\."),
        (
            ({"q": "x", "a": "1" * 5000},),
            r"answer_field: expected an answer, or a solution that ends in .* line 1, got 5000 ",
        ),
        (('{"q": "x", "a": ' + "1" * 5000 + "}",), r"data: expected a JSON object in .*line 1, got .*limit"),
        (
            ({"question": "x", "id": 1},),
            r"prompt_field: expected one of the fields id, question of .*a\.jsonl, line 1, got 'q'",
        ),
        (({"q": "x", "a": "1"}, {"a": "1"}), r"prompt_field: expected one of the fields a of .*line 2, got 'q'"),
        (({"q": "x", "id": 1},), r"answer_field: expected one of the fields id, q of .*a\.jsonl, line 1, got 'a'"),
        (({"q": "x", "a": " "},), r"answer_field: expected a text or a number in 'a' of .*a\.jsonl, line 1"),
        (('{"q": "x", "a": NaN}',), r"answer_field: expected a text or a number in 'a' of .*line 1, got nan"),
        (({"q": "x", "a": True},), r"answer_field: expected a text or a number in 'a' of .*line 1, got True"),
        (
            ({"q": ["x" * 1000], "a": "1"},),
            r"prompt_field: expected a text or a number in 'q' of .*line 1, got \['x+ \.\.\.$",
        ),
        (({"q": "\ud800", "a": "1"},), r"prompt_field: expected a text in 'q' of .*line 1, got half a surrogate pair"),
        (("",), r"data: expected at least one example, got none in .*a\.jsonl"),
    ],
)
def test_broken_rows_name_file_and_line(tmp_path: Path, rows: tuple, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        read(write(tmp_path / "a.jsonl", *rows), needs_gold=True, prompt_field="q", answer_field="a")
    assert len(str(caught.value)) < 400  # however long the line


@pytest.mark.parametrize("name", ["none.jsonl", "none.json", "none.parquet"])
def test_unreadable_file(tmp_path: Path, name: str) -> None:
    kind = {".jsonl": "JSONL", ".json": "JSON", ".parquet": "Parquet"}[Path(name).suffix]
    with pytest.raises(UsageError, match=rf"data: expected a readable {kind} file, got .*{name}"):
        read(tmp_path / name)


def test_an_ending_that_is_none_of_these(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError,
        match=r"eval_data: expected a file that ends in \.jsonl, \.json, \.csv, \.parquet, or \.gz after the first three, got .*a\.txt",
    ):
        read_rows(write(tmp_path / "a.txt", {"question": "x"}), "eval_data")


def test_windows_files_have_marks_and_other_line_ends(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"question": "1"}\r\n\r\n{"question": "2"}\r\n')
    assert [each.prompt for each in read(tmp_path / "a.jsonl")] == ["1", "2"]
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf[{"question": "1"},\r\n{"question": "2"}]')
    assert [each.prompt for each in read(tmp_path / "a.json")] == ["1", "2"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"question": "1"}\n{"question": "caf\xe9"}\n', r"expected UTF-8 in .*a\.jsonl, got byte 0xe9 in line 2"),
        ('{"question": "1"}\n'.encode("utf-16"), r"expected UTF-8 in .*a\.jsonl, got byte 0xff in line 1"),
        (b"", r"data: expected at least one example, got none in .*a\.jsonl"),
        (b"\n \n", r"data: expected at least one example, got none in .*a\.jsonl"),
    ],
)
def test_files_that_are_no_text_or_empty(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(UsageError, match=message):
        read(tmp_path / "a.jsonl")


def test_a_line_separator_inside_a_text_ends_no_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes('{"question": "one\u2028two"}\r\n{"question": "3"}'.encode())
    assert [each.prompt for each in read(tmp_path / "a.jsonl")] == ["one\u2028two", "3"]


def test_a_line_of_ten_megabytes_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"question": "x" * 10_000_000, "answer": "1"}))
    assert len(read(tmp_path / "a.jsonl")[0].prompt) == 10_000_000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"question": "x"}', r"data: expected a list of JSON objects in .*a\.json, got dict"),
        (
            '{"question": "x"}\n{"question": "y"}',
            r"data: expected a list of JSON objects in .*\(one a line: call it \.jsonl\)",
        ),
        ('[{"question": "x"}, 3]', r"data: expected a JSON object in .*a\.json, object 2, got 3"),
        ("[]", r"data: expected at least one example, got none in .*a\.json"),
    ],
)
def test_json_that_is_no_list_of_objects(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UsageError, match=message):
        read(tmp_path / "a.json")


def test_parquet(tmp_path: Path) -> None:
    rows = [{"question": "1+1", "answer": 2}, {"question": "1/2", "answer": None}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert [each[:2] for each in read(tmp_path / "a.parquet")] == [("1+1", "2"), ("1/2", None)]
    with pytest.raises(
        UsageError, match=r"answer_field: expected a text or a number in 'answer' of .*a\.parquet, row 2, got None"
    ):
        read(tmp_path / "a.parquet", needs_gold=True)
    (tmp_path / "b.parquet").write_bytes(b"PAR1 but no more")
    with pytest.raises(UsageError, match=r"data: expected a readable Parquet file, got .*b\.parquet"):
        read(tmp_path / "b.parquet")


@pytest.mark.parametrize(("source", "package"), [("a.parquet", "pyarrow"), ("some/name", "datasets")])
def test_an_absent_package_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, package: str
) -> None:
    for name in (package, f"{package}.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        UsageError, match=rf"data: expected .*{package}.*, got none installed: {re.escape(how_to_install(package))}"
    ):
        read(source)


# --- Data sets


@pytest.fixture
def data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a directory that datasets loads, with the splits train and test; nothing is asked of a hub or cached outside."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    place = tmp_path / "set"
    place.mkdir()
    write(place / "train.jsonl", *({"question": f"{i}+{i}", "answer": str(2 * i)} for i in range(3)))
    write(place / "test.jsonl", {"question": "9+9", "answer": "#### 18"})
    return place


def test_a_data_set_and_its_splits(data_set: Path) -> None:
    assert [each[:2] for each in read(data_set)] == [("0+0", "0"), ("1+1", "2"), ("2+2", "4")]
    assert [each[:2] for each in read(f"{data_set}:test")] == [("9+9", "18")]
    assert [each.prompt for each in read(f"{data_set}:train[1:]")] == ["1+1", "2+2"]
    assert [each.prompt for each in read(f"{data_set}:default:train[:1]")] == ["0+0"]
    held_out = read("unused.jsonl", option="eval_data", eval_data=str(data_set), needs_gold=True)
    assert [each.prompt for each in held_out] == ["9+9"]


@pytest.mark.parametrize(
    ("suffix", "message"),
    [
        (":dev", r"data: expected a file, a directory or a data set on the hub, with a split 'dev', got .*set:dev: "),
        (":other:train", r"data: expected a file, .* got .*set:other:train: .*other"),
        (
            "-none",
            r"data: expected a file, a directory or a data set on the hub, with a split 'train', got .*set-none: ",
        ),
        (":", r"data: expected NAME, NAME:SPLIT or NAME:CONFIG:SPLIT, got .*set:'"),
        (":a:b:c", r"data: expected NAME, NAME:SPLIT or NAME:CONFIG:SPLIT, got .*set:a:b:c'"),
    ],
)
def test_a_data_set_that_is_not_there(data_set: Path, suffix: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read(f"{data_set}{suffix}")


# --- Fields and true answers


def test_fields_are_found_where_there_is_one_choice(tmp_path: Path, said: Any) -> None:
    file = write(tmp_path / "a.jsonl", {"problem": "x", "solution": r"So \boxed{\frac12}.", "level": 1})
    assert read(file, needs_gold=True) == [Example("x", r"\frac12")]
    assert said() == [
        f"prompt_field: problem, since {file} has no question",
        f"answer_field: solution, since {file} has no answer",
    ]


def test_the_usual_field_comes_first_and_in_silence(tmp_path: Path, said: Any) -> None:
    file = write(tmp_path / "a.jsonl", {"question": "x", "prompt": "y", "answer": "1", "solution": "2"})
    assert read(file, needs_gold=True) == [Example("x", "1")]
    assert said() == []


def test_nothing_is_guessed(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", {"prompt": "x", "problem": "y", "answer": "1"})
    with pytest.raises(
        UsageError, match=r"prompt_field: expected the name of a field of .*, which has prompt and problem, got"
    ):
        read(file)
    assert read(file, prompt_field="problem") == [Example("y", "1")]
    with pytest.raises(
        UsageError, match="prompt_field: expected one of the fields answer, problem, prompt of .*, got 'question'"
    ):
        read(file, prompt_field="question")  # asked for by name


def test_a_named_answer_field_must_be_somewhere(tmp_path: Path) -> None:
    bare = write(tmp_path / "bare.jsonl", {"question": "x"})
    with pytest.raises(UsageError, match="answer_field: expected one of the fields question of .*, got 'anwser'"):
        read(bare, answer_field="anwser")
    assert read(bare, answer_field="gold", eval_data="other.jsonl") == [Example("x", None)]  # held-out ones may have it


def test_an_empty_answer_is_refused_even_where_no_answer_is_needed(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", {"question": "x", "answer": ""})
    with pytest.raises(UsageError, match=r"answer_field: expected a text or a number in 'answer' of .*line 1, got ''"):
        read(file)


def test_a_solution_without_an_answer(tmp_path: Path, said: Any) -> None:
    file = write(tmp_path / "a.jsonl", {"question": "x", "answer": "a proof " * 100}, {"question": "y", "answer": "1"})
    assert [each.gold for each in read(file)] == [None, "1"]
    assert said() == ["data: 1 of 2 rows have no answer in 'answer' that can be read; label_accuracy leaves them out"]
    with pytest.raises(
        UsageError, match=r"answer_field: expected an answer, or a solution that ends in .*line 1, got 800 characters"
    ):
        read(file, needs_gold=True)


GOLD = {
    "gsm8k.jsonl": ["66", "1080", "1250000", "-4.0", "1.5", r"\boxed{42}", "14", "15"],
    "math.jsonl": ["1.5", r"2^{1/2}", r"(3, \pi/2)", r"[-2,2]", "0.25", "$10,000$", "C"],
    "math.json": [r"\frac32", r"\sqrt2", r"(3,\frac{\pi}{2})", r"-2 \le x \le 2", "25", "10000", "(C)"],
    "amc.json": ["48", "144", r"-\frac{9}{2}"],
    "aime.json": ["25", "64", "204.0", "0"],
}


@pytest.mark.parametrize("name", GOLD)
def test_true_answers_as_the_benchmarks_spell_them(name: str) -> None:
    golds = [each.gold for each in read(FIXTURES / name, needs_gold=True)]
    assert equal_to_gold(golds, golds, "math").eq(1).all()
    assert equal_to_gold(GOLD[name], golds, "math").eq(1).all()
    assert equal_to_gold([*GOLD[name][1:], "-1"], golds, "math").eq(0).all()
    assert_golds_score_in_a_box(golds)


def assert_golds_score_in_a_box(golds: list[Any]) -> None:
    """A response that gives the true answer in a box is right, and one that gives another's is not."""
    boxed = [extract_answer(f"So it is $\\boxed{{{gold}}}$.") for gold in golds]
    wrong = [
        pair
        for pair, right in zip(zip(golds, boxed, strict=True), equal_to_gold(boxed, golds, "math"), strict=True)
        if right != 1
    ]
    assert not wrong


@pytest.mark.parametrize(
    "name", ["gsm8k/train.jsonl", "gsm8k/test.jsonl", "math-ttt/math.json", "math-ttt/amc.json", "math-ttt/aime.json"]
)
def test_true_answers_of_the_benchmarks_themselves(name: str) -> None:
    if not (SHARED / name).exists():
        pytest.skip(f"{name} is not in ../shared/data")
    golds = [each.gold for each in read(SHARED / name, needs_gold=True)]
    assert (
        len(golds)
        == {"train.jsonl": 7473, "test.jsonl": 1319, "math.json": 500, "amc.json": 83, "aime.json": 30}[Path(name).name]
    )
    assert all(gold is not None and len(gold) <= 100 for gold in golds)
    assert_golds_score_in_a_box(golds)
    if "math.json" not in name:  # numbers, all of them: the same in another spelling
        assert all(answers_equal(gold, f"{float(gold.replace(',', ''))}") for gold in golds if gold)


# --- Tasks


def task_of(model: str, **options: Any) -> Any:
    return load_task(tiny.config(**{"model": model, "eval_data": None, "prompt_template": "{question}", **options}))


def test_gold_labels_need_some_answers_and_not_all(tmp_path: Path, model: str) -> None:
    rows = [{"question": "x"}, {"question": "y", "answer": "1"}]
    task = task_of(model, data=write(tmp_path / "some.jsonl", *rows), gold_labels=True)
    assert [each.gold for each in task.train] == [None, "1"]
    bare = write(tmp_path / "bare.jsonl", *rows[:1])
    with pytest.raises(
        UsageError, match=r"gold_labels: expected true answers for some of the prompts of .*bare\.jsonl, got none"
    ):
        task_of(model, data=bare, gold_labels=True)
    assert task_of(model, data=bare).train[0].gold is None


def test_gold_method_and_evaluation_need_answers(tmp_path: Path, model: str) -> None:
    bare, full = (
        write(tmp_path / "bare.jsonl", {"question": "x"}),
        write(tmp_path / "full.jsonl", {"question": "x", "answer": "1"}),
    )
    assert task_of(model, data=bare).train[0].gold is None
    for changes in ({"data": bare, "method": "gold"}, {"data": full, "eval_data": bare}):
        with pytest.raises(
            UsageError,
            match=r"answer_field: expected one of the fields question of .*bare\.jsonl, line 1, got 'answer'",
        ):
            task_of(model, **changes)


def test_prompts_that_stand_there_twice(tmp_path: Path, model: str, said: Any) -> None:
    rows = [("a b", "1"), ("a  b", "1"), ("a b", "2"), ("c", "3"), ("d", "4")]
    data = write(tmp_path / "a.jsonl", *({"question": q, "answer": a} for q, a in rows))
    held = write(tmp_path / "b.jsonl", *({"question": q, "answer": "1"} for q in ("c ", "e", "f")))
    task = task_of(model, data=data, eval_data=held)
    assert (len(task.train), len(task.held_out)) == (5, 3)  # nothing is taken out
    assert said() == [
        "data: 2 of 5 prompts repeat another, 1 with another answer; each counts as often as it stands there",
        "eval_data: 1 of 3 held-out prompts are trained on too: accuracy on them is no measure of new ones",
    ]


def test_answers_longer_than_a_response_or_the_context(tmp_path: Path, said: Any) -> None:
    make_byte_model(tmp_path / "model", context=64)
    file = write(
        tmp_path / "a.jsonl", *({"question": str(i), "answer": "1" * n} for i, n in enumerate((3, 12, 13, 40)))
    )
    task_of(str(tmp_path / "model"), data=file)  # the longest response is 12 tokens, here bytes
    assert said() == [
        "max_response_tokens: 2 of 4 different true answers are longer than 12 tokens: no response can give them"
    ]
    file = write(tmp_path / "a.jsonl", {"question": "x", "answer": "1" * 65})
    with pytest.raises(
        UsageError, match="answer_field: expected answers that fit a context of 64 tokens, got one of 65: '1+"
    ):
        task_of(str(tmp_path / "model"), data=file)


def test_a_prompt_longer_than_the_context(tmp_path: Path) -> None:
    make_byte_model(tmp_path / "model", context=64)
    for option in ("data", "eval_data"):
        sizes = {"data": 10, "eval_data": 10, option: 64}
        files = {
            name: write(tmp_path / f"{name}.jsonl", {"question": "x" * size, "answer": "1"})
            for name, size in sizes.items()
        }
        with pytest.raises(
            UsageError,
            match=rf"^{option}: expected prompts shorter than .* context of 64 tokens, .*, got one of 64: 'x+",
        ):
            task_of(str(tmp_path / "model"), **files)


def test_long_prompts_are_skipped_where_that_is_asked_for(tmp_path: Path, said: Any) -> None:
    make_byte_model(tmp_path / "model", context=64)
    file = write(tmp_path / "a.jsonl", *({"question": "x" * size} for size in (10, 52, 53, 64, 100)))
    options = {"model": str(tmp_path / "model"), "data": file, "long_prompts": "skip"}
    task = task_of(**options, max_response_tokens=12)
    assert [len(each.prompt) for each in task.train] == [10, 52]  # 52 + 12 is the context
    assert said() == ["data: 3 of 5 prompts skipped: longer than 52 tokens"]
    with pytest.raises(
        UsageError, match=r"max_response_tokens: expected at most 54, .* got 60, for which every prompt of data is too"
    ):
        task_of(**options, max_response_tokens=60)


def test_a_template_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "t.bin").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="prompt_template: expected a readable text file"):
        read_template(str(tmp_path / "t.bin"))


def test_template_is_a_text_or_a_file(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("Q: {question}\nA:")
    assert read_template(str(tmp_path / "t.txt")) == "Q: {question}\nA:"
    assert read_template(DEFAULT_TEMPLATE) == DEFAULT_TEMPLATE
    with pytest.raises(UsageError, match="prompt_template: expected a text, or a file that exists"):
        read_template("no placeholder")
    with pytest.raises(UsageError, match="prompt_template: expected a readable text file, got 'long "):
        read_template("long " * 1000)


def test_steps_go_through_the_data_epoch_by_epoch() -> None:
    drawn = [index for step in range(1, 8) for index in prompts_of_step(7, 3, step, seed=5)]
    epochs = [drawn[start : start + 7] for start in range(0, 21, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert drawn[:3] == prompts_of_step(7, 3, 1, seed=5)
    assert drawn != [index for step in range(1, 8) for index in prompts_of_step(7, 3, step, seed=6)]
    assert Counter(prompts_of_step(2, 5, 1, seed=0)).total() == 5  # more prompts than there are examples


@pytest.mark.parametrize(
    "text, gold",
    [
        ("a: 3, b: 4", "a: 3, b: 4"),
        ("Vitamin A: 5mg", "Vitamin A: 5mg"),
        ("A:B = 3:2", "A:B = 3:2"),
        ("A: (1,2), B: (3,4)", "A: (1,2), B: (3,4)"),
        ("the answer is 42", "the answer is 42"),
        ("7 + 11 = 18\n#### 18", "18"),
        ("#### Paris ", "Paris"),
        (r"so \boxed{\frac12}.", r"\frac12"),
        ("x" * 300, None),
        (" ", None),
    ],
)
def test_a_true_answer_is_no_response(text: str, gold: str | None) -> None:
    assert read_gold(text) == gold
    if gold is not None:
        assert_golds_score_in_a_box([gold])


def test_equal_to_gold_in_other_words() -> None:
    answers = ["7 apples", r"7 \text{ apples}", "7", "20%", "20", "0.2", "0.2", "7", "5", "9"]
    golds = ["7", "7", "7 apples", "20", r"20\%", r"20\%", "20", ("6", "7.0"), ("6", "7"), "8"]
    assert equal_to_gold(answers, golds, "math").tolist() == [1, 1, 1, 1, 1, 1, 0, 1, 0, 0]
    assert equal_to_gold(["7 apples", "7"], ["7", ("6", "7")], "exact").tolist() == [0, 1]


def test_equal_to_gold() -> None:
    got = equal_to_gold(["1/2", "3", None, "4"], ["0.5", "4", "1", None], "math").tolist()
    assert got[:3] == [1.0, 0.0, 0.0]
    assert math.isnan(got[3])


def asking(file: Path, **changes: Any) -> Config:
    return tiny.config(data=str(file), model="model", eval_every=0, **changes)


def test_a_second_wording(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "a.jsonl"
    write(
        file,
        {"question": "1+2", "answer": "3", "paraphrase": "2+1"},
        {"question": "4", "answer": "4", "paraphrase": "four"},
    )
    config = asking(file, method="self_harmony", prompt_template="<{question}>")
    (_, drafts), *_ = read_sources(config, "data", False)
    assert [(each.prompt, each.paraphrase.prompt, each.paraphrase.question) for each in drafts] == [
        ("<1+2>", "<2+1>", "2+1"),
        ("<4>", "<four>", "four"),
    ]
    (_, plain), *_ = read_sources(asking(file), "data", False)  # a method that asks once reads none
    assert [each.paraphrase for each in plain] == [None, None]
    write(file, {"question": "1+2", "rephrased_question": "2+1"})
    (_, drafts), *_ = read_sources(config, "data", False)
    assert drafts[0].paraphrase.question == "2+1"
    assert "paraphrase_field: rephrased_question" in caplog.text
    write(file, {"question": "1+2", "other": "2+1"})
    with pytest.raises(
        UsageError, match=r"paraphrase_field: expected one of the fields other, question of .*got 'paraphrase'"
    ):
        read_sources(config, "data", False)
    named = asking(file, method="co_rewarding_1", paraphrase_field="other")
    (_, drafts), *_ = read_sources(named, "data", False)
    assert drafts[0].paraphrase.question == "2+1"
    write(file, {"question": "1+2", "other": " "})
    with pytest.raises(UsageError, match="paraphrase_field: expected a text or a number in 'other'"):
        read_sources(named, "data", False)


def test_a_second_wording_has_to_fit_too() -> None:
    class Tokenizer:
        def __call__(self, texts: list[str]) -> dict[str, list[list[str]]]:
            return {"input_ids": [list(text) for text in texts]}

    long = Example("1", None, "x" * 30)
    config = tiny.config(long_prompts="skip", max_response_tokens=4)
    assert fitting("data", [Example("1", None, "one"), long], Tokenizer(), 20, config) == [Example("1", None, "one")]
    task = Task([long], [])
    with pytest.raises(UsageError, match="prompt of 30 tokens"):
        check_lengths(Tokenizer(), 20, task, 4)
    assert check_lengths(Tokenizer(), None, task, 4) == 30
