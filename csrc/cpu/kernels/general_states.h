// The final states alone, where forward's are not the right ones.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "../integers.h"
#include "../simd/vec.h"
#include "../tiling.h"
#include "scratch.h"
#include "seq_ids.h"
#include "tile.h"

namespace causal_conv1d {
namespace {
namespace general {

template <class S>
S* take_states(Arena* arena, const Tiling& tiling) {
  return arena->take<S>(tiling.channel_first ? padded(tiling.block)
                                             : tiling.block * padded(tiling.cols));
}

// Of sequences whole, without their phases: a tile is as wide as the states are long. Each block
// is read before it is written, and none is read after that: final_states_out may be
// initial_states.
template <class V>
void final_states_unit(const ForwardProblem& p, const Tiling& tiling, const int64_t* ends,
                       int64_t unit, char* scratch) {
  using S = typename V::Scalar;
  Arena arena(scratch);
  S* const states = take_states<S>(&arena, tiling);
  const Range range = range_of(tiling, unit);
  const int64_t halo = tiling.width - 1;
  const int64_t* const bounds = p.sequences.bounds;
  for (int64_t d = range.d0; d < range.d1; d += tiling.cols) {
    const Tile tile = tile_at(tiling, d, range.d1);
    for (int64_t i = range.b0; i < range.b1; ++i) {
      const int64_t end = ends[i];
      if (end < 0) continue;
      const int64_t b = bounds == nullptr ? i : 0, start = bounds == nullptr ? 0 : bounds[i];
      const Inputs in = {plane_of(p.x, b, start), plane_of(p.pre_gate, b, start),
                         plane_of(p.initial_states, i)};
      Piece piece = {};
      piece.b = b;
      piece.length = end;
      const IdRow ids = id_row_of(p.seq_idx, piece, 1);
      for (int64_t c = 0, rows; c < halo; c += rows) {
        rows = smaller(tiling.block, halo - c);
        load_rows_of(tile, in, end - halo + c, rows, states);
        zero_padding(tile, ids, end > 0, end - halo + c, rows, states);
        store_block(tile, states, false, plane_of(p.final_states_out, i), c, rows);
      }
    }
  }
}

}  // namespace general
}  // namespace
}  // namespace causal_conv1d
