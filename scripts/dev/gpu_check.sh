#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: installs a wheel (the one named by WHEEL, else one built here for
# this GPU), then runs the doctor, the test suite with --device cuda and compute-sanitizer.
#
#   bash scripts/dev/gpu_check.sh [doctor] [tests] [sanitizer] [options] [ctypes] [benchmark] [host]
#
# The default is the first three; options are CASES random calls with options and as many of the
# pool, from seed SEED; ctypes is the suite with the operators registered from Python, host the time
# of a call on the host.
#
# Python is python3 on PATH, with torch. Wheels for what else is needed may lie in WHEELHOUSE.
# Logs go to OUT (default: build/gpu), and there into one file as well: logs.tgz.
set -euo pipefail
cd "$(dirname "$0")/../.."
OUT=${OUT:-build/gpu}
mkdir -p "$OUT"
site=$(mktemp -d)
export PYTHONPATH=$site
steps=("$@")
[ ${#steps[@]} -gt 0 ] || steps=(doctor tests sanitizer)

if [ -n "${WHEELHOUSE:-}" ]; then
  python3 -m pip install -q --no-index --no-deps --target "$site" "$WHEELHOUSE"/*.whl
fi
wheel=${WHEEL:-}
if [ -z "$wheel" ]; then
  TORCH_CUDA_ARCH_LIST=native python3 -m pip wheel -v --no-build-isolation --no-deps -w "$site/dist" . \
    >"$OUT/build.log" 2>&1
  wheel=$(echo "$site"/dist/*.whl)
fi
python3 -m pip install -q --no-index --no-deps --target "$site" "$wheel"
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
echo "wheel: $(basename "$wheel")"

status=0
run() { # name, command: its whole output into a log, the end of it here
  local name=$1
  shift
  echo "== $name: $*"
  if "$@" >"$OUT/$name.log" 2>&1; then echo "$name: ok"; else status=1; echo "$name: FAILED"; fi
  tail -n "${TAIL:-25}" "$OUT/$name.log"
}

# Without the source folder, which has no compiled libraries, on the path.
suite=(python3 -c 'import sys; del sys.path[0]; import pytest; sys.exit(pytest.console_main())'
  tests --ignore tests/ecosystem --device cuda -q -n "${WORKERS:-8}" --dist worksteal)

for step in "${steps[@]}"; do
  case $step in
  doctor) run doctor env -C / python3 -m causal_conv1d ;;
  tests) run tests "${suite[@]}" ;;
  ctypes) run ctypes env CAUSAL_CONV1D_REGISTRATION=ctypes "${suite[@]}" ;;
  sanitizer)
    for tool in memcheck racecheck initcheck; do
      run "$tool" compute-sanitizer --tool "$tool" --error-exitcode 1 \
        python3 scripts/dev/sanitizer_cases.py
      for form in options pool; do
        run "$tool-$form" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
          compute-sanitizer --tool "$tool" --error-exitcode 1 \
          python3 scripts/dev/fuzz_options.py --device cuda --of "$form" --cases 200
      done
    done
    ;;
  options)
    for form in options pool; do
      run "random-$form" python3 scripts/dev/fuzz_options.py --device cuda --of "$form" \
        --seed "${SEED:-1}" --cases "${CASES:-2000}"
    done
    ;;
  host) run host python3 benchmarks/benchmark.py --host ;;
  benchmark) TAIL=80 run benchmark python3 benchmarks/benchmark.py --json "$OUT/benchmark.json" ;;
  *) echo "no step $step" && exit 2 ;;
  esac
done
tar -czf "$OUT/logs.tgz" -C "$OUT" --exclude logs.tgz .
exit $status
