#!/usr/bin/env bash
# What others build on this library, run with it: the newest releases from the package index, each in
# an environment of its own under build/ecosystem, and then tests/ecosystem/test_NAME.py.
#
#   bash scripts/test_ecosystem.sh [transformers] [fla] [mamba_ssm] [PYTEST OPTIONS] # default: all
#
# WHEELHOUSE is a folder of wheels to use instead of the index, for a machine without network; they
# are put beside python3's own packages. mamba_ssm is tested in several releases: its wheels lie in
# WHEELHOUSE/mamba_ssm. WHEEL is this library's wheel (default: built here). MAMBA_VERSIONS, separated
# by spaces, are other releases of mamba_ssm than those below.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/setup_env.sh
. scripts/setup_env.sh

declare -A packages=(
  [transformers]="transformers"
  [fla]="flash-linear-attention fla-core triton"
  [mamba_ssm]="einops transformers triton packaging setuptools wheel"
)
read -ra mamba_versions <<<"${MAMBA_VERSIONS:-2.2.4 2.2.5 2.2.6.post3 2.3.2.post1}"
names=()
while [ $# -gt 0 ] && [ -n "${packages[$1]:-}" ]; do
  names+=("$1")
  shift
done
[ ${#names[@]} -gt 0 ] || names=(transformers fla mamba_ssm)

find_python
if [ -z "${WHEEL:-}" ]; then
  ensure_compiler
  build_wheel
fi
[ -n "${WHEELHOUSE:-}" ] || install_packages pytest numpy

# environment NAME: sets SITE, a folder of packages that the tests find before PYTHON's own.
environment() {
  SITE=$PWD/build/ecosystem/$1
  if [ -n "${WHEELHOUSE:-}" ]; then
    rm -rf "$SITE"
    "$PYTHON" -m pip install -q --no-index --no-deps --target "$SITE" "$WHEELHOUSE"/*.whl
  else
    # An environment that sees PYTHON's packages, so that pip finds torch there and leaves it alone.
    [ -x "$SITE/venv/bin/python" ] || "$PYTHON" -m venv "$SITE/venv"
    local python=$SITE/venv/bin/python
    local own
    own=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    run_python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$own/parent.pth"
    # No quotes: one requirement a word.
    # shellcheck disable=SC2086
    "$python" -m pip install -q --upgrade ${packages[$1]}
    SITE=$own
  fi
  "$PYTHON" -m pip install -q --no-index --no-deps --upgrade --target "$SITE" "$WHEEL"
}

# mamba VERSION: sets MAMBA, a folder with the Python files of that release, its extension not built.
mamba() {
  MAMBA=$PWD/build/ecosystem/mamba_ssm/$1
  [ ! -d "$MAMBA/mamba_ssm" ] || return 0
  if [ -n "${WHEELHOUSE:-}" ]; then
    "$PYTHON" -m pip install -q --no-index --no-deps --target "$MAMBA" "$WHEELHOUSE"/mamba_ssm/mamba_ssm-"$1"-*.whl
  else
    MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE \
      build/ecosystem/mamba_ssm/venv/bin/python -m pip install -q --no-deps --no-build-isolation \
      --target "$MAMBA" "mamba_ssm==$1"
  fi
}

# tests PATH FILES-AND-OPTIONS...: pytest, with PATH before all else that Python finds.
tests() {
  PYTHONPATH=$1 "$PYTHON" -c 'import sys; del sys.path[0]; import pytest; sys.exit(pytest.console_main())' \
    "${@:2}" || status=1
}

status=0
for name in "${names[@]}"; do
  environment "$name"
  if [ "$name" = mamba_ssm ]; then
    say "the selective scan's Triton kernels"
    tests "$SITE" tests/ecosystem/test_selective_scan_triton.py "$@"
    for version in "${mamba_versions[@]}"; do
      mamba "$version"
      say "mamba_ssm $version"
      MAMBA_SSM_VERSION=$version tests "$MAMBA:$SITE" tests/ecosystem/test_mamba_ssm.py "$@"
      [ "$version" != 2.2.4 ] || tests "$MAMBA:$SITE" tests/ecosystem/test_patches.py "$@"
    done
    say "transformers with mamba_ssm $version"
    tests "$MAMBA:$SITE" tests/ecosystem/test_transformers_mamba_ssm.py "$@"
    continue
  fi
  say "$name: $(PYTHONPATH=$SITE run_python - "$name" <<'PYTHON'
import importlib, importlib.metadata, sys
importlib.import_module(sys.argv[1])  # a package that is missing is a failure, not a skipped test
found = importlib.metadata.packages_distributions()[sys.argv[1]]
print(", ".join(f"{each} {importlib.metadata.version(each)}" for each in sorted(set(found))))
PYTHON
  )"
  tests "$SITE" "tests/ecosystem/test_$name.py" "$@"
done
exit $status
