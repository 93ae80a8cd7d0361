#!/usr/bin/env bash
# Builds the documentation as a site in build/site; a link that leads nowhere is an error. What it
# needs (the extra "docs" of pyproject.toml) is installed into build/docs-tools the first time; from
# then on no network is needed. Neither torch nor this library is.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
tools=$PWD/build/docs-tools
needs=$(sed -n '/^docs = \[/,/^\]/s/^ *"\(.*\)",$/\1/p' pyproject.toml)
if [ "$needs" != "$(cat "$tools/installed" 2>/dev/null)" ]; then
  rm -rf "$tools"
  # No quotes: one requirement a word.
  # shellcheck disable=SC2086
  "$python" -m pip install -q --target "$tools" $needs
  printf '%s\n' "$needs" >"$tools/installed"
fi
NO_MKDOCS_2_WARNING=1 PYTHONPATH=$tools "$python" -m mkdocs build --strict "$@"
echo "build/site/index.html"
