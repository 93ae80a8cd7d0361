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
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
[ -e $keyring ] || { echo "error: there is no $keyring; on Debian or Ubuntu: apt-get install debian-archive-keyring" >&2; exit 1; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# An apt of its own: lists, cache and settings in work.
mkdir -p "$work/lists/partial" "$work/cache/archives/partial"
touch "$work/status"
echo "deb [arch=amd64 signed-by=$keyring] http://deb.debian.org/debian trixie main" >"$work/sources.list"
cat >"$work/apt.conf" <<CONF
Dir::State "$work"; Dir::State::status "$work/status"; Dir::Cache "$work/cache";
Dir::Etc::sourcelist "$work/sources.list"; Dir::Etc::sourceparts "/dev/null";
APT::Architecture "amd64"; APT::Architectures { "amd64"; }; APT::Sandbox::User "";
CONF
export APT_CONFIG=$work/apt.conf
apt-get update -qq
(cd "$work" && apt-get download -qq libonnxruntime-dev)
dpkg-deb -x "$work"/libonnxruntime-dev_*.deb "$folder"
