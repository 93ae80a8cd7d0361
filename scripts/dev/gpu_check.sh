#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: installs a wheel (the one named by WHEEL, else one built here for
# this GPU), then runs the doctor, the test suite with --device cuda and compute-sanitizer.
#
#   bash scripts/dev/gpu_check.sh [doctor] [tests] [sanitizer] [random] [ctypes] [benchmark] [host]
#
# The default is the first three; random is CASES random calls of each form that fuzz.py knows (or of
# FORMS), from seed SEED on; ctypes is the suite with the operators registered from Python, host the time of a
# call on the host.
#
# Python is python3 on PATH, with torch. Wheels for what else is needed may lie in WHEELHOUSE.
# TOOLS are compute-sanitizer's, by default three; each takes SANITIZED seconds of random calls of each
# form at most.
# LIBRARY takes the place of the wheel's CUDA library: one with PTX alone, for example. LIMIT is the
# most seconds a step may take; FILES are the tests, by default all.
# Logs go to OUT (default: build/gpu), and there into one file as well: logs.tgz.
set -euo pipefail
cd "$(dirname "$0")/../.."
OUT=${OUT:-build/gpu}
mkdir -p "$OUT"
site=$(mktemp -d)
export OUT PYTHONPATH=$site OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} # many processes beside each other
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
if [ -n "${LIBRARY:-}" ]; then
  cp --remove-destination "$LIBRARY" "$site/causal_conv1d/libcausal_conv1d_cuda.so"
fi
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
echo "wheel: $(basename "$wheel")"

trap 'tar -czf "$OUT/logs.tgz" -C "$OUT" --exclude logs.tgz .' EXIT

status=0
run() { # name, command: its whole output into a log, the end of it here
  local name=$1
  shift
  echo "== $name: $*"
  if timeout "${LIMIT:-3600}" "$@" >"$OUT/$name.log" 2>&1; then
    echo "$name: ok"
  else
    echo "$name: FAILED, $?"
    status=1
  fi
  tail -n "${TAIL:-25}" "$OUT/$name.log"
}

# Without the source folder, which has no compiled libraries, on the path.
read -ra files <<<"${FILES:-tests --ignore tests/ecosystem}"
suite=(python3 -c 'import sys; del sys.path[0]; import pytest; sys.exit(pytest.console_main())'
  "${files[@]}" --device cuda -v -n "${WORKERS:-8}" --dist worksteal
  --durations 20)

# fuzz FORM: its random cases, by WORKERS processes, each with a seed of its own.
fuzz() {
  local i processes=() workers=${WORKERS:-8} failed=0
  for ((i = 0; i < workers; ++i)); do
    python3 scripts/dev/fuzz.py --device cuda --of "$1" --seed $((${SEED:-1} + i)) \
      --cases $((${CASES:-2000} / workers + 1)) >"$OUT/random-$1-$i.log" 2>&1 &
    processes+=($!)
  done
  for i in "${processes[@]}"; do wait "$i" || failed=1; done
  tail -qn 1 "$OUT/random-$1"-*.log
  return $failed
}
export -f fuzz

for step in "${steps[@]}"; do
  case $step in
  doctor) run doctor env -C / python3 -m causal_conv1d ;;
  tests) run tests "${suite[@]}" ;;
  ctypes) run ctypes env CAUSAL_CONV1D_REGISTRATION=ctypes "${suite[@]}" ;;
  sanitizer)
    for tool in ${TOOLS:-memcheck racecheck initcheck}; do
      run "$tool" compute-sanitizer --tool "$tool" --error-exitcode 1 \
        python3 scripts/dev/sanitizer_cases.py
      for form in options pool scan state_update; do
        run "$tool-$form" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
          compute-sanitizer --tool "$tool" --error-exitcode 1 \
          python3 scripts/dev/fuzz.py --device cuda --of "$form" --cases 200 \
          --seconds "${SANITIZED:-600}"
      done
    done
    ;;
  random)
    for form in ${FORMS:-options pool scan state_update}; do
      run "random-$form" bash -c "fuzz $form"
    done
    ;;
  host) run host python3 benchmarks/benchmark.py --host ;;
  benchmark) TAIL=80 run benchmark python3 benchmarks/benchmark.py --json "$OUT/benchmark.json" ;;
  *) echo "no step $step" && exit 2 ;;
  esac
done
exit $status
