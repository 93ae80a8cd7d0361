// Which part of a problem the calling thread has; schedule.h has the host's side.
#pragma once

#include "gpu.h"
#include "schedule.h"

namespace causal_conv1d::gpu {

// Splits n = outer * count + i into outer, which is returned, and i; 32-bit where it can.
__device__ __forceinline__ int64_t split(int64_t n, int64_t count, int64_t* i) {
  if (n >= 0 && n <= 0xffffffffll && count <= 0xffffffffll) {
    const uint32_t q = static_cast<uint32_t>(n) / static_cast<uint32_t>(count);
    *i = static_cast<uint32_t>(n) - q * static_cast<uint32_t>(count);
    return q;
  }
  *i = n % count;
  return n / count;
}

// The same of n < 2^31 by a multiplication.
__device__ __forceinline__ uint32_t split(uint32_t n, const Divisor& by, uint32_t* i) {
  const uint32_t q =
      by.multiplier == 0 ? n : static_cast<uint32_t>(uint64_t(n) * by.multiplier >> 31 >> by.shift);
  *i = n - q * by.count;
  return q;
}

// Bytes of static shared memory that, with USED others, leave room for BLOCKS blocks per SM of
// compute capability 9.0 and no more, for BLOCKS >= 4. More, as registers may allow, compete for
// memory there: every kernel takes 1 to 10 % longer.
template <int BLOCKS, int USED = 0>
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
constexpr int kRoomFor = BLOCKS < 4 ? 1 : 228 * 1024 / (BLOCKS + 1) - 1023 - USED;
#else
constexpr int kRoomFor = 1;
#endif

// BLOCKS, or as many as the threads of an SM of compute capability 7.5 are.
template <int BLOCKS>
constexpr int kAtMost = kTuring && BLOCKS > 1024 / kThreads ? 1024 / kThreads : BLOCKS;

// The calling thread's place in the plane of Columns.
struct ColumnChunk {
  uint32_t b, chunk, column, part;  // part: which block of chunks
  bool inside;                      // of the plane of batch entry b

  __device__ __forceinline__ explicit ColumnChunk(const Columns& columns,
                                                  uint32_t block = blockIdx.x) {
    uint32_t across;
    b = split(split(block, columns.across, &across), columns.down, &part);
    column = (across << columns.bits) + (threadIdx.x & ((1 << columns.bits) - 1));
    chunk = part * (kThreads >> columns.bits) + (threadIdx.x >> columns.bits);
    inside = column < columns.count && chunk < columns.chunks;
  }
};

constexpr int kFar = 1 << 30;  // further than any step of a tile
constexpr int kNowhere = -kFar;

// A warp's part of a channel-first row, in local time from 0: its step 0 is step `origin` of the
// row. The row's first part begins `offset` steps before the row.
struct Segment {
  int64_t origin;
  int lo, hi;  // the row
  int end;     // of the part: the chunk's, or the row's

  __device__ __forceinline__ Segment(int64_t index, int64_t chunk, int offset, int64_t seqlen)
      : origin(index * chunk - offset), chunk_(static_cast<int>(chunk)) {
    lo = static_cast<int>(max(-origin, int64_t(-kFar)));
    hi = static_cast<int>(min(seqlen - origin, int64_t(kFar)));
    end = min(chunk_, hi);
  }

  // The same with another offset, this one's being 0.
  __device__ __forceinline__ Segment with(int offset) const {
    Segment s = *this;
    s.origin -= offset;
    s.lo += offset;
    s.hi += offset;
    s.end = min(chunk_, s.hi);
    return s;
  }

 private:
  int chunk_;
};

}  // namespace causal_conv1d::gpu
