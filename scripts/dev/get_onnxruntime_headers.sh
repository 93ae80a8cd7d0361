#!/usr/bin/env bash
# Puts ONNX Runtime's headers into FOLDER/usr/include/onnxruntime, for
# -DCAUSAL_CONV1D_ONNXRUNTIME_INCLUDE=FOLDER/usr/include/onnxruntime; 85 kB.
#
#   bash scripts/dev/get_onnxruntime_headers.sh FOLDER
#
# They are of Debian trixie's libonnxruntime-dev, unpacked and not installed (no root; needs apt and
# Debian's archive keyring): the packages on PyPI have none.
set -euo pipefail
[ $# = 1 ] || { sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 2; }
mkdir -p "$1"
folder=$(realpath "$1")
# shellcheck source=scripts/dev/private_apt.sh
. "$(dirname "${BASH_SOURCE[0]}")/private_apt.sh"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
private_apt "$work" amd64 trixie main
unpack_packages "$folder" libonnxruntime-dev
