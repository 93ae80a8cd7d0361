// Parts of the kernels for channel-first rows with a dilation d > 1. A tile of a row lies in shared
// memory, where a thread has every d-th step, V of them, and so reads each input once for all taps.
#pragma once

#include "dilated_rows.h"
#include "pack.cuh"
#include "ptx.cuh"
#include "schedule.cuh"

namespace causal_conv1d::gpu {

// Places in shared memory for so many steps of any alignment: whole vectors, of which the first may
// begin before them and the last end after them.
template <typename T, int STEPS>
constexpr int kPlaces = (STEPS + 2 * kPerVector<T> - 2) / kPerVector<T> * kPerVector<T>;

// Starts to copy `count` steps of a row, from `from` on, to shared memory: step `from` comes to
// place misalignment(row + from). outside(s) is what stands at s outside the row.
template <typename T, typename Outside>
__device__ __forceinline__ void stage(T* to, const T* row, int64_t from, int count, int64_t seqlen,
                                      Outside&& outside) {
  constexpr int G = kPerVector<T>;
  const int early = misalignment(row + from), places = early + count;
  const int64_t first = from - early;
  const T* const data = row + first;
  // The row is at places [lo, hi).
  const int lo = static_cast<int>(max(-first, int64_t(-kFar)));
  const int hi = static_cast<int>(min(seqlen - first, int64_t(kFar)));
  const uint32_t address = shared_address(to);
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x) * G; i < places; i += kThreads * G) {
    if (i >= lo && i + G <= hi) {
      copy_async_or_zero<16>(true, address + i * int(sizeof(T)), data + i);
      continue;
    }
#pragma unroll 1
    for (int j = i; j < i + G; ++j) to[j] = j >= lo && j < hi ? data[j] : outside(first + j);
  }
}

// Writes `count` steps of a row, from `from` on, that lie in shared memory as stage() has them.
template <typename T>
__device__ __forceinline__ void unstage(const T* staged, T* row, int64_t from, int count) {
  constexpr int G = kPerVector<T>;
  const int early = misalignment(row + from), places = early + count;
  T* const data = row + (from - early);
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x) * G; i < places; i += kThreads * G) {
    if (i >= early && i + G <= places) {
      *reinterpret_cast<uint4*>(data + i) = *reinterpret_cast<const uint4*>(staged + i);
      continue;
    }
#pragma unroll 1
    for (int j = max(i, early); j < min(i + G, places); ++j) data[j] = staged[j];
  }
}

// A block's part of a row, and the steps of a tile that the calling thread has: first, first + d...
struct DilatedPart {
  uint32_t b, d, index;
  int64_t begin, end;
  int first;
  bool idle;  // it has none

  template <typename Args>
  __device__ __forceinline__ DilatedPart(const Args& p, const DilatedRows& rows) {
    b = split(split(blockIdx.x, p.by_chunks, &index), p.by_dim, &d);
    begin = index * rows.chunk;
    end = min(begin + rows.chunk, p.seqlen);
    const int distance = static_cast<int>(rows.dilation), thread = static_cast<int>(threadIdx.x);
    first = thread / distance * distance * kPhaseSteps + thread % distance;
    idle = first >= rows.tile;
  }
};

// x~ before the row, of x's type.
template <typename Args>
__device__ __forceinline__ auto state_before(const Args& p, const DilatedPart& at, int64_t s,
                                             int64_t dilation) {
  using T = typename Args::Element;
  const int64_t j = s + (p.width - 1) * dilation;
  if (s >= 0 || j < 0 || !p.initial_states.given()) return from_compute<T>(0.0f);
  return static_cast<const T*>(
      p.initial_states.data)[at.b * p.initial_states.strides[0] +
                             at.d * p.initial_states.strides[1] + j * p.initial_states.strides[2]];
}

}  // namespace causal_conv1d::gpu
