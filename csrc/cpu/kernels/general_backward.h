// The backward for any width, layout, type and seq_idx: with dz the gradient of the sum z,
// dx[s] = sum over j of w[width-1-j] * dz[s + j] is the forward's convolution with the taps
// reversed, width - 1 rows late; rows s < 0 are dinitial_states.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "../integers.h"
#include "../simd/vec.h"
#include "../tiling.h"
#include "general_convolve.h"
#include "general_correlate.h"
#include "scratch.h"
#include "seq_ids.h"
#include "tile.h"

namespace causal_conv1d {
namespace {
namespace general {

template <class S>
struct BackwardScratch {
  S *w, *bias, *zeros, *x, *dz, *z, *dfinal, *sums;
  double* totals;
  int32_t* ids;

  BackwardScratch(Arena* arena, const Tiling& tiling) {
    const int64_t pitch = tiling.channel_first ? 1 : padded(tiling.cols);
    const auto rows = [&](int64_t n) { return tiling.channel_first ? padded(n) : n * pitch; };
    w = arena->take<S>(rows(tiling.width));
    bias = arena->take<S>(padded(pitch));
    zeros = arena->take<S>(padded(pitch));
    x = arena->take<S>(rows(tiling.width - 1 + tiling.block));
    dz = arena->take<S>(rows(tiling.width - 1 + tiling.block));
    z = arena->take<S>(rows(tiling.block));
    dfinal = arena->take<S>(rows(tiling.block));
    sums = arena->take<S>((tiling.width + 1) * pitch);
    totals = arena->take<double>((tiling.width + 1) * pitch);
    ids = arena->take<int32_t>(padded(tiling.width - 1 + tiling.block));
  }
};

// Adds to s.z, gradients of x~[first] to x~[first + rows - 1], those of the states that precede the
// time `end`.
template <class S>
void add_dfinal_states(const Tile& tile, const BackwardParams& p, int64_t b, int64_t end,
                       int64_t first, int64_t rows, const BackwardScratch<S>& s) {
  const int64_t states = end - (tile.width - 1);  // the time of the first
  const int64_t begin = larger(first, states);
  const int64_t count = smaller(first + rows, end) - begin;
  if (count <= 0) return;
  load_block(tile, p.dfinal_states, b, begin - states, count, s.dfinal);
  if (is_given(p.seq_idx)) zero_padding(tile, p.seq_idx, b, end, begin, count, s.dfinal);
  S* const dx = s.z + (begin - first) * tile.pitch;
  for (int64_t i = 0; i < count * tile.pitch; ++i) dx[i] += s.dfinal[i];
}

// One tile of one batch entry, from its time t0 to t1. end: the time that its final states precede.
template <class V, class S>
void backward_rows(const BackwardParams& p, const Tile& tile, const Tiling& tiling, int64_t b,
                   int64_t t0, int64_t t1, int64_t end, bool with_sums,
                   const BackwardScratch<S>& s) {
  const int64_t halo = tile.width - 1, pitch = tile.pitch;
  const int64_t step = tile.channel_first ? 1 : pitch;
  const Taps<S> taps = {s.w, step, tile.width, s.bias};
  const Taps<S> reversed = {s.w + halo * step, -step, tile.width, s.zeros};
  const bool with_silu = p.silu != 0;
  const bool initial = is_given(p.dinitial_states) && t0 == 0;
  S* const x = s.x + halo * pitch;
  S* const dz = s.dz + halo * pitch;
  load_halo(tile, p.x, p.initial_states, b, t0, s.x);
  zero_rows(tile, s.dz, 0, halo);
  // The gradient of a row needs dz of the next width - 1: go on that far past the chunk.
  for (int64_t t = t0, rows; t < t1 + halo; t += rows) {
    rows = smaller(tiling.block, t1 + halo - t);
    const int64_t present = larger(0, smaller(rows, tiling.seqlen - t));
    const int64_t owned = larger(0, smaller(rows, t1 - t));
    load_block(tile, p.x, b, t, present, x);
    load_block(tile, p.dout, b, t, present, dz);
    zero_rows(tile, x, present, rows);
    const bool plain = !is_given(p.seq_idx) || load_ids(p.seq_idx, b, t - halo, halo + rows, s.ids);
    const int32_t* const ids = plain ? nullptr : s.ids;
    if (with_silu || !plain) {
      convolve<V>(gradient_epilogue(p.x.dtype, with_silu), tile, taps, s.x, Ids{ids, halo}, s.zeros,
                  dz, present);
    }
    zero_rows(tile, dz, present, rows);
    if (with_sums) {
      correlate<V>(tile, dz, Correlation<S>{s.x, s.zeros, s.sums, s.totals, ids}, owned);
    }

    // Row r of dx is time first + r. Those before the chunk are dinitial_states or another chunk's.
    const int64_t first = t - halo;
    const int64_t skip = initial ? 0 : smaller(rows, larger(0, t0 - first));
    convolve<V>(Epilogue::kIdentity, tile, reversed, s.dz + skip * pitch,
                Ids{plain ? nullptr : ids + skip, 0}, s.zeros, s.z + skip * pitch, rows - skip);
    if (is_given(p.dfinal_states)) add_dfinal_states(tile, p, b, end, first, rows, s);
    const int64_t begin = larger(first, t0);
    store_block(tile, s.z + (begin - first) * pitch, tiling.stream, p.dx, b, begin,
                first + rows - begin);
    if (initial) {
      store_block(tile, s.z, false, p.dinitial_states, b, first + halo, smaller(rows, -first));
    }
    keep_halo(tile, s.x, rows);
    keep_halo(tile, s.dz, rows);
  }
}

template <class V>
void backward_unit(const BackwardParams& p, const Tiling& tiling, const int64_t* ends, int64_t unit,
                   char* scratch, double* partials) {
  using S = typename V::Scalar;
  Arena arena(scratch);
  const BackwardScratch<S> s(&arena, tiling);
  __builtin_memset(s.zeros, 0, static_cast<size_t>(padded(tiling.cols)) * sizeof(S));
  const Range range = range_of(tiling, unit);
  for (int64_t d = range.d0; d < range.d1; d += tiling.cols) {
    const Tile tile = tile_at(tiling, d, range.d1);
    load_weights(tile, p.weight, p.bias, s.w, s.bias);
    const size_t totals_bytes = static_cast<size_t>((tile.width + 1) * tile.pitch) * sizeof(double);
    __builtin_memset(s.totals, 0, totals_bytes);
    for (int64_t b = range.b0; b < range.b1; ++b) {
      backward_rows<V>(p, tile, tiling, b, range.t0, range.t1,
                       ends == nullptr ? tiling.seqlen : ends[b], partials != nullptr, s);
    }
    if (partials == nullptr) continue;
    for (int64_t k = 0; k <= tile.width; ++k) {
      double* const out = partials + (range.slot * (tile.width + 1) + k) * tiling.dim + d;
      for (int64_t c = 0; c < tile.cols; ++c) out[c] = s.totals[k * tile.pitch + c];
    }
  }
  finish_streams();
}

}  // namespace general
}  // namespace
}  // namespace causal_conv1d
