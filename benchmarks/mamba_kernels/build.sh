#!/usr/bin/env bash
# Compiles mamba_ssm's own kernels for sm_90 with its own flags, without linking torch, for
# benchmark_scan.py --compiled.
#
#   bash benchmarks/mamba_kernels/build.sh SOURCES OUT.so
#
# SOURCES is mamba_ssm's source distribution, unpacked (2.3.2.post1). It takes minutes, and needs
# nvcc and a python3 with torch, whose headers the kernels include.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
sources=$1 out=$2
include=$(python3 -c 'import torch; print(torch.__path__[0] + "/include")')
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
flags=(-O3 -std=c++17 --expt-relaxed-constexpr --expt-extended-lambda --use_fast_math -lineinfo
  -gencode "arch=compute_90,code=sm_90" -Xcompiler "-fPIC,-fvisibility=hidden"
  -U__CUDA_NO_HALF_OPERATORS__ -U__CUDA_NO_HALF_CONVERSIONS__ -U__CUDA_NO_BFLOAT16_OPERATORS__
  -U__CUDA_NO_BFLOAT16_CONVERSIONS__ -U__CUDA_NO_BFLOAT162_OPERATORS__
  -U__CUDA_NO_BFLOAT162_CONVERSIONS__)
folders=(-I "$here" -I "$here/include" -I "$sources/csrc/selective_scan" -isystem "$include"
  -isystem "$include/torch/csrc/api/include")
for unit in calls forward backward; do
  nvcc "${flags[@]}" "${folders[@]}" -c "$here/$unit.cu" -o "$work/$unit.o"
done
nvcc -gencode "arch=compute_90,code=sm_90" -shared -o "$out" "$work"/*.o
