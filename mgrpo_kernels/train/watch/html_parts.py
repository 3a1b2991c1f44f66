"""Parts of a page in HTML, in which every text is escaped."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import Any

Row = Sequence[Any]


class Markup(str):
    """Text that is HTML already."""


def table(head: Row, rows: Iterable[Row], classes: Sequence[str] | None = None) -> str:
    """Return a table; `classes` are those of its rows."""

    def cells(tag: str, values: Row) -> str:
        def shown(value: Any) -> str:
            return value if isinstance(value, Markup) else html.escape(text_of(value))

        return "".join(f"<{tag}>{shown(value)}</{tag}>" for value in values)

    rows = list(rows)
    names = classes or [""] * len(rows)
    body = "".join(
        f'<tr class="{name}">{cells("td", row)}</tr>' if name else f"<tr>{cells('td', row)}</tr>"
        for name, row in zip(names, rows, strict=True)
    )
    top = f"<thead><tr>{cells('th', head)}</tr></thead>" if any(head) else ""
    return f'<div class="wide"><table>{top}<tbody>{body}</tbody></table></div>'


def paragraph(text: str) -> str:
    """Return a text as a paragraph."""
    return f"<p>{html.escape(text)}</p>"


def quoted(title: str, text: str) -> str:
    """Return a text of several lines as it stands, under a title."""
    return f'<div class="quoted"><span class="soft">{html.escape(title)}</span><pre>{html.escape(text)}</pre></div>'


def text_of(value: Any) -> str:
    """Return a value as the report shows it."""
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
