#!/usr/bin/env bash
# Makes .venv with everything that training, tests, linting and benchmarks need. `make setup` calls it.
#   PYTHON=python3.12 scripts/setup.sh     another interpreter (3.11 to 3.13)
#   TORCH=2.12.0 scripts/setup.sh          another version of torch (>= 2.11)
#   TRITON=3.6.0 TRANSFORMERS=5.16.0 scripts/setup.sh    other versions of these
set -euo pipefail
cd "$(dirname "$0")/.."

TORCH=${TORCH:-2.13.0}
export MGRPO_REQUIRE_NATIVE=${MGRPO_REQUIRE_NATIVE:-1}  # here a missing compiler is an error, not a slower library

suitable() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; }

if [ ! -x .venv/bin/python ]; then
  for candidate in ${PYTHON:-} python3 python3.13 python3.12 python3.11; do
    if suitable "$candidate"; then python=$candidate; break; fi
  done
  [ -n "${python:-}" ] || { echo "setup: expected Python 3.11 to 3.13; name it: PYTHON=/path/to/python make setup" >&2; exit 1; }
  "$python" -m venv .venv
fi
export PATH="$PWD/.venv/bin:$PATH"  # ninja, which compiles the extension on all cores
pip() { .venv/bin/python -m pip --quiet --disable-pip-version-check "$@"; }
pip install --upgrade pip setuptools wheel ninja numpy

echo "setup: torch $TORCH ..." >&2
# A build of torch that fits the machine. Without a GPU: the CPU build, an eighth of the size.
has_gpu() { nvidia-smi -L >/dev/null 2>&1 || rocm-smi --showid >/dev/null 2>&1; }
if ! .venv/bin/python -c 'import torch' 2>/dev/null; then
  if [ "$(uname -s)" = Linux ] && ! has_gpu; then
    pip install "torch==$TORCH+cpu" 2>/dev/null ||
      { pip install uv && .venv/bin/uv pip install --python .venv/bin/python --torch-backend cpu "torch==$TORCH" 2>/dev/null; } ||
      { echo "setup: no CPU build of torch $TORCH to be had; taking the default build, which is several GB" >&2
        pip install "torch==$TORCH"; }
  else
    pip install "torch==$TORCH"
  fi
fi

echo "setup: the package, and what training and tests need ..." >&2
# Nothing that follows may replace torch. Its builds for a GPU name their triton; beside the others comes the one that the tests expect.
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
pip install --constraint .venv/constraints.txt --no-build-isolation --editable '.[train,dev]'
