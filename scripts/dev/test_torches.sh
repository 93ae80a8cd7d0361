#!/usr/bin/env bash
# One wheel under many torches: installs the same file beside each torch named and runs the test
# suite there, on the CPU, then prints a table. Nothing outside build/torches is changed.
#
#   bash scripts/dev/test_torches.sh [TORCH...] [-- PYTEST OPTIONS]
#
# A TORCH is one of
#   pypi:VERSION      from the package index, in a virtual environment of PYTHON (default: python3).
#                     Of a torch with CUDA only its own wheel and libcudart are fetched (0.5 to 0.9
#                     GB); scripts/dev/stub_cuda_libraries.py stands in for the rest.
#   debian:SUITE      the Python and torch of a Debian release, unpacked with debootstrap and entered
#                     with chroot. Needs root; 2 GB. In November 2026 trixie has torch 2.6 and
#                     Python 3.13, sid 2.14 and 3.14.
# The default is debian:trixie pypi:2.5.1 pypi:2.9.1 pypi:2.13.0 debian:sid pypi:2.15.0.
# WHEEL is the wheel (default: built here). WORKERS is the number of pytest's processes (default: 2).
# Logs, and each environment for a second run, stay in build/torches; one takes 2 to 4 GB.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# shellcheck source=scripts/setup_env.sh
. scripts/setup_env.sh

torches=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  case $1 in
  pypi:?* | debian:?*) torches+=("$1") ;;
  *) fail "'$1' is neither pypi:VERSION nor debian:SUITE" ;;
  esac
  shift
done
[ $# -eq 0 ] || shift
[ ${#torches[@]} -gt 0 ] ||
  torches=(debian:trixie pypi:2.5.1 pypi:2.9.1 pypi:2.13.0 debian:sid pypi:2.15.0)
options=(-q -n "${WORKERS:-2}" --dist worksteal -p no:cacheprovider --ignore tests/ecosystem
  --ignore tests/test_docs.py --ignore tests/test_benchmarks.py "$@") # about the repository, not torch

host_python=${PYTHON:-python3}
if [ -z "${WHEEL:-}" ]; then
  find_python
  ensure_compiler
  build_wheel
fi
WHEEL=$(realpath "$WHEEL")
folder=$PWD/build/torches
mkdir -p "$folder"
table=$folder/table.md
printf '%s\n' "| from | torch | Python | operators by | result | date |" \
  "|---|---|---|---|---|---|" >"$table"

facts='import platform, torch, causal_conv1d._library as l
print(f"{torch.__version__} | {platform.python_version()} | {l.cpu.registration}", end="")'

# Each of these makes the environment $place if it is not there, installs the wheel and defines
# run_python_there and run_tests.

pypi() {
  python=$place/bin/python
  if ! [ -e "$place/ready" ]; then
    rm -rf "$place"
    "$host_python" -m venv "$place"
    "$python" -m pip install -q --no-deps "torch==$1"
    # What torch imports, and the libcudart of its CUDA.
    "$python" - >"$place/requirements.txt" <<'PYTHON'
import re
from importlib.metadata import requires
for line in requires("torch"):
    requirement, _, marker = line.partition(";")
    name = re.match(r"[\w.-]+", requirement)[0]
    version = re.search(r"==([\w.]+)", requirement)
    if name == "cuda-toolkit":
        print(f"cuda-toolkit[cudart]=={version[1]}")
    elif name.startswith("nvidia-cuda-runtime"):
        print(f"{name}=={version[1]}")
    elif not re.match("nvidia|cuda|triton", name) and "extra" not in marker:
        print(line.replace("(", "").replace(")", ""))
PYTHON
    "$python" -m pip install -q -r "$place/requirements.txt" numpy pytest pytest-xdist hypothesis
    local lib
    lib=$("$python" -c 'import sysconfig; print(sysconfig.get_path("platlib"))')/torch/lib
    "$python" scripts/dev/stub_cuda_libraries.py "$lib" >/dev/null
    touch "$place/ready"
  fi
  "$python" -m pip install -q --no-deps --force-reinstall "$WHEEL"
  run_python_there() { (cd / && "$python" "$@"); }
  run_tests() { "$place/bin/pytest" tests "${options[@]}"; }
}

debian() {
  [ "$(id -u)" = 0 ] || fail "debian:$1 needs root, for debootstrap and chroot"
  if ! [ -e "$place/ready" ]; then
    command -v debootstrap >/dev/null || apt_install debootstrap debootstrap
    rm -rf "$place"
    local packages=python3-torch,libtorch-dev,python3-numpy,python3-pip,python3-dev,g++,git,patch
    packages+=,python3-pytest,python3-pytest-xdist,python3-hypothesis
    debootstrap --variant=minbase --include="$packages" "$1" "$place" >/dev/null
    touch "$place/ready"
  fi
  # In a mount namespace, so that /proc is gone from the folder when the command ends.
  enter() {
    unshare --mount sh -c 'mount --bind /proc "$0/proc" && exec chroot "$0" "$@"' "$place" "$@"
  }
  rm -rf "$place/causal_conv1d"
  mkdir "$place/causal_conv1d"
  cp -r tests scripts patches pyproject.toml "$WHEEL" "$place/causal_conv1d"
  run_python_there() { enter env -C / python3 "$@"; }
  run_tests() { enter env -C /causal_conv1d python3 -m pytest tests "${options[@]}"; }
  run_python_there -m pip install -q --no-index --no-deps --force-reinstall --break-system-packages \
    --root-user-action ignore "/causal_conv1d/$(basename "$WHEEL")"
}

status=0
for name in "${torches[@]}"; do
  say "$name"
  place=$folder/${name/:/-}
  log=$place.log
  "${name%%:*}" "${name#*:}"
  run_python_there -m causal_conv1d --no-speed >"$log" || status=1
  tail -n 1 "$log"
  run_tests >>"$log" 2>&1 || status=1
  grep -E '^(FAILED|ERROR)' "$log" || true
  result=$(tail -n 1 "$log" | tr -d '=' | sed 's/^ *//; s/ in [0-9].*//')
  echo "$result"
  echo "| $name | $(run_python_there -c "$facts" 2>/dev/null) | $result | $(date -u +%F) |" >>"$table"
done
say "$(basename "$WHEEL")"
cat "$table"
exit $status
