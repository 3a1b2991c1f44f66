"""Markdown pages as the tests see them: fenced blocks with the reason why one is not run, links, headings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
RUN = ("python", "bash")  # what these two hold is run; a transcript or a file's text stands in a block of another kind
SHOWN = ("", "text", "yaml", "json", "toml", "html", "diff")
NOT_RUN = re.compile(r"<!-- not run: (.+?) -->")
FENCE = re.compile(r"^(\s*)(```+|~~~+)\s*([\w-]*)")
LINK = re.compile(r"!?\[(?:[^\]\[]|\[[^\]]*\])*\]\(([^()\s]+)\)")


class Block(NamedTuple):
    """A fenced block."""

    line: int  # of its first line of text, from 1
    language: str
    text: str
    not_run: str | None  # why


def pages() -> list[Path]:
    """Return every page that a reader may come to."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path) -> list[Block]:
    """Return the fenced blocks of a page, in order."""
    found: list[Block] = []
    fence, indent, language, start, before = "", "", "", 0, ""
    lines = page.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, 1):
        match = FENCE.match(line)
        if not fence and match:
            indent, fence, language, start = match[1], match[2], match[3], number
        elif fence and line.strip() == fence:
            text = "\n".join(each.removeprefix(indent) for each in lines[start : number - 1])
            reason = NOT_RUN.fullmatch(before.strip())
            found.append(Block(start + 1, language, text, reason and reason[1]))
            fence, before = "", ""
        elif not fence and line.strip():
            before = line
    assert not fence, f"{page}, line {start}: a block without an end"
    return found


def prose(page: Path) -> str:
    """Return a page without its fenced blocks and code spans."""
    kept, fence = [], ""
    for line in page.read_text(encoding="utf-8").split("\n"):
        match = FENCE.match(line)
        if fence or match:
            fence = "" if fence and line.strip() == fence else fence or (match[2] if match else "")
            continue
        kept.append(line)
    return re.sub(r"(`+)(?:(?!\1).)+\1", "``", "\n".join(kept))


def anchors(page: Path) -> set[str]:
    """Return the names of a page's headings, as a link's part behind # has them."""
    text = page.read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.+?)\s*$", text, re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", each.lower())).strip("-") for each in headings}
