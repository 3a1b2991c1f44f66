"""Chat templates: when one is used, and that a prompt begins and ends as the template has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
from small_models import make_byte_model
from transformers import AutoTokenizer

from mgrpo_kernels.train.data.task import load_task
from mgrpo_kernels.train.errors import UsageError
from mgrpo_kernels.train.model.chat import wrapper
from mgrpo_kernels.train.model.policy import end_tokens

ENDS_WITH = "{%% for m in messages %%}{{ m.role }}: {{ m.content }}%s\n{%% endfor %%}{%% if add_generation_prompt %%}assistant: {%% endif %%}"
CHAT, BASE = ENDS_WITH % "<end>", ENDS_WITH % "<turn>"  # a base model has never learnt to give <turn>
DATA = Path(__file__).parent / "data" / "gsm8k.jsonl"


def ignore(*_: object) -> None:
    """Take no note."""


def make(place: Path, template: str | None, **options: Any) -> tuple[str, Any]:
    make_byte_model(place, chat_template=template, **options)
    return str(place), AutoTokenizer.from_pretrained(place)


@pytest.mark.parametrize(
    ("template", "mode", "prompt", "said"),
    [
        (CHAT, "auto", "user: 1+1<end>\nassistant: ", ["chat_template: on, because the model ends its responses with the template's end-of-turn token"]),
        (CHAT, "on", "user: 1+1<end>\nassistant: ", []),
        (CHAT, "off", "1+1", []),
        (BASE, "auto", "1+1", ["chat_template: off, because the model does not end its responses with the template's end-of-turn token"]),
        (
            BASE,
            "on",
            "user: 1+1<turn>\nassistant: ",
            ["chat_template: the end-of-turn token does not end a response, so responses may reach the maximum length"],
        ),
        (None, "auto", "1+1", []),
        (None, "off", "1+1", []),
    ],
)  # fmt: skip
def test_when_it_is_used(tmp_path: Path, template: str | None, mode: str, prompt: str, said: list[str]) -> None:
    lines: list[str] = []
    assert wrapper(*make(tmp_path, template), mode, lambda text, *values: lines.append(text % values))("1+1") == prompt
    assert lines == said


def test_the_generation_configuration_may_name_more_ends(tmp_path: Path) -> None:
    name, tokenizer = make(tmp_path, BASE)
    assert end_tokens(name, tokenizer) == [0]
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [0, 1]}')  # 1 is <turn>
    assert end_tokens(name, tokenizer) == [0, 1]
    assert wrapper(name, tokenizer, "auto", ignore)("1+1").startswith("user: ")
    (tmp_path / "generation_config.json").unlink()
    assert end_tokens(name, tokenizer) == [0]


def test_a_text_begins_once(tmp_path: Path) -> None:
    name, tokenizer = make(tmp_path, "<begin>" + CHAT, bos_token="<begin>")
    ids = tokenizer(wrapper(name, tokenizer, "on", ignore)("1+1"))["input_ids"]
    assert ids == tokenizer.apply_chat_template(
        [{"role": "user", "content": "1+1"}], add_generation_prompt=True, return_dict=False
    )
    assert ids.count(2) == 1


def test_on_without_a_template_or_with_a_broken_one(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match="chat_template: expected a tokenizer with a chat template, got .*, whose tokenizer has none"
    ):
        wrapper(*make(tmp_path / "none", None), "on", ignore)
    broken = "{{ raise_exception('expected a system turn') }}"
    with pytest.raises(
        UsageError,
        match="chat_template: expected a template that accepts .*, got TemplateError: expected a system turn",
    ):
        wrapper(*make(tmp_path / "broken", broken), "on", ignore)


def test_both_training_and_held_out_prompts_are_wrapped(tmp_path: Path) -> None:
    make(tmp_path, CHAT)
    options = {"model": str(tmp_path), "data": str(DATA), "eval_data": str(DATA), "prompt_template": "Q: {question}"}
    task = load_task(tiny.config(**options))
    for example in (task.train[0], task.held_out[-1]):
        assert example.prompt.startswith("user: Q: ")
        assert example.prompt.endswith("<end>\nassistant: ")
