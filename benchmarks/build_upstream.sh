#!/usr/bin/env bash
# Compiles upstream's extension for sm_90 with its own flags, for benchmark.py --upstream.
#
#   bash benchmarks/build_upstream.sh SOURCES OUT.so
#
# SOURCES is causal-conv1d's source distribution, unpacked. It takes minutes, and needs nvcc and a
# python3 with torch and its headers.
set -euo pipefail
sources=$(realpath "$1")/csrc out=$2
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
paths=$(python3 -c '
import sysconfig, torch
print(torch.__path__[0] + "/include", sysconfig.get_paths()["include"])')
read -r torch python <<<"$paths"
folders=(-I "$sources" -isystem "$torch" -isystem "$torch/torch/csrc/api/include" -isystem "$python")
flags=(-O3 -std=c++20 -DTORCH_EXTENSION_NAME=causal_conv1d_cuda)
cuda=(--expt-relaxed-constexpr --expt-extended-lambda --use_fast_math -lineinfo
  -gencode "arch=compute_90,code=sm_90" -Xcompiler -fPIC
  -U__CUDA_NO_HALF_OPERATORS__ -U__CUDA_NO_HALF_CONVERSIONS__ -U__CUDA_NO_BFLOAT16_OPERATORS__
  -U__CUDA_NO_BFLOAT16_CONVERSIONS__ -U__CUDA_NO_BFLOAT162_OPERATORS__
  -U__CUDA_NO_BFLOAT162_CONVERSIONS__)
for unit in fwd bwd update; do
  nvcc "${flags[@]}" "${cuda[@]}" "${folders[@]}" -c "$sources/causal_conv1d_$unit.cu" \
    -o "$work/$unit.o" &
done
cuda_home=$(dirname "$(dirname "$(realpath "$(command -v nvcc)")")")
g++ "${flags[@]}" -fPIC "${folders[@]}" -isystem "$cuda_home/include" -c \
  "$sources/causal_conv1d.cpp" -o "$work/binding.o" &
for job in $(jobs -p); do wait "$job"; done
libraries=(c10 c10_cuda torch torch_cpu torch_cuda torch_python)
nvcc -gencode "arch=compute_90,code=sm_90" -shared -o "$out" "$work"/*.o \
  -L "$torch/../lib" "${libraries[@]/#/-l}"
