// Sums over lanes, and dweight and dbias from the sums of all units.
#pragma once

#include <stdint.h>

#include "../integers.h"
#include "../simd/vec.h"
#include "../tiling.h"
#include "rows.h"
#include "tensor.h"

namespace causal_conv1d {
namespace {

template <class V>
CAUSAL_CONV1D_INLINE double sum_of_lanes(V v) {
  typename V::Scalar lanes[V::kLanes];
  v.store(lanes);
  for (int half = V::kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return static_cast<double>(lanes[0]);
}

// Channels first <= d < last; partials: see KernelTable.
template <class V>
void reduce_partials(const BackwardParams& p, const Tiling& tiling, const double* partials,
                     int64_t first, int64_t last) {
  using S = typename V::Scalar;
  constexpr int64_t kBatch = 64;
  const int64_t slots = tiling.batch_groups * tiling.chunks;
  const int64_t width = tiling.width;
  for (int64_t d = first; d < last; d += kBatch) {
    const int64_t count = smaller(kBatch, last - d);
    for (int64_t k = 0; k <= width; ++k) {
      double totals[kBatch] = {};
      for (int64_t slot = 0; slot < slots; ++slot) {
        const double* const part = partials + (slot * (width + 1) + k) * tiling.dim + d;
        for (int64_t c = 0; c < count; ++c) totals[c] += part[c];
      }
      S sums[kBatch] = {};
      for (int64_t c = 0; c < count; ++c) sums[c] = static_cast<S>(totals[c]);
      if (k < width && is_given(p.dweight)) {
        store_row(p.dweight.dtype, sums, false, address(p.dweight, d, k), p.dweight.strides[0],
                  count);
      }
      if (k == width && is_given(p.dbias)) {
        store_row(p.dbias.dtype, sums, false, address(p.dbias, d), p.dbias.strides[0], count);
      }
    }
  }
}

}  // namespace
}  // namespace causal_conv1d
