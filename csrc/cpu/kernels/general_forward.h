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
#include "general_gates.h"
#include "piece_rows.h"
#include "pieces.h"
#include "pool_states.h"
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
  GateScratch<S> gates;

  ForwardScratch(Arena* arena, const Tiling& tiling) {
    const int64_t pitch = tiling.channel_first ? 1 : padded(tiling.cols);
    const auto rows = [&](int64_t n) { return tiling.channel_first ? padded(n) : n * pitch; };
    w = arena->take<S>(rows(tiling.width));
    bias = arena->take<S>(padded(pitch));
    zeros = arena->take<S>(padded(pitch));
    x = arena->take<S>(rows(tiling.width - 1 + tiling.block));
    z = arena->take<S>(rows(tiling.block));
    ids = arena->take<int32_t>(padded(tiling.width - 1 + tiling.block));
    if (!tiling.gated) return;
    gates.gate = arena->take<S>(rows(tiling.block));
    gates.other = arena->take<S>(rows(tiling.block));
  }
};

// Steps t0 to t1 of out with the width - 1 rows before t0 in s.x, which then holds those before t1.
template <class V, class S>
void forward_rows(const Tile& tile, const Tiling& tiling, const ForwardRow& row, bool with_silu,
                  int64_t t0, int64_t t1, const ForwardScratch<S>& s) {
  const int64_t halo = tile.width - 1;
  const Taps<S> taps = {s.w, tile.channel_first ? 1 : tile.pitch, tile.width, s.bias};
  for (int64_t t = t0, rows; t < t1; t += rows) {
    rows = smaller(tiling.block, t1 - t);
    load_inputs(tile, row.in, t, rows, s.x + halo * tile.pitch);
    const bool plain = row.ids.data == nullptr || load_ids(row.ids, t - halo, halo + rows, s.ids);
    const Ids ids = {plain ? nullptr : s.ids, halo};
    convolve<V>(forward_epilogue(row.out.dtype, with_silu), tile, taps, s.x, ids, s.zeros, s.z,
                rows);
    apply_gates<V>(tile, row.post_gate, row.residual, t, rows, ids, s.gates, s.z);
    store_block(tile, s.z, tiling.stream, row.out, t, rows);
    keep_halo(tile, s.x, rows);
  }
}

template <class V>
void forward_unit(const ForwardProblem& p, const Tiling& tiling, int64_t unit, char* scratch) {
  using S = typename V::Scalar;
  Arena arena(scratch);
  const ForwardScratch<S> s(&arena, tiling);
  __builtin_memset(s.zeros, 0, static_cast<size_t>(padded(tiling.cols)) * sizeof(S));
  const Range range = range_of(tiling, unit);
  for (int64_t d = range.d0; d < range.d1; d += tiling.cols) {
    const Tile tile = tile_at(tiling, d, range.d1);
    load_weights(tile, p.weight, p.bias, s.w, s.bias);
    Pieces pieces(p.sequences, tiling, range, nullptr);
    for (Piece piece = {}; pieces.next(&piece);) {
      const ForwardRow row = row_of(p, piece);
      load_halo(tile, row.in, piece.t0, s.x);
      if (p.sequences.pool != nullptr) leave_state(tile, p, piece, row.in.x, s.x, s.z);
      forward_rows<V>(tile, tiling, row, p.silu != 0, piece.t0, piece.t1, s);
      if (is_given(row.final_) && piece.t1 == piece.length) {
        store_block(tile, s.x, false, row.final_, 0, tile.width - 1);
      }
    }
  }
  finish_streams();
}

}  // namespace general
}  // namespace
}  // namespace causal_conv1d
