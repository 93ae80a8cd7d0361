// What the direct kernels of both layouts do with a run: some groups of sums, in the L1 cache.
#pragma once

#include <stdint.h>

#include "../simd/groups.h"
#include "silu.h"

namespace causal_conv1d {
namespace {

template <class T>
constexpr bool kShortSilu = sizeof(T) == 2;

// sum over k of taps[k] * window[k], as fused multiply-adds in this order.
template <int kWidth, class V>
CAUSAL_CONV1D_INLINE V weighted(V start, const V* taps, const V* window) {
  for (int k = 0; k < kWidth; ++k) start = fma(taps[k], window[k], start);
  return start;
}

// The chain from a sum to its silu is longer than the CPU looks ahead, and its constants fill the
// registers. So the sums of a run of groups are written to the L1 cache first, and what follows
// from them is done in further loops over the run, whose rounds are short and independent.
constexpr int64_t kMostInRun = 32;  // groups
struct Run {
  // Apart by other than a multiple of 4096 bytes, where a load would wait for another's store.
  alignas(64) float sums[(kMostInRun + 8) * kGroup], parts[kMostInRun * kGroup];
};

// rows x groups that will be read soon, fetched in rounds that read no others; an address, for it
// may lie behind the end of the memory. The hardware's own reading ahead ends at pages of 4096
// bytes, does not follow as many rows as channel_last walks, and is too late for short stretches.
template <class T>
struct Ahead {
  uintptr_t address;
  int64_t stride;
  // `distance` elements behind p.
  CAUSAL_CONV1D_INLINE Ahead(const T* p, int64_t distance, int64_t row_stride)
      : address(reinterpret_cast<uintptr_t>(p) + static_cast<uintptr_t>(distance) * sizeof(T)),
        stride(row_stride) {}
  CAUSAL_CONV1D_INLINE void fetch(int64_t r, int64_t g) const {
    constexpr int64_t kBytes = kGroup * sizeof(T);
    const uintptr_t group = address + static_cast<uintptr_t>((r * stride + g * kGroup)) * sizeof(T);
    for (int64_t i = 0; i < kBytes; i += 64) {
      __builtin_prefetch(reinterpret_cast<const void*>(group + static_cast<uintptr_t>(i)));
    }
  }
};

// What comes out of the sums of rows x groups: themselves or their silu, to rows `stride` apart.
template <class T, bool kSilu, bool kStream>
void store_sums_as(Run* run, int64_t rows, int64_t groups, T* out, int64_t stride,
                   Ahead<T> x_ahead) {
  int64_t i = 0;
  for (int64_t r = 0; kSilu && r < rows; ++r) {
#pragma GCC unroll 2
    for (int64_t g = 0; g < groups; ++g, i += kGroup) {
      x_ahead.fetch(r, g);
      begin_silu<kShortSilu<T>>(Vec::load(run->sums + i)).store(run->parts + i);
    }
  }
  i = 0;
  for (int64_t r = 0; r < rows; ++r) {
#pragma GCC unroll 2
    for (int64_t g = 0; g < groups; ++g, i += kGroup) {
      if (!kSilu) x_ahead.fetch(r, g);
      const Vec sum = Vec::load(run->sums + i);
      const Vec part = Vec::load(run->parts + i);
      store_group(kSilu ? end_silu<kShortSilu<T>>(sum, part) : sum, kStream,
                  out + r * stride + g * kGroup);
    }
  }
}

template <class T>
CAUSAL_CONV1D_INLINE void store_sums(Run* run, int64_t rows, int64_t groups, T* out, int64_t stride,
                                     Ahead<T> x_ahead, bool with_silu, bool stream) {
  (with_silu ? stream ? store_sums_as<T, true, true> : store_sums_as<T, true, false>
   : stream ? store_sums_as<T, false, true>
             : store_sums_as<T, false, false>)(run, rows, groups, out, stride, x_ahead);
}

// The sums become dz = dout * silu'(sum).
template <class T>
void to_gradients(Run* run, int64_t rows, int64_t groups, const T* dout, int64_t stride,
                  Ahead<T> x_ahead, Ahead<T> dout_ahead) {
  int64_t i = 0;
  for (int64_t r = 0; r < rows; ++r) {
#pragma GCC unroll 2
    for (int64_t g = 0; g < groups; ++g, i += kGroup) {
      x_ahead.fetch(r, g);
      begin_derivative<kShortSilu<T>>(Vec::load(run->sums + i)).store(run->parts + i);
    }
  }
  i = 0;
  for (int64_t r = 0; r < rows; ++r) {
#pragma GCC unroll 2
    for (int64_t g = 0; g < groups; ++g, i += kGroup) {
      dout_ahead.fetch(r, g);
      const Vec derivative =
          end_derivative<kShortSilu<T>>(Vec::load(run->sums + i), Vec::load(run->parts + i));
      mul(load_group(dout + r * stride + g * kGroup), derivative).store(run->sums + i);
    }
  }
}

}  // namespace
}  // namespace causal_conv1d
