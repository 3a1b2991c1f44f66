#!/usr/bin/env bash
# Creates .venv with torch, this package and its extras (`scripts/setup.sh train,dev`; without an argument, train). `make setup` calls it.
# Environment variables choose versions:
#   PYTHON=python3.12 scripts/setup.sh                   the Python interpreter (3.11 to 3.13)
#   TORCH=2.12.0 scripts/setup.sh                        the version of torch (2.11 or later)
#   TRITON=3.6.0 TRANSFORMERS=5.16.0 scripts/setup.sh    the versions of triton and transformers
set -euo pipefail
cd "$(dirname "$0")/.."

EXTRAS=${1:-train}
TORCH=${TORCH:-2.13.0}
export MGRPO_REQUIRE_NATIVE=${MGRPO_REQUIRE_NATIVE:-1}  # a missing compiler is an error here

suitable() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; }

if [ ! -x .venv/bin/python ]; then
  for candidate in ${PYTHON:-} python3 python3.13 python3.12 python3.11; do
    if suitable "$candidate"; then python=$candidate; break; fi
  done
  if [ -z "${python:-}" ]; then
    echo "setup: expected Python 3.11 to 3.13, got none in PATH; name an interpreter: PYTHON=/path/to/python make setup" >&2
    exit 1
  fi
  "$python" -m venv .venv
fi
export PATH="$PWD/.venv/bin:$PATH"  # for ninja, which compiles the extension on all cores
pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }  # with its progress bars
say() { echo "setup: $*" >&2; }
say "1 of 3: build tools ..."
pip install --upgrade pip setuptools wheel ninja numpy

say "2 of 3: torch $TORCH (about 200 MB for a CPU, several GB for a GPU) ..."
# Without a GPU install the CPU build of torch, which has an eighth of the size.
has_gpu() { nvidia-smi -L >/dev/null 2>&1 || rocm-smi --showid >/dev/null 2>&1; }
if ! .venv/bin/python -c 'import torch' 2>/dev/null; then
  if [ "$(uname -s)" = Linux ] && ! has_gpu; then
    pip install "torch==$TORCH+cpu" 2>/dev/null ||
      { pip install uv && .venv/bin/uv pip install --python .venv/bin/python --torch-backend cpu "torch==$TORCH"; } ||
      { say "the CPU build of torch $TORCH is not available; installing the default build, which is several GB"
        pip install "torch==$TORCH"; }
  else
    pip install "torch==$TORCH"
  fi
fi

say "3 of 3: this package with $EXTRAS; its C++ is compiled, which takes minutes ..."
# The constraints keep the installed torch. Builds of torch for a GPU require a certain triton; for the other builds install the one that the tests expect.
.venv/bin/python - > .venv/constraints.txt <<'PYTHON'
import importlib.metadata
import os

import torch

print(f"torch=={torch.__version__}")
named = any(each.startswith("triton") for each in importlib.metadata.requires("torch") or ())
if triton := os.environ.get("TRITON") or ("" if named else "3.9.0"):
    print(f"triton=={triton}")
if transformers := os.environ.get("TRANSFORMERS"):
    print(f"transformers=={transformers}")
PYTHON
pip install --constraint .venv/constraints.txt --no-build-isolation --editable ".[$EXTRAS]"
say "done: .venv is $(du -sh .venv | cut -f1)"
