#!/usr/bin/env bash
# Installs verl and OpenRLHF for tests/integrations into .venv/peers, and Liger into .venv/liger, with only those dependencies that their
# modules need on a CPU. .venv itself is not changed, because verl and OpenRLHF pin a release of transformers, and hydra pins a release of
# antlr that math-verify cannot use. The tests find the folders; other commands need PYTHONPATH=.venv/peers.
set -euo pipefail
cd "$(dirname "$0")/.."

packages=(
  verl==0.9.1 openrlhf==0.11.2
  # for verl's heads, losses and models
  tensordict==0.10.0 ray==2.60.0 omegaconf==2.4.0 codetiming==1.4.0 cloudpickle pyvers orjson msgpack jsonschema jsonschema-specifications
  referencing rpds-py attrs requests charset-normalizer urllib3 certifi protobuf
  # for verl's trainer; fastapi 0.116 and starlette 0.47 and later need further packages
  transferqueue==0.1.11 torchdata==0.11.0 hydra-core==1.3.8 antlr4-python3-runtime==4.9.3 fastapi==0.115.14 starlette==0.46.2 uvicorn
  cachetools pyzmq msgspec prometheus_client aiohttp multidict yarl frozenlist aiosignal propcache aiohappyeyeballs
  # for models with adapters, and for OpenRLHF's answers
  peft pylatexenc
)
into() {  # installs packages into a folder, unless it has them
  local to=$1; shift
  if [ "$(cat "$to/installed" 2>/dev/null)" = "$*" ]; then return; fi
  rm -rf "$to"
  .venv/bin/python -m pip --quiet --disable-pip-version-check install --no-deps --target "$to" "$@"
  rm -rf "$to/tests" "$to/scripts"  # wheels of verl and OpenRLHF contain the tests and scripts of their repositories
  echo "$*" > "$to/installed"
}
into .venv/peers "${packages[@]}"
into .venv/liger liger-kernel==0.8.5  # a folder of its own: TRL uses Liger's losses where it can import them
