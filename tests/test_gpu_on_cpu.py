"""The CUDA library's fast kernels where there is no GPU, by value: see cuda_stand_in.py."""

import os
import re
import subprocess
import sys
from pathlib import Path

import gpu_source
import gpu_stand_in
import pytest

TESTS = Path(__file__).parent

# Each kernel has 256 threads reverse numbers, by way of shared memory and of lanes; all but the
# first make a mistake that a GPU may not show.
KERNELS = """
#include <cuda_runtime.h>

constexpr int kThreads = 256;

template <int MISTAKE>
__global__ void reverse(const int* from, int* to) {
  __shared__ int staged[kThreads];
  const int i = static_cast<int>(threadIdx.x);
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(&staged[i]));
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, 0;" ::"r"(address), "l"(from + i), "n"(4)
               : "memory");
  asm volatile("cp.async.commit_group;" ::: "memory");
  if (MISTAKE != 1) asm volatile("cp.async.wait_group %0;" ::"n"(0) : "memory");
  if (MISTAKE != 2) __syncthreads();
  int v = staged[i / 32 * 32 + 31 - i % 32];
  if (MISTAKE == 3 && i % 32 < 16) __syncthreads();
  v = __shfl_xor_sync(~0u, v, 0);
  if (MISTAKE == 4) staged[i + 1] = v;
  uint32_t words[2];
  if (MISTAKE == 5) {
    asm("ld.global.v2.b32 {%0, %1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "l"(from + 1));
  }
  if (MISTAKE == 6) __shfl_xor_sync(0xffff, v, 1);
  to[i / 32 * 32 + i % 32] = v;
}

extern "C" int wrong(int mistake) {
  alignas(16) int from[kThreads], to[kThreads];
  void (*const kernels[])(const int*, int*) = {reverse<0>, reverse<1>, reverse<2>, reverse<3>,
                                               reverse<4>, reverse<5>, reverse<6>};
  int count = 0;
  for (int repetition = 0; repetition < 20; ++repetition) {
    for (int i = 0; i < kThreads; ++i) from[i] = i + repetition;
    const auto kernel = kernels[mistake];
    kernel<<<1, kThreads, 0, nullptr>>>(from, to);
    for (int i = 0; i < kThreads; ++i) count += to[i] != i / 32 * 32 + 31 - i % 32 + repetition;
  }
  return count;
}
"""
MESSAGES = {
    3: "threads wait for others that do not come",
    4: "a thread wrote behind a variable in shared memory",
    5: "an access to memory is not aligned",
    6: "not all lanes are asked for",
}


def run(*command, **variables):
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), *filter(None, sys.path)])}
    return subprocess.run(
        [sys.executable, *command],
        cwd=TESTS,
        env=env | variables,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def mistakes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mistakes")
    (folder / "kernels.cpp").write_text(gpu_source.translate(KERNELS))
    sources = (folder / "kernels.cpp", TESTS / "gpu_on_cpu" / "fibers.cpp")
    options = ("-std=c++17", "-O1", "-fPIC", "-shared", "-U_FORTIFY_SOURCE", "-D__CUDA_ARCH__=870")
    gpu_stand_in.run(
        os.environ.get("CXX", "g++"),
        *options,
        f"-I{TESTS}/gpu_on_cpu/cuda",
        *map(str, sources),
        "-o",
        str(folder / "kernels.so"),
    )
    return folder / "kernels.so"


@pytest.mark.parametrize("mistake", range(7))
def test_mistakes_are_noticed(mistakes, mistake):
    code = f"import ctypes, sys; print(ctypes.CDLL(sys.argv[1]).wrong({mistake}))"
    found = run("-c", code, mistakes)
    if mistake in MESSAGES:
        assert found.returncode < 0
        assert re.search(MESSAGES[mistake], found.stderr), found.stderr
    else:
        assert (int(found.stdout) > 0) == (mistake > 0), found.stderr


RANDOM = """
import ctypes, sys
import cuda_stand_in, gpu_stand_in
library = ctypes.CDLL(str(cuda_stand_in.build()))
gpu_stand_in.install(library)
sys.path.append("../scripts/dev")
import fuzz
wrong = fuzz.main(["--cases", "60"]) | fuzz.main(["--of", "pool", "--cases", "30"])
print(*gpu_stand_in.launched(library), sep="\\n")
sys.exit(wrong)
"""
FAST = (
    *("forward_channel_first", "forward_channel_last", "forward_edges", "find_matches"),
    *("backward_channel_first", "backward_channel_last", "backward_edges", "reduce_partials"),
    *("write_packing", "pool_tiles", "pool_walk"),
)


@pytest.mark.parametrize("architecture", ("870", "750"))
def test_random_calls(architecture):
    found = run("-c", RANDOM, CUDA_STAND_IN_ARCHITECTURE=architecture)
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-2000:]
    assert found.stdout.count(" 0 wrong") == 2
    assert not [name for name in FAST if f"::{name}(" not in found.stdout]


# Filters with fewer taps than their kernel has room for, beside NaN; and what random calls lack.
CHOSEN = (
    "position and nan and not float64 or few_rows or few_tokens or every_option or long_dilated"
)
MORE = "update_token", "update_rows", "update_staged", "forward_dilated", "backward_dilated"


def test_values():
    options = ("-q", "-p", "cuda_stand_in", "-p", "no:xdist", "-p", "no:cacheprovider")
    files = (TESTS / f"test_{name}.py" for name in ("extreme_values", "update", "options"))
    found = run("-m", "pytest", *options, "-k", CHOSEN, *files)
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-2000:]
    assert not [name for name in MORE if f" {name} " not in found.stdout]
