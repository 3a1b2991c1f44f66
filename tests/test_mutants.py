"""The mutation check itself: what is killed, what survives, what is stale or broken; and that its own list is in order."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "scripts"))

import mutants  # noqa: E402
import mutants_copies  # noqa: E402

PRODUCT = """
def larger(a, b):
    return a if a > b else b

def size(values):
    return len(values)

def wait(seconds):
    return seconds
"""
TESTS = """
import os, time
import mgrpo_kernels

def test_larger():
    assert mgrpo_kernels.larger(1, 2) == 2

def test_size():
    assert mgrpo_kernels.size([0]) >= 0  # cannot fail

def test_wait():
    seconds = mgrpo_kernels.wait(0)
    if seconds < 0:
        os.abort()
    time.sleep(seconds)

def test_broken():
    assert False
"""


def entry(name: str, before: str, after: str, tests: str = "tests/test_product.py -k 'not broken'") -> str:
    values = {
        "name": name,
        "file": "mgrpo_kernels/__init__.py",
        "before": before,
        "after": after,
        "tests": tests,
        "why": "a test",
    }
    return "[[mutation]]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A small project with a package of the product's name, tests that see some faults, and one that always fails."""
    monkeypatch.setattr(mutants_copies, "PRELOADED", ())
    for name, text in {
        "mgrpo_kernels/__init__.py": PRODUCT,
        "tests/test_product.py": TESTS,
        ".gitignore": "build/\n__pycache__/\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    for command in (
        ["init", "-q"],
        ["add", "."],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "all"],
    ):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    return tmp_path


def check(project, *entries, arguments=()):
    place = project / mutants.LISTS
    place.mkdir(parents=True, exist_ok=True)
    (place / "list.toml").write_text("\n".join(entries))
    status = mutants.main(["--root", str(project), *arguments])
    report = place / "report.json"
    rows = json.loads(report.read_text())["mutations"] if report.exists() else []
    return status, {row["name"]: (row["outcome"], row["by"]) for row in rows}


def test_every_outcome_is_reported(project):
    status, found = check(
        project,
        entry("killed", "a if a > b else b", "b if a > b else a"),
        entry("survives", "return len(values)", "return 2 * len(values)"),
        entry("stale", "no such text", "other text"),
        entry("twice", "    return", "    yield"),
        entry("no-syntax", "return len(values)", "return len(values"),
        entry("no-name", "return len(values)", "return lenght(values)"),
        entry("crash", "return seconds", "return seconds - 1"),
        entry("hang", "return seconds", "return seconds + 1000"),
        entry("fails-without", "return len(values)", "return 0", "tests/test_product.py"),
        entry("no-tests", "return len(values)", "return 0", "tests/test_product.py -k nothing"),
        arguments=["--timeout", "15"],
    )
    assert status == 1
    assert {name: outcome for name, (outcome, _) in found.items()} == {
        "killed": "killed",
        "survives": "survived",
        "stale": "stale",
        "twice": "stale",
        "no-syntax": "error",
        "no-name": "error",
        "crash": "killed",
        "hang": "killed",
        "fails-without": "error",
        "no-tests": "error",
    }
    assert found["killed"][1] == "tests/test_product.py::test_larger"
    assert found["crash"][1] == "crash: signal 6"
    assert found["hang"][1] == "timeout"
    assert found["fails-without"][1].startswith("without the mutation: tests/test_product.py::test_broken")
    assert "3 times" in found["twice"][1]
    text = (project / mutants.LISTS / "report.json").read_text() + (project / mutants.LISTS / "report.md").read_text()
    assert str(project) not in text
    assert "mutants-" not in text  # the scratch copy's place
    assert (project / "mgrpo_kernels/__init__.py").read_text() == PRODUCT


def test_all_killed_is_success_and_kept_results_are_used_again(project, capsys):
    killed = entry("killed", "a if a > b else b", "b if a > b else a")
    assert check(project, killed) == (0, {"killed": ("killed", check(project, killed)[1]["killed"][1])})
    assert capsys.readouterr().out.count("killed   killed:") == 1  # the second time nothing was run
    (project / "tests/test_other.py").write_text("")  # a test file that is not selected changes no result
    subprocess.run(["git", "add", "tests/test_other.py"], cwd=project, check=True)
    assert check(project, killed)[0] == 0
    assert "killed   killed:" not in capsys.readouterr().out
    tests = project / "tests/test_product.py"
    tests.write_text(TESTS.replace("== 2", "in (1, 2)"))
    assert check(project, killed) == (1, {"killed": ("survived", "all selected tests passed")})


def test_a_part_of_the_list_writes_no_report(project):
    entries = entry("killed", "a if a > b else b", "b if a > b else a"), entry("stale", "no such text", "other text")
    assert check(project, *entries, arguments=["--only", "kill*"]) == (0, {})
    with pytest.raises(SystemExit):
        check(project, *entries, arguments=["--only", "nothing"])


def test_a_part_of_the_list_renews_its_rows_of_the_report(project):
    entries = entry("killed", "a if a > b else b", "b if a > b else a"), entry("stale", "no such text", "other text")
    assert check(project, *entries)[1]["stale"][0] == "stale"
    mended = entry("stale", "return len(values)", "return 2 * len(values)")
    status, found = check(project, entries[0], mended, arguments=["--only", "stale", "--update"])
    assert (status, found["stale"][0], found["killed"][0]) == (1, "survived", "killed")
    report = json.loads((project / mutants.LISTS / "report.json").read_text())
    assert report["counts"] == {"killed": 1, "survived": 1, "stale": 0, "error": 0}
    assert all(len(row["commit"]) == 10 for row in report["mutations"])


def test_the_copy_is_what_is_tested(project):
    (project / "mgrpo_kernels").rename(project / "elsewhere")  # the installed package is then found in its place
    with pytest.raises(RuntimeError, match="stopped") as stopped:
        check(project, entry("killed", "a", "b"))
    assert "expected tests to import the package from" in str(stopped.value.__cause__)


def test_the_library_of_one_mutant_is_not_the_baseline_of_the_next(project, monkeypatch):
    """Each of two selections passes without its mutation, though the mutant built before fails both."""

    def build(copy):
        source = copy.place / "csrc" / "value.cpp"
        (copy.place / "build").mkdir(exist_ok=True)
        (copy.place / "mgrpo_kernels" / "_C.so").write_text(source.read_text())
        return ""

    monkeypatch.setattr(mutants_copies.NativeCopy, "build", build)
    (project / "csrc").mkdir()
    (project / "csrc" / "value.cpp").write_text("one two")
    (project / "tests" / "test_native.py").write_text(
        "from pathlib import Path\n"
        "def read():\n    return (Path(__file__).parents[1] / 'mgrpo_kernels' / '_C.so').read_text().split()\n"
        "def test_first():\n    assert read() == ['one', 'two']\n"
        "def test_second():\n    assert read() == ['one', 'two']\n"
    )
    subprocess.run(["git", "add", "."], cwd=project, check=True)
    entries = [
        entry("a", "one", "1", "tests/test_native.py -k first").replace("mgrpo_kernels/__init__.py", "csrc/value.cpp"),
        entry("b", "two", "2", "tests/test_native.py -k second").replace("mgrpo_kernels/__init__.py", "csrc/value.cpp"),
    ]
    status, found = check(project, *entries)
    assert (status, {name: by for name, (_, by) in found.items()}) == (
        0,
        {"a": "tests/test_native.py::test_first", "b": "tests/test_native.py::test_second"},
    )


def test_names_are_different_and_mutations_change_something(project):
    with pytest.raises(ValueError, match="got twice: one"):
        check(project, entry("one", "a", "b"), entry("one", "a", "c"))
    with pytest.raises(ValueError, match="got none in one"):
        check(project, entry("one", "a", "a"))


def test_no_mutation_of_the_list_is_stale():
    found = mutants.load(ROOT)
    assert len(found) >= 60
    for mutation in found:
        text = (ROOT / mutation.file).read_text(encoding="utf-8")
        assert text.count(mutation.before) == 1, f"{mutation.name}: {mutation.file}"
        assert mutation.why, mutation.name
        for argument in mutation.tests.partition(" -k ")[0].split():
            assert (ROOT / argument.partition("::")[0]).exists(), mutation.name
