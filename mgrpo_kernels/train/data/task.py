r"""Prompts: the fields of a row, true answers, the prompt template, and which prompts a step gets.

A row has a question and, where it is known, the true answer: plain (MATH, AMC's ``144.0``, AIME's ``025``), or at the end of a
solution (GSM8K's ``#### 1,080``, MATH's ``\boxed{}``).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mgrpo_kernels import extract_answer
from mgrpo_kernels.method import ANSWER_FIELDS, read_gold
from mgrpo_kernels.train import parallel
from mgrpo_kernels.train.config import Config
from mgrpo_kernels.train.data.answers import make_extractor
from mgrpo_kernels.train.data.files import Row, read_rows, shown
from mgrpo_kernels.train.errors import UsageError
from mgrpo_kernels.train.model.chat import wrapper
from mgrpo_kernels.train.model.policy import read_tokenizer
from mgrpo_kernels.train.rng import generator_for
from mgrpo_kernels.train.text import printable
from mgrpo_kernels.vote import Equivalence

logger = logging.getLogger("mgrpo_kernels")

FIELDS = {"prompt_field": ("question", "prompt", "problem"), "answer_field": ANSWER_FIELDS}
"""What a field may be called where no option names it: the first where there is one, else the others, if it is one of them."""


class Example(NamedTuple):
    """One question."""

    prompt: str  # as the model sees it
    gold: str | None  # the true answer, where it is known


class Task(NamedTuple):
    """What is trained on, and how an answer is read and compared."""

    train: list[Example]
    held_out: list[Example]  # may be empty: no evaluation
    extract: Callable[[str], str | None] = extract_answer
    equivalence: Equivalence = "math"


def load_task(config: Config, *, training: bool = True) -> Task:
    """Return the task that the configuration names, the prompts to train on where `training`; what is odd about the data is logged.

    Raises:
        UsageError: unreadable data, broken row, missing field, no rows, a template without {question}, or a prompt or a true answer
            that is longer than the model's context.
    """
    assert config.model.model is not None
    train = read_examples(config, "data", config.method.row.needs_gold) if training else []
    held_out = [] if config.data.eval_data is None else read_examples(config, "eval_data", True)
    warn_of_repeats(train, held_out)
    tokenizer, context = read_tokenizer(config.model.model)
    check_answers([*train, *held_out], tokenizer, context, config.rollout.max_response_tokens)
    wrap = wrapper(config.model.model, tokenizer, config.data.chat_template, log_info)

    def prompts(option: str, examples: list[Example]) -> list[Example]:
        wrapped = [each._replace(prompt=wrap(each.prompt)) for each in examples]
        return fitting(option, wrapped, tokenizer, context, config)

    extract = make_extractor(config.data)
    return Task(prompts("data", train), prompts("eval_data", held_out), extract, config.method.equivalence)


# --- Examples


def read_examples(config: Config, option: str, needs_gold: bool) -> list[Example]:
    """Read what the option data or eval_data names.

    Raises:
        UsageError: names the file and the row.
    """
    source: str = getattr(config.data, option)
    template, rows = read_template(config.data.prompt_template), read_rows(source, option)
    prompt_field = find_field("prompt_field", config.data.prompt_field, rows, source, needed=True)
    # Training data may lack a field that is named for the held-out ones.
    needed = needs_gold or (config.data.answer_field is not None and config.data.eval_data is None)
    answer_field = find_field("answer_field", config.data.answer_field, rows, source, needed=needed)
    examples = []
    for row in rows:
        question, gold = _field(row, "prompt_field", prompt_field), None
        if needs_gold or row.values.get(answer_field) is not None:
            answer = _field(row, "answer_field", answer_field)
            gold = read_gold(answer)
            if needs_gold and gold is None:
                raise UsageError(
                    f"answer_field: expected an answer, or a solution that ends in \\boxed{{}} or ####, in {answer_field!r} "
                    f"of {row.location}, got {len(answer)} characters with neither: {shown(answer)}"
                )
        examples.append(Example(template.replace("{question}", question), gold))
    unread = sum(row.values.get(answer_field) is not None for row in rows) - sum(
        each.gold is not None for each in examples
    )
    if unread:
        log_info(
            "%s: %d of %d rows have no answer in %r that can be read; label_accuracy leaves them out",
            option, unread, len(rows), answer_field,
        )  # fmt: skip
    return examples


def find_field(option: str, given: str | None, rows: Sequence[Row], source: str, *, needed: bool) -> str:
    """Return the field that the option names; where it names none the usual one, or with a word in the log the only one like it.

    Raises:
        UsageError: it is needed, and not there; or more than one is like it.
    """
    usual, *others = FIELDS[option]
    names = set().union(*(row.values for row in rows))
    alike = [name for name in others if name in names]
    if given is None and usual not in names and alike:
        if len(alike) > 1:
            raise UsageError(
                f"{option}: expected the name of a field of {source}, which has {' and '.join(alike)}, got none"
            )
        log_info("%s: %s, since %s has no %s", option, alike[0], source, usual)
        return alike[0]
    name = usual if given is None else given
    if needed and name not in names:
        _field(rows[0], option, name)
    return name


def _field(row: Row, option: str, name: str) -> str:
    if name not in row.values:
        raise UsageError(
            f"{option}: expected one of the fields {', '.join(sorted(row.values)) or '(none)'} of {row.location}, got {name!r}"
        )
    value = row.values[name]
    fine = isinstance(value, (str, int, float)) and not isinstance(value, bool) and str(value).strip()
    if not fine or (isinstance(value, float) and not math.isfinite(value)):
        raise UsageError(f"{option}: expected a text or a number in {name!r} of {row.location}, got {shown(value)}")
    text = str(value)
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise UsageError(
            f"{option}: expected a text in {name!r} of {row.location}, got half a surrogate pair in {shown(text)}"
        )
    return text


def log_info(text: str, *values: object) -> None:
    """Log what the user should know, once however many ranks there are."""
    if parallel.is_first():
        logger.warning(text, *(printable(each) if isinstance(each, str) else each for each in values))


def read_template(text_or_file: str) -> str:
    """Return the template, read from a file where the argument names one.

    Raises:
        UsageError: no {question} in it.
    """
    try:  # a long text is a name too long for a file
        is_file = "{question}" not in text_or_file and "\n" not in text_or_file and Path(text_or_file).is_file()
        template = Path(text_or_file).read_text(encoding="utf-8") if is_file else text_or_file
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"prompt_template: expected a readable text file, got {shown(text_or_file)}: {error}"
        ) from error
    if "{question}" not in template:
        raise UsageError(
            f"prompt_template: expected a text, or a file that exists, with {{question}} in it, got {shown(template)}"
        )
    return template


def warn_of_repeats(train: Sequence[Example], held_out: Sequence[Example]) -> None:
    """Say in the log which prompts stand there twice, and which held-out ones are trained on: spaces make no difference."""

    def same(example: Example) -> str:
        return " ".join(example.prompt.split())

    for option, examples in (("data", train), ("eval_data", held_out)):
        different = {same(example) for example in examples}
        answers = {(same(example), example.gold) for example in examples}
        if len(different) < len(examples):
            log_info(
                "%s: %d of %d prompts repeat another, %d with another answer; each counts as often as it stands there",
                option, len(examples) - len(different), len(examples), len(answers) - len(different),
            )  # fmt: skip
    trained = {same(example) for example in train}
    seen = sum(same(example) in trained for example in held_out)
    if seen:
        log_info(
            "eval_data: %d of %d held-out prompts are trained on too: accuracy on them is no measure of new ones",
            seen,
            len(held_out),
        )


def fitting(option: str, examples: list[Example], tokenizer: Any, context: int | None, config: Config) -> list[Example]:
    """Return the examples without those whose prompt leaves too little of the context, where long_prompts is skip.

    Raises:
        UsageError: none is left; or, where it is stop, a prompt fills the context by itself. (The trainer looks at the others.)
    """
    if context is None:
        return examples
    skip = config.data.long_prompts == "skip"
    most = context - config.rollout.max_response_tokens if skip else context - 1  # tokens
    # Few tokenizers make more tokens than bytes, so most prompts need no count.
    doubtful = [index for index, each in enumerate(examples) if len(each.prompt.encode()) > most]
    lengths = {index: len(tokenizer(examples[index].prompt)["input_ids"]) for index in doubtful}
    long = {index for index, length in lengths.items() if length > most}
    if long and not skip:
        first = min(long)
        raise UsageError(
            f"{option}: expected prompts shorter than the model's context of {context} tokens, or --long-prompts skip, got one of "
            f"{lengths[first]}: {shown(examples[first].prompt)}"
        )
    if long and len(long) == len(examples):
        raise UsageError(
            f"max_response_tokens: expected at most {context - min(lengths.values())}, since a prompt and its response share a context of "
            f"{context}, got {config.rollout.max_response_tokens}, for which every prompt of {option} is too long"
        )
    if long:
        log_info("%s: %d of %d prompts skipped: longer than %d tokens", option, len(long), len(examples), most)
    return [each for index, each in enumerate(examples) if index not in long]


def check_answers(examples: Sequence[Example], tokenizer: Any, context: int | None, longest: int) -> None:
    """Raise UsageError for a true answer longer than the context; say in the log how many are longer than the longest response."""
    golds = list(dict.fromkeys(example.gold for example in examples if example.gold is not None))
    ids = tokenizer(golds, add_special_tokens=False)["input_ids"] if golds else []
    lengths = [len(each) for each in ids]
    for gold, length in zip(golds, lengths, strict=True):
        if context is not None and length > context:
            raise UsageError(
                f"answer_field: expected answers that fit a context of {context} tokens, got one of {length}: {shown(gold)}"
            )
    too_long = sum(length > longest for length in lengths)
    if too_long:
        log_info(
            "max_response_tokens: %d of %d different true answers are longer than %d tokens: no response can give them",
            too_long, len(golds), longest,
        )  # fmt: skip


# --- Steps


def prompts_of_step(size: int, per_step: int, step: int, seed: int) -> list[int]:
    """Return which of `size` examples step `step` (from 1) trains on: epoch after epoch, each in an order of its own."""
    order: dict[int, list[int]] = {}
    chosen = []
    for position in range((step - 1) * per_step, step * per_step):
        epoch, index = divmod(position, size)
        if epoch not in order:
            order[epoch] = torch.randperm(size, generator=generator_for(seed, "data", epoch)).tolist()
        chosen.append(order[epoch][index])
    return chosen


def check_lengths(tokenizer: Any, context: int | None, task: Task, max_response_tokens: int) -> int:
    """Return the tokens of the longest prompt.

    Raises:
        UsageError: an empty prompt, or one that leaves too little of the context for the longest response.
    """
    prompts = [example.prompt for example in (*task.train, *task.held_out)]
    tokens = tokenizer(prompts)["input_ids"]
    for prompt, ids in zip(prompts, tokens, strict=True):
        if not ids:
            raise UsageError(f"data: expected prompts of at least one token, got {prompt!r}")
        if context is not None and len(ids) + max_response_tokens > context:
            raise UsageError(
                f"max_response_tokens: expected at most {context - len(ids)}, since a prompt of {len(ids)} tokens and its response "
                f"share a context of {context}, got {max_response_tokens} (prompt {prompt[:40]!r} ...); --long-prompts skip leaves such "
                "prompts out"
            )
    return max(map(len, tokens))
