r"""Finding the final answer that a response states.

In a vote a missing answer costs nothing, and a text that every response shares costs everything, so that what is no value is no answer:
headings, option lists, prose and placeholders give None.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Sequence

from mgrpo_kernels import checks
from mgrpo_kernels.vote.keys import canonical_key
from mgrpo_kernels.vote.normal import normal_form, without_delimiters
from mgrpo_kernels.vote.phrases import is_value, value_at_start, value_on_line, without_count, without_restatement
from mgrpo_kernels.vote.structure import join_thousands

_STOPS = re.compile(
    r"<\|(?:im_end|im_start|eot_id|endoftext|end|end_of_text|user|assistant|start_header_id|eom_id)\|>|</s>|<end_of_turn>"
    r"|<\uff5cend\u2581of\u2581sentence\uff5c>|\n(?:User|Human|### (?:Instruction|Question))\s*:"
)
_BRACES = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*\{|\\.|[{}]", re.DOTALL)
_BARE_BOX = re.compile(r"\\(?:boxed|fbox)\s+([^\s{}$](?:(?!\\[)\]]|[,;](?:\s|$))[^\s$])*)")  # \boxed 5
_TAG = re.compile(r"<answer>([^<]*)</answer>", re.IGNORECASE)
_PLACEHOLDER = re.compile(
    r"[\W_]*|(?:\\(?:text|mathrm|textbf)\{)?\s*[<\[(]?(?:your|the|my|insert|put|final|correct|numerical|numeric)?[\s_]*(?:final\s+)?(?:answer|"
    r"result|solution|value|number|response|expression)(?:\s+here)?[>\])]?\s*\}?|\\(?:square|ldots|dots|cdots|cdot|Box|quad)|xxx?|n/?a",
    re.IGNORECASE,
)
_HASHES = re.compile(r"(?<!#)####(?!#)")
_LABEL = (
    r"(?:ans(?:wer)?|answers|r\u00e9ponse|respuesta|antwort|risposta|resposta|odpowied\u017a|\u043e\u0442\u0432\u0435\u0442"
    r"|\u7b54\u6848|\u7b54|(?:final|end)\s+result|(?:correct|right|best)\s+(?:choice|option))"
)
_PHRASE = re.compile(
    rf"(?<![^\W_]){_LABEL}(?:\s+to\s+(?:the|this)\s+(?:question|problem))?[*_]{{0,3}}[^\S\n]{{0,4}}"
    r"(?:(?::|=|\uff1a)|(?:is|was|be|would\s+be|will\s+be|should\s+be|must\s+be|equals|comes\s+(?:out\s+)?to(?:\s+be)?)(?![\w'])[^\S\n]{0,4}:?)"
    r"|(?<!\w)(?:the|our|final)\s+(?:result|total|sum|value)[^\S\n]{1,4}is(?![\w'])[^\S\n]{0,4}:?"
    r"|(?:^|(?<=[?.!]\s)|(?<=\n))[*_ ]{0,4}A[*_]{0,2}[^\S\n]{0,4}:",
    re.IGNORECASE,
)
_LABELLED = re.compile(
    rf"^[ *_]{{0,4}}(?:the\s+)?(?:final\s+)?{_LABEL}[ *_]{{0,4}}(?:is|=|:)[ *_]{{0,4}}", re.IGNORECASE
)
_HEADING = re.compile(rf"(?:^|\n)[ #*_]{{1,9}}(?:the\s+)?(?:final\s+)?{_LABEL}[ *_:]{{0,6}}(?=\n)", re.IGNORECASE)
_REVERSED = re.compile(
    r"(?:^|(?<=[\s(]))([^\s]{1,80})\s+is\s+(?:the|our|my)\s+(?:\w+\s+)?(?:answer|result|choice|option)(?!\w)",
    re.IGNORECASE,
)
_OPTION_B = re.compile(r"(?:^|[\s,;])[Bb]\s*[:).]")
_FOLLOWS = re.compile(
    r"[*_]{0,3}\s{0,4}(?:(?:as\s+follows|below|given\s+(?:by|below)|the\s+following|in\s+the\s+(?:box|formula)|this|here)\s{0,4})?[:.*_]{0,4}\s*",
    re.IGNORECASE,
)
_DISPLAY = re.compile(r"\\\[(.*?)\\\]|\$\$(.*?)\$\$", re.DOTALL)
_HARNESS_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?|-?\$?\.\d+")
_LAST_SUM = re.compile(r".*=\s*(.{1,120})", re.DOTALL)

_MARKED = re.compile(rf"####|\\(?:boxed|fbox)|<answer>|(?<!\w){_LABEL}", re.IGNORECASE)

_LINE = re.compile(r"\S[^\n]*")

_MARKERS = 64
"""The last so many markers of a kind are looked at."""
_WINDOW = 400
"""Characters after a marker in which its value stands."""

SOURCES = ("auto", "boxed", "phrase", "last-number")
"""Where an answer may stand: :func:`extract_answer`'s order; boxes alone; boxes, #### and phrases; the last number of the text."""


def extract_answer(text: str) -> str | None:
    r"""Return the final answer that a response states, or None.

    In this order: the last ``\boxed{x}`` that is closed and says something (or one left open at the end); the last
    ``<answer>x</answer>``; the last ``#### x``; the last phrase such as ``A: x``, ``Answer: x`` or ``the answer is x``; the value that is
    the whole text, or that ends it after an equals sign. Hashes and phrases count only where a value follows, and it ends where the
    value ends: ``the answer is 42, since 6*7=42`` says ``42``.

    Args:
        text: one response.

    Raises:
        TypeError: no string.
    """
    return _extract(text, "auto")


def extractor(source: str) -> Callable[[str], str | None]:
    """Return :func:`extract_answer` for one of :data:`SOURCES`."""
    checks.check_choice("source", source, SOURCES)
    return extract_answer if source == "auto" else lambda text: _extract(text, source)


def is_number(answer: str) -> bool:
    r"""Return whether an answer is a number as such: ``122``, ``x = \frac34``, ``12 cm``; ``59+63`` only restates a question."""
    text = join_thousands(normal_form(without_count(answer)).rpartition("=")[2].strip())
    key = canonical_key(text)
    sum_or_product = re.search(r"(?<=[^\s(eE^{*-])\s*[+-]|\*(?!\s*10\s*\^)|[()!√±]|sqrt|\^(?!\s*\{?[+-]?\d+\}?)", text)
    return (
        key[0] == "number" and not sum_or_product and (text.count("^") == 0 or re.search(r"10\s*\^", text) is not None)
    )


def _extract(text: str, source: str) -> str | None:
    if not isinstance(text, str):
        raise TypeError(f"text: expected a string, got {type(text).__name__}")
    text = text.lstrip()
    if stop := _STOPS.search(text, 1):
        text = text[: stop.start()]
    if source == "last-number":
        return last_number(text)
    answer = last_box(text)
    if answer is None and source != "boxed":
        answer = _last_tag(text) or _after_hashes(text) or _after_phrase(text)
        if answer is None and source == "auto":
            answer = _whole_or_sum(text)
    return answer


def marked_answer(text: str) -> str | None:
    """Return the answer that an answer given as a sentence or a response marks: "The answer is 5", "#### 5", a box."""
    return _extract(text, "phrase") if _MARKED.search(text) else None


def answer_place(text: str, answer: str) -> tuple[int, int] | None:
    """Return where a response spells the answer that was found in it, as the slice of its characters; None for a blank answer.

    That is the first place behind the last marker that the answer follows, or else the last place of all. An answer that the text spells
    in another way, such as 1000 for 1,000, is the rest of the line behind the last marker, or the last line of a text without one.
    """
    stop = _STOPS.search(text, 1)
    text = text[: stop.start() if stop else None]
    answer = "".join(answer.split())
    if not answer:
        return None
    spelled = r"\s*".join(map(re.escape, answer))
    before, after = (r"(?<![^\W_])" if answer[0].isalnum() else ""), (r"(?![^\W_])" if answer[-1].isalnum() else "")
    literal = re.compile(before + spelled + after)
    markers = [each for each in _MARKED.finditer(text) if text[max(each.start() - 1, 0) : each.start()] != "/"][
        -_MARKERS:
    ]
    for marker in reversed(markers):
        if match := literal.search(text, marker.end(), marker.end() + _WINDOW):
            return match.span()
    if places := [match.span() for match in literal.finditer(text)]:
        return places[-1]
    behind = _LINE.finditer(text, markers[-1].end()) if markers else iter(())
    line = next((match for match in behind if any(map(str.isalnum, match[0]))), None)
    line = line or next(reversed(list(_LINE.finditer(text))), None)
    return None if line is None else line.span()


def last_box(text: str, *, open_too: bool = True) -> str | None:
    """Return what the last box holds that is closed and says something, else the open one at the end.

    One pass: a text of unclosed boxes costs no more.
    """
    open_braces: list[int | None] = []  # where a box's content starts; None for any other brace
    boxes: list[tuple[int, int]] = []  # (start, end) of its content
    for match in _BRACES.finditer(text):
        token = match[0]
        if token == "{":
            open_braces.append(None)
        elif token == "}":
            start = open_braces.pop() if open_braces else None
            if start is not None:
                boxes.append((start, match.start()))
        elif token.endswith("{") and len(token) > 2:
            open_braces.append(match.end())
    boxes += [match.span(1) for match in _BARE_BOX.finditer(text)]
    closed = _first(
        without_count(without_delimiters(text[start:end])) for start, end in sorted(boxes, reverse=True)[:_MARKERS]
    )
    if closed is not None or not open_too:
        return closed
    started = next((start for start in reversed(open_braces) if start is not None), None)
    if started is None or len(text) - started > _WINDOW:
        return None
    rest = without_delimiters(text[started:].split("\n", 1)[0].rstrip("$ "))
    return rest if rest and value_on_line(rest) == rest and not _PLACEHOLDER.fullmatch(rest) else None


def _first(answers: Iterable[str | None]) -> str | None:
    return next((answer for answer in answers if answer and not _PLACEHOLDER.fullmatch(answer[:80])), None)


def _last_tag(text: str) -> str | None:
    tags = [without_delimiters(match[1]) for match in _TAG.finditer(text)]
    return _first(tag if len(tag) <= _WINDOW else None for tag in reversed(tags[-_MARKERS:]))


def _after_hashes(text: str) -> str | None:
    """Return the value of the last #### that has one on its line: a heading has none."""
    spans = [match.span() for match in _HASHES.finditer(text)][-_MARKERS:] + [(len(text), len(text))]
    lines = [
        text[end : min(start, end + _WINDOW)].split("\n", 1)[0] for (_, end), (start, _) in itertools.pairwise(spans)
    ]
    return _first(value_on_line(_LABELLED.sub("", line, count=1)) for line in reversed(lines))


def _after_phrase(text: str) -> str | None:
    """Return the value of the last phrase that has one."""
    found: list[tuple[int, str]] = []
    for match in [*_PHRASE.finditer(text)][-_MARKERS:]:
        window = text[match.end() : match.end() + _WINDOW]
        letter = match[0].strip(" *_:\n").upper() == "A"
        if letter and _OPTION_B.search(window):
            continue  # a list of options
        if (answer := _value_after(window)) is not None:
            found.append((match.start(), answer))
    for marker, value in ((_HEADING, _below_heading), (_REVERSED, _before_verb)):
        matches = [*marker.finditer(text)][-_MARKERS:]
        found += [(match.start(), answer) for match in matches if (answer := value(match)) is not None]
    return _first(answer for _, answer in sorted(found, reverse=True))


def _below_heading(match: re.Match[str]) -> str | None:
    return _value_below(match.string[match.end() : match.end() + _WINDOW])


def _before_verb(match: re.Match[str]) -> str | None:
    return value_on_line(match[1].strip("*_,"))


def _value_after(window: str) -> str | None:
    """Return the value after a phrase: on its line, or below where the line says no more than "as follows"."""
    line, _, below = window.partition("\n")
    lead = _FOLLOWS.match(line)
    if lead is not None and lead.end() == len(line):
        return _value_below(below)
    if display := _DISPLAY.match(window.lstrip(" *_")):
        return value_on_line(next(group for group in display.groups() if group is not None))
    return value_at_start(line)


def _value_below(text: str) -> str | None:
    """Return the next line or display formula, if it is a value as a whole."""
    text = text.lstrip()
    if display := _DISPLAY.match(text):
        return value_on_line(next(group for group in display.groups() if group is not None))
    return value_on_line(text.split("\n", 1)[0])


def _whole_or_sum(text: str) -> str | None:
    """Return the value that is the whole text, or that ends it after an equals sign."""
    last = text.rstrip()[-_WINDOW:]
    if len(last) <= 80 and (answer := _bare(last)) is not None:
        return None if _PLACEHOLDER.fullmatch(answer) else answer
    line = last.rsplit("\n", 1)[-1]
    sentence = re.split(r"(?<=[^\d\s][.!?])\s|(?<=\d[.!?])\s", line.rstrip(" .!*$"))[-1]
    match = _LAST_SUM.fullmatch(sentence)
    return None if match is None else value_at_start(match[1], whole=True)


def _bare(text: str) -> str | None:
    """Return a text that is nothing but a value; a labelled one, "NASA: 5", is something else."""
    answer = without_delimiters(text)
    if re.match(r"[\w ]+:", answer) or re.match(r"\(?A\)?.*\(B\)", answer):  # "NASA: 5", "(A) 3 (B) 4"
        return None
    return without_restatement(answer) if is_value(answer) else value_on_line(text)


def last_number(text: str) -> str | None:
    """Return the last number of a text, as the "flexible extract" of the GSM8K harnesses does."""
    last = None
    for match in _HARNESS_NUMBER.finditer(text):
        last = match[0]
    return last if last is None else last.replace("$", "").rstrip(",")


def closed_answer(extract: Callable[[str], str | None], text: str) -> str | None:
    """Return the answer of a response that was cut at the length limit: None if it might have gone on.

    An answer that another digit at the end would change reaches the last character: of "the answer is 262", cut before the second digit,
    "2" is left.

    Args:
        extract: any function that finds an answer in a text.
        text: the cut response.
    """
    answer = extract(text)
    return answer if answer is not None and extract(f"{text}7") == answer else None


def read_answers(
    extract: Callable[[str], str | None], texts: Sequence[str], finished: Sequence[bool]
) -> list[str | None]:
    """Return each response's answer; one that was cut at the length limit has none that the cut may have shortened."""
    return [extract(text) if done else closed_answer(extract, text) for text, done in zip(texts, finished, strict=True)]
