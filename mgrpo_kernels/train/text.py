"""Text from models, data files and servers, made safe to print."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

PRINTED = logging.getLogger("mgrpo_kernels.printed")
"""Receives every line that is printed; :class:`mgrpo_kernels.train.run.record.Record` writes them to log.txt."""
PRINTED.setLevel(logging.INFO)
PRINTED.propagate = False


def printable(text: object) -> str:
    """Return text in which every control character but a line feed is escaped, as are direction marks and lone surrogates.

    A terminal then shows what a model or a file contains and executes none of it.
    """
    return "".join(each if each.isprintable() or each == "\n" else _escaped(each) for each in str(text))


def one_line(text: str | None) -> str:
    """Return text as it can be shown in one line of a table: every control character becomes a space, and None "none"."""
    return "none" if text is None else "".join(each if each.isprintable() else " " for each in text)


def print_line(text: object, *, error: bool = False) -> None:
    """Print a line of printable text to standard output, or to standard error.

    A run does not end because nobody reads its output: where the stream cannot be written, a full disk or a closed pipe, the line is
    dropped, and so are all later ones.
    """
    PRINTED.info(printable(text))
    stream = sys.stderr if error else sys.stdout
    try:
        print(printable(text), file=stream, flush=True)
    except UnicodeEncodeError:  # a terminal without UTF-8
        print(printable(text).replace("±", "+/-").encode("ascii", "backslashreplace").decode(), file=stream, flush=True)
    except OSError:
        unread = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - it takes the stream's place until the process ends
        if error:
            sys.stderr = unread
        else:
            sys.stdout = unread


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()
