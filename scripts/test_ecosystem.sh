#!/usr/bin/env bash
# What others build on this library, run with it: the newest releases from the package index, each in
# an environment of its own under build/ecosystem, and then tests/ecosystem/test_NAME.py.
#
#   bash scripts/test_ecosystem.sh [NAME...] [PYTEST OPTIONS] # recipe kernels transformers fla mamba_ssm
#
# "recipe" is mamba_ssm's installation: the lines as RECIPE prints them, run without a network.
#
# WHEELHOUSE is a folder of wheels to use instead of the index, for a machine without network; they
# are put beside python3's own packages. mamba_ssm is tested in several releases: its wheels lie in
# WHEELHOUSE/mamba_ssm, and what the recipe installs in WHEELHOUSE/recipe. WHEEL is this library's
# wheel (default: built here). MAMBA_VERSIONS, separated by spaces, are other releases of mamba_ssm
# than those below. MAMBA_SOURCES is a checkout of state-spaces/mamba, whose tests/ops (which no
# release on the index has) are then run too.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/setup_env.sh
. scripts/setup_env.sh

# In this file, between the comments <!-- recipe --> and <!-- end of recipe -->.
RECIPE=${RECIPE:-README.md}
declare -A packages=(
  [recipe]="setuptools wheel packaging ninja einops transformers<5 triton" # and mamba-ssm
  [kernels]="kernels"
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
[ ${#names[@]} -gt 0 ] || names=(recipe kernels transformers fla mamba_ssm)

find_python
if [ -z "${WHEEL:-}" ]; then
  ensure_compiler
  build_wheel
fi
[ -n "${WHEELHOUSE:-}" ] || install_packages pytest numpy

# fresh_venv FOLDER: an environment that sees PYTHON's packages, so that pip finds torch there and
# leaves it alone. Prints its own folder of packages.
fresh_venv() {
  local own
  "$PYTHON" -m venv --clear "$1"
  own=$("$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  run_python -c 'import sys; print(*(path for path in sys.path if path.endswith("-packages")), sep="\n")' >"$own/parent.pth"
  echo "$own"
}

# environment NAME: sets SITE, a folder of packages that the tests find before PYTHON's own.
environment() {
  SITE=$PWD/build/ecosystem/$1
  if [ -n "${WHEELHOUSE:-}" ]; then
    rm -rf "$SITE"
    "$PYTHON" -m pip install -q --no-index --no-deps --target "$SITE" "$WHEELHOUSE"/*.whl
  else
    [ -x "$SITE/venv/bin/python" ] || fresh_venv "$SITE/venv" >/dev/null
    local python=$SITE/venv/bin/python
    # No quotes: each word is a requirement.
    # shellcheck disable=SC2086
    "$python" -m pip install -q --upgrade ${packages[$1]}
    SITE=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
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

# recipe_wheels FOLDER: what the recipe installs, from the index, mamba_ssm as its sources.
recipe_wheels() {
  local venv=$PWD/build/ecosystem/recipe/download partial=$1.partial
  [ ! -d "$1" ] || return 0
  rm -rf "$partial"
  fresh_venv "$venv" >/dev/null
  # No quotes: one requirement a word.
  # shellcheck disable=SC2086
  "$venv/bin/python" -m pip download -q -d "$partial" ${packages[recipe]}
  "$venv/bin/python" -m pip install -q --no-index --find-links "$partial" setuptools wheel packaging
  MAMBA_SKIP_CUDA_BUILD=TRUE "$venv/bin/python" -m pip download -q --no-deps --no-build-isolation \
    --no-binary mamba-ssm -d "$partial" "mamba-ssm==${mamba_versions[0]}"
  mv "$partial" "$1"
}

# recipe: runs RECIPE's lines in a fresh environment that has torch and this library.
recipe() {
  local folder=$PWD/build/ecosystem/recipe own lines wheels offline=()
  lines=$(sed -n '/^<!-- recipe -->/,/^<!-- end of recipe -->/{/^<!--/d;/^```/d;s/^    //;/./p}' "$RECIPE")
  [ -n "$lines" ] || fail "there is no recipe in $RECIPE, between <!-- recipe --> and <!-- end of recipe -->"
  wheels=${WHEELHOUSE:+$WHEELHOUSE/recipe}
  wheels=${wheels:-$folder/wheels}
  [ -n "${WHEELHOUSE:-}" ] || recipe_wheels "$wheels"
  own=$(fresh_venv "$folder/venv")
  "$folder/venv/bin/python" -m pip install -q --no-index --no-deps "$WHEEL"
  if [ "$(id -u)" = 0 ]; then offline=(unshare -n); fi
  say "the lines of $RECIPE"
  printf '%s\n' "$lines"
  env PATH="$folder/venv/bin:$PATH" PIP_NO_INDEX=1 PIP_FIND_LINKS="$wheels" PIP_QUIET=1 PIP_NO_COMPILE=1 \
    PIP_NO_CACHE_DIR=1 CAUSAL_CONV1D_CUDA=0 "${offline[@]}" bash -euo pipefail -c "$lines" | tee "$folder/output"
  grep -q '✓ Mamba module' "$folder/output" || fail "the recipe's Mamba module was not verified"
  [ ! -e "$own/torch" ] || fail "the recipe has installed a torch"

  say "the same without Triton"
  "$folder/venv/bin/python" -m pip uninstall -q -y triton
  if "$folder/venv/bin/python" -c 'import triton' 2>/dev/null; then
    echo "not tried: $PYTHON has a Triton of its own"
  elif "$folder/venv/bin/python" scripts/verify.py | tee "$folder/output"; then
    fail "scripts/verify.py passed without Triton"
  else
    grep -q '✗ Mamba module .* cannot be imported without triton: pip install triton' "$folder/output" ||
      fail "scripts/verify.py did not say that Triton is missing"
  fi
}

# tests PATH FILES-AND-OPTIONS...: pytest, with PATH before all else that Python finds.
tests() {
  PYTHONPATH=$1 "$PYTHON" -c 'import sys; del sys.path[0]; import pytest; sys.exit(pytest.main())' \
    "${@:2}" || status=1
}

# mamba_scan_tests OPTIONS...: those of the newest mamba_ssm's scan that MAMBA_SOURCES has. They are
# for CUDA; on a CPU they run there instead, without the sizes that take minutes.
mamba_scan_tests() {
  local file=$PWD/build/ecosystem/mamba_ssm/test_selective_scan.py few=()
  say "mamba_ssm's own tests of the scan"
  cp "$MAMBA_SOURCES/tests/ops/test_selective_scan.py" "$file"
  case " $* " in
  *" --device cuda "* | *" --device=cuda "*) ;;
  *)
    sed -i -E "s/([\"'])cuda\1/\1cpu\1/" "$file"
    few=(-k "not 2048 and not 4096")
    ;;
  esac
  tests "$MAMBA:$SITE" -p no:cacheprovider "${few[@]}" "$file"
}

status=0
for name in "${names[@]}"; do
  if [ "$name" = recipe ]; then
    recipe
    continue
  fi
  environment "$name"
  if [ "$name" = mamba_ssm ]; then
    for version in "${mamba_versions[@]}"; do
      mamba "$version"
      say "mamba_ssm $version"
      MAMBA_SSM_VERSION=$version tests "$MAMBA:$SITE" tests/ecosystem/test_mamba_ssm.py "$@"
      [ "$version" != 2.2.4 ] || tests "$MAMBA:$SITE" tests/ecosystem/test_patches.py "$@"
    done
    say "transformers with mamba_ssm $version"
    tests "$MAMBA:$SITE" tests/ecosystem/test_transformers_mamba_ssm.py "$@"
    [ -z "${MAMBA_SOURCES:-}" ] || mamba_scan_tests "$@"
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
  [ "$name" != transformers ] || tests "$SITE" tests/ecosystem/test_transformers_scan.py "$@"
done
exit $status
