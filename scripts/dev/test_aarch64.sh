#!/usr/bin/env bash
# Runs an aarch64 wheel on an x86-64 machine: under qemu-user, with the Python and torch of Debian's
# arm64 packages, which are unpacked into a folder and not installed (no root, chroot or binfmt).
#
#   bash scripts/dev/test_aarch64.sh WHEEL [PYTEST ARGUMENTS]
#
# pip installs the file; the doctor and a part of the tests (by default those of TESTS below) run in
# one process, as importing torch alone takes minutes there; and the CPU library's inner loops are
# searched for vector code. It needs qemu-user and apt with Debian's archive keyring, and fetches
# 215 MB on the first run. SUITE chooses Debian's release (default: sid), ARM64_ROOT the folder
# (default: build/arm64-SUITE).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
[ $# -ge 1 ] || { sed -n '2,13s/^# \{0,1\}//p' "$0"; exit 2; }
wheel=$(realpath "$1")
shift
TESTS=(tests/test_{forward,backward,update,varlen_states,bitwise}.py
  -k "lengths_around_the_vector or types or varlen or alignment or test_update.py and every_option")
[ $# -gt 0 ] || set -- "${TESTS[@]}"
suite=${SUITE:-sid}
root=$(realpath -m "${ARM64_ROOT:-build/arm64-$suite}")
fail() { echo "error: $*" >&2; exit 1; }
command -v qemu-aarch64 >/dev/null || fail "qemu-aarch64 is missing; install it: apt-get install qemu-user"

if ! [ -e "$root/complete" ]; then
  echo "== Debian $suite's arm64 packages into $root"
  # shellcheck source=scripts/dev/private_apt.sh
  . scripts/dev/private_apt.sh
  apt=$root.apt
  rm -rf "$root" "$apt"
  mkdir -p "$root"
  private_apt "$apt" arm64 "$suite" main
  packages=$(apt-get install -s python3-torch python3-numpy python3-pip python3-pytest \
    python3-hypothesis | sed -n 's/^Inst \([^ ]*\).*/\1/p')
  # shellcheck disable=SC2086
  unpack_packages "$root" $packages
  [ -e "$root/lib" ] || ln -s usr/lib "$root/lib" # the loader is in /lib
  rm -rf "$apt"
  touch "$root/complete"
fi
usr=$root/usr
python=$(compgen -G "$usr/bin/python3.[0-9]*" | grep -E '/python3\.[0-9]+$' | head -n 1)
libraries=$usr/lib/aarch64-linux-gnu
site=$root/site
run() {
  qemu-aarch64 -L "$root" -E PYTHONHOME="$usr" -E PYTHONPATH="$site" -E PYTHONDONTWRITEBYTECODE=1 \
    -E LD_LIBRARY_PATH="$libraries:$libraries/blas:$libraries/lapack" "$python" "$@"
}

echo "== pip install $(basename "$wheel")"
rm -rf "$site"
run -m pip install -q --no-index --no-deps --root-user-action ignore --target "$site" "$wheel"

echo "== the doctor, and pytest $*"
run -c '
import sys
del sys.path[0]  # the source folder, which has no compiled library
arguments, sys.argv[1:] = sys.argv[1:], ["--no-speed"]
from causal_conv1d import _library, __main__ as doctor
assert _library.cpu.text("causal_conv1d_cpu_isa") == "neon"
import pytest
sys.exit(doctor.main() or pytest.main(["-q", "-p", "no:cacheprovider", *arguments]))
' "$@"

echo "== the inner loops"
python3 scripts/dev/check_neon.py "$site/causal_conv1d/libcausal_conv1d_cpu.so"
