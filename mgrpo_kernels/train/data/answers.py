"""How a run reads answers from responses: where they stand, a pattern or function of the user's own, and their kind."""

from __future__ import annotations

import re
from collections.abc import Callable

from mgrpo_kernels.train.config.sections import DataConfig
from mgrpo_kernels.train.errors import UsageError
from mgrpo_kernels.train.functions import function_of
from mgrpo_kernels.train.parser import flag_of
from mgrpo_kernels.vote.extraction import extractor, is_number

Extractor = Callable[[str], str | None]


def make_extractor(options: DataConfig) -> Extractor:
    """Return the function that reads a response's answer.

    Raises:
        UsageError: a pattern that does not compile, a function that cannot be imported, or two of the options at once.
    """
    given = [name for name in ("answer_pattern", "answer_extractor") if getattr(options, name) is not None]
    if options.answer_from != "auto":
        given.append("answer_from")
    if len(given) > 1:
        raise UsageError(
            f"{given[0]}: expected one of --answer-from, --answer-pattern and --answer-extractor, got {' and '.join(map(flag_of, given))}"
        )
    find = extractor(options.answer_from)
    if options.answer_pattern is not None:
        find = _by_pattern(options.answer_pattern)
    elif options.answer_extractor is not None:
        find = _by_function(options.answer_extractor)
    return _numbers(find) if options.answer_kind == "number" else find


def describe_extractor(options: DataConfig) -> str:
    """Return how answers are read, for the start of a run."""
    how = {
        "auto": "the last box, <answer> tag, #### or answer phrase, or the value that ends the response",
        "boxed": "the last \\boxed{}",
        "phrase": "the last box, <answer> tag, #### or answer phrase",
        "last-number": "the last number of the response",
    }[options.answer_from]
    if options.answer_pattern is not None:
        how = f"the last match of {options.answer_pattern!r}"
    elif options.answer_extractor is not None:
        how = options.answer_extractor
    return how if options.answer_kind == "any" else f"{how}, if it is a number"


def _by_pattern(pattern: str) -> Extractor:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UsageError(
            f"answer_pattern: expected a regular expression of Python's, got {pattern!r}: {error}"
        ) from error
    if compiled.groups > 1:
        raise UsageError(
            f"answer_pattern: expected at most one group, which is the answer, got {compiled.groups} in {pattern!r}; (?:...) groups "
            "without being one"
        )

    def find(text: str) -> str | None:
        last = None
        for match in compiled.finditer(text):
            last = match[compiled.groups]
        return last.strip() or None if last is not None else None

    return find


def _by_function(name: str) -> Extractor:
    found = function_of("answer_extractor", name)

    def find(text: str) -> str | None:
        answer = found(text)
        if answer is not None and not isinstance(answer, str):
            raise UsageError(
                f"answer_extractor: expected {name} to return a string or None, got {type(answer).__name__}"
            )
        return answer

    return find


def _numbers(find: Extractor) -> Extractor:
    def find_number(text: str) -> str | None:
        answer = find(text)
        return answer if answer is not None and is_number(answer) else None

    return find_number
