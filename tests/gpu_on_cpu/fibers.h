// Runs kernels on the CPU, so that the sources for GPUs, compiled by g++, can be tested by value
// where there is no GPU. Each thread of a block is a fiber, which goes on until it meets a barrier,
// a shuffle or a vote. Blocks run one after another. Their order, that of the warps and lanes of a
// block, and whether warps take turns or each goes as far as it can alone are drawn for each block;
// the environment's GPU_ON_CPU_SEED draws others. Device memory is the host's.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1) : x(x_), y(y_), z(1) {}  // NOLINT: as CUDA's
};

extern dim3 threadIdx, blockIdx, gridDim;

namespace gpu_on_cpu {

extern uint64_t block_run;  // the number of the block that runs, of all there were

// Runs a kernel. Shared memory holds NaNs before each block.
void run(dim3 blocks, unsigned threads, size_t dynamic_bytes, const std::function<void()>& kernel);
// What the translated sources call first in a kernel: counts it.
void entered(const char* kernel);
// Ends the process with what is wrong and the name of the kernel.
[[noreturn]] void fail(const char* problem);
uint32_t draw();  // 32 random bits

void wait_for_block();
bool any_of_block(bool v);

// What the lanes of a group of `width` do together; all that have not ended must.
enum class Together { kSync, kExchange, kBallot, kLeast };
uint64_t together(Together what, uint64_t v, int from, int width);

template <typename T>
T exchange(T v, int from, int width) {
  static_assert(sizeof v <= sizeof(uint64_t) && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &v, sizeof v);
  bits = together(Together::kExchange, bits, from, width);
  std::memcpy(&v, &bits, sizeof v);
  return v;
}

// Shared memory. A variable has its alignment and no more, and what follows it must stay as it is.
extern char shared_memory[];
constexpr size_t kMostStatic = 48 << 10, kMostDynamic = 227 << 10;
char* dynamic_memory();
void* allocate_shared(size_t size, size_t alignment);

// A __shared__ variable, one for each place in the code.
template <typename T, size_t ALIGNMENT = alignof(T)>
struct Shared {
  void* at;
  uint64_t of;  // the block_run

  std::add_lvalue_reference_t<T> get() {
    if (of != block_run) at = allocate_shared(sizeof(T), ALIGNMENT);
    of = block_run;
    return *static_cast<std::remove_reference_t<T>*>(at);
  }
};

}  // namespace gpu_on_cpu
