"""Values in prose: where an answer that follows "the answer is" ends."""

from __future__ import annotations

import re
from typing import Any

from mgrpo_kernels.vote.keys import canonical_key, key_of, read_part
from mgrpo_kernels.vote.normal import normal_form, without_delimiters

_FILLERS = re.compile(
    r"(?:[*_]{1,3}|:|therefore|thus|hence|indeed|simply|just|now|then|clearly|exactly|equal\s+to|equals|given\s+by|also|still|the\s+number|"
    r"option(?=\s)|choice(?=\s)|found\s+to\s+be|U\.S\.(?=\s*\\?\$)|,|=(?!=))\s*",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"(?<!\\)[.!?](?=\s|[*_]{1,3}(?:\s|$)|$)(?<!U\.S\.)")
_CHOICE = re.compile(r"[(\[]([A-Ja-j])[)\]](?![\w(])|([B-HJ])(?=[\s.,;:!?)*]|$)|(A|I)(?=[.,;:!?)*]|\s*$)")
_FORMULA = re.compile(r"(\$\$?)(?=\S)([^$]+)\1|\\\((.*?)\\\)|\\\[(.*?)\\\]|\*\*([^*]+)\*\*|`([^`]+)`")
_WORD_END = re.compile(r"\s+|(?=,\s)|(?=\s*\()|(?=;)")
_CHANGES = re.compile(
    r"\s*(?:(?:january|february|march|april|may|june|july|august|september|october|november|december|jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec|"
    r"a\.?m\.?|p\.?m\.?|noon|midnight|o'clock|bce?|ad|ce|remainder|r|mod|modulo|to|by|per|over|minus|plus|times|x|out\s+of|or\s+more|or\s+less|"
    r"base|in\s+base|west|east|north|south|and\s+a\s+half)(?![\w'])|(?!-\s[A-Za-z]{3,})[-+*/^=<>:%!_]|\\)",
    re.IGNORECASE,
)
_DASH = re.compile(r"\s[-\u2013\u2014]\s[A-Za-z]{3,}")  # 5 - see above
_COUNTS_AGAIN = re.compile(r"\s+[A-Za-z]+(?:\s[A-Za-z]+)?\s*(?:,|,?\s*and|&)\s*[\d$\\]")
_WORDS = re.compile(
    r"(?:yes|no|true|false|none|never|always|impossible|undefined|even|odd|infinity|infinite|no\s+(?:real\s+)?solutions?|does\s+not\s+exist|"
    r"dne|infinitely\s+many(?:\s+solutions)?|monday|tuesday|wednesday|thursday|friday|saturday|sunday|january|february|march|april|may|june|july|"
    r"august|september|october|november|december)(?![\w'])",
    re.IGNORECASE,
)
_NAME = re.compile(r"[A-Z][A-Za-z'-]*(?:\s[A-Z][A-Za-z'-]*){0,2}")
_NO_NAME = re.compile(
    r"(?:A|An|The|We|I|It|Let|Let's|Since|If|As|To|So|Thus|Hence|Therefore|First|Second|Next|Then|Now|Step|Solution|Conclusion|Answer|Final|"
    r"Correct|Incorrect|Wrong|Right|Clear|Clearly|Obvious|Below|Above|Following|Follows|See|Note|This|That|These|There|Here|Given|Using|By|In|On|"
    r"For|From|With|Not|Your|My|Our|Simply|Please|Question|Problem|Explanation|Check|Verify|Done|Found|Unknown|Machine|Both|All|Calculate|Compute|"
    r"What|Which|How|Why|Result|Ok|Okay|Sure|Yes)(?![\w'])"
)
_COUNTED = re.compile(
    r"(?P<value>.*?[\d})$])\s*(?:\\(?:text|textrm|mathrm|mbox)\s*\{\s*(?P<words>[a-z]{3,}(?: [a-z]+){0,2})\s*\}"
    r"|(?P<plain>(?<=\s)[a-z]{3,}(?: [a-z]+){0,2}))",
    re.DOTALL,
)
_LATEX_WORDS = re.compile(r"\\(?:text|textbf|textrm|mbox|mathrm)\s*\{[^{}]+\}")
_MAX_CUTS = 12
_NO_VALUES = ("text", "relation")


def is_value(text: str) -> bool:
    """Return whether a text is a value through and through: a number, formula, list or the like, and no word in it."""
    part = read_part(normal_form(text)) if text else None
    return part is not None and not _has_text(key_of(part))


def _has_text(key: Any) -> bool:
    return isinstance(key, tuple) and bool(key) and (key[0] in _NO_VALUES or any(_has_text(each) for each in key))


def value_on_line(line: str) -> str | None:
    """Return the value that a line consists of, or starts with where only words without a meaning of their own follow."""
    return value_at_start(line, whole=True)


def value_at_start(line: str, *, whole: bool = False) -> str | None:
    """Return the value at the start of a line, up to its end, or None where no value starts there.

    Args:
        line: what follows a marker, on one line.
        whole: the value must be all of the line, but for a unit or what is counted: "7 apples", not "7 is what we add".
    """
    rest = line.strip()
    while (filler := _FILLERS.match(rest)) is not None:
        rest = rest[filler.end() :]
    if not rest:
        return None
    end = _SENTENCE_END.search(rest)
    sentence = rest if end is None else rest[: end.start()]
    if end is not None and end[0] == "!" and rest[end.end() : end.end() + 1] == ".":
        sentence += "!"
    sentence = without_delimiters(sentence.rstrip(",;: "))
    if whole and end is not None and rest[end.end() :].strip(" *_$.!"):
        return None
    return _choice(rest, whole) or _longest(sentence, whole) or _words(sentence)


def _choice(rest: str, whole: bool) -> str | None:
    match = _CHOICE.match(rest)
    if match is None:
        return None
    after = rest[match.end() :]
    if (match[2] or match[3]) and re.match(r"\s*[=<>:+*/^-]", after) and not re.match(r"\s*:\s*\S", after):
        return None  # C = 5
    if whole and len(after.strip(" .*_)$\\")) > 40:
        return None
    if re.match(r"\s*,\s*[(\d]|\s*[,;]?\s*(?:and|or)\s", after):
        return None
    return match[1] or match[2] or match[3]


def _longest(sentence: str, whole: bool) -> str | None:
    """Return the longest start of a sentence that is a value."""
    if len(sentence) <= 200 and is_value(sentence):
        return without_restatement(sentence)
    if formula := _FORMULA.match(sentence):
        inner = without_delimiters(next(group for group in formula.groups()[1:] if group is not None))
        if is_value(inner) or ("\\" in inner and len(inner) <= 200):
            longer = _cut(sentence, whole, shortest=formula.end())
            return longer or inner
    return _cut(sentence, whole)


def _cut(sentence: str, whole: bool, shortest: int = 0) -> str | None:
    """Return the longest value that ends where a word does; None where what follows would change its meaning."""
    cuts = [match.start() for match in _WORD_END.finditer(sentence[:200]) if match.start() > shortest][:_MAX_CUTS]
    for cut in reversed(cuts):
        value, rest = without_delimiters(sentence[:cut].rstrip(",;: ")), sentence[cut:]
        if not value or not is_value(value) or re.fullmatch(r"[A-Za-z]{1,2}", value) or _DASH.search(value):
            continue
        if _COUNTS_AGAIN.match(rest):  # 3 apples and 4 oranges
            return sentence if len(sentence.split()) <= 8 else None
        if _CHANGES.match(rest):
            return sentence if len(sentence.split()) <= 4 else None
        if whole and not re.fullmatch(
            r"(?:\s*\([^()]*\)|\s+[a-z][a-z'-]*){0,3}[\s*_$]*|\s*\\\(.*\\\)|\s*####\s*", rest
        ):
            return None
        return without_restatement(value)
    return None


def without_restatement(value: str) -> str:
    """Return a value without what says the same: "3.5 hours" of "3.5 hours, or 210 minutes", "122" of "59 + 63 = 122"."""
    sides = [side.strip() for side in value.split("=")]
    if len(sides) > 1 and re.search(r"\d", sides[0]) and canonical_key(value) == canonical_key(sides[-1]):
        return sides[-1]
    first, _, second = value.partition(", or ")
    if (
        second
        and re.search(r"[A-Za-z]", first)
        and re.search(r"[A-Za-z]", second)
        and "=" not in value
        and is_value(first)
    ):
        return first
    return value


def _words(sentence: str) -> str | None:
    r"""Return an answer in words: yes, no, Monday, a name, or ``\text{a phrase}`` in LaTeX."""
    if len(sentence) <= 80 and _LATEX_WORDS.fullmatch(sentence):
        return sentence
    if (match := _WORDS.match(sentence)) and len(sentence.split()) <= 4:
        return match[0]
    if _NAME.fullmatch(sentence) and not _NO_NAME.match(sentence):
        return sentence
    return None


def without_count(answer: str) -> str:
    r"""Return the number of ``7 \text{ apples}``: what is counted stands in the question. Other answers stay as they are."""
    match = _COUNTED.fullmatch(answer) if len(answer) <= 120 else None
    if (
        match is None
        or _CHANGES.match(match["words"] or match["plain"])
        or is_value(answer)
        or not is_value(match["value"])
    ):
        return answer
    return match["value"]
