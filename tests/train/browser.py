"""A headless Chromium, and what a page does in it."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from absent import absent

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)


def missing() -> str | None:
    """Return what a test in the browser lacks here, or None."""
    if importlib.util.find_spec("playwright") is None:
        return "expected playwright, got none: pip install playwright"
    if not any(map(shutil.which, NAMES)):
        return f"expected a browser on the path ({', '.join(NAMES)}), got none: apt-get install chromium"
    return None


@contextmanager
def chromium() -> Iterator[Any]:
    """Start the browser. Where it is missing, CI fails, and a test elsewhere is skipped."""
    reason = missing()
    if reason is not None:
        absent(reason)
    from playwright.sync_api import sync_playwright

    path = next(filter(None, map(shutil.which, NAMES)))
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=list(FLAGS))
        yield browser
        browser.close()


class Seen:
    """A page in the browser: what it asked for, complained of, or popped up while it was loaded."""

    def __init__(self, browser: Any, file: Path, **options: Any) -> None:
        context = browser.new_context(**options)
        self.page = context.new_page()
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.complaints.append(f"dialog {dialog.message}"), dialog.dismiss()))
        self.page.goto(file.as_uri(), wait_until="load")

    @property
    def outside(self) -> list[str]:
        """What was asked for beside the file itself and what is written in it."""
        return [url for url in self.requests[1:] if not url.startswith("data:")]

    def texts(self, selector: str) -> list[str]:
        return self.page.locator(selector).all_inner_texts()

    def widths(self) -> list[int]:
        """Return the natural width of each image, 0 for one that did not decode."""
        return self.page.evaluate(
            "Promise.all([...document.images].map(i => i.decode().then(() => i.naturalWidth, () => 0)))"
        )
