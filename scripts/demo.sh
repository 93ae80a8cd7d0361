#!/usr/bin/env bash
# Sets up, checks the installation (python -m causal_conv1d), and trains and runs a small language
# model. Arguments go to scripts/demo.py: bash scripts/demo.sh --steps 40 is a shorter one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/setup_env.sh
. scripts/setup_env.sh

cat <<'TEXT'
This takes about three minutes on two cores, Ctrl-C ends it at any time:
  1. torch is installed if python3 has none (its download is 200 MB to 3 GB, and comes on top)
  2. this library is built, a minute or two (or not at all if it was built here before), and installed
  3. it is checked, half a minute
  4. a small language model is trained, a minute, and writes
TEXT

install_library
install_packages tqdm

say "python -m causal_conv1d"
run_python -m causal_conv1d

say "a language model that trains through causal_conv1d_fn and writes through causal_conv1d_update"
run_python "$PWD/scripts/demo.py" "$@"
printf '\nThe library is installed for %s; README.md says how to call it.\n' "$PYTHON"
