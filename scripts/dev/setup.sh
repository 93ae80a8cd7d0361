#!/usr/bin/env bash
# Sets this folder up for work on it: an environment with torch and the tests' packages, and the
# library installed in place. The same command again compiles what has changed.
#
#   bash scripts/dev/setup.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# shellcheck source=scripts/setup_env.sh
. scripts/setup_env.sh

find_python
ensure_compiler
install_packages "setuptools>=77" ninja pytest pytest-xdist hypothesis numpy
say "building and installing in place"
"$PYTHON" -m pip install -q --no-build-isolation --no-deps -e .
say "done; one test: $PYTHON -m pytest tests/test_update.py -k ring"
