"""The documentation is true: its examples run, its links lead somewhere, its tables are those of the code, its figures those of results.

Every `python` and `bash` block of README.md, CONTRIBUTING.md and docs/ is run, a page's blocks in order in one empty directory, unless the
line before it says why not: `<!-- not run: needs a GPU -->`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
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
from mgrpo_kernels.method import METHODS

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
                ["bash", "-euo", "pipefail", "-c", block.text],
                env=environment,
                timeout=LIMIT,
                check=False,
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, (
                f"{place}: status {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
            )


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_blocks_say_what_they_are(page: Path) -> None:
    for block in doc_pages.blocks(page):
        known = doc_pages.RUN + doc_pages.SHOWN
        assert block.language in known, (
            f"{name(page)}, line {block.line}: expected one of {known}, got {block.language!r}"
        )
        if block.not_run is not None:
            assert block.language in doc_pages.RUN, (
                f"{name(page)}, line {block.line}: a block that would not run anyway"
            )
        elif block.language == "bash":  # a test that installs something changes the environment of all others
            assert not installs(block), f"{name(page)}, line {block.line}: expected '<!-- not run: why -->'"


def installs(block: doc_pages.Block) -> bool:
    return (
        re.search(r"\b(pip|apt|apt-get|conda|uv)\b[^\n]* install\b|\bmake (setup|vllm|peers)", block.text) is not None
    )


def test_a_block_that_installs_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    commands = {"python -m pip install x": True, "make setup": True, "apt-get install y": True, "make test": False}
    page.write_text("".join(f"```bash\n{command}\n```\n" for command in commands))
    assert [installs(block) for block in doc_pages.blocks(page)] == list(commands.values())


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


@functools.cache
def tracked() -> set[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return set(listed.split())


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_named_files_exist(page: Path) -> None:
    missing = [
        each for each in sorted(doc_pages.named_files(page, tracked())) if not doc_pages.is_tracked(each, tracked())
    ]
    assert not missing, f"{name(page)}: expected files of the repository, got {missing}"


def test_a_file_that_is_gone_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "`tests/test_docs.py` `momentum.py` `tests/mutations/*.toml` `csrc/cpu/` `python docs/generate.py` `runs/mine` `NAME.py` vote_of.py\n"
        "`tests/gone.py` `tests/gone/*.toml` `_votes.py` `python docs/make.py` `csrc/gpu/`\n\n"
        "```bash\ncat > mine.py < a\npython mine.py\npython benchmarks/recorded.py\n```\n"
    )
    found = doc_pages.named_files(page, tracked())
    missing = {each for each in found if not doc_pages.is_tracked(each, tracked())}
    assert {
        "tests/test_docs.py",
        "momentum.py",
        "tests/mutations/*.toml",
        "csrc/cpu",
        "docs/generate.py",
    } == found - missing
    assert missing == {
        "tests/gone.py",
        "tests/gone/*.toml",
        "_votes.py",
        "docs/make.py",
        "csrc/gpu",
        "benchmarks/recorded.py",
    }


@pytest.fixture(scope="module")
def generate() -> Any:
    """docs/generate.py, which finds its neighbours as a script does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "docs"))
        yield generator()


def generator() -> Any:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_pages_are_those_of_the_code(generate: Any) -> None:
    for page, text in generate.pages().items():
        same = (ROOT / "docs" / page).read_text(encoding="utf-8") == text
        assert same, f"docs/{page} is not what the code says: run python docs/generate.py"


def test_figures_are_those_of_the_results(generate: Any) -> None:
    for page in generate.pages_with_figures():
        text = page.read_text(encoding="utf-8")
        same = generate.spans.filled(text, generate.FIGURES) == text
        assert same, f"{name(page)}: a figure is not that of the results: run python docs/generate.py"


def test_no_figure_is_typed_without_its_source(generate: Any) -> None:
    for page in generate.pages_with_figures():
        wrong = generate.spans.typed(page.read_text(encoding="utf-8"))
        assert not wrong, (
            f"{name(page)}: expected these from results, or marked with their source (docs/spans.py): {wrong}"
        )


def test_a_changed_figure_is_found(generate: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A digit changed by hand in any generated figure of any page makes the comparison above fail."""
    changed = 0
    for page in generate.pages_with_figures():
        text = wrong = page.read_text(encoding="utf-8")
        for span in generate.spans.SPAN.finditer(text):
            digits = [each.start() for each in re.finditer(r"\d", span[2])]
            if digits:
                at = span.start(2) + digits[-1]
                wrong = wrong[:at] + str(9 - int(wrong[at])) + wrong[at + 1 :]
                changed += 1
        assert generate.spans.filled(wrong, generate.FIGURES) == text
        if wrong != text:
            forged = tmp_path / page.name
            forged.write_text(wrong, encoding="utf-8")
    assert changed > 30
    monkeypatch.setattr(generate, "pages_with_figures", lambda: [forged])
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    with pytest.raises(AssertionError, match="is not that of the results"):
        test_figures_are_those_of_the_results(generate)


@pytest.mark.parametrize(
    "line",
    [
        "It takes 12 ms.", "It takes 1.5 s", "Some 20 minutes", "3.7 GB/s of 4", "812 TFLOP/s", "It holds 224 MiB.", "1.3x TRL's", "1.3 x as fast",
        "0.92 g", "51 times TRL's", "it is 83% of it", "up to 90 %", "It ends at .98.", "0.15 ms, and 0.38 in eager PyTorch", "between 2.7 and 3.1 g",
        "| ours | 12.4 |", "| ours | 8, 2078, 448 |", "| ours | 52 / 65 |", "- a list: 5 us", "missed by 11 points", "**1.21** times the sum",
    ],
)  # fmt: skip
def test_a_typed_figure_is_found(generate: Any, line: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for text in (
        f"# A page\n\n{line}\n",
        f"Before.\n{line}\nAfter.\n",
        f"<!-- typed: 7 MiB; a limit -->\n7 MiB\n\n{line}\n",
    ):
        assert generate.spans.typed(text), text
    page = tmp_path / "page.md"
    page.write_text(line)
    monkeypatch.setattr(generate, "pages_with_figures", lambda: [page])
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    with pytest.raises(AssertionError, match="expected these from results"):
        test_no_figure_is_typed_without_its_source(generate)


@pytest.mark.parametrize(
    "text",
    [
        "Python 3.11, torch 2.13, TRL 1.16.0",
        "512 x 151936 logits, 8 x 16 rollouts",
        "sm_90, float32, 2^20 elements, 1e-4",
        "over 9000 steps",
        "`--timeout 3 s` in code",
        "```text\n12 ms\n```",
        "| step | 1 |\n",
        "<!-- figure: machine -->12 ms<!-- /figure -->",
        "arXiv 2512.13070",
        "<!-- typed: 224 MiB, 3 s; limits of the code -->\nAt most 224 MiB,\nfor 3 s.",
        "<!-- typed: all; predicted -->\n\n| a | 12.4 |\n| b | 5 ms |",
        "[a page](of/12ms.md)",
        "vLLM 0.32 and OpenRLHF 0.11.2",
    ],
)
def test_what_is_no_typed_figure(generate: Any, text: str) -> None:
    assert generate.spans.typed(text) == []


def test_a_mark_is_of_its_block_and_of_what_it_names(generate: Any) -> None:
    typed = generate.spans.typed
    assert typed("<!-- typed: 3 s; a limit -->\n3 s and 4 s.\n") == ["line 2: 4 s"]
    assert typed("<!-- typed: all; a limit -->\n3 s\n\n4 s\n") == ["line 4: 4 s"]
    assert typed("<!-- typed: 3 s, 5 s; a limit -->\n3 s\n") == [
        "line 1: the mark names 5 s, which its block does not have"
    ]
    assert typed("<!-- typed: all; a limit -->\nNone.\n") == [
        "line 1: the mark names all, which its block does not have"
    ]
    assert typed("<!-- typed: 3 s -->\n3 s\n") == ["line 2: 3 s"]  # a mark without a source


def test_a_figure_that_would_break_its_paragraph_is_refused(generate: Any) -> None:
    with pytest.raises(ValueError, match="expected words before"):
        generate.spans.filled("Text\n<!-- figure: machine --><!-- /figure --> more", generate.FIGURES)
    with pytest.raises(ValueError, match="expected one of"):
        generate.spans.filled("Of <!-- figure: no-such-thing --><!-- /figure -->", generate.FIGURES)


def test_a_run_on_busy_cores_is_not_shown(generate: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    figures = sys.modules["figures"]
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    assert figures.times("ema", "eager") == figures.NO_RUN
    row = {
        "name": "bench_ema[eager]",
        "params": {"provider": "eager"},
        "extra_info": {"p50_ms": 3.0, "ratio_to_ours": 1.49},
    }
    for marks, refused in (
        ({"idle": True, "small": False}, False),
        ({"idle": False, "small": False}, True),
        ({"idle": True, "small": True}, True),
    ):
        (tmp_path / f"{figures.PUBLISHED}.json").write_text(json.dumps({**marks, "benchmarks": [row]}))
        if refused:
            with pytest.raises(ValueError, match="expected a run of full size on idle cores"):
                figures.times("ema", "eager")
        else:
            assert figures.times("ema", "eager") == "1.49"


def test_a_run_before_and_after_is_shown_as_recorded(
    generate: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    figures = sys.modules["figures"]
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    assert figures.before_after("trl", "TRL's times") == "These figures have not been recorded yet."
    recorded = {
        "environment": {"CPU": "a CPU", "torch": "2.13.0"},
        "times": {"step": 1.234},
        "table": "| a |\n|---|\n| 1 |",
    }
    (tmp_path / "trl-before-after.json").write_text(json.dumps(recorded))
    assert figures.before_after("trl", "TRL's times") == (
        "Measured on a CPU, torch 2.13.0:\n\n| a |\n|---|\n| 1 |\n\nTRL's times, as multiples of the patched run's time: step 1.23."
    )


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
