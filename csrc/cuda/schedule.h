// How blocks and threads divide a problem: the host's part, without CUDA. The threads' is in
// schedule.cuh.
#pragma once

#include <cstdint>

namespace causal_conv1d::gpu {

constexpr int kThreads = 128;              // per block, in all kernels
constexpr int kWarps = kThreads / 32;      // per block
constexpr int64_t kMaxParts = 0x7ffffff0;  // that a Divisor can number, less a block

#if defined(__CUDACC__) || defined(__HIPCC__)
#define CAUSAL_CONV1D_DEVICE __host__ __device__
#else
#define CAUSAL_CONV1D_DEVICE
#endif

CAUSAL_CONV1D_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether the kernels of variants.cuh are there; else those for any strides take every call. They
// are written for warps of 32 lanes and in part in PTX, so that HIP builds have none.
#ifdef CAUSAL_CONV1D_GENERAL
constexpr bool kHasVariants = false;
#else
constexpr bool kHasVariants = true;
#endif

// Division by a constant as a multiplication, since a thread waits for it before its first load:
// see split().
struct Divisor {
  uint32_t count = 1, multiplier = 0, shift = 0;

  Divisor() = default;
  explicit Divisor(int64_t n) {
    if (n <= 1 || n > kMaxParts) return;  // no kernel that splits by more is started
    count = static_cast<uint32_t>(n);
    while ((int64_t(1) << shift) < n) ++shift;  // 2^shift >= n > 2^(shift-1)
    // Rounded up; 2^(31+shift) / n < 2^32.
    multiplier = static_cast<uint32_t>(((uint64_t(1) << (31 + shift)) + count - 1) / count);
  }
};

// How channel-last kernels divide the (chunk, column) plane, a column being a thread's C channels:
// a block is as many columns wide as there are, a power of two up to a warp, and kThreads / that
// many chunks high.
struct Columns {
  int64_t count = 0, chunks = 0;
  int bits = 0;
  Divisor across, down;  // blocks

  Columns() = default;
  // The power of two that a block's columns are, or -1 for what suits.
  Columns(int64_t columns, int64_t chunks_, int width_bits) : count(columns), chunks(chunks_) {
    bits = width_bits < 0 ? 0 : width_bits;
    while (width_bits < 0 && bits < 5 && int64_t(1) << bits < columns) ++bits;
    const int64_t width = int64_t(1) << bits;
    across = Divisor(ceil_div(columns, width));
    down = Divisor(ceil_div(chunks, kThreads / width));
  }
  int64_t threads(int64_t batch) const { return batch * down.count * across.count * kThreads; }
};

}  // namespace causal_conv1d::gpu
