#!/usr/bin/env bash
# The libraries that gpu_check.sh compares with, as wheels for a machine without a network: they fit its 64 MiB.
#   bash benchmarks/fetch_peers.sh [python version of that machine]
# They go to build/wheels, to be carried there, in place of what is there. Newer quack-kernels need a cutlass wheel of
# 88 MB. Not fetched: numpy and cuda-bindings, which cutlass imports too; gpu_check.sh's rows say what did not import.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
VERSION=${1:-3.12}
mkdir -p build/wheels
rm -f build/wheels/*.whl
python3 -m pip download --quiet --no-deps --only-binary :all: --python-version "$VERSION" --dest build/wheels \
  --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 \
  quack-kernels==0.2.2 nvidia-cutlass-dsl==4.2.1 liger-kernel
python3 -m pip download --quiet --no-deps --dest build/wheels expecttest
bytes=$(du -cb build/wheels/*.whl | tail -n 1 | cut -f 1)
echo "$((bytes / 1048576)) MiB in build/wheels"
((bytes <= 64 * 1048576))
