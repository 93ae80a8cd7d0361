#!/usr/bin/env bash
# All tests, with all the set-up they need: format and lint checks, the C++ tests (plain, and under
# AddressSanitizer and UBSan), then pytest. Arguments go to pytest: bash scripts/test.sh --device cuda
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/setup_env.sh
. scripts/setup_env.sh

find_python

say "format, lint and types"
bash scripts/dev/lint.sh

install_library
install_packages pytest pytest-xdist hypothesis numpy onnx onnxruntime onnxscript
ensure_googletest
ensure_onnxruntime_headers
ensure_pkg_config

# ctest_in FOLDER OPTIONS...: builds the C++ tests there and runs them.
ctest_in() {
  local folder=build/$1
  shift
  cmake -S . -B "$folder" -DCAUSAL_CONV1D_TESTS=ON "$@" >"$folder.log" 2>&1 &&
    cmake --build "$folder" -j "${MAX_JOBS:-$(nproc)}" >>"$folder.log" 2>&1 || {
    tail -n 40 "$folder.log" >&2
    fail "the C++ tests do not build; the whole output is in $folder.log"
  }
  (cd "$folder" && ctest --output-on-failure -j "$(nproc)" | sed '/Test *#.*Passed/d; /^ *Start /d')
}
say "C++ tests"
# Of the libraries that are installed.
ctest_in cpp -DCAUSAL_CONV1D_BUILT="$(
  run_python -c 'import causal_conv1d, os; print(os.path.dirname(causal_conv1d.__file__))'
)" -DCAUSAL_CONV1D_TORCH_INCLUDE="$(
  run_python -c 'import os, torch; print(os.path.join(os.path.dirname(torch.__file__), "include"))'
)"

say "C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer"
ctest_in cpp-sanitized -DCAUSAL_CONV1D_CUDA=OFF -DCAUSAL_CONV1D_SANITIZE=address,undefined \
  -DCMAKE_BUILD_TYPE=RelWithDebInfo

say "pytest $*"
# pytest by way of -c, without the folder it runs in on sys.path: see run_python. One process per core,
# so one thread each, where a test asks for no more.
OMP_NUM_THREADS=1 "$PYTHON" -c 'import sys; del sys.path[0]; import pytest; sys.exit(pytest.main())' \
  -n auto --dist worksteal "$@"
