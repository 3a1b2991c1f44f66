r"""The normal form of an answer: one spelling for characters, LaTeX commands and separators that mean the same.

The normal form is still a text. LaTeX's commands have become single characters where there is one (``\pi`` is π, ``\le`` is ≤,
``\{`` is ⦃), so that braces only group, and what makes no difference (delimiters, fonts, colours, spacing) is gone.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Any

from mgrpo_kernels.vote.units import CURRENCY_SIGNS

ROMAN = "\x01"
r"""Stands before a letter that was set upright by itself, as in ``\text{m}``: a unit, not a variable."""
SET_OPEN, SET_CLOSE = "⦃", "⦄"

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼⁽⁾ⁿⁱ", "0123456789+-=()ni")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉₊₋₌₍₎", "0123456789+-=()")
_CHARACTERS = str.maketrans(
    {
        **dict.fromkeys("−–‒‐‑﹣", "-"),
        **dict.fromkeys("×·∙⋅✕∗", "*"),
        **dict.fromkeys("’‘ʼ′", "'"),
        **dict.fromkeys("ºᵒ˚", "°"),
        "÷": "/",
        "⁄": "/",
        "∕": "/",
        "℃": "°C",
        "℉": "°F",
        "⋯": "…",
        "≦": "≤",
        "≧": "≥",
        "∼": "≈",
        "〈": "⟨",
        "〉": "⟩",
        "ϕ": "φ",
        "ϵ": "ε",
        "∧": " and ",
        "∨": " or ",
        "Ω": "Ω",
    }
)
_KEPT = set("…ℝℤℕℚℂ℮°ϕ")  # NFKC would make other texts of these

_GREEK_NAMES = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma tau upsilon phi chi psi omega"
).split()
_GREEK = dict(zip(_GREEK_NAMES, "αβγδεζηθικλμνξπρστυφχψω", strict=True))
_GREEK |= {name.capitalize(): letter.upper() for name, letter in _GREEK.items()}
_GREEK |= {"varepsilon": "ε", "vartheta": "θ", "varphi": "φ", "varrho": "ρ", "varsigma": "σ", "varpi": "π"}
_COMMANDS = {
    **_GREEK,
    **dict.fromkeys(("cdot", "times", "ast"), "*"),
    **dict.fromkeys(("le", "leq", "leqslant", "leqq"), "≤"),
    **dict.fromkeys(("ge", "geq", "geqslant", "geqq"), "≥"),
    **dict.fromkeys(("ne", "neq"), "≠"),
    **dict.fromkeys(("approx", "simeq", "doteq", "sim"), "≈"),
    **dict.fromkeys(("ldots", "dots", "cdots", "dotsc", "dotsb"), "…"),
    **dict.fromkeys(("emptyset", "varnothing"), "∅"),
    **dict.fromkeys(("lbrace",), SET_OPEN),
    **dict.fromkeys(("rbrace",), SET_CLOSE),
    **dict.fromkeys(("vert", "lvert", "rvert", "mid"), "|"),
    **dict.fromkeys(("land", "wedge"), " and "),
    **dict.fromkeys(("lor", "vee"), " or "),
    **dict.fromkeys(("quad", "qquad", "enspace", "thinspace"), " "),
    **dict.fromkeys(("degree", "textdegree", "circ"), "°"),
    **dict.fromkeys(("setminus", "backslash", "smallsetminus"), "∖"),
    **dict.fromkeys(("dollar", "dollars", "textdollar"), "$"),
    **dict.fromkeys(("left", "right", "big", "Big", "bigg", "Bigg", "bigl", "bigr", "Bigl", "Bigr", "middle"), ""),
    **dict.fromkeys(("displaystyle", "textstyle", "scriptstyle", "limits", "nolimits", "bf", "rm", "it", "checkmark"), ""),
    "div": "/", "lt": "<", "gt": ">", "infty": "∞", "pm": "±", "cup": "∪", "cap": "∩", "in": "∈", "R": "ℝ", "angle": "∠", "triangle": "△",
    "colon": ":", "lfloor": "⌊", "rfloor": "⌋", "lceil": "⌈", "rceil": "⌉", "prime": "'", "langle": "⟨", "rangle": "⟩", "euro": "€",
    "pounds": "£", "textbackslash": "∖", "percent": "%", "imath": "i", "lbrack": "[", "rbrack": "]", "euler": "e",
}  # fmt: skip
COMMAND_OF = {
    letter: f"\\{name} "
    for name, letter in {**_GREEK, "infty": "∞", "pm": "±", "cdot": "*", "le": "≤", "ge": "≥"}.items()
}
"""The LaTeX command of a character in normal form."""
_SETS = {"R": "ℝ", "Z": "ℤ", "N": "ℕ", "Q": "ℚ", "C": "ℂ"}

_UPRIGHT = "text|textrm|textup|mbox|mathrm|textnormal|operatorname\\*?|hbox|textsf|mathsf"
_STYLED = re.compile(
    rf"\\(?:(?P<upright>{_UPRIGHT})|textbf|textit|texttt|mathbf|mathit|boldsymbol|bm|emph|underline|uline|mathcal|boxed|fbox|textcolor"
    r"\s*\{[^{}]*\}|colorbox\s*\{[^{}]*\}|cancel)\s*\{(?P<content>[^{}]*)\}"
)
_DROPPED = re.compile(r"\\(?:color|hspace\*?|vspace\*?|phantom|hphantom|vphantom|label|tag\*?)\s*\{[^{}]*\}")
_COMMAND = re.compile(r"\\([A-Za-z]+)")
_DELIMITERS = re.compile(r"(\$\$?)([^$]*)\1|\\\((.*)\\\)|\\\[(.*)\\\]|`([^`]*)`", re.DOTALL)
_REWRITTEN: list[tuple[re.Pattern[str], Any]] = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"(?<=\d),\\!\s*(?=\d{3})|(?<=\d)\{,\}(?=\d{3})|(?<=\d)\\,(?=\d{3}(?!\d))", ""),  # thousands
        (r"(?<=\d)\{,\}(?=\d)", "."),  # a decimal comma
        (r"\{([:,=.])\}", r"\1"),
        (r"\\\\\s*$", ""),
        (r"\\(?:left|right|middle)\s*\.", ""),
        (r"\\mathbb\s*\{?\s*([RZNQC])\s*\}?", lambda match: _SETS[match[1]]),
        (r"\^\s*\{?\s*\\(?:circ(?![A-Za-z])|degree)\s*\}?", "°"),
        (r"\\[()\[\]]|\$\$|\$(?!\s*[\d.-])(?<![\d\s]\$)", " "),  # delimiters of formulas inside a text
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\not\s*=", "≠"),
        (r"\\not\s*\\in(?![a-z])", "∉"),
        (r"\\[lr]vert(?![A-Za-z])|\\\|", "|"),
        (r"\\\{", SET_OPEN),
        (r"\\\}", SET_CLOSE),
        (r"\\!|\\/", ""),
        (r"(?<!\\)\\[,;:> ]|~", " "),
        (r"\\([$%&#_])", r"\1"),
    ]
]
_AFTER: list[tuple[re.Pattern[str], Any]] = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"<=|=<", "≤"),
        (r">=", "≥"),
        (r"!=|=/=", "≠"),
        (r"\.\.\.+", "…"),
        (r"(?<=[\w)])\s*\*\*\s*(?=[\w({-])", "^"),
        (r"\\frac\s*([A-Za-z0-9π])", r"\\frac{\1}"),
        (r"(\\frac\s*\{[^{}]*\})\s*([A-Za-z0-9π])", r"\1{\2}"),
        (r"√\s*(\d+(?:\.\d+)?|[A-Za-zα-ω])", r"\\sqrt{\1}"),
        (r"√", r"\\sqrt"),
        (r"(?<=\d)\s*[xX]\s*(?=10\s*\^)", "*"),
        (
            r"(?<![\d.,'_])(\d{1,3})((?:'\d{3})+|(?:_\d{3})+)(?![\d'_])",
            lambda match: match[1] + re.sub(r"['_]", "", match[2]),
        ),
        (r"(?<![\d.,^_{])(\d{1,3})((?: \d{3})+)(?!\d|\s*/|[,.]\d)", lambda match: match[1] + match[2].replace(" ", "")),
        (r"(?<![\d.,^_{])(\d{1,3})((?: \d{3})+)(?=\.\d)", lambda match: match[1] + match[2].replace(" ", "")),
        (r"\s+", " "),
    ]
]


def normal_form(answer: str) -> str:
    """Return the normal form of an answer; its thousands separators stay, for what they are depends on the brackets around."""
    text = _plain_characters(without_delimiters(answer))
    for pattern, replacement in _REWRITTEN:
        text = pattern.sub(replacement, text)
    before = None
    while before != text:  # from the innermost braces outwards
        before = text
        text = _DROPPED.sub("", _STYLED.sub(_unstyled, text))
    text = _COMMAND.sub(lambda match: _spaced(_COMMANDS[match[1]]) if match[1] in _COMMANDS else match[0], text)
    for pattern, replacement in _AFTER:
        text = pattern.sub(replacement, text)
    return trimmed(text)


def without_delimiters(answer: str) -> str:
    """Return the answer without spaces, Markdown's emphasis and math delimiters around the whole, and without a full stop."""
    before = None
    while before != answer:
        before = answer
        answer = answer.strip()
        for mark in ("**", "__", '"'):
            if answer.startswith(mark) and answer.endswith(mark) and len(answer) > 2 * len(mark):
                answer = answer[len(mark) : -len(mark)]
        answer = answer.removeprefix("**").removesuffix("**").strip()
        if not answer.endswith((r"\right.", r"\left.")):
            answer = re.sub(r"(?<!\.)\.$", "", answer)
        if match := _DELIMITERS.fullmatch(answer):
            answer = next(group for group in match.groups()[1:] if group is not None)
    return answer


def trimmed(text: str) -> str:
    """Return the text without what does not count at its ends, and without braces around the whole."""
    before = None
    while before != text:
        before = text
        text = text.strip().strip("`").rstrip(",;:.").removesuffix("\\\\").strip()
        if text.startswith("{") and text.endswith("}") and _closes_at_the_end(text):
            text = text[1:-1]
    return text


def _closes_at_the_end(text: str) -> bool:
    depth = 0
    for index, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return index == len(text) - 1
    return False


def _plain_characters(text: str) -> str:
    if text.isascii():
        return text
    text = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼⁽⁾ⁿⁱ]+", lambda match: f"^{{{match[0].translate(_SUPERSCRIPTS)}}}", text)
    text = re.sub(r"[₀₁₂₃₄₅₆₇₈₉₊₋₌₍₎]+", lambda match: f"_{{{match[0].translate(_SUBSCRIPTS)}}}", text)
    return "".join(_plain_character(character) for character in text.translate(_CHARACTERS))


def _plain_character(character: str) -> str:
    if character.isascii() or character in _KEPT or character in CURRENCY_SIGNS:
        return character
    plain = unicodedata.normalize("NFKC", character)
    if unicodedata.category(character) == "No" and "⁄" in plain:  # ½ is 1/2, and 1½ is 1 1/2
        return f" {plain.replace('⁄', '/')}"
    return " " if plain.isspace() else plain.translate(_CHARACTERS)


def _unstyled(match: re.Match[str]) -> str:
    content = match["content"]
    if match["upright"] is None:
        return content
    letter = content.strip()
    if len(letter) == 1 and letter.isalpha():
        return f" {letter} " if letter in "ei" else f" {ROMAN}{letter} "
    return f" {content} " if content[:1].isalpha() or content[-1:].isalpha() else content


def _spaced(replacement: str) -> str:
    return f" {replacement} " if replacement.isalpha() and replacement.isascii() else replacement
