// Parts of the kernels for channel-first rows with a dilation d > 1. A tile of a row lies in shared
// memory, where a thread has every d-th step, V of them, and so reads each input once for all taps.
#pragma once

#include "dilated_rows.h"
#include "pack.cuh"
#include "ptx.cuh"
#include "schedule.cuh"

namespace causal_conv1d::gpu {

// Places for so many steps, and for what their vectors have before and after them.
template <typename T, int STEPS>
constexpr int kPlaces = (STEPS + 2 * kPerVector<T> - 2) / kPerVector<T> * kPerVector<T>;

// Starts to copy `count` steps of a row, from `from` on, to shared memory: step `from` comes to
// place misalignment(row + from). outside(s) is what stands at s outside the row.
template <typename T, typename Outside>
__device__ __forceinline__ void stage(T* to, const T* row, int64_t from, int count, int64_t seqlen,
                                      Outside&& outside) {
  constexpr int G = kPerVector<T>;
  const int places = misalignment(row + from) + count;
  const int64_t first = from + count - places;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x) * G; i < places; i += kThreads * G) {
    const int64_t s = first + i;
    if (s >= 0 && s + G <= seqlen) {
      copy_async_or_zero<16>(true, shared_address(to + i), row + s);
      continue;
    }
#pragma unroll 1
    for (int j = 0; j < G; ++j) {
      to[i + j] = s + j >= 0 && s + j < seqlen ? row[s + j] : outside(s + j);
    }
  }
}

// Writes `count` steps of a row, from `from` on, that lie in shared memory as stage() has them.
template <typename T>
__device__ __forceinline__ void unstage(const T* staged, T* row, int64_t from, int count) {
  constexpr int G = kPerVector<T>;
  const int early = misalignment(row + from), places = early + count;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x) * G; i < places; i += kThreads * G) {
    T* const to = row + (from - early + i);
    if (i >= early && i + G <= places) {
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(staged + i);
      continue;
    }
#pragma unroll 1
    for (int j = 0; j < G; ++j) {
      if (i + j >= early && i + j < places) to[j] = staged[i + j];
    }
  }
}

// A block's part of a row, and the steps of a tile that the calling thread has: first, first + d...
struct DilatedPart {
  int64_t b, d, index;
  int64_t begin, end;
  int first;
  bool idle;  // it has none

  __device__ __forceinline__ DilatedPart(const DilatedRows& rows, int64_t dim, int64_t seqlen) {
    b = split(split(blockIdx.x, rows.chunks, &index), dim, &d);
    begin = index * rows.chunk;
    end = min(begin + rows.chunk, seqlen);
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
  return static_cast<const T*>(p.initial_states.data)[at.b * p.initial_states.strides[0] +
                                                      at.d * p.initial_states.strides[1] +
                                                      j * p.initial_states.strides[2]];
}

}  // namespace causal_conv1d::gpu
