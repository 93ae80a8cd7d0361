// dweight[k] = sum over i of dz[i] * x[i + k] and dbias = sum of dz, for a tile in scratch.
#pragma once

#include <stdint.h>

#include "../integers.h"
#include "../simd/vec.h"
#include "seq_ids.h"
#include "sums.h"
#include "tile.h"

namespace causal_conv1d {
namespace {

template <class V, class S>
CAUSAL_CONV1D_INLINE V load_partial(const S* p, int64_t n) {
  S buffer[V::kLanes] = {};
  for (int64_t i = 0; i < n; ++i) buffer[i] = p[i];
  return V::load(buffer);
}

// Where ids differ: tap k of row i has the id tap[i + k], and dz of row i has dz[i].
struct CorrelateIds {
  const int32_t *tap, *dz;
};

// total[k] += sum over i < n of dz[i] * x[i + k], k < kTaps; and *bias_total += sum of dz if not
// null. Stretches of 64 vectors are summed in S, these sums in double, to keep rounding errors
// small.
template <class V, int kTaps, bool kIds, class S>
void correlate_channel_first(const S* dz, const S* x, CorrelateIds ids, int64_t n, double* total,
                             double* bias_total) {
  constexpr int64_t kStretch = 64 * V::kLanes;
  for (int64_t begin = 0; begin < n; begin += kStretch) {
    const int64_t end = smaller(n, begin + kStretch);
    V acc[kTaps], bias_acc = V::set(0);
    for (int k = 0; k < kTaps; ++k) acc[k] = V::set(0);
    const auto add_rows = [&](int64_t i, auto load) {
      const V g = load(dz + i);
      bias_acc = add(bias_acc, g);
      for (int k = 0; k < kTaps; ++k) {
        V tap = load(x + i + k);
        if (kIds) {
          const auto same = equal_ids(V(), ids.tap + i + k, ids.dz + i);
          tap = select_or_zero(both(same, valid_ids(V(), ids.dz + i)), tap);
        }
        acc[k] = fma(g, tap, acc[k]);
      }
    };
    int64_t i = begin;
    for (; i + V::kLanes <= end; i += V::kLanes) add_rows(i, [](const S* p) { return V::load(p); });
    if (i < end) add_rows(i, [&](const S* p) { return load_partial<V>(p, end - i); });
    for (int k = 0; k < kTaps; ++k) total[k] += sum_of_lanes(acc[k]);
    if (bias_total != nullptr) *bias_total += sum_of_lanes(bias_acc);
  }
}

// sums[k * pitch + c] = sum over rows of dz[r] * x[r + k], k < kTaps, and bias_sums if not null.
template <class V, int kTaps, class S>
void correlate_channel_last(const S* dz, const S* x, CorrelateIds ids, const S* zeros,
                            int64_t pitch, int64_t rows, S* sums, S* bias_sums) {
  for (int64_t c = 0; c < pitch; c += V::kLanes) {
    V acc[kTaps], bias_acc = V::set(0);
    for (int k = 0; k < kTaps; ++k) acc[k] = V::set(0);
    for (int64_t r = 0; r < rows; ++r) {
      const V g = V::load(dz + r * pitch + c);
      bias_acc = add(bias_acc, g);
      for (int k = 0; k < kTaps; ++k) {
        const bool same = ids.tap == nullptr || (ids.tap[r + k] == ids.dz[r] && ids.dz[r] >= 0);
        const S* const row = same ? x + (r + k) * pitch : zeros;
        acc[k] = fma(g, V::load(row + c), acc[k]);
      }
    }
    for (int k = 0; k < kTaps; ++k) acc[k].store(sums + k * pitch + c);
    if (bias_sums != nullptr) bias_acc.store(bias_sums + c);
  }
}

// What a tile is correlated from and to.
template <class S>
struct Correlation {
  const S *x, *zeros;  // x with the width - 1 rows before dz's
  S* sums;             // scratch of [width + 1][pitch]
  double* totals;      // [width + 1][pitch], which is added to: dweight and, last, dbias
  const int32_t* ids;  // of x's rows, or null
};

// Taps k to k + kTaps - 1, and with k = 0 dbias.
template <class V, int kTaps, class S>
void correlate_taps(const Tile& tile, const S* dz, const Correlation<S>& c, int64_t rows,
                    int64_t k) {
  const int64_t width = tile.width, pitch = tile.pitch;
  const S* const x = c.x + k * pitch;
  CorrelateIds ids = {nullptr, nullptr};
  if (c.ids != nullptr) ids = {c.ids + k, c.ids + width - 1};
  if (tile.channel_first) {
    (c.ids == nullptr
         ? correlate_channel_first<V, kTaps, false, S>
         : correlate_channel_first<V, kTaps, true, S>)(dz, x, ids, rows, c.totals + k,
                                                       k == 0 ? c.totals + width : nullptr);
  } else {
    correlate_channel_last<V, kTaps>(dz, x, ids, c.zeros, pitch, rows, c.sums + k * pitch,
                                     k == 0 ? c.sums + width * pitch : nullptr);
  }
}

// Adds the share of `rows` rows to the totals.
template <class V, class S>
void correlate(const Tile& tile, const S* dz, const Correlation<S>& c, int64_t rows) {
  if (rows <= 0) return;
  for (int64_t k = 0; k < tile.width; k += 4) {
    switch (smaller(4, tile.width - k)) {
      case 1: correlate_taps<V, 1>(tile, dz, c, rows, k); break;
      case 2: correlate_taps<V, 2>(tile, dz, c, rows, k); break;
      case 3: correlate_taps<V, 3>(tile, dz, c, rows, k); break;
      default: correlate_taps<V, 4>(tile, dz, c, rows, k);
    }
  }
  if (tile.channel_first) return;
  for (int64_t i = 0; i < (tile.width + 1) * tile.pitch; ++i) {
    c.totals[i] += static_cast<double>(c.sums[i]);
  }
}

}  // namespace
}  // namespace causal_conv1d
