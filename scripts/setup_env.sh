# Sourced by the other scripts, from the repository's root. Needs bash.
#
#   find_python             sets PYTHON: the python3 on PATH if it has torch and takes packages,
#                           else that of .venv, which it makes (with torch: TORCH, below)
#   install_packages P...   what is missing of these, by pip, in the version of scripts/dev/pinned.txt
#   ensure_compiler         a C++ compiler and CMake
#   ensure_googletest       GoogleTest
#   ensure_onnxruntime_headers  exports CAUSAL_CONV1D_ONNXRUNTIME_INCLUDE, the folder of ONNX Runtime's
#   ensure_pkg_config       pkg-config
#   build_wheel             sets WHEEL, and WHEEL_LOG: the build's output; builds only if the sources
#                           or the settings have changed since the last time, and shows how far it is
#   install_library         find_python, ensure_compiler, build_wheel, and installs that wheel
#   run_python ARGS...      PYTHON, with the source folder not on its path
#
# TORCH is the requirement given to pip where torch is missing, by default torch==2.13.0.

say() { printf '\n== %s\n' "$*"; }
fail() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

# apt_install COMMAND-OR-FILE PACKAGES...: installs Debian packages for what is missing, or says how.
apt_install() {
  local what=$1
  shift
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    say "apt-get install $*"
    # The package lists may be missing or old, hence the second try.
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$@" >/dev/null 2>&1 ||
      { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$@" >/dev/null; } ||
      fail "$what is missing and apt-get could not install it: $*"
  else
    fail "$what is missing; install it (Debian and Ubuntu: sudo apt-get install $*) and start again"
  fi
}

has_torch() { "$1" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)'; }

# A distribution's own Python refuses packages from pip (PEP 668).
takes_packages() {
  "$1" - <<'PYTHON'
import os, sys, sysconfig
marker = os.path.join(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED")
sys.exit(sys.prefix == sys.base_prefix and os.path.exists(marker))
PYTHON
}

find_python() {
  [ -z "${PYTHON:-}" ] || return 0
  command -v python3 >/dev/null || apt_install "python3" python3 python3-venv python3-pip
  python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "python3 on PATH is $(python3 -V), but Python >= 3.10 is needed"
  if has_torch python3 && takes_packages python3 && python3 -m pip --version >/dev/null 2>&1; then
    PYTHON=$(command -v python3)
  else
    if ! [ -x .venv/bin/python ] || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
      local options=()
      if has_torch python3; then options=(--system-site-packages); fi
      say "python3 has no torch, or takes no packages: making .venv"
      python3 -m venv --clear "${options[@]}" .venv >/dev/null 2>&1 || {
        apt_install "Python's venv module" python3-venv
        python3 -m venv --clear "${options[@]}" .venv
      }
    fi
    PYTHON=$PWD/.venv/bin/python
    if ! has_torch "$PYTHON"; then
      say "pip install ${TORCH:-torch==2.13.0}"
      local quiet=-q
      if [ -t 1 ]; then quiet=; fi # pip shows how far the download is
      # shellcheck disable=SC2086
      "$PYTHON" -m pip install $quiet "${TORCH:-torch==2.13.0}" numpy # torch warns without NumPy
    fi
  fi
  # Programs of this Python's packages: cmake, ninja, clang-format.
  PATH=$("$PYTHON" -c 'import site, sysconfig
print(sysconfig.get_path("scripts") + ":" + site.getuserbase() + "/bin")'):$PATH
  # NVIDIA's packages leave nvcc off the PATH.
  if ! command -v nvcc >/dev/null && [ -x /usr/local/cuda/bin/nvcc ]; then
    PATH=$PATH:/usr/local/cuda/bin
  fi
  export PATH
  say "$("$PYTHON" -V) in $PYTHON with torch $(run_python -c 'import torch; print(torch.__version__)')"
}

install_packages() {
  local missing
  missing=$(
    "$PYTHON" - "$@" <<'PYTHON'
import sys
from importlib.metadata import PackageNotFoundError, version
with open("scripts/dev/pinned.txt") as file:
    pinned = {line.partition("==")[0]: line.strip() for line in file}
for requirement in sys.argv[1:]:
    requirement = pinned.get(requirement, requirement)
    name, _, wanted = requirement.partition("==")
    try:
        if wanted in ("", version(name)):
            continue
    except PackageNotFoundError:
        pass
    print(requirement)
PYTHON
  )
  # No quotes: each word is a requirement.
  # shellcheck disable=SC2086
  [ -z "$missing" ] || "$PYTHON" -m pip install -q $missing
}

ensure_compiler() {
  command -v "${CXX:-c++}" >/dev/null || apt_install "a C++ compiler" g++
  if ! cmake --version >/dev/null 2>&1; then
    install_packages cmake
    hash -r
    cmake --version >/dev/null || fail "CMake is missing; install it: pip install cmake"
  fi
}

ensure_googletest() {
  echo '#include <gtest/gtest.h>' | "${CXX:-c++}" -std=c++17 -E -x c++ - >/dev/null 2>&1 ||
    apt_install "GoogleTest" libgtest-dev
}

ensure_onnxruntime_headers() {
  local folder
  for folder in "${CAUSAL_CONV1D_ONNXRUNTIME_INCLUDE:-}" /usr/include/onnxruntime \
    "$PWD/build/onnxruntime/usr/include/onnxruntime"; do
    if [ -e "$folder/onnxruntime_c_api.h" ]; then
      export CAUSAL_CONV1D_ONNXRUNTIME_INCLUDE=$folder
      return
    fi
  done
  say "fetching ONNX Runtime's headers"
  bash scripts/dev/get_onnxruntime_headers.sh build/onnxruntime ||
    fail "ONNX Runtime's headers are missing; install them (Debian 13: apt-get install libonnxruntime-dev), or set CAUSAL_CONV1D_ONNXRUNTIME_INCLUDE to their folder"
  export CAUSAL_CONV1D_ONNXRUNTIME_INCLUDE=$folder
}

ensure_pkg_config() {
  command -v pkg-config >/dev/null || apt_install "pkg-config" pkg-config
}

# What the wheel depends on. Files under csrc/ may be new and not yet known to git.
fingerprint() {
  {
    find csrc cmake causal_conv1d causal_conv1d_cuda ./*.py -type f ! -name '*.so' ! -name '*.pyc' -print0 |
      LC_ALL=C sort -z | xargs -0 sha256sum CMakeLists.txt README.md pyproject.toml
    printf '%s\n' "${TORCH_CUDA_ARCH_LIST:-}" "${CAUSAL_CONV1D_CUDA:-}" "${CUDACXX:-}" \
      "${CUDA_HOME:-}" "${CMAKE_ARGS:-}" "${CXX:-}" "${CXXFLAGS:-}" "$(command -v nvcc)" "$(uname -m)"
    nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null || true
  } | sha256sum | cut -c 1-16
}

# follow LOG: while this script lives and until it is killed, how far the build with this log is.
follow() {
  local start=$SECONDS pause=10 line='  %s %d s\n' step
  if [ -t 1 ]; then pause=1 line='\r  %s %d s '; fi
  while sleep "$pause" >/dev/null 2>&1 && kill -0 $$ 2>/dev/null; do
    step=$(grep -o '^ *\[[0-9]*/[0-9]*\]' "$1" | tail -n 1 | tr -d ' ') || true # Ninja's
    # shellcheck disable=SC2059
    printf "$line" "${step:-starting,}" $((SECONDS - start))
  done
}

build_wheel() {
  local folder follower status=0
  folder=$PWD/build/wheel-$(fingerprint)
  WHEEL_LOG=$folder/build.log
  if ! compgen -G "$folder/*.whl" >/dev/null; then
    say "building the wheel (log: $WHEEL_LOG)"
    rm -rf build/wheel-*
    mkdir -p "$folder"
    follow "$WHEEL_LOG" &
    follower=$!
    # BUILD_WITH: a command to start it with; BUILD_OPTIONS: more for pip. No quotes: their words.
    # shellcheck disable=SC2086
    ${BUILD_WITH:-} "$PYTHON" -m pip wheel -v --no-deps ${BUILD_OPTIONS:-} -w "$folder" . >"$WHEEL_LOG" 2>&1 || status=$?
    kill "$follower"
    wait "$follower" 2>/dev/null || true
    [ ! -t 1 ] || printf '\r\033[K'
    if [ "$status" != 0 ]; then
      tail -n 40 "$WHEEL_LOG" >&2
      fail "the build failed; its whole output is in $WHEEL_LOG"
    fi
    grep -o 'causal_conv1d: .*' "$WHEEL_LOG" | head -n 1 || true
  fi
  WHEEL=$(echo "$folder"/*.whl)
}

install_library() {
  find_python
  ensure_compiler
  build_wheel
  say "installing $(basename "$WHEEL")"
  "$PYTHON" -m pip install -q --no-deps --force-reinstall "$WHEEL"
}

# The source folder has no compiled libraries, so its causal_conv1d must not win over the installed.
run_python() { (cd / && exec "$PYTHON" "$@"); }
