// Forward and backward for widths 2 to 4 where there are vectors, straight between the caller's
// memory and registers; of seq_idx, what can be joined. Channel_first has kernels for plain rows
// (direct_channel_first.h) and for those with options (direct_options.h).
//
// The innermost functions (forward_groups, backward_groups) work on whole groups (simd/groups.h) in
// unit strides. Whatever is not so (other strides, the ends of rows) is copied to or from a small
// piece of memory, a stage, so that results do not depend on strides. All compute the same chain of
// multiply-adds as the general kernels and therefore the same bits.
//
// backward computes dz, the gradient of the sum, from x and dout; adds dz * x to the sums of
// dweight; and combines dz with those before it to dx, one group (channel_first) or width - 1 rows
// (channel_last) earlier. Where dx needs more than that (the ends: dinitial_states, dfinal_states,
// chunks), it goes to an edge in fp32 instead.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "../kernel_table.h"
#include "../simd/groups.h"
#include "direct_channel_first.h"
#include "direct_channel_last.h"
#include "direct_options.h"
#include "direct_scratch.h"
#include "group_memory.h"
#include "piece_rows.h"
#include "pool_states.h"
#include "tile.h"

namespace causal_conv1d {
namespace {
namespace direct {

// The tile at channel d, its channels up to `end`, and its weights and bias to s.
template <class T, int kWidth>
Tile start_tile(const Tiling& tiling, const Tensor& weight, const Tensor& bias, int64_t d,
                int64_t end, const DirectScratch& s) {
  Tile tile = tile_at(tiling, d, end);
  if (!tile.channel_first) tile.pitch = direct_pitch(tiling);
  load_weights(tile, weight, bias, s.w, s.bias);
  if (tile.channel_first) {
    plain_nans(s.w, kWidth);
    plain_nans(s.bias, 1);
    return tile;
  }
  const int64_t used = padded(tile.cols);
  to_groups<T>(s.bias, used);
  for (int k = 0; k < kWidth; ++k) to_groups<T>(s.w + k * tile.pitch, used);
  return tile;
}

// The width - 1 rows before t0 to s.x.
template <int kWidth>
CAUSAL_CONV1D_INLINE void take_halo(const Tile& tile, const Inputs& in, int64_t t0,
                                    const DirectScratch& s) {
  static_assert(kWidth - 1 <= kGroup, "the pitch for channel_first");
  if (tile.channel_first && t0 == 0 && !is_given(in.initial)) {
    __builtin_memset(s.x, 0, (kWidth - 1) * sizeof(float));
  } else {
    load_halo(tile, in, t0, s.x);
  }
}

// The width - 1 rows before t0, which are in s.x, in the order of groups for channel_last.
template <class T, int kWidth>
void order_halo(const Tile& tile, const Inputs& in, int64_t t0, const DirectScratch& s) {
  if (tile.channel_first || (t0 == 0 && !is_given(in.initial))) return;
  for (int k = 0; k < kWidth - 1; ++k) to_groups<T>(s.x + k * tile.pitch, padded(tile.cols));
}

// The final states, if the piece ends its sequence.
__attribute__((noinline)) inline void leave_final(const Tile& tile, const ForwardRow& row,
                                                  const Piece& piece, const DirectScratch& s) {
  if (!is_given(row.final_) || piece.t1 != piece.length) return;
  load_halo(tile, row.in, piece.t1, s.x);
  store_block(tile, s.x, false, row.final_, 0, tile.width - 1);
}

template <class T, int kWidth>
void forward_unit_as(const ForwardProblem& p, const Tiling& tiling, int64_t unit, char* scratch) {
  const Range range = range_of(tiling, unit);
  Arena arena(scratch);
  const DirectScratch s(&arena, tiling, false);
  ForwardRow row = {};
  Piece only, last = {};
  last.length = -1;
  const bool is_one = Pieces(p.sequences, tiling, range, nullptr).is_one(&only);
  for (int64_t d = range.d0; d < range.d1; d += tiling.cols) {
    const Tile tile = start_tile<T, kWidth>(tiling, p.weight, p.bias, d, range.d1, s);
    Pieces pieces(p.sequences, tiling, range, nullptr);
    Piece piece = only;
    for (bool more = is_one || pieces.next(&piece); more; more = !is_one && pieces.next(&piece)) {
      const int64_t t0 = piece.t0, t1 = piece.t1;
      if (!piece.is_with(last)) row = row_of(p, last = piece);
      const Inputs& in = row.in;
      if (tile.channel_first && !row.plain) {
        const with_options::Taps taps(s.w, s.bias[0], kWidth, tiling.apart);
        const auto& kernels = tiling.apart > 1 ? with_options::kernels_of<T, kWidth, true>
                                               : with_options::kernels_of<T, kWidth, false>;
        with_options::forward_row(row, d, t0, t1, kernels, taps, s, p.silu != 0, tiling.stream);
        leave_final(tile, row, piece, s);
        continue;
      }
      take_halo<kWidth>(tile, in, t0, s);
      if (p.sequences.pool != nullptr) leave_state(tile, p, piece, in.x, s.x, s.row);
      order_halo<T, kWidth>(tile, in, t0, s);
      if (t0 == t1) {
        // no outputs
      } else if (tile.channel_first) {
        channel_first::forward_row<T, kWidth>(row, d, t0, t1 - t0, s.w, s.bias[0], s.x, p.silu != 0,
                                              tiling.stream);
      } else {
        channel_last::forward_tile<T, kWidth>(row, p.silu != 0, tile, t0, t1, s, tiling.stream);
      }
      leave_final(tile, row, piece, s);
    }
  }
  finish_streams();
}

template <class T, int kWidth>
void backward_unit_as(const BackwardProblem& p, const Tiling& tiling, int64_t unit, char* scratch,
                      double* partials) {
  const Range range = range_of(tiling, unit);
  const int64_t pitch = direct_pitch(tiling);
  Arena arena(scratch);
  const DirectScratch s(&arena, tiling, true);
  const size_t count = static_cast<size_t>((kWidth + 1) * pitch);
  BackwardRow row = {};
  Piece only, last = {};
  last.length = -1;
  const bool is_one = Pieces(p.sequences, tiling, range, nullptr).is_one(&only);
  for (int64_t d = range.d0; d < range.d1; d += tiling.cols) {
    const Tile tile = start_tile<T, kWidth>(tiling, p.weight, p.bias, d, range.d1, s);
    __builtin_memset(s.totals, 0, count * sizeof(double));
    if (!tile.channel_first) {
      __builtin_memset(s.sums, 0, count * sizeof(float));
      __builtin_memset(s.unused, 0, count * sizeof(float));
    }
    Pieces pieces(p.sequences, tiling, range, nullptr);
    Piece piece = only;
    for (bool more = is_one || pieces.next(&piece); more; more = !is_one && pieces.next(&piece)) {
      if (!piece.is_with(last)) row = row_of(p, last = piece);
      if (tile.channel_first && !row.plain) {
        const with_options::Taps taps(s.w, s.bias[0], kWidth, tiling.apart);
        const auto& kernels = tiling.apart > 1 ? with_options::kernels_of<T, kWidth, true>
                                               : with_options::kernels_of<T, kWidth, false>;
        with_options::BackwardWalk<T>(row, p.silu != 0, d, piece.t0, piece.t1, kernels, taps, s,
                                      tiling.stream)
            .run();
        continue;
      }
      take_halo<kWidth>(tile, row.in, piece.t0, s);
      order_halo<T, kWidth>(tile, row.in, piece.t0, s);
      if (tile.channel_first) {
        channel_first::BackwardWalk<T, kWidth>(row, p.silu != 0, d, piece.t0, piece.t1, s.w,
                                               s.bias[0], s.x, tiling.stream, s.totals)
            .run();
      } else {
        __builtin_memset(s.dz, 0, static_cast<size_t>((kWidth - 1) * pitch) * sizeof(float));
        channel_last::backward_tile<T, kWidth>(row, p.silu != 0, tile, piece.t0, piece.t1, s,
                                               tiling.stream);
      }
    }
    if (partials == nullptr) continue;
    for (int64_t k = 0; k <= kWidth; ++k) {
      double* const out = partials + (range.slot * (kWidth + 1) + k) * tiling.dim + d;
      for (int64_t c = 0; c < tile.cols; ++c) {
        const int64_t lane = c / kGroup * kGroup + lane_of<T>(static_cast<int>(c % kGroup));
        out[c] = tile.channel_first ? s.totals[k] : s.totals[k * pitch + lane];
      }
    }
  }
  finish_streams();
}

inline size_t scratch_bytes(const Tiling& tiling, Operation operation) {
  Arena arena(nullptr);
  DirectScratch(&arena, tiling, operation == Operation::kBackward);
  return arena.used();
}

// Calls f with a zero of the type.
template <class F>
CAUSAL_CONV1D_INLINE void with_type(int32_t dtype, F f) {
  if (dtype == CAUSAL_CONV1D_FLOAT32) {
    f(float());
  } else if (dtype == CAUSAL_CONV1D_FLOAT16) {
    f(Half());
  } else {
    f(Bfloat16());
  }
}

inline void forward_unit(const ForwardProblem& p, const Tiling& tiling, int64_t unit,
                         char* scratch) {
  with_type(p.x.dtype, [&](auto zero) {
    using T = decltype(zero);
    (tiling.width == 2   ? forward_unit_as<T, 2>
     : tiling.width == 3 ? forward_unit_as<T, 3>
                         : forward_unit_as<T, 4>)(p, tiling, unit, scratch);
  });
}

inline void backward_unit(const BackwardProblem& p, const Tiling& tiling, int64_t unit,
                          char* scratch, double* partials) {
  with_type(p.x.dtype, [&](auto zero) {
    using T = decltype(zero);
    (tiling.width == 2   ? backward_unit_as<T, 2>
     : tiling.width == 3 ? backward_unit_as<T, 3>
                         : backward_unit_as<T, 4>)(p, tiling, unit, scratch, partials);
  });
}

}  // namespace direct
}  // namespace
}  // namespace causal_conv1d
