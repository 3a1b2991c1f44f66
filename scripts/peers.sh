#!/usr/bin/env bash
# Installs what tests/integrations needs of verl and OpenRLHF into .venv/peers: the packages themselves and as few of their dependencies
# as their modules need on a CPU. .venv itself stays as it is: both pin a transformers of their own, hydra an antlr that math-verify cannot
# use. The tests find the folder; elsewhere: PYTHONPATH=.venv/peers.
set -euo pipefail
cd "$(dirname "$0")/.."

packages=(
  verl==0.9.1 openrlhf==0.11.2
  # verl's modules: heads, losses, models
  tensordict==0.10.0 ray==2.60.0 omegaconf==2.4.0 codetiming==1.4.0 cloudpickle pyvers orjson msgpack jsonschema jsonschema-specifications
  referencing rpds-py attrs requests charset-normalizer urllib3 certifi protobuf
  # verl's trainer. fastapi from 0.116 on, and starlette from 0.47 on, want more.
  transferqueue==0.1.11 torchdata==0.11.0 hydra-core==1.3.8 antlr4-python3-runtime==4.9.3 fastapi==0.115.14 starlette==0.46.2 uvicorn
  cachetools pyzmq msgspec prometheus_client aiohttp multidict yarl frozenlist aiosignal propcache aiohappyeyeballs
  # models with adapters; OpenRLHF's answers
  peft pylatexenc
)
to=.venv/peers
if [ "$(cat "$to/installed" 2>/dev/null)" = "${packages[*]}" ]; then exit; fi
rm -rf "$to"
.venv/bin/python -m pip --quiet --disable-pip-version-check install --no-deps --target "$to" "${packages[@]}"
rm -rf "$to/tests" "$to/scripts"  # both wheels carry their repository's folders of these names
echo "${packages[*]}" > "$to/installed"
