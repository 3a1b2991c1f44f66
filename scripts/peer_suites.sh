#!/usr/bin/env bash
# Runs another library's own tests with and without our ops, and compares: scripts/peer_suites.sh trl|verl CHECKOUT [options]
# (scripts/peer_suites/compare.py --help). Nothing is downloaded. verl and what its tests need come from `make peers`.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
if [ "${1:-}" = verl ]; then export PYTHONPATH="$here/../.venv/peers${PYTHONPATH:+:$PYTHONPATH}"; fi
exec "${PY:-$here/../.venv/bin/python}" "$here/peer_suites/compare.py" "$@"
