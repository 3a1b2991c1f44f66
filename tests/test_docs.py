"""The documentation is true: its examples run, its links lead somewhere, its tables are those of the code.

Every `python` and `bash` block of README.md, CONTRIBUTING.md and docs/ is run, a page's blocks in order in one empty directory, unless the
line before it says why not: `<!-- not run: needs a GPU -->`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import doc_pages
import pytest
import torch
import yaml
from doc_pages import ROOT

import mgrpo_kernels
from mgrpo_kernels.train.labels import METHODS

PAGES = doc_pages.pages()
LIMIT = 300  # seconds for one block of commands, on a busy machine


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def runs(page: Path) -> bool:
    return any(block.language in doc_pages.RUN and block.not_run is None for block in doc_pages.blocks(page))


@pytest.mark.parametrize("page", [page for page in PAGES if runs(page)], ids=name)
def test_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "ignore",
        "OMP_NUM_THREADS": "1",
        "MPLCONFIGDIR": str(tmp_path / ".matplotlib"),
    }
    environment.pop("TRITON_INTERPRET", None)  # a reader has not set it
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in doc_pages.blocks(page):
        if block.language not in doc_pages.RUN or block.not_run is not None:
            continue
        place = f"{name(page)}, line {block.line}"
        if block.language == "python":
            torch.manual_seed(0)
            # A reader's file has the line numbers of the page, so that a traceback points there.
            code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
            with contextlib.redirect_stdout(None):
                exec(code, namespace)
        else:
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", block.text], env=environment, timeout=LIMIT, check=False,
                capture_output=True, text=True,
            )  # fmt: skip
            assert done.returncode == 0, (
                f"{place}: status {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
            )


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_blocks_say_what_they_are(page: Path) -> None:
    for block in doc_pages.blocks(page):
        known = doc_pages.RUN + doc_pages.SHOWN
        assert block.language in known, f"{name(page)}, line {block.line}: want one of {known}, got {block.language!r}"
        if block.not_run is not None:
            assert block.language in doc_pages.RUN, (
                f"{name(page)}, line {block.line}: a block that would not run anyway"
            )


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in doc_pages.LINK.findall(doc_pages.prose(page)):
        if re.match(r"[a-z]+:", target):
            continue  # the network is not asked
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{name(page)}: {target}"
        inside = (ROOT / "docs") in file.parents
        assert inside or (ROOT / "docs") not in page.parents, f"{name(page)}: {target} is no page of the built docs"
        if anchor:
            assert anchor in doc_pages.anchors(file), f"{name(page)}: {target}; there are {doc_pages.anchors(file)}"


def generator() -> Any:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_pages_are_those_of_the_code() -> None:
    for page, text in generator().pages().items():
        same = (ROOT / "docs" / page).read_text(encoding="utf-8") == text
        assert same, f"docs/{page} is not what the code says: run python docs/generate.py"


def test_every_page_is_in_the_navigation() -> None:
    def leaves(entry: Any) -> list[str]:
        parts = entry.values() if isinstance(entry, dict) else entry
        return [entry] if isinstance(entry, str) else [leaf for part in parts for leaf in leaves(part)]

    listed = leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    there = [page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")]
    assert sorted(listed) == sorted(there)


def test_every_public_name_has_its_page() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs" / "ops").glob("*.md")))
    missing = [each for each in mgrpo_kernels.__all__ if f"`{each}" not in text]
    assert not missing, f"not in docs/ops: {missing}"


def test_every_method_is_in_the_table() -> None:
    text = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
    assert sorted(listed) == sorted(METHODS)


def test_a_broken_page_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tests above rest on: a block that fails fails, a dead link is dead, a reason is read."""
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(
        "[gone](gone.md) `[no](link.md)`\n\n<!-- not run: a reason -->\n```bash\nfalse\n```\n\n```bash\nexit 3\n```\n"
    )
    skipped, failing = doc_pages.blocks(page)
    assert (skipped.not_run, failing.not_run, failing.line) == ("a reason", None, 9)
    with pytest.raises(AssertionError, match="status 3"):
        test_examples_run(page, tmp_path, monkeypatch)
    with pytest.raises(AssertionError, match=re.escape("gone.md")):
        test_links_lead_somewhere(page)
