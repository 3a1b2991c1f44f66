#!/usr/bin/env bash
# Compiles every Triton kernel, without a GPU, with both supported versions of Triton: the one in .venv, which CI checks, and 3.6, which comes
# with torch 2.11. The second one is installed into build/triton-3.6, and only these commands use it.
#   scripts/compile_tables.sh                  runs the compile tests with both versions
#   scripts/compile_tables.sh --write-table    renews both tables in tests/compiled_kernels.json
set -euo pipefail
cd "$(dirname "$0")/.."

OTHER=${OTHER:-3.6}
python=$PWD/.venv/bin/python
folder=build/triton-$OTHER
if ! PYTHONPATH=$folder "$python" -c "import triton, sys; sys.exit(not triton.__version__.startswith('$OTHER.'))" 2>/dev/null; then
  rm -rf "$folder"
  "$python" -m pip --quiet --disable-pip-version-check install --no-deps --target "$folder" "triton==$OTHER.*"
fi

for path in "" "$PWD/$folder"; do
  export PYTHONPATH=$path
  "$python" -c 'import triton; print("Triton", triton.__version__)'
  if [ "${1:-}" = --write-table ]; then
    "$python" tests/compiled.py --write-table
  else
    "$python" -m pytest -q -p no:cacheprovider tests/test_compile_targets.py tests/test_compile_sweep.py
  fi
done
