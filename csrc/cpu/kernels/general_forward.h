// The forward for any width, layout, type and seq_idx. A block of x is converted into scratch
// memory in the L1 or L2 cache, behind the width - 1 rows before it, and convolved there. Rows
// outside the sequence are zeros in scratch.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "../integers.h"
#include "../simd/vec.h"
#include "../tiling.h"
#include "general_convolve.h"
#include "scratch.h"
#include "seq_ids.h"
#include "tile.h"

namespace causal_conv1d {
namespace {
namespace general {

template <class S>
struct ForwardScratch {
  S *w, *bias, *zeros, *x, *z;
  int32_t* ids;

  ForwardScratch(Arena* arena, const Tiling& tiling) {
    const int64_t pitch = tiling.channel_first ? 1 : padded(tiling.cols);
    const auto rows = [&](int64_t n) { return tiling.channel_first ? padded(n) : n * pitch; };
    w = arena->take<S>(rows(tiling.width));
    bias = arena->take<S>(padded(pitch));
    zeros = arena->take<S>(padded(pitch));
    x = arena->take<S>(rows(tiling.width - 1 + tiling.block));
    z = arena->take<S>(rows(tiling.block));
    ids = arena->take<int32_t>(padded(tiling.width - 1 + tiling.block));
  }
};

// out[t0 .. t1) with the width - 1 rows before t0 in s.x, which then holds those before t1.
template <class V, class S>
void forward_rows(const Tile& tile, const Tiling& tiling, const Tensor& x, const Tensor* seq_idx,
                  const Tensor& out, bool with_silu, int64_t b, int64_t t0, int64_t t1,
                  const ForwardScratch<S>& s) {
  const int64_t halo = tile.width - 1;
  const Taps<S> taps = {s.w, tile.channel_first ? 1 : tile.pitch, tile.width, s.bias};
  for (int64_t t = t0, rows; t < t1; t += rows) {
    rows = smaller(tiling.block, t1 - t);
    load_block(tile, x, b, t, rows, s.x + halo * tile.pitch);
    const bool plain = seq_idx == nullptr || load_ids(*seq_idx, b, t - halo, halo + rows, s.ids);
    const Ids ids = {plain ? nullptr : s.ids, halo};
    convolve<V>(forward_epilogue(x.dtype, with_silu), tile, taps, s.x, ids, s.zeros, s.z, rows);
    store_block(tile, s.z, tiling.stream, out, b, t, rows);
    keep_halo(tile, s.x, rows);
  }
}

template <class V>
void forward_unit(const ForwardParams& p, const Tiling& tiling, int64_t unit, char* scratch) {
  using S = typename V::Scalar;
  Arena arena(scratch);
  const ForwardScratch<S> s(&arena, tiling);
  __builtin_memset(s.zeros, 0, static_cast<size_t>(padded(tiling.cols)) * sizeof(S));
  const Tensor* const seq_idx = is_given(p.seq_idx) ? &p.seq_idx : nullptr;
  const Range range = range_of(tiling, unit);
  for (int64_t d = range.d0; d < range.d1; d += tiling.cols) {
    const Tile tile = tile_at(tiling, d, range.d1);
    load_weights(tile, p.weight, p.bias, s.w, s.bias);
    for (int64_t b = range.b0; b < range.b1; ++b) {
      load_halo(tile, p.x, p.initial_states, b, range.t0, s.x);
      forward_rows<V>(tile, tiling, p.x, seq_idx, p.out, p.silu != 0, b, range.t0, range.t1, s);
      if (is_given(p.final_states_out) && range.t1 == tiling.seqlen) {
        store_block(tile, s.x, false, p.final_states_out, b, 0, tile.width - 1);
      }
    }
  }
  finish_streams();
}

template <class S>
S* take_states(Arena* arena, const Tiling& tiling) {
  const int64_t states = tiling.width - 1;
  return arena->take<S>(tiling.channel_first ? padded(states) : states * padded(tiling.cols));
}

// All of a row is read before it is written: final_states_out may be initial_states.
template <class V>
void final_states_unit(const ForwardParams& p, const Tiling& tiling, const int64_t* ends,
                       int64_t unit, char* scratch) {
  using S = typename V::Scalar;
  Arena arena(scratch);
  S* const states = take_states<S>(&arena, tiling);
  const Range range = range_of(tiling, unit);
  const int64_t halo = tiling.width - 1;
  for (int64_t d = range.d0; d < range.d1; d += tiling.cols) {
    const Tile tile = tile_at(tiling, d, range.d1);
    for (int64_t b = range.b0; b < range.b1; ++b) {
      if (ends[b] < 0) continue;
      load_halo(tile, p.x, p.initial_states, b, ends[b], states);
      if (is_given(p.seq_idx)) {
        zero_padding(tile, p.seq_idx, b, ends[b], ends[b] - halo, halo, states);
      }
      store_block(tile, states, false, p.final_states_out, b, 0, halo);
    }
  }
}

}  // namespace general
}  // namespace
}  // namespace causal_conv1d
