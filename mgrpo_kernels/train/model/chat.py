"""Prompts for a chat model: a user message in its tokenizer's chat template."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

from mgrpo_kernels.train.errors import UsageError
from mgrpo_kernels.train.model.policy import end_tokens


class Turn(NamedTuple):
    """A message of a conversation."""

    role: str
    content: str


def wrapper(model: str, tokenizer: Any, mode: str, log: Callable[..., None]) -> Callable[[str | Sequence[Turn]], str]:
    """Return a function from a text or a conversation to a prompt: by the chat template, or, of a single message, the text itself.

    Args:
        model: directory or Hugging Face Hub name of the model.
        tokenizer: tokenizer of the model.
        mode: on, off, or auto, which is on if the model ends a response with the template's end-of-turn token. Base models often have a
            template, but have never learnt to generate that token.
        log: called like a method of a logger, with the decision of auto and its reason.

    Raises:
        UsageError: the mode is on and there is no template, or the template fails.
    """
    if mode == "off" or (mode == "auto" and not tokenizer.chat_template):
        return _as_it_is
    if not tokenizer.chat_template:
        raise UsageError(
            f"chat_template: expected a tokenizer with a chat template, got {model}, whose tokenizer has none"
        )
    ends = ends_a_turn(tokenizer, end_tokens(model, tokenizer))
    if mode == "auto":
        why = f"because the model {'ends' if ends else 'does not end'} its responses with the template's end-of-turn token"
        log("chat_template: %s, %s", "on" if ends else "off", why)
        if not ends:
            return _as_it_is
    elif not ends:
        log("chat_template: the end-of-turn token does not end a response, so responses may reach the maximum length")
    # The template begins with the beginning-of-text token, and the tokenizer would add another one.
    twice = tokenizer.bos_token is not None and tokenizer("1")["input_ids"][:1] == [tokenizer.bos_token_id]
    begin = tokenizer.bos_token if twice else ""

    def wrap(prompt: str | Sequence[Turn]) -> str:
        turns = [Turn("user", prompt)] if isinstance(prompt, str) else prompt
        return render(tokenizer, [turn._asdict() for turn in turns], begin_answer=True).removeprefix(begin)

    return wrap


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


def render(tokenizer: Any, turns: list[dict[str, str]], *, begin_answer: bool) -> str:
    """Return a conversation as text; with `begin_answer`, it ends with the beginning of the assistant's message.

    Raises:
        UsageError: the template fails.
    """
    try:
        text: str = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=begin_answer)
    except Exception as error:  # a template is a program that may raise any error
        reason = f"{type(error).__name__}: {error}"
        raise UsageError(
            f"chat_template: expected a template that accepts a user message, got {reason}; use --chat-template off"
        ) from error
    return text


def ends_a_turn(tokenizer: Any, ends: Collection[int]) -> bool:
    """Return whether the template continues a response with one of the tokens `ends`."""
    response = "RESPONSE"
    turns = [{"role": "user", "content": "QUESTION"}, {"role": "assistant", "content": response}]
    behind = render(tokenizer, turns, begin_answer=False).rpartition(response)[2]
    return any(token in ends for token in tokenizer(behind, add_special_tokens=False)["input_ids"][:1])
