"""Prompts for a chat model: a user's turn in its tokenizer's chat template."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from mgrpo_kernels.train.errors import UsageError
from mgrpo_kernels.train.model.policy import end_tokens


def wrapper(model: str, tokenizer: Any, mode: str, log: Callable[..., None]) -> Callable[[str], str]:
    """Return what makes a prompt of a text: a user's turn in the chat template, or the text as it is.

    Args:
        model: directory or hub name.
        tokenizer: its tokenizer.
        mode: on, off, or auto: on where the model ends a response as the template ends a turn. A base model often comes with a template
            whose end of turn it has never learnt to give.
        log: gets what auto decides, and why, as a logger would.

    Raises:
        UsageError: on, and there is no template; or the template fails.
    """
    if mode == "off" or (mode == "auto" and not tokenizer.chat_template):
        return str
    if not tokenizer.chat_template:
        raise UsageError(
            f"chat_template: expected a tokenizer with a chat template, got that of {model}, which has none"
        )
    ends = ends_a_turn(tokenizer, end_tokens(model, tokenizer))
    if mode == "auto":
        why = f"since the model {'ends' if ends else 'does not end'} a response as its chat template ends a turn"
        log("chat_template: %s, %s", "on" if ends else "off", why)
        if not ends:
            return str
    elif not ends:
        log("chat_template: no end-of-sequence token ends a turn: responses may run on to the longest length")
    # From the template a prompt has its beginning of the text, before which the tokenizer would put another.
    twice = tokenizer.bos_token is not None and tokenizer("1")["input_ids"][:1] == [tokenizer.bos_token_id]
    begin = tokenizer.bos_token if twice else ""
    return lambda text: render(tokenizer, [{"role": "user", "content": text}], begin_answer=True).removeprefix(begin)


def render(tokenizer: Any, turns: list[dict[str, str]], *, begin_answer: bool) -> str:
    """Return a conversation as a text, with the beginning of the assistant's next turn where that is asked for.

    Raises:
        UsageError: the template fails.
    """
    try:
        text: str = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=begin_answer)
    except Exception as error:  # a template is a program, and may raise what it likes
        reason = f"{type(error).__name__}: {error}"
        raise UsageError(f"chat_template: expected a template that takes a user's turn, got {reason}") from error
    return text


def ends_a_turn(tokenizer: Any, ends: Collection[int]) -> bool:
    """Return whether what the template puts behind a response begins with one of the tokens `ends`."""
    response = "RESPONSE"
    turns = [{"role": "user", "content": "QUESTION"}, {"role": "assistant", "content": response}]
    behind = render(tokenizer, turns, begin_answer=False).rpartition(response)[2]
    return any(token in ends for token in tokenizer(behind, add_special_tokens=False)["input_ids"][:1])
