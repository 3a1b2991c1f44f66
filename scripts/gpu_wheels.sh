#!/usr/bin/env bash
# Downloads wheels of the libraries that the benchmarks compare with, for a GPU machine without access to a package index. There,
# `make gpu-check WHEELS=dir` imports the missing ones from them. That machine must have torch, triton, transformers, accelerate, pandas and pyarrow.
#   scripts/gpu_wheels.sh DIR [--quack]
# The wheels are for Python 3.12 on x86-64 Linux; TARGET_PYTHON=3.13 chooses another version. They take 4.3 MiB, and 19 MiB unpacked.
# --quack adds QuACK and NVIDIA's CuTe DSL, whose compiler alone takes 92 MB. Liger uses that compiler on Hopper too, and plain PyTorch
# without it.
set -euo pipefail

out=${1:?usage: scripts/gpu_wheels.sh DIR [--quack]}
python=${TARGET_PYTHON:-3.12}
packages=(
  trl==1.16.0 datasets==5.2.0 dill==0.4.1 multiprocess==0.70.19  # trl imports the last three
  liger-kernel==0.8.5
  cut-cross-entropy==25.1.1
  verl==0.9.1  # benchmarks/peers.py imports its kernel only
)
if [ "${2:-}" = --quack ]; then
  packages+=(
    quack-kernels==0.6.5 einops==0.8.2 apache-tvm-ffi==0.1.15.post2 torch-c-dlpack-ext==0.1.5
    nvidia-cutlass-dsl==4.8.1 nvidia-cutlass-dsl-libs-base==4.8.1 nvidia-cutlass-dsl-libs-core==4.8.1 nvidia-cutlass-dsl-libs-cu13==4.8.1
  )
fi
platforms=()
for glibc in manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014 manylinux1; do
  platforms+=(--platform "${glibc}_x86_64")
done
mkdir -p "$out"
rm -f "$out"/*.whl
"${PY:-python3}" -m pip --quiet --disable-pip-version-check download --no-deps --only-binary=:all: --python-version "$python" \
  --implementation cp "${platforms[@]}" --dest "$out" "${packages[@]}"
echo "$(ls "$out"/*.whl | wc -l) wheels, $(du -ch "$out"/*.whl | tail -1 | cut -f1), in $out"
