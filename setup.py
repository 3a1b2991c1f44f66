"""Builds the optional extension ``mgrpo_kernels._C`` from csrc/; everything else is in pyproject.toml.

Without a compiler (or torch) the package installs all the same, and ``mgrpo_kernels/_build_report.py`` says what was missing.
MGRPO_REQUIRE_NATIVE=1 makes that an error.
"""

import os
import platform
import shlex
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup

try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension, get_cxx_compiler

    NO_TORCH = None
except ImportError as error:
    from setuptools.command.build_ext import build_ext as BuildExtension

    CppExtension = Extension
    NO_TORCH = f"torch could not be imported while building ({error})"

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


class BuildNative(BuildExtension):
    def run(self):
        report = Path("." if self.inplace else self.build_lib, "mgrpo_kernels/_build_report.py")
        try:
            if NO_TORCH:
                raise RuntimeError(NO_TORCH)
            compiler = get_cxx_compiler()
            if shutil.which(shlex.split(compiler)[0]) is None:
                raise RuntimeError(
                    f"there is no C++ compiler {compiler!r} (the environment variable CXX names another)"
                )
            super().run()
            report.unlink(missing_ok=True)
        except (Exception, SystemExit) as error:  # whatever a compiler driver raises
            if os.environ.get("MGRPO_REQUIRE_NATIVE") == "1":
                raise
            reason = f"it could not be built: {type(error).__name__}: {error}"
            print(f"warning: mgrpo_kernels installs without its native kernels: {reason}", file=sys.stderr)
            report.parent.mkdir(parents=True, exist_ok=True)
            report.write_text(f"REASON = {reason[:2000]!r}\n", encoding="utf-8")
            self.extensions = []

    def build_extension(self, ext):
        kernels = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/cpu/*_kernel.cpp"))
        for isa, flags in ISAS.items():
            ext.extra_objects += self.compiler.compile(
                kernels, output_dir=f"{self.build_temp}/{isa}", include_dirs=ext.include_dirs, debug=self.debug,
                extra_postargs=[*FLAGS, *flags, f"-DCPU_CAPABILITY={isa}"], depends=ext.depends,
            )  # fmt: skip
        super().build_extension(ext)


def sources():
    kernels = set(ROOT.glob("csrc/cpu/*_kernel.cpp"))
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.cpp") if path not in kernels)


build_info = [f'-DMGRPO_FLAGS="{" ".join(FLAGS)}"', f'-DMGRPO_ISAS="{" ".join(ISAS)}"']
extension = CppExtension(
    "mgrpo_kernels._C",
    sources(),
    include_dirs=[str(ROOT / "csrc")],
    extra_compile_args=[*FLAGS, *build_info, *(["-DMGRPO_X86"] if "AVX2" in ISAS else [])],
    depends=[str(path) for path in ROOT.glob("csrc/**/*.h")],
)
setup(ext_modules=[extension], cmdclass={"build_ext": BuildNative})
