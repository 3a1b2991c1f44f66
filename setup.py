"""Builds the extension ``mgrpo_kernels._C`` from csrc/, and sets the licence and the description; everything else is in pyproject.toml.

Without torch or a C++ compiler the package installs without the extension, and ``mgrpo_kernels/_build_report.py`` records the reason.
A source file that is missing, or one that does not compile, is always an error. The environment variable MGRPO_REQUIRE_NATIVE decides
otherwise: 1 makes a missing torch or compiler an error too, and 0 installs without the extension.
"""

import os
import platform
import re
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, get_cxx_compiler

    release = tuple(int(part) for part in torch.__version__.split(".")[:2])
    NO_TORCH = None if release >= (2, 11) else f"expected torch 2.11 or later, got {torch.__version__}"
except (ImportError, OSError) as error:  # OSError: a library that torch loads is missing
    from setuptools.command.build_ext import build_ext as BuildExtension

    CppExtension = Extension
    NO_TORCH = (
        f"torch could not be imported while building ({error}); once torch is installed, build mgrpo_kernels again with: "
        "pip install --no-build-isolation --no-deps --force-reinstall PATH/TO/mgrpo_kernels"
    )

ROOT = Path(__file__).parent

# -ffp-contract=off: an FMA stands where the source says so, whichever instruction set the object is for.
FLAGS = [
    *("-std=c++20", "-O3", "-g0", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"),
    *("-fvisibility=hidden", "-fvisibility-inlines-hidden"),
    # at::vec and GCC 12's intrinsics are noisy
    *("-Wno-psabi", "-Wno-unknown-pragmas", "-Wno-uninitialized", "-Wno-maybe-uninitialized"),
]
if sys.platform == "linux":
    FLAGS.append("-fopenmp")  # not when linking: the OpenMP runtime must be the one that torch has loaded

# csrc/cpu/*_kernel.cpp are compiled once for each of these. Order matters: where objects share an inline function (std::, c10::),
# the linker keeps the first, and that must be the one that every CPU can run.
ISAS = {"DEFAULT": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISAS["AVX2"] = ["-mavx2", "-mfma", "-mf16c", "-DCPU_CAPABILITY_AVX2"]
    ISAS["AVX512"] = [
        "-mavx2",
        "-mfma",
        "-mf16c",
        *(f"-mavx512{part}" for part in ("f", "bw", "vl", "dq")),
        "-DCPU_CAPABILITY_AVX512",
    ]
if os.environ.get("MGRPO_ISAS"):  # only these, for a quick build: MGRPO_ISAS=DEFAULT
    ISAS = {isa: flags for isa, flags in ISAS.items() if isa in os.environ["MGRPO_ISAS"].split()}

# Every source of the extension. A file that is missing (from an sdist, say) would otherwise surface only when a kernel is called.
SOURCES = """
library.cpp
cpu/check.h cpu/dispatch.cpp cpu/dispatch.h cpu/vec.h
cpu/decoder.cpp cpu/decoder.h cpu/decoder_kernel.cpp
cpu/ema.cpp cpu/ema.h cpu/ema_kernel.cpp
cpu/few_rows.cpp cpu/few_rows.h cpu/few_rows_kernel.cpp
cpu/iqr_filter.cpp
cpu/head_transform.h
cpu/kept.cpp cpu/kept.h cpu/kept_kernel.cpp
cpu/linear_tile.cpp cpu/linear_tile.h cpu/linear_tile_kernel.cpp
cpu/matmul.cpp cpu/pack.h cpu/pack_kernel.cpp
cpu/policy_loss.cpp cpu/policy_loss.h cpu/policy_loss_kernel.cpp cpu/policy_loss_terms.h
cpu/row_gradient.h cpu/row_state.h
cpu/top_entries.cpp cpu/top_entries.h cpu/top_entries_kernel.cpp cpu/top_row.h
cpu/token_stats.cpp cpu/token_stats.h cpu/token_stats_kernel.cpp
""".split()


def check_sources():
    """End unless the folder csrc holds exactly the listed files."""
    found = {
        path.relative_to(ROOT / "csrc").as_posix() for path in ROOT.glob("csrc/**/*") if path.suffix in (".cpp", ".h")
    }
    if missing := sorted(set(SOURCES) - found):
        raise SystemExit(f"error: csrc: expected all sources of the extension, missing: {', '.join(missing)}")
    if unlisted := sorted(found - set(SOURCES)):
        raise SystemExit(
            f"error: csrc: expected the files in SOURCES of setup.py, got others too: {', '.join(unlisted)}"
        )


def sources(*, kernels):
    """Return the C++ files that are compiled once for each instruction set, or the others."""
    return [f"csrc/{name}" for name in SOURCES if name.endswith(".cpp") and name.endswith("_kernel.cpp") == kernels]


PROBE = """
#include <Python.h>
#include <bit>
#ifdef _OPENMP
#include <omp.h>
#endif
template <class T> concept Any = true;
"""


def no_compiler():
    """Return None if the compiler takes C++20, our flags and Python's headers, else the reason."""
    command = [*shlex.split(get_cxx_compiler()), *FLAGS, *(flag for flags in ISAS.values() for flag in flags)]
    hint = "the environment variable CXX names another compiler"
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder, "probe.cpp")
        probe.write_text(PROBE, encoding="utf-8")
        command += ["-I", sysconfig.get_path("include"), "-c", str(probe), "-o", str(probe.with_suffix(".o"))]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError:
            return f"there is no C++ compiler {get_cxx_compiler()!r} ({hint})"
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        said = next((line for line in lines if "error" in line), lines[-1] if lines else f"status {done.returncode}")
        return f"the C++ compiler {get_cxx_compiler()!r} cannot compile C++20 with Python's headers: {said} ({hint})"
    return None


def why_not():
    """Return None if the extension is to be built, else the reason why it cannot be."""
    if os.environ.get("MGRPO_REQUIRE_NATIVE") == "0":
        return "MGRPO_REQUIRE_NATIVE=0 asked for an installation without the native kernels"
    return NO_TORCH or no_compiler()


class BuildNative(BuildExtension):
    def run(self):
        if self.editable_mode and NO_TORCH is None:  # only what has changed is compiled again
            self.build_temp = f"build/editable-torch-{torch.__version__}-{sys.implementation.cache_tag}"
        package = Path("." if self.inplace else self.build_lib, "mgrpo_kernels")
        report, reason = package / "_build_report.py", why_not()
        if reason is None:
            try:
                super().run()
            except BaseException:
                print(
                    "error: the native kernels do not compile; MGRPO_REQUIRE_NATIVE=0 installs without them",
                    file=sys.stderr,
                )
                raise
            report.unlink(missing_ok=True)
            return
        if os.environ.get("MGRPO_REQUIRE_NATIVE") == "1":
            raise SystemExit(
                f"error: MGRPO_REQUIRE_NATIVE=1 requires the native kernels, which cannot be built: {reason}"
            )
        print(f"warning: mgrpo_kernels installs without its native kernels: {reason}", file=sys.stderr)
        package.mkdir(parents=True, exist_ok=True)
        for older in package.glob("_C.*"):
            older.unlink()
        report.write_text(f"REASON = {reason[:2000]!r}\n", encoding="utf-8")
        self.extensions = []

    def build_extension(self, ext):
        for isa, flags in ISAS.items():
            ext.extra_objects += self.compiler.compile(
                sources(kernels=True),
                output_dir=f"{self.build_temp}/{isa}",
                include_dirs=ext.include_dirs,
                debug=self.debug,
                extra_postargs=[*FLAGS, *flags, f"-DCPU_CAPABILITY={isa}"],
                depends=ext.depends,
            )
        super().build_extension(ext)


check_sources()
build_info = [f'-DMGRPO_FLAGS="{" ".join(FLAGS)}"', f'-DMGRPO_ISAS="{" ".join(ISAS)}"']
extension = CppExtension(
    "mgrpo_kernels._C",
    sources(kernels=False),
    include_dirs=[str(ROOT / "csrc")],
    extra_compile_args=[*FLAGS, *build_info, *(["-DMGRPO_X86"] if "AVX2" in ISAS else [])],
    # The kernels are linked as objects, so that setuptools does not know their sources.
    # torch: another release means another extension, whatever an earlier build has left in build/
    depends=[
        *(f"csrc/{name}" for name in SOURCES if name.endswith(".h")),
        *sources(kernels=True),
        *([] if NO_TORCH else [torch.version.__file__]),
    ],
)


def long_description():
    """Return README for a package index, which has neither the figures nor the other pages: without its relative links and images."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"!\[([^\]]*)\]\((?!https?:)[^)]*\)", r"*Figure in the repository: \1.*", text)
    return re.sub(r"\[([^\]]*)\]\((?!https?:)[^)]*\)", r"\1", text)


# The licence is given here since setuptools before 77 refuses the SPDX form in pyproject.toml, and later ones deprecate the older form.
setup(
    license="Apache-2.0",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    ext_modules=[extension],
    cmdclass={"build_ext": BuildNative},
)
