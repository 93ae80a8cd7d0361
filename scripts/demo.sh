#!/usr/bin/env bash
# Sets up, checks the installation (python -m causal_conv1d), and trains and runs a small language
# model. Arguments go to scripts/demo.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/setup_env.sh
. scripts/setup_env.sh

install_library

say "python -m causal_conv1d"
run_python -m causal_conv1d

say "a language model that trains through causal_conv1d_fn and writes through causal_conv1d_update"
run_python "$PWD/scripts/demo.py" "$@"
