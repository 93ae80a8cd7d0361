#!/usr/bin/env bash
# Puts the compiler of CUDA 12.4 into a folder, beside whatever CUDA the machine has, for wheels that
# JetPack 6 can load (a CUDA 13 build needs a newer driver than it has). x86-64 only; 350 MB.
#
#   bash scripts/dev/get_cuda12.sh FOLDER
#   CUDACXX=FOLDER/bin/nvcc python3 scripts/dev/build_wheel.py --machine aarch64
#
# The programs are of Debian trixie's non-free packages, unpacked and not installed (no root, no
# chroot; needs apt and Debian's archive keyring); the headers and libcudart of NVIDIA's on PyPI.
set -euo pipefail
[ $# = 1 ] || { sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 2; }
mkdir -p "$1"
folder=$(realpath "$1")
# shellcheck source=scripts/dev/private_apt.sh
. "$(dirname "${BASH_SOURCE[0]}")/private_apt.sh"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

private_apt "$work/apt" amd64 trixie "main non-free"
unpack_packages "$work/unpacked" nvidia-cuda-toolkit libcu++-dev libcub-dev libthrust-dev
python3 -m pip install -q --no-deps --target "$work/pypi" \
  nvidia-cuda-runtime-cu12==12.4.127 nvidia-cuda-nvcc-cu12==12.4.131
find "$work/pypi" \( -name '__init__.py' -o -name '*.pyc' \) -delete

# The usual layout of a toolkit.
mkdir -p "$folder/bin" "$folder/nvvm" "$folder/include" "$folder/lib64"
debian=$work/unpacked/usr/lib/nvidia-cuda-toolkit
cp -r "$debian"/bin/{nvcc,cicc,crt} "$work"/unpacked/usr/bin/{cudafe++,ptxas,fatbinary,nvlink,bin2c,cuobjdump} "$folder/bin/"
cp -r "$debian/libdevice" "$folder/nvvm/"
cp -r "$work"/pypi/nvidia/cuda_{nvcc,runtime}/include/* "$work"/unpacked/usr/include/{cuda,nv,cub,thrust} "$folder/include/"
cp "$work/pypi/nvidia/cuda_runtime/lib/libcudart.so.12" "$folder/lib64/"
ln -sf libcudart.so.12 "$folder/lib64/libcudart.so"
# The static libraries are only in a package of 0.9 GB. CMake's checks name them; nothing is of them.
echo 'INPUT(-lcudart)' >"$folder/lib64/libcudart_static.a"
echo '!<arch>' >"$folder/lib64/libcudadevrt.a"
cat >"$folder/bin/nvcc.profile" <<'PROFILE'
TOP                = $(_HERE_)/..
NVVMIR_LIBRARY_DIR = $(TOP)/nvvm/libdevice
PATH              += $(_HERE_):
INCLUDES          += "-I$(TOP)/include" $(_SPACE_)
LIBRARIES         =+ $(_SPACE_) "-L$(TOP)/lib64"
PROFILE
"$folder/bin/nvcc" --version | tail -n 2
