// z = bias + sum over k of w[k] * x[i + k * pitch] for a tile in scratch, with the same fused
// multiply-adds in the same order for every layout, so that layouts, chunks and updates agree
// bitwise.
#pragma once

#include <stdint.h>

#include "../simd/vec.h"
#include "seq_ids.h"
#include "silu.h"
#include "tile.h"

namespace causal_conv1d {
namespace {

// Tap k of the first channel of a tile is w[k * step].
template <class S>
struct Taps {
  const S* w;
  int64_t step, count;
  const S* bias;
};

// kWidth 0: any width. z of n rows and the rest of the last vector.
template <class V, int kWidth, bool kIds, class S>
void convolve_channel_first(Epilogue epilogue, const Taps<S>& taps, const S* x, Ids ids, S* z,
                            int64_t n) {
  constexpr int kKept = kWidth == 0 ? 1 : kWidth;
  const S* const w = taps.w;
  const int64_t step = taps.step, count = kWidth == 0 ? taps.count : kWidth;
  V kept[kKept];
  for (int k = 0; k < kKept; ++k) kept[k] = V::set(w[k * step]);
  const V start = V::set(*taps.bias);
  for (int64_t i = 0; i < n; i += V::kLanes) {
    V acc = start;
    for (int64_t k = 0; k < count; ++k) {
      V tap = V::load(x + i + k);
      if (kIds) {
        const auto same = equal_ids(V(), ids.ids + i + k, ids.ids + i + ids.center);
        tap = select_or_zero(same, tap);
      }
      acc = fma(kWidth == 0 ? V::set(w[k * step]) : kept[k], tap, acc);
    }
    acc = apply(epilogue, acc, z + i);
    if (kIds) acc = select_or_zero(valid_ids(V(), ids.ids + i + ids.center), acc);
    acc.store(z + i);
  }
}

// Each tap is a row, or the row `zeros` where its id differs.
template <class V, class S>
void convolve_channel_last(Epilogue epilogue, const Taps<S>& taps, const S* x, Ids ids,
                           const S* zeros, int64_t pitch, S* z, int64_t rows) {
  const S *const w = taps.w, *const bias = taps.bias;
  const int64_t step = taps.step, count = taps.count;
  for (int64_t r = 0; r < rows; ++r) {
    S* const out = z + r * pitch;
    const int32_t id = ids.ids != nullptr ? ids.ids[r + ids.center] : 0;
    if (id < 0) {
      __builtin_memset(out, 0, static_cast<size_t>(pitch) * sizeof(S));
      continue;
    }
    for (int64_t c = 0; c < pitch; c += V::kLanes) {
      V acc = V::load(bias + c);
      for (int64_t k = 0; k < count; ++k) {
        const bool same = ids.ids == nullptr || ids.ids[r + k] == id;
        const S* const row = same ? x + (r + k) * pitch : zeros;
        acc = fma(V::load(w + k * step + c), V::load(row + c), acc);
      }
      apply(epilogue, acc, out + c).store(out + c);
    }
  }
}

// z[r] = epilogue(bias + sum over k of w[k] * x[r + k]) for `rows` rows, 0 where the id is padding.
template <class V, class S>
void convolve(Epilogue epilogue, const Tile& tile, const Taps<S>& taps, const S* x, Ids ids,
              const S* zeros, S* z, int64_t rows) {
  if (!tile.channel_first) {
    convolve_channel_last<V>(epilogue, taps, x, ids, zeros, tile.pitch, z, rows);
  } else if (ids.ids == nullptr) {
    convolve_channel_first<V, 0, false>(epilogue, taps, x, ids, z, rows);
  } else if (tile.width == 4) {
    convolve_channel_first<V, 4, true>(epilogue, taps, x, ids, z, rows);
  } else {
    convolve_channel_first<V, 0, true>(epilogue, taps, x, ids, z, rows);
  }
}

}  // namespace
}  // namespace causal_conv1d
