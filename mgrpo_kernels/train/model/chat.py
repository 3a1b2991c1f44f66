"""Prompts for a chat model: a user message in its tokenizer's chat template."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from mgrpo_kernels.train.errors import UsageError
from mgrpo_kernels.train.model.policy import NO_KEYWORDS, end_tokens


class Turn(NamedTuple):
    """A message of a conversation."""

    role: str
    content: str


class Chat(NamedTuple):
    """How prompts become conversations."""

    system: str | None = None  # system message of conversations that have none
    arguments: Mapping[str, Any] = NO_KEYWORDS  # of the chat template
    loading: Mapping[str, Any] = NO_KEYWORDS  # keywords of from_pretrained


DEFAULT = Chat()


def wrapper(
    model: str, tokenizer: Any, mode: str, log: Callable[..., None], chat: Chat = DEFAULT
) -> Callable[[str | Sequence[Turn]], str]:
    """Return a function from a text or a conversation to a prompt: by the chat template, or, of a single message, the text itself.

    Args:
        model: directory or Hugging Face Hub name of the model.
        tokenizer: tokenizer of the model.
        mode: on, off, or auto, which is on if the model ends a response with the template's end-of-turn token. Base models often have a
            template, but have never learnt to generate that token.
        log: called like a method of a logger, with the decision of auto and its reason.
        chat: how prompts become conversations.

    Raises:
        UsageError: the mode is on and there is no template, the template fails, or an option of the template has no effect.
    """
    if mode == "off" or (mode == "auto" and not tokenizer.chat_template):
        return _without_template(chat, "is off" if mode == "off" else "does not exist for this model")
    if not tokenizer.chat_template:
        raise UsageError(
            f"chat_template: expected a tokenizer with a chat template, got {model}, whose tokenizer has none"
        )
    ends = ends_a_turn(tokenizer, end_tokens(model, tokenizer, chat.loading), chat.arguments)
    if mode == "auto":
        why = f"because the model {'ends' if ends else 'does not end'} its responses with the template's end-of-turn token"
        log("chat_template: %s, %s", "on" if ends else "off", why)
        if not ends:
            return _without_template(chat, "is off for this model")
    elif not ends:
        log("chat_template: the end-of-turn token does not end a response, so responses may reach the maximum length")
    for name in chat.arguments:
        if not re.search(rf"\b{re.escape(name)}\b", str(tokenizer.chat_template)):
            raise UsageError(
                f"chat_template_kwargs: expected names that the chat template of {model} reads, got {name!r}"
            )
    # The template begins with the beginning-of-text token, and the tokenizer would add another one.
    twice = tokenizer.bos_token is not None and tokenizer("1")["input_ids"][:1] == [tokenizer.bos_token_id]
    begin = tokenizer.bos_token if twice else ""

    def wrap(prompt: str | Sequence[Turn]) -> str:
        turns = [Turn("user", prompt)] if isinstance(prompt, str) else list(prompt)
        # The end-of-turn token follows the text as in the model's training, without the line break that ends a prompt template.
        turns[-1] = turns[-1]._replace(content=turns[-1].content.rstrip())
        if chat.system is not None and all(turn.role != "system" for turn in turns):
            turns.insert(0, Turn("system", chat.system))
        messages = [turn._asdict() for turn in turns]
        text = render(tokenizer, messages, chat.arguments, begin_answer=True).removeprefix(begin)
        if chat.system is not None and turns[0].content.strip() not in text:
            raise UsageError(
                f"system_prompt: expected a chat template that keeps the system message, got {text[:200]!r}"
            )
        return text

    return wrap


def _without_template(chat: Chat, why: str) -> Callable[[str | Sequence[Turn]], str]:
    """Return the function that takes a text as it is.

    Raises:
        UsageError: an option is set that only a chat template uses.
    """
    for name, value in (("system_prompt", chat.system), ("chat_template_kwargs", chat.arguments or None)):
        if value is not None:
            raise UsageError(
                f"{name}: expected a chat template, which {why}, got {value!r}; --prompt-template applies without one"
            )
    return _as_it_is


def _as_it_is(prompt: str | Sequence[Turn]) -> str:
    """Return a text without a chat template.

    Raises:
        UsageError: a conversation of several turns, which only a template makes a text of.
    """
    if isinstance(prompt, str):
        return prompt
    if len(prompt) > 1:
        roles = ", ".join(turn.role for turn in prompt)
        raise UsageError(f"chat_template: expected on for prompts of several messages, got off for one of {roles}")
    return prompt[0].content


def render(
    tokenizer: Any, turns: list[dict[str, str]], arguments: Mapping[str, Any] = NO_KEYWORDS, *, begin_answer: bool
) -> str:
    """Return a conversation as text; with `begin_answer`, it ends with the beginning of the assistant's message.

    Raises:
        UsageError: the template fails.
    """
    try:
        text: str = tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=begin_answer, **arguments
        )
    except Exception as error:  # a template is a program that may raise any error
        reason = f"{type(error).__name__}: {error}"
        roles = " and ".join(dict.fromkeys(turn["role"] for turn in turns))
        raise UsageError(
            f"chat_template: expected a template that accepts {roles} messages, got {reason}; use --chat-template off"
        ) from error
    return text


def ends_a_turn(tokenizer: Any, ends: Collection[int], arguments: Mapping[str, Any] = NO_KEYWORDS) -> bool:
    """Return whether the template continues a response with one of the tokens `ends`."""
    response = "RESPONSE"
    turns = [{"role": "user", "content": "QUESTION"}, {"role": "assistant", "content": response}]
    behind = render(tokenizer, turns, arguments, begin_answer=False).rpartition(response)[2]
    return any(token in ends for token in tokenizer(behind, add_special_tokens=False)["input_ids"][:1])
