"""The forms that data have: conversations, nested fields, several true answers, CSV, gzip, mixtures, and templates that drop the question."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import tiny
from small_models import make_byte_model

from mgrpo_kernels.train.data.fields import gold_in, lookup, question_in
from mgrpo_kernels.train.data.files import Row, read_rows
from mgrpo_kernels.train.data.mixture import Source, mixed, parse_sources
from mgrpo_kernels.train.data.task import Draft, load_task, read_examples, wrapped_prompt
from mgrpo_kernels.train.errors import UsageError
from mgrpo_kernels.train.model.chat import Turn

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "What is 1+1?"}


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read(source: str, **options: Any) -> list[Any]:
    values = {"model": "m", "data": source, "eval_data": None, "prompt_template": "{question}", **options}
    return read_examples(tiny.config(**values), "data", False)


def row(**values: Any) -> Row:
    return Row("a.jsonl, line 1", values)


# --- Fields


def test_conversations() -> None:
    assert question_in(row(prompt=[SYSTEM, USER]), "prompt") == (
        Turn("system", "Be brief."),
        Turn("user", "What is 1+1?"),
    )
    parts = [{"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "1+1?"}]}]
    assert question_in(row(prompt=parts), "prompt") == (Turn("user", "What is 1+1?"),)
    assert question_in(row(prompt="1+1"), "prompt") == "1+1"


@pytest.mark.parametrize(
    "value, message",
    [
        ([], "prompt_field: expected messages that end with the user's in 'p' of a.jsonl, line 1, got none"),
        ([USER, {"role": "assistant", "content": "2"}], "got 2 messages, the last of assistant"),
        ([{"role": "king", "content": "x"}], "prompt_field: expected messages of the form"),
        ([{"role": "user", "content": [{"type": "image"}]}], "prompt_field: expected messages of the form"),
        ([{"role": "user", "content": " "}], "prompt_field: expected a text or a number"),
        ([{"role": "user"}], "prompt_field: expected messages of the form"),
    ],
)
def test_broken_conversations(value: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        question_in(row(p=value), "p")


def test_nested_fields(tmp_path: Path) -> None:
    values = {"prompt": [USER], "reward_model": {"ground_truth": "2", "style": "rule"}, "a.b": 1}
    assert lookup(values, "reward_model.ground_truth") == "2"
    assert lookup(values, "a.b") == 1
    assert lookup(values, "reward_model.no") is lookup(values, "prompt.x") is None
    (example,) = read(write(tmp_path / "a.jsonl", values), answer_field="reward_model.ground_truth")
    assert example[:2] == ("What is 1+1?", "2")
    with pytest.raises(
        UsageError,
        match="answer_field: expected one of the fields a.b, prompt, reward_model of .*line 1, got 'reward_model.no'",
    ):
        read(write(tmp_path / "a.jsonl", values), answer_field="reward_model.no")


def test_several_true_answers() -> None:
    assert gold_in(row(a=["1/2", "#### 0.5", 3, Decimal("2.50")]), "a") == ("1/2", "0.5", "3", "2.50")
    assert gold_in(row(a=["7"]), "a") == "7"
    assert gold_in(row(a=Decimal("0.5")), "a") == "0.5"
    assert gold_in(row(a=[]), "a") is None
    for broken in ([None], [True], Decimal("NaN"), {"x": 1}):
        with pytest.raises(UsageError, match="answer_field: expected a text or a number in 'a' of a.jsonl, line 1"):
            gold_in(row(a=broken), "a")


# --- Files


def test_csv(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text('question,answer\n"How many,\nin all?",42\n1+1,\n', encoding="utf-8-sig")
    assert [each[:2] for each in read(str(file))] == [("How many,\nin all?", "42"), ("1+1", None)]
    file.write_text("question,answer\n1+1,2,3\n")
    with pytest.raises(
        UsageError, match=r"data: expected 2 fields, as the first line names, in .*a\.csv, row 1, got 3"
    ):
        read(str(file))
    file.write_text('question\n"open')
    with pytest.raises(UsageError, match=r"data: expected a readable CSV file, got .*a\.csv"):
        read(str(file))


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv"])
def test_gzip(tmp_path: Path, ending: str) -> None:
    texts = {
        "jsonl": '{"question": "1+1", "answer": 2}\n',
        "json": '[{"question": "1+1", "answer": 2}]',
        "csv": "question,answer\n1+1,2\n",
    }
    file = tmp_path / f"a.{ending}.gz"
    file.write_bytes(gzip.compress(texts[ending].encode()))
    assert [each[:2] for each in read(str(file))] == [("1+1", "2")]
    file.write_bytes(b"no gzip")
    with pytest.raises(UsageError, match="data: expected a readable"):
        read_rows(str(file), "data")


# --- Mixtures


def test_sources_are_parsed(tmp_path: Path) -> None:
    assert parse_sources("a.jsonl@3, b.parquet@1.5", "data") == [Source("a.jsonl", 3.0), Source("b.parquet", 1.5)]
    assert parse_sources("org/name:train[:10,20],b", "data") == [
        Source("org/name:train[:10,20]", None),
        Source("b", None),
    ]
    file = tmp_path / "a,b@2"
    file.write_text("")
    assert parse_sources(str(file), "data") == [Source(str(file), None)]  # a file of this name
    for named, option, message in (
        ("a,,b", "data", "data: expected names with commas between"),
        ("a@0", "data", "data: expected names with commas between"),
        ("a@1,b", "data", "data: expected weights for all sources or for none"),
        ("a@1", "eval_data", "eval_data: expected no weights"),
    ):
        with pytest.raises(UsageError, match=message):
            parse_sources(named, option)


def test_a_mixture_has_its_weights() -> None:
    sources = [(3.0, list(range(10))), (1.0, list(range(100, 130)))]
    taken = mixed(sources, seed=1, shuffle=False, most=None)
    assert len(taken) == 40
    assert Counter(each < 100 for each in taken) == {True: 30, False: 10}
    assert set(Counter(taken[:30]).values()) == {3}  # the small source is repeated, each example as often
    assert taken == mixed(sources, seed=1, shuffle=False, most=None)
    assert taken != mixed(sources, seed=2, shuffle=False, most=None)


def test_shuffle_and_most() -> None:
    sources = [(None, list(range(10))), (None, list(range(10, 20)))]
    assert mixed(sources, seed=0, shuffle=False, most=None) == list(range(20))
    assert mixed(sources, seed=0, shuffle=False, most=3) == [0, 1, 2]
    first, second = (mixed(sources, seed=seed, shuffle=True, most=8) for seed in (0, 1))
    assert len(first) == len(set(first)) == 8
    assert first != second
    assert first != sorted(first)


def test_several_files_of_different_fields(tmp_path: Path) -> None:
    one = write(tmp_path / "a.jsonl", {"question": "1+1", "answer": 2})
    two = write(tmp_path / "b.jsonl", {"problem": "2+2", "solution": r"so \boxed{4}"})
    assert [each[:2] for each in read(f"{one},{two}")] == [("1+1", "2"), ("2+2", "4")]


# --- Chat templates


def chat_model(path: Path, template: str) -> str:
    make_byte_model(path, chat_template=template)
    return str(path)


TURNS = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
PARTS = "{% for m in messages %}{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{% endfor %}assistant:"


def test_conversations_reach_the_model(tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", {"prompt": [SYSTEM, USER], "answer": "2"})
    name = chat_model(tmp_path / "m", TURNS)
    options = {"model": name, "data": data, "eval_data": None}
    (example,) = load_task(tiny.config(**options, chat_template="on")).train
    assert example[:2] == ("system: Be brief.\nuser: What is 1+1?\nassistant:", "2")
    (example,) = load_task(tiny.config(**options, chat_template="on", prompt_template="{question} Box it.")).train
    assert example.prompt == "system: Be brief.\nuser: What is 1+1? Box it.\nassistant:"
    with pytest.raises(
        UsageError, match="chat_template: expected on for prompts of several messages, got off for one of system, user"
    ):
        load_task(tiny.config(**options, chat_template="off"))


def test_a_template_that_drops_the_question_is_refused(tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", {"question": "What is 1+1?", "answer": "2"})
    options = {"model": chat_model(tmp_path / "m", PARTS), "data": data, "eval_data": None, "chat_template": "on"}
    with pytest.raises(
        UsageError,
        match=r"chat_template: expected a template that keeps the question, got 'assistant:' for 'What is 1\+1\?'",
    ):
        load_task(tiny.config(**options))


def test_what_a_template_does_to_spaces_makes_no_difference() -> None:
    draft = Draft("a  b\n", None, (Turn("user", "a  b\n"),), "a  b\n")
    assert wrapped_prompt(lambda turns: f"user: {turns[0].content.strip()} ", draft) == "user: a  b "
