"""What users install: the version, the extras, the sdist and the wheel, the build without a compiler, an extension for another torch."""

import ast
import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from absent import absent

import mgrpo_kernels
from mgrpo_kernels import _native
from mgrpo_kernels.train import extras

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
sys.path.append(str(ROOT / "scripts"))

import build_backend  # noqa: E402
import check_artifacts  # noqa: E402


def run(*command, cwd, **environment):
    """Run Python without what the test run itself has set for builds."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MGRPO_", "PYTHONPATH", "CXX"))}
    return subprocess.run(
        [sys.executable, *command], cwd=cwd, env=kept | environment, capture_output=True, text=True, check=False
    )


# --- The metadata


def test_the_version_is_that_of_the_newest_entry_in_the_changelog():
    released = re.findall(r"^## \[(\d[^\]]*)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert mgrpo_kernels.__version__ == released[0]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == released[0]


def test_the_extras_are_those_of_the_command_lines():
    """A package that an extra installs and the command lines do not know, or the reverse, would be named wrongly in an error."""
    imported = {"pyyaml": "yaml", "math-verify": "math_verify", "flash-attn": "flash_attn"}
    declared = {
        extra: tuple(imported.get(name, name) for name in (re.split(r"[<>=!~;]", each)[0].strip() for each in packages))
        for extra, packages in PROJECT["optional-dependencies"].items()
        if extra not in ("dev", "peers")
    }
    assert declared == extras.EXTRAS
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [extra for extra in PROJECT["optional-dependencies"] if f"`{extra}`" not in readme] == []


def test_every_import_is_of_a_dependency_or_of_an_extra():
    known = {"numpy", "torch", "triton", "mgrpo_kernels", *sys.stdlib_module_names, *sum(extras.EXTRAS.values(), ())}
    # What a package brings along may be imported where that package is used.
    other = {"tokenizers": "train/data/demo.py", "accelerate": "integrations/trl/trainer.py"}
    other |= {"huggingface_hub": "train/run/hub.py"}  # of transformers
    other |= dict.fromkeys(("verl", "transfer_queue", "tensordict"), "integrations/verl_trainer.py")
    other |= {"latex2sympy2_extended": "mgrpo_kernels/_math_worker.py"}  # of math-verify
    known |= {"sympy", "mpmath"}  # of torch
    for file in ROOT.glob("mgrpo_kernels/**/*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            for name in names:
                package = name.partition(".")[0]
                assert package in known or other.get(package, "?") in file.as_posix(), f"{file}: {name}"


def test_the_workflow_has_the_supported_versions_and_the_targets_of_ci_run():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    rows = workflow["jobs"]["versions"]["strategy"]["matrix"]["include"]
    classifiers = [each.rpartition(" ")[2] for each in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", each)]
    assert [row["python"] for row in rows] == classifiers
    declared = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["train"]]
    for package in ("torch", "triton", "transformers"):
        (oldest,) = (each.partition(">=")[2].partition(";")[0] for each in declared if each.startswith(package + ">="))
        assert rows[0][package] == f"{oldest}.0"
        newer = [tuple(map(int, row[package].split("."))) for row in rows]
        assert newer == sorted(newer)
    steps = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    assert ".ci/run" in steps
    script, makefile = ((ROOT / name).read_text(encoding="utf-8") for name in (".ci/run", "Makefile"))
    staged = set(" ".join(re.findall(r"^stage ([a-z ]+)$", script, re.MULTILINE)).split())
    assert staged == {"setup", "vllm", "peers", "lint", "docs", "artifacts", "test"}
    for target in staged:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
    assert {step.removeprefix("make ") for step in steps if step.startswith("make ")} <= staged


# --- The command lines without an extra


def blocked(folder, package):
    """Return a directory for PYTHONPATH that hides a package from Python."""
    folder.joinpath("sitecustomize.py").write_text(
        "import sys\n"
        "class Hidden:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] == {package!r}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Hidden())\n",
        encoding="utf-8",
    )
    return str(folder)


COMMANDS = ("mgrpo_kernels.train", "mgrpo_kernels.train.evaluate", "mgrpo_kernels.train.export")


@pytest.mark.parametrize(
    ("module", "package"),
    [
        *((COMMANDS[i % len(COMMANDS)], package) for i, package in enumerate(extras.EXTRAS["train"])),
        ("mgrpo_kernels.train.serve", "vllm"),
    ],
)
def test_a_command_without_its_extra_ends_in_one_line(tmp_path, module, package):
    result = run("-m", module, "some_model", cwd=tmp_path, PYTHONPATH=blocked(tmp_path, package))
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1, result.stderr
    assert re.fullmatch(
        rf"error: .*expected .*{package}.*, got none.*: {re.escape(extras.how_to_install(package))}\n", result.stderr
    )


def test_every_documented_command_is_covered():
    pages = [ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("mgrpo_kernels/**/*.py")]
    named = {
        name for page in pages for name in re.findall(r"-m (mgrpo_kernels(?:\.\w+)*)", page.read_text(encoding="utf-8"))
    }
    assert named == {"mgrpo_kernels", *COMMANDS, *extras.NO_TRAINING}


def test_an_import_from_python_needs_no_complete_extra(tmp_path):
    result = run("-c", "import mgrpo_kernels.train.rng", cwd=tmp_path, PYTHONPATH=blocked(tmp_path, "rich"))
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("flags", "package"),
    [
        (["--lora-rank", "2"], "peft"),
        (["--engine", "vllm"], "vllm"),
        (["--engine", "vllm", "--vllm-servers", "http://127.0.0.1:1"], "httpx"),
        *(([f"--{name}", *value], name) for name, value in (("tensorboard", []), ("wandb", ["p"]), ("trackio", ["p"]))),
        ([], "matplotlib"),
    ],
)
def test_an_option_without_its_package_ends_in_one_line(tmp_path, monkeypatch, capsys, flags, package):
    from mgrpo_kernels.train import __main__ as command

    monkeypatch.setattr(extras, "installed", lambda name: name != package)
    assert command.main(["--output", str(tmp_path / "run"), "--dry-run", *flags]) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(
        rf"error: -?-?[\w-]+: expected the package {package}, got none: {re.escape(extras.how_to_install(package))}\n",
        said,
    )
    assert not (tmp_path / "run").exists()


# --- An extension for another torch


def test_an_extension_for_another_torch_is_refused_before_it_is_loaded(tmp_path):
    """A copy of the package whose extension claims another release, and would not even load: it ends after its first half."""
    shutil.copytree(ROOT / "mgrpo_kernels", tmp_path / "mgrpo_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    (extension,) = tmp_path.glob("mgrpo_kernels/_C.*")
    content = extension.read_bytes()
    version = torch.version.__version__.partition("+")[0].encode()
    assert content.count(b", torch " + version) == 1
    other = version.replace(b".", b"9.", 1)[: len(version)]
    extension.write_bytes(content.replace(b", torch " + version, b", torch " + other))
    result = run("-m", "mgrpo_kernels", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    reason = f"{extension.name} was built against torch {other.decode()}, and torch {torch.__version__} is installed"
    assert (
        f"native: the compiled extension is refused: {reason}; build it again with: {_native.REBUILD}\n"
        in result.stdout
    )
    assert f"    native: the compiled extension is refused: {reason}" in result.stdout


@pytest.mark.parametrize(
    ("built", "installed", "fits"),
    [
        ("2.13.0", "2.13.0+cpu", True),
        ("2.13.1", "2.13.0+cu130", True),
        ("2.1.0", "2.13.0", False),
        ("2.14.0", "2.13.0", False),
        ("3.13.0", "2.13.0", False),
        ("2.14.0a0+git1234", "2.14.0", True),
    ],
)
def test_minor_releases_of_torch_are_told_apart(tmp_path, built, installed, fits):
    file = tmp_path / "_C.so"
    file.write_bytes(b"\x7fELF\0 compiler 13, torch 1\0compiler 13.3.0, torch " + built.encode() + b", flags -O3\0")
    reason = _native.wrong_torch(file, installed)
    assert (reason is None) == fits
    assert fits or f"built against torch {built}, and torch {installed} is installed" in reason


def test_an_extension_without_a_record_is_refused(tmp_path):
    (tmp_path / "_C.so").write_bytes(b"\x7fELF")
    assert "built against torch an unknown version" in _native.wrong_torch(tmp_path / "_C.so", "2.13.0")


# --- The build


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Return a copy of what the artefacts are made from."""
    to = tmp_path_factory.mktemp("tree")
    for name in check_artifacts.IN_SDIST:
        (to / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, to / name)
    for name in ("csrc", "mgrpo_kernels"):
        ignored = shutil.ignore_patterns("__pycache__", "_C.*", "_build_report.py")
        shutil.copytree(ROOT / name, to / name, ignore=ignored)
    (to / "tests").mkdir()
    (to / "tests/test_stray.py").write_text("", encoding="utf-8")  # setuptools takes these unless told otherwise
    return to


def files(tree):
    return {path.relative_to(tree).as_posix() for path in tree.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def sdist(tree, tmp_path_factory):
    return check_artifacts.build_sdist(tree, tmp_path_factory.mktemp("dist"))


def test_the_sdist_is_complete(tree, sdist):
    checkout = {name for name in files(tree) if ".egg-info/" not in name}
    check_artifacts.check_sdist(sdist, checkout)
    with pytest.raises(check_artifacts.ArtifactError, match=r"missing: csrc/cpu/new\.h; not expected: none"):
        check_artifacts.check_sdist(sdist, checkout | {"csrc/cpu/new.h"})
    with pytest.raises(
        check_artifacts.ArtifactError, match=r"missing: none; not expected: mgrpo_kernels/vote/count\.py"
    ):
        check_artifacts.check_sdist(sdist, checkout - {"mgrpo_kernels/vote/count.py"})


def test_a_wheel_cannot_be_built_from_an_sdist_without_a_header(tree, sdist, tmp_path):
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    (unpacked / "csrc/cpu/vec.h").unlink()
    for setting in ({}, {"CXX": "no-such-compiler"}, {"MGRPO_REQUIRE_NATIVE": "0"}):
        result = run("setup.py", "build_ext", "--inplace", cwd=unpacked, **setting)
        assert result.returncode != 0
        assert "error: csrc: expected all sources of the extension, missing: cpu/vec.h" in result.stderr
    with tarfile.open(tmp_path / sdist.name, "w:gz") as archive:
        archive.add(unpacked, arcname=unpacked.name)
    with pytest.raises(check_artifacts.ArtifactError, match=r"missing: csrc/cpu/vec\.h; not expected: none"):
        check_artifacts.check_sdist(tmp_path / sdist.name, {name for name in files(tree) if ".egg-info/" not in name})


def test_a_wheel_is_compared_with_the_checkout(tree, tmp_path):
    checkout = files(tree)
    package = {name for name in checkout if name.startswith("mgrpo_kernels/") and ".egg-info/" not in name}
    assert {
        "mgrpo_kernels/py.typed",
        "mgrpo_kernels/_math_worker.py",
        "mgrpo_kernels/train/presets/paper.yaml",
    } <= package
    extension = "mgrpo_kernels/_C.cpython-311-x86_64-linux-gnu.so"

    def wheel(names):
        with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
            for name in (*names, "mgrpo_kernels-1.dist-info/METADATA"):
                archive.writestr(name, "")
        return tmp_path / "a.whl"

    check_artifacts.check_wheel(wheel(package | {extension}), package)
    for names, said in (
        (package, "expected one compiled extension, got none"),
        (package | {extension} - {"mgrpo_kernels/py.typed"} | {"tests/test_a.py"}, r"not expected: tests/test_a\.py"),
        (
            (package | {extension}) - {"mgrpo_kernels/train/presets/paper.yaml"},
            r"missing: mgrpo_kernels/train/presets/paper\.yaml",
        ),
    ):
        with pytest.raises(check_artifacts.ArtifactError, match=said):
            check_artifacts.check_wheel(wheel(names), package)


def test_without_a_compiler_the_reason_is_recorded(tree):
    report = tree / "mgrpo_kernels/_build_report.py"
    for compiler, said in (("no-such-compiler", "there is no C++ compiler"), ("false", "cannot compile C++20")):
        result = run("setup.py", "build_ext", "--inplace", cwd=tree, CXX=compiler)
        assert result.returncode == 0, result.stderr
        assert said in report.read_text(encoding="utf-8")
        result = run("setup.py", "build_ext", "--inplace", cwd=tree, CXX=compiler, MGRPO_REQUIRE_NATIVE="1")
        assert result.returncode != 0
        assert "error: MGRPO_REQUIRE_NATIVE=1 requires the native kernels" in result.stderr


def test_a_source_that_does_not_compile_is_an_error(tree, tmp_path):
    """Of a compiler that is fit for C++20, every error is one of the sources."""
    compiler = tmp_path / "c++"
    compiler.write_text(
        '#!/bin/sh\ncase "$*" in *probe.cpp*) exec c++ "$@";; *) echo broken >&2; exit 1;; esac\n', encoding="utf-8"
    )
    compiler.chmod(compiler.stat().st_mode | stat.S_IEXEC)
    result = run("setup.py", "build_ext", "--inplace", cwd=tree, CXX=str(compiler))
    assert result.returncode != 0
    assert "error: the native kernels do not compile; MGRPO_REQUIRE_NATIVE=0 installs without them" in result.stderr


@pytest.mark.parametrize("ninja", [True, False])
def test_what_an_edit_concerns_is_built_again(tree, tmp_path, ninja):
    """With three sources that hold one string each, which take no time to compile."""
    if ninja and shutil.which("ninja") is None:
        absent("ninja is not installed")
    for name in check_artifacts.IN_SDIST:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(tree / name, tmp_path / name)
    shutil.copytree(tree / "mgrpo_kernels", tmp_path / "mgrpo_kernels")
    of_setup = (tree / "setup.py").read_text(encoding="utf-8")
    listed = re.sub(
        r'SOURCES = """.*?"""', 'SOURCES = """library.cpp cpu/a_kernel.cpp cpu/a.h"""', of_setup, flags=re.DOTALL
    )
    texts = {
        "setup.py": listed,
        "bin/ninja": f'#!/bin/sh\nexec {shutil.which("ninja")} "$@"\n' if ninja else "#!/bin/sh\nexit 1\n",
        "csrc/cpu/a.h": '#define MARK "header 1"\n',
        "csrc/cpu/a_kernel.cpp": '#include "cpu/a.h"\nconst char* kernel() { return "kernel 1, " MARK; }\n',
        "csrc/library.cpp": '#include "cpu/a.h"\nconst char* library() { return "library 1, " MARK; }\n',
    }

    def built(name=None):
        if name:
            texts[name] = texts[name].replace("1", "2")
        for each, text in texts.items():
            if name in (None, each):
                (tmp_path / each).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / each).write_text(text, encoding="utf-8")
        (tmp_path / "bin/ninja").chmod(0o755)
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        command = "setup.py", "build_ext", "--inplace"
        result = run(*command, cwd=tmp_path, PATH=path, MGRPO_REQUIRE_NATIVE="1", MGRPO_ISAS="DEFAULT")
        assert result.returncode == 0, result.stderr
        (extension,) = tmp_path.glob("mgrpo_kernels/_C.*")
        return {each.decode() for each in re.findall(rb"\w+ \d, header \d", extension.read_bytes())}

    assert built() == {"kernel 1, header 1", "library 1, header 1"}
    assert built("csrc/cpu/a_kernel.cpp") == {"kernel 2, header 1", "library 1, header 1"}
    assert built("csrc/cpu/a.h") == {"kernel 2, header 2", "library 1, header 2"}


def test_an_isolated_build_asks_for_the_torch_that_is_installed(monkeypatch):
    assert build_backend.installed_torch() == torch.__version__
    monkeypatch.setattr(build_backend.build_meta, "get_requires_for_build_wheel", lambda settings: [])  # runs setup.py
    for version, wanted in (
        (None, ["torch>=2.11"]),
        ("2.13.0", ["torch==2.13.0"]),
        ("2.14.1+cu132", ["torch==2.14.1"]),
        ("2.10.0", ["torch>=2.11"]),  # pip replaces it
        ("2.16.0.dev20261101+cpu", []),  # no index has its twin
        ("2.12.0a0+1234abc", []),
    ):
        monkeypatch.setattr(build_backend, "installed_torch", lambda version=version: version)
        assert build_backend.torch_requirement() == wanted
        assert set(wanted) <= set(build_backend.get_requires_for_build_wheel())
    # An sdist is setuptools' own business, and needs no torch.
    assert build_backend.get_requires_for_build_sdist == build_backend.build_meta.get_requires_for_build_sdist


def test_the_trainers_set_up_installs_nothing_for_tests():
    def steps(target):
        result = subprocess.run(
            ["make", "--dry-run", "--always-make", target], capture_output=True, text=True, cwd=ROOT, check=True
        )
        return [line for line in result.stdout.split("\n") if "setup.sh" in line]

    assert steps("train") == ["scripts/setup.sh train"]
    assert steps("test") == ["scripts/setup.sh train,dev"]


def test_nothing_for_sharded_tensors_is_imported_before_there_is_one():
    """torch.distributed.tensor takes longer to import than all of this library. (The first call of an op is when torch imports it itself.)"""
    script = """
import sys, torch, mgrpo_kernels
model = torch.nn.Linear(8, 8)
momentum = mgrpo_kernels.MomentumModel(model)
momentum.distance(model)
with momentum.swapped_into(model):
    pass
print(*sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = set(result.stdout.split())
    assert "mgrpo_kernels.sharded" in loaded
    assert loaded.isdisjoint({"torch.distributed.tensor", "torch.distributed.fsdp", "sympy", "transformers", "triton"})
