"""The figures in a page: which are filled in from results, which are typed and say so, and which are neither.

A page has a figure between two comments, which ``python docs/generate.py`` fills:

    <!-- figure: times ema foreach_lerp -->1.99<!-- /figure -->        within a line
    <!-- figure: measured linear_token_stats -->                       or a table, on lines of its own
    <!-- /figure -->

The first word is a function of figures.py, the others are its arguments. A number with a unit outside of these is an error, unless the
block that it is in has a comment before it that names the figure, or all of them, and says where it comes from:

    <!-- typed: 224 MiB, 512 MiB; defaults of the code -->
    <!-- typed: all; predictions by python tests/compiled.py --bounds -->
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping

SPAN = re.compile(r"<!-- figure: (.+?) -->(.*?)<!-- /figure -->", re.DOTALL)
TYPED = re.compile(r"^[ ]*<!-- typed: (.+?); (.+?) -->[ ]*$", re.MULTILINE)
NUMBER = r"(?<![\w.^-])(?:\d[\d,]*)?\.?\d+"
TIMES = r"ms|s|us|µs|ns|seconds?|minutes?|hours?|days?|(?:micro|milli|nano)seconds?"
UNITS = rf"(?:{TIMES}|[KMGT]i?B(?:/s)?|kB|[KMGT]?FLOPS?(?:/s)?|[GT]FLOP/s|g|times|%|percent|points|x(?!\s*\d)(?!\s[A-Z]\b))(?![\w/])"
# A number with its unit; or a share such as .98 or 0.98, which is how the pages write accuracies and small figures.
FIGURE = re.compile(
    rf"{NUMBER}\s?{UNITS}|(?<![\w.)\]/*])\.\d+(?!\w)|(?<![\w.])(?<!vLLM )(?<!OpenRLHF )0\.\d\d+(?!\.?\w)"
)
# A cell of a table with a number alone, or several: its unit is in the heading.
CELL = re.compile(r"(?<=\|)[ *]*(?=[^|]*[\d.]\d)(\d[\d.]*(?: ?[-/,(]+ ?[\d.]+\)?)*)[ *]*(?=\|)")


def value(words: str, figures: Mapping[str, Callable[..., str]]) -> str:
    """Return what belongs between the comments: words within a line, or a block of lines."""
    name, *arguments = shlex.split(words)
    if name not in figures:
        raise ValueError(f"figure: expected one of {', '.join(figures)}, got {name!r}")
    return figures[name](*arguments).strip()


def filled(text: str, figures: Mapping[str, Callable[..., str]]) -> str:
    """Return a page with all of its figures."""

    def fill(match: re.Match[str]) -> str:
        found = value(match[1], figures)
        if "\n" in match[2] + found:  # a block, with a blank line before and after
            return f"<!-- figure: {match[1]} -->\n\n{found}\n\n<!-- /figure -->"
        if not text[: match.start()].rpartition("\n")[2].strip():
            raise ValueError(
                f"figure: expected words before {match[1]!r} in its line: a comment there ends the paragraph"
            )
        return f"<!-- figure: {match[1]} -->{found}<!-- /figure -->"

    return SPAN.sub(fill, text)


def blank(text: str, pattern: str, flags: int = 0) -> str:
    """Return the text with what matches taken out, but for its line ends."""
    return re.sub(pattern, lambda match: "\n" * match[0].count("\n") or " ", text, flags=flags)


def typed(text: str) -> list[str]:
    """Return what is wrong with a page's typed figures: those without a mark, and marks that name what is not there."""
    text = blank(text, SPAN.pattern, re.DOTALL)
    text = blank(text, r"^(\s*)(```+|~~~+).*?^\s*\2\s*$", re.DOTALL | re.MULTILINE)
    text = blank(text, r"(`+)(?:(?!\1)[^\n])+\1")
    text = blank(text, r"\]\([^)\s]*\)")
    wrong, lines = [], text.split("\n")
    marks: dict[
        int, tuple[list[str], set[str]]
    ] = {}  # line -> figures that the mark before its block names, and those found
    allowed: tuple[list[str], set[str]] | None = None
    waiting = False  # for the block that a mark is of
    for number, written in enumerate(lines, 1):
        mark, line = TYPED.match(written), blank(written.replace("**", ""), r"<!--.*?-->")
        if mark:
            allowed = [each.strip() for each in mark[1].split(",")], set()
            marks[number], waiting = allowed, True
            continue
        if not line.strip():
            allowed = allowed if waiting else None
            continue
        waiting = False
        found = [match[0] for match in FIGURE.finditer(line)]
        if line.lstrip().startswith("|"):
            found += [match[1] for match in CELL.finditer(line)]
        for each in found:
            if allowed is not None:
                allowed[1].add(each)
            if allowed is None or (allowed[0] != ["all"] and each not in allowed[0]):
                wrong.append(f"line {number}: {each}")
    for number, (named, seen) in marks.items():
        unused = [each for each in named if each not in seen] if named != ["all"] else [] if seen else ["all"]
        wrong += [f"line {number}: the mark names {each}, which its block does not have" for each in unused]
    return wrong
