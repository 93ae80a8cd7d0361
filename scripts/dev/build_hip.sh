#!/usr/bin/env bash
# Builds and checks the library for AMD GPUs: build/hip/libcausal_conv1d_hip.so.
#
#   bash scripts/dev/build_hip.sh
#
# It takes the hipcc on PATH or that HIPCC names. On x86-64 Debian without one it takes Debian's
# packages, without installing them: LLVM 19 of this release, and HIP 5.7 of trixie, whose own compiler
# would need a newer glibc (400 MB in build/hip-tools). PYTORCH_ROCM_ARCH names
# other GPUs than the usual three.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# shellcheck source=scripts/setup_env.sh
. scripts/setup_env.sh

get_debian_hipcc() {
  local tools=$PWD/build/hip-tools root=$PWD/build/hip-tools/usr
  if ! [ -x "$tools/hipcc" ]; then
    rm -rf "$tools"
    mkdir -p "$tools"
    # shellcheck source=scripts/dev/private_apt.sh
    . scripts/dev/private_apt.sh
    private_apt "$tools/apt-llvm" amd64 "$(. /etc/os-release && echo "$VERSION_CODENAME")" main
    unpack_packages "$tools" clang-19 clang-tools-19 libclang-common-19-dev libclang-cpp19 libllvm19 \
      lld-19 llvm-19 llvm-19-linker-tools
    private_apt "$tools/apt-hip" amd64 trixie main
    unpack_packages "$tools" hipcc libamdhip64-5 libamdhip64-dev rocm-device-libs-17 \
      libfile-which-perl liburi-encode-perl
    unset APT_CONFIG
    # hipcc asks for the compilers of its own release.
    ln -s clang "$root/lib/llvm-19/bin/clang-17"
    ln -s clang++ "$root/lib/llvm-19/bin/clang++-17"
    cat >"$tools/hipcc" <<END
#!/bin/sh
export HIP_PLATFORM=amd HIP_PATH=$root ROCM_PATH=$root HIP_CLANG_PATH=$root/lib/llvm-19/bin
export DEVICE_LIB_PATH=$root/lib/llvm-17/lib/clang/17/amdgcn/bitcode PERL5LIB=$root/share/perl5
export LD_LIBRARY_PATH=$root/lib/x86_64-linux-gnu:$root/lib/llvm-19/lib
exec $root/bin/hipcc "\$@"
END
    chmod +x "$tools/hipcc"
  fi
  export HIPCC=$tools/hipcc ROCM_PATH=$root
}

find_python
if [ -z "${HIPCC:-}" ] && ! command -v hipcc >/dev/null; then
  say "hipcc from Debian"
  get_debian_hipcc
fi
say "the library for AMD GPUs"
cmake -S . -B build/hip -DCAUSAL_CONV1D_HIP=ON -DCAUSAL_CONV1D_CUDA=OFF -DCAUSAL_CONV1D_PYTHON=ON
cmake --build build/hip -j "${MAX_JOBS:-$(nproc)}" --target causal_conv1d_hip
say "what is in it"
"$PYTHON" scripts/dev/check_hip.py build/hip/libcausal_conv1d_hip.so \
  ${PYTORCH_ROCM_ARCH:+--architectures "${PYTORCH_ROCM_ARCH//[; ]/,}"}
