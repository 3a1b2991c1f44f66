#!/usr/bin/env bash
# Builds the extension for AddressSanitizer and UndefinedBehaviorSanitizer into build/asan, and makes random calls of every op with it, valid
# and broken: tests/fuzz_ops.py, a third of them with the kernels of each instruction set. Needs GCC. The extension in use is not touched.
#   scripts/asan.sh              6,000 calls
#   CALLS=300 scripts/asan.sh --seed 7    300 for each instruction set, with other options passed on to tests/fuzz_ops.py
set -euo pipefail
cd "$(dirname "$0")/.."

CALLS=${CALLS:-2000} CXX=${CXX:-g++}
python=$PWD/.venv/bin/python
folder=$PWD/build/asan
# vptr needs type information that torch does not export.
sanitize="-fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=undefined -fno-omit-frame-pointer"
CFLAGS="$sanitize -D_GLIBCXX_ASSERTIONS" LDFLAGS=$sanitize MGRPO_REQUIRE_NATIVE=1 MAX_JOBS=${MAX_JOBS:-2} \
  "$python" setup.py --quiet build --build-lib "$folder/lib" --build-temp "$folder/temp"
grep -q __asan_init "$folder"/lib/mgrpo_kernels/_C*.so # or nothing would be checked

runtimes=$("$CXX" -print-file-name=libasan.so):$("$CXX" -print-file-name=libubsan.so)
capabilities=default
[ "$(uname -m)" = x86_64 ] && capabilities="default avx2 avx512"
first=0
for capability in $capabilities; do
  echo "kernels for $capability"
  # What PyTorch itself never frees is no leak of ours.
  ATEN_CPU_CAPABILITY=$capability PYTHONPATH=$folder/lib OMP_NUM_THREADS=2 LD_PRELOAD=$runtimes \
    ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 \
    "$python" tests/fuzz_ops.py --calls "$CALLS" --first "$first" --trace "$@" >"$folder/calls.log" ||
    { tail -n 5 "$folder/calls.log"; exit 1; }
  tail -n 1 "$folder/calls.log"
  first=$((first + CALLS))
done
