"""The annotated tree of CONTRIBUTING is the tree, and README's first example prints what README says."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HIDDEN = {".gitignore", ".pre-commit-config.yaml", "mkdocs.yml"}  # what a reader expects to find


def drawn():
    """Return directory -> names below it, for every directory that the drawing opens. The root is ''."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    block = re.search(r"### The tree\n\n```\n(.*?)```", text, re.DOTALL).group(1)
    children, stack = {}, [""]
    for line in block.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        # Names come first; two spaces and a word without dot or slash begin the description.
        names = []
        for word in line.split():
            if not re.fullmatch(r"[\w.\-/]+", word) or not (
                "." in word or "/" in word or word in ("LICENSE", "Makefile")
            ):
                break
            names.append(word)
        del stack[depth + 1 :]
        parent = stack[depth]
        children.setdefault(parent, set()).update(name.rstrip("/") for name in names)
        if len(names) == 1 and names[0].endswith("/"):
            stack.append(f"{parent}{names[0]}")
    return children


def test_the_tree():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    for directory, names in drawn().items():
        inside = [path.removeprefix(directory) for path in tracked if path and path.startswith(directory)]
        real = {path.split("/")[0] for path in inside}
        listed = {name.split("/")[0] for name in names}
        assert listed <= real, f"drawn, but not in {directory or 'the root'}: {sorted(listed - real)}"
        missing = real - listed - HIDDEN - {"py.typed", "__init__.py"}
        assert not missing, f"in {directory or 'the root'}, but not drawn: {sorted(missing)}"


def test_the_first_example_prints_what_stands_below_it():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    code, output = re.search(r"```python\n(.*?)```\n\n```text\n(.*?)```", text, re.DOTALL).groups()
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout == output


def test_the_first_screen_has_what_a_stranger_looks_for():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    first, *_ = text.partition("\n## ")
    assert first.count("\n") <= 50
    for word in ("**Why.**", "**Status.**", "pip install", "```python", "make train"):
        assert word in first


def test_the_description_on_a_package_index_has_no_relative_links():
    """A package index shows README without the other pages and figures: a relative link would be broken there."""
    command = [sys.executable, "setup.py", "--quiet", "--long-description"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert shown.startswith("# mgrpo_kernels")
    assert re.findall(r"\]\((?!https?:)[^)]*\)", shown) == []
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for alternative in re.findall(r"!\[([^\]]*)\]", readme):
        assert f"*Figure in the repository: {alternative}.*" in shown
    assert re.findall(r"```.*?```", shown, re.DOTALL) == re.findall(r"```.*?```", readme, re.DOTALL)
