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
FENCED = re.compile(r"^(\s*)(```+|~~~+).*?^\s*\2\s*$", re.DOTALL | re.MULTILINE)
SOURCE = re.compile(r"\.(py|sh|cpp|h|toml)$")
PLACEHOLDER = re.compile(r"\b[A-Z]{3,}\.|[<>]")
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


def named_files(page: Path, tracked: set[str]) -> set[str]:
    """Return the words in a page's code that name a file or folder of the repository: those below a folder of it, and all sources.

    `tracked` are the repository's files. What the page's own commands write is left out, and so are placeholders such as NAME.json and <device>.
    """
    text = page.read_text(encoding="utf-8")
    code = [block.text for block in blocks(page) if block.language in ("bash", "yaml", "toml")]
    code += [match[2] for match in re.finditer(r"(`+)((?:(?!\1)[^\n])+)\1", FENCED.sub("", text))]
    written = {match[1] for part in code for match in re.finditer(r"(?:>>?|--out) *([\w./-]+)", part)}
    folders = {path.partition("/")[0] for path in tracked if "/" in path}
    found = set()
    for word in re.findall(r"[\w.*/<>-]+", "\n".join(code)):
        name = word.rstrip(".")
        below = "/" in name and name.partition("/")[0] in folders
        if (below or SOURCE.search(name)) and not PLACEHOLDER.search(name) and name not in written:
            found.add(name.rstrip("/"))
    return found


def is_tracked(name: str, tracked: set[str]) -> bool:
    """Return True if a name, which may have leading folders left out or hold a *, is that of a file or folder."""
    pattern = re.escape(name).replace(r"\*", "[^/]*")
    return any(re.search(rf"(^|/){pattern}(/|$)", path) for path in tracked)


def anchors(page: Path) -> set[str]:
    """Return the names of a page's headings, as a link's part behind # has them."""
    text = page.read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.+?)\s*$", text, re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", each.lower())).strip("-") for each in headings}
