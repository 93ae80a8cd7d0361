#!/usr/bin/env bash
# On a machine with two or more NVIDIA GPUs, with this library installed for its python3: the tests
# that need a second GPU, a small model trained on one and on two, and the benchmark.
#
#   bash scripts/dev/two_gpus.sh
#
# Logs go to OUT (default: build/gpu), and there into one file as well: logs.tgz. NVLink multicast
# stays off.
set -uo pipefail
cd "$(dirname "$0")/../.."
OUT=${OUT:-build/gpu}
mkdir -p "$OUT"
export NCCL_NVLS_ENABLE=0 OMP_NUM_THREADS=4

status=0
run() { # name, command: its whole output into a log, the end of it here
  local name=$1
  shift
  echo "== $name: $*"
  if "$@" >"$OUT/$name.log" 2>&1; then echo "$name: ok"; else status=1; echo "$name: FAILED"; fi
  tail -n 30 "$OUT/$name.log"
}
torchrun=(python3 -m torch.distributed.run --standalone --nproc-per-node)

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
# Without the source folder, which has no compiled libraries, on the path.
run tests timeout 280 python3 -c 'import sys; del sys.path[0]; import pytest; sys.exit(pytest.main())' \
  tests/test_cp.py tests/test_modes.py tests/test_distributed.py --device cuda -q -rs \
  -k "nccl or gpu"
for ranks in 1 2; do
  run "train$ranks" timeout 100 "${torchrun[@]}" "$ranks" docs/examples/train_sharded.py --steps 30
done
run benchmark timeout 200 "${torchrun[@]}" 2 benchmarks/benchmark_cp.py --json "$OUT/benchmark_cp.json"
tar -czf "$OUT/logs.tgz" -C "$OUT" --exclude logs.tgz .
exit $status
