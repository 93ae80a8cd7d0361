#!/usr/bin/env bash
# The checks that need no build: format and lint of Python and C++, and Python's types.
#
#   bash scripts/dev/lint.sh [--fix]
#
# --fix writes what the formatters and linters can put right by themselves.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# shellcheck source=scripts/setup_env.sh
. scripts/setup_env.sh

find_python
tools=$PWD/build/tools # a folder of their own: the environment may have other versions
if ! cmp -s scripts/dev/pinned.txt "$tools/pinned.txt"; then
  rm -rf "$tools"
  "$PYTHON" -m pip install -q --target "$tools" -c scripts/dev/pinned.txt ruff clang-format mypy
  cp scripts/dev/pinned.txt "$tools"
fi

lint=() format=(--check) clang=(--dry-run -Werror)
if [ "${1:-}" = --fix ]; then lint=(--fix) format=() clang=(-i); fi
"$tools/bin/ruff" check "${lint[@]}" .
"$tools/bin/ruff" format "${format[@]}" .
find csrc tests/cpp tests/gpu_on_cpu docs/examples -name '*.[ch]' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.inl' |
  xargs env PYTHONPATH="$tools" "$tools/bin/clang-format" "${clang[@]}"
PYTHONPATH=$tools "$PYTHON" -m mypy
