"""Builds the sdist and, from it alone, a wheel; installs that in a fresh environment and runs an op on the native backend there.

    python scripts/check_artifacts.py                  the sdist of this checkout
    python scripts/check_artifacts.py --sdist FILE     one that was built before

Each artefact must hold exactly the files that git tracks for it. Compiling takes about a minute on two cores; torch is not installed
again, the fresh environment borrows the one of the Python that runs this.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
import zipfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IN_SDIST = (
    *("pyproject.toml", "setup.py", "MANIFEST.in", "scripts/build_backend.py"),
    *("README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "SECURITY.md"),
)
BUILT = re.compile(r"PKG-INFO|setup\.cfg|[^/]+\.egg-info/.*")
"""What setuptools adds to an sdist."""
EXTENSION = re.compile(r"mgrpo_kernels/_C\.[^/]+\.(so|pyd)")

USE = """
import pathlib, sys, torch, mgrpo_kernels
from mgrpo_kernels import _native
assert pathlib.Path(sys.prefix) in pathlib.Path(mgrpo_kernels.__file__).parents, mgrpo_kernels.__file__
assert _native.missing() is None, _native.missing()
logits, labels = torch.randn(5, 1000), torch.arange(5)
with mgrpo_kernels.use_backend("native"):
    ours = mgrpo_kernels.token_stats_from_logits(logits, labels)
torch.testing.assert_close(ours.logprob, logits.log_softmax(-1)[labels, labels])
vote = mgrpo_kernels.majority_vote([r"$\\int_0^1 x dx$", "1/2", "3"], groups=3)  # SymPy runs in a process of its own
assert vote.agrees.tolist() == [1, 1, 0], vote
print(f"mgrpo_kernels {mgrpo_kernels.__version__}: {torch.ops.mgrpo_native.build_info()}")
"""


class ArtifactError(Exception):
    """An artefact lacks a file, has one too many, or does not work."""


def tracked(root: Path = ROOT) -> set[str]:
    """Return the files of a checkout."""
    names = subprocess.run(
        ["git", "-C", str(root), "ls-files", "-z"], check=True, capture_output=True, text=True
    ).stdout
    return {name for name in names.split("\0") if name and (root / name).exists()}


def compare(what: str, expected: Iterable[str], found: Iterable[str]) -> None:
    """Raise ArtifactError unless both hold the same names."""
    wanted, there = set(expected), set(found)
    missing, stray = sorted(wanted - there), sorted(there - wanted)
    if missing or stray:
        raise ArtifactError(
            f"{what}: missing: {', '.join(missing) or 'none'}; not expected: {', '.join(stray) or 'none'}"
        )


def check_sdist(sdist: Path, checkout: set[str]) -> None:
    """Raise ArtifactError unless the sdist holds the sources of the package and of the extension, and no other file."""
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    expected = {name for name in checkout if name.startswith(("mgrpo_kernels/", "csrc/"))} | set(IN_SDIST)
    compare(sdist.name, expected, (name for name in names if BUILT.fullmatch(name) is None))


def check_wheel(wheel: Path, checkout: set[str]) -> None:
    """Raise ArtifactError unless the wheel holds the package with one extension, and no other file."""
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.partition("/")[0].endswith(".dist-info")}
    extensions = {name for name in names if EXTENSION.fullmatch(name)}
    if len(extensions) != 1:
        raise ArtifactError(f"{wheel.name}: expected one compiled extension, got {sorted(extensions) or 'none'}")
    compare(wheel.name, (name for name in checkout if name.startswith("mgrpo_kernels/")), names - extensions)


def build_sdist(root: Path, to: Path) -> Path:
    """Build the sdist as ``python -m build --sdist --no-isolation`` does."""
    code = "import sys, build_backend; build_backend.build_sdist(sys.argv[1])"
    environment = {**os.environ, "PYTHONPATH": str(root / "scripts")}
    subprocess.run(
        [sys.executable, "-c", code, str(to)], cwd=root, env=environment, check=True, stdout=subprocess.DEVNULL
    )
    return next(to.glob("*.tar.gz"))


def make_environment(place: Path) -> dict[str, str]:
    """Make a virtual environment that can import what this Python has installed, but for editable packages; return its variables."""
    venv.create(place, with_pip=True, symlinks=True)
    own = sysconfig.get_path("purelib", vars={"base": str(place), "platbase": str(place)})
    # A path in a .pth file is searched after the environment's own packages, and the .pth files there are not read.
    Path(own, "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    path = os.pathsep.join([str(place / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    drop = ("PYTHONPATH", "PYTHONHOME")
    kept = {name: value for name, value in os.environ.items() if name not in drop}
    return {**kept, "PATH": path, "VIRTUAL_ENV": str(place), "MGRPO_REQUIRE_NATIVE": "1"}


def check(sdist: Path | None, work: Path) -> None:
    """Build, check, install and use the artefacts in the directory `work`."""
    checkout = tracked()
    try:
        sdist = sdist or build_sdist(ROOT, work)
    except subprocess.CalledProcessError:
        raise ArtifactError("the sdist cannot be built, for the reason above") from None
    check_sdist(sdist, checkout)
    environment = make_environment(work / "env")
    python = str(work / "env/bin/python")
    pip = [python, "-m", "pip", "--quiet", "--disable-pip-version-check"]

    def run(*command: str) -> None:
        if subprocess.run(command, cwd=work, env=environment, check=False).returncode != 0:
            raise ArtifactError(f"{sdist.name}: this failed: {' '.join(command[:6])} ...")

    run(*pip, "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", str(work), str(sdist))
    wheel = next(work.glob("*.whl"))
    check_wheel(wheel, checkout)
    run(*pip, "install", "--no-deps", "--no-index", "--force-reinstall", str(wheel))
    run(python, "-I", "-c", USE)
    print(f"{sdist.name} and {wheel.name}: complete, and the native backend works")


def main() -> int:
    """Run the check; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sdist", type=Path, metavar="FILE", help="check this sdist instead of building one")
    sdist = parser.parse_args().sdist
    with tempfile.TemporaryDirectory() as folder:
        try:
            check(None if sdist is None else sdist.resolve(), Path(folder))
        except ArtifactError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
