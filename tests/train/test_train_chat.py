"""Chat templates: when one is used, and that a prompt begins and ends as the template has it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from small_models import make_byte_model
from transformers import AutoTokenizer

from mgrpo_kernels.train import __main__ as command
from mgrpo_kernels.train.data.task import load_task
from mgrpo_kernels.train.errors import UsageError
from mgrpo_kernels.train.model import policy as policy_module
from mgrpo_kernels.train.model.chat import Chat, Turn, wrapper
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
        (
            CHAT,
            "auto",
            "user: 1+1<end>\nassistant: ",
            ["chat_template: on, because the model ends its responses with the template's end-of-turn token"],
        ),
        (CHAT, "on", "user: 1+1<end>\nassistant: ", []),
        (CHAT, "off", "1+1", []),
        (
            BASE,
            "auto",
            "1+1",
            ["chat_template: off, because the model does not end its responses with the template's end-of-turn token"],
        ),
        (
            BASE,
            "on",
            "user: 1+1<turn>\nassistant: ",
            ["chat_template: the end-of-turn token does not end a response, so responses may reach the maximum length"],
        ),
        (None, "auto", "1+1", []),
        (None, "off", "1+1", []),
    ],
)
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


THINKING = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}<end>\n{% endfor %}{% if add_generation_prompt %}assistant: "
    "{% if enable_thinking is defined and not enable_thinking %}<no>{% endif %}{% endif %}"
)


def test_a_system_prompt_and_the_templates_own_arguments(tmp_path: Path) -> None:
    name, tokenizer = make(tmp_path, THINKING)
    wrap = wrapper(name, tokenizer, "on", ignore, Chat("Be brief.", {"enable_thinking": False}))
    assert wrap("1+1") == "system: Be brief.<end>\nuser: 1+1<end>\nassistant: <no>"
    turns = [Turn("system", "Of its own."), Turn("user", "1+1")]
    assert wrap(turns) == "system: Of its own.<end>\nuser: 1+1<end>\nassistant: <no>"
    with pytest.raises(
        UsageError,
        match="chat_template_kwargs: expected names that the chat template of .* reads, got 'enable_thinkin'",
    ):
        wrapper(name, tokenizer, "on", ignore, Chat(None, {"enable_thinkin": False}))


def test_no_line_break_stands_before_the_end_of_a_turn(tmp_path: Path) -> None:
    wrap = wrapper(*make(tmp_path, CHAT), "on", ignore)
    assert wrap("1+1\n") == "user: 1+1<end>\nassistant: "
    assert wrap([Turn("user", "a\n"), Turn("assistant", "b"), Turn("user", "1+1 \n\n")]).endswith(
        "user: 1+1<end>\nassistant: "
    )
    task = load_task(tiny.config(model=str(tmp_path), data=str(DATA), eval_data=None))  # with the default template
    assert "\\boxed{}.<end>" in task.train[0].prompt


@pytest.mark.parametrize("mode", ["off", "auto"])
@pytest.mark.parametrize(
    ("chat", "option"),
    [(("Be brief.",), "system_prompt"), ((None, {"enable_thinking": False}), "chat_template_kwargs")],
)
def test_options_of_a_template_that_is_not_used_are_refused(tmp_path: Path, mode: str, chat: Any, option: str) -> None:
    with pytest.raises(UsageError, match=f"{option}: expected a chat template, which is off"):
        wrapper(*make(tmp_path, BASE), mode, ignore, Chat(*chat))


def test_a_template_without_system_messages_is_refused(tmp_path: Path) -> None:
    template = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}<end>{% endif %}{% endfor %}"
    wrap = wrapper(*make(tmp_path, template), "on", ignore, Chat("Be brief."))
    with pytest.raises(UsageError, match="system_prompt: expected a chat template that keeps the system message"):
        wrap("1+1")


def test_the_options_reach_the_prompts(tmp_path: Path) -> None:
    make(tmp_path / "model", THINKING)
    (tmp_path / "system.txt").write_text("From a file.\n")
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"prompt": [{"role": "user", "content": "1+1"}], "answer": "2"}) + "\n")
    options = {
        "model": str(tmp_path / "model"),
        "data": str(data),
        "eval_data": None,
        "system_prompt": str(tmp_path / "system.txt"),
        "chat_template_kwargs": {"enable_thinking": False},
    }
    (example,) = load_task(tiny.config(**options)).train
    assert example.prompt == "system: From a file.<end>\nuser: 1+1<end>\nassistant: <no>"
    for wrong in ("{", "[1]"):
        with pytest.raises(UsageError, match="chat_template_kwargs: expected a JSON object like"):
            tiny.config(**{**options, "chat_template_kwargs": wrong})


def test_revision_and_trust_reach_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, CHAT)
    seen = []
    for name in ("AutoConfig", "AutoTokenizer", "AutoModelForCausalLM"):
        real = getattr(policy_module, name).from_pretrained
        monkeypatch.setattr(
            getattr(policy_module, name),
            "from_pretrained",
            lambda *a, real=real, **k: seen.append((k.get("revision"), k.get("trust_remote_code"))) or real(*a, **k),
        )
    chosen = tiny.config(model=str(tmp_path), data=str(DATA), eval_data=None, revision="v2", trust_remote_code=True)
    policy_module.read_tokenizer(str(tmp_path), chosen.model.loading)
    policy_module.load_policy(str(tmp_path), torch.device("cpu"), torch.float32, loading=chosen.model.loading)
    assert len(seen) >= 4
    assert set(seen) == {("v2", True)}
    assert tiny.config().model.loading == {"trust_remote_code": False}  # asked for, transformers would ask the user


def test_trusted_code_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "model", CHAT)
    flags = [
        "--model",
        str(tmp_path / "model"),
        "--data",
        str(DATA),
        "--max-response-tokens",
        "8",
        "--output",
        str(tmp_path / "run"),
    ]
    assert command.main([*flags, "--dry-run", "--trust-remote-code"]) == 0
    assert (
        f"warning: --trust-remote-code runs the Python code that comes with {tmp_path / 'model'}"
        in capsys.readouterr().out
    )
    assert command.main([*flags, "--dry-run"]) == 0
    assert "trust-remote-code" not in capsys.readouterr().out
