// A unit's part of the problem, and the tiles that it walks. A tile is what scratch memory holds:
// some rows of time x some channels of one batch entry.
//
//   channel_first: one channel, a row is one element; vectors run along time.
//   channel_last:  `cols` channels, a row is `pitch` >= cols elements; vectors run along channels,
//   so
//                  that long contiguous pieces are read however long a row is.
//
// Scratch is padded to whole vectors, so there are no tails but where memory of the caller is
// touched.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "../integers.h"
#include "../tiling.h"
#include "rows.h"
#include "scratch.h"
#include "tensor.h"

namespace causal_conv1d {
namespace {

// The batch entries, channels and times of a unit.
struct Range {
  int64_t b0, b1, d0, d1, t0, t1, slot;
};

inline Range range_of(const Tiling& tiling, int64_t unit) {
  const int64_t channels = unit % tiling.channel_groups;
  const int64_t slot = unit / tiling.channel_groups;
  const int64_t chunk = slot % tiling.chunks;
  const int64_t batch = slot / tiling.chunks;
  Range r;
  r.b0 = batch * tiling.batches_per_unit;
  r.b1 = smaller(tiling.batch, r.b0 + tiling.batches_per_unit);
  r.d0 = channels * tiling.channels_per_unit;
  r.d1 = smaller(tiling.dim, r.d0 + tiling.channels_per_unit);
  r.t0 = chunk * tiling.chunk;
  r.t1 = smaller(tiling.seqlen, r.t0 + tiling.chunk);
  r.slot = slot;
  return r;
}

// The shape of the current tile in scratch.
struct Tile {
  bool channel_first;
  int64_t width, d, cols, pitch;
};

CAUSAL_CONV1D_INLINE Tile tile_at(const Tiling& tiling, int64_t d, int64_t end) {
  const int64_t cols = smaller(tiling.cols, end - d);
  return {tiling.channel_first, tiling.width, d, cols, tiling.channel_first ? 1 : padded(cols)};
}

// Rows [t, t + rows) of a sequence. channel_first pads with zeros.
template <class S>
void load_block(const Tile& tile, const Plane& x, int64_t t, int64_t rows, S* dst) {
  if (rows <= 0) return;
  if (tile.channel_first) {
    load_row(x.dtype, address(x, tile.d, t), x.time, rows, dst);
    return;
  }
  const int64_t bytes = x.channel == 1 ? tile.cols * element_size(x.dtype) : 0;
  for (int64_t r = 0; r < rows; ++r) {
    // Rows lie too far apart for the hardware to foresee the next block's.
    const uintptr_t next = reinterpret_cast<uintptr_t>(x.data) +
                           static_cast<uintptr_t>((tile.d * x.channel + (t + r + rows) * x.time) *
                                                  element_size(x.dtype));
    for (int64_t i = 0; i < bytes; i += 64) {
      __builtin_prefetch(reinterpret_cast<const void*>(next + static_cast<uintptr_t>(i)));
    }
    load_row(x.dtype, address(x, tile.d, t + r), x.channel, tile.cols, dst + r * tile.pitch);
  }
}

template <class S>
void store_block(const Tile& tile, const S* src, bool stream, const Plane& out, int64_t t,
                 int64_t rows) {
  if (rows <= 0) return;
  if (tile.channel_first) {
    store_row(out.dtype, src, stream, address(out, tile.d, t), out.time, rows);
    return;
  }
  for (int64_t r = 0; r < rows; ++r) {
    store_row(out.dtype, src + r * tile.pitch, stream, address(out, tile.d, t + r), out.channel,
              tile.cols);
  }
}

// Rows [first, last), and for channel_first the rest of the last vector.
template <class S>
CAUSAL_CONV1D_INLINE void zero_rows(const Tile& tile, S* x, int64_t first, int64_t last) {
  const int64_t end = tile.channel_first ? padded(last) : last * tile.pitch;
  const int64_t begin = first * tile.pitch;
  if (begin < end) __builtin_memset(x + begin, 0, static_cast<size_t>(end - begin) * sizeof(S));
}

// Moves the last `halo` of rows + halo rows to the front.
template <class S>
CAUSAL_CONV1D_INLINE void keep_halo(const Tile& tile, S* x, int64_t rows) {
  const size_t bytes = static_cast<size_t>((tile.width - 1) * tile.pitch) * sizeof(S);
  __builtin_memmove(x, x + rows * tile.pitch, bytes);
}

// What a sequence convolves: x, times a gate if there is one, behind its initial state.
struct Inputs {
  Plane x, pre_gate, initial;
};

// Rows [t, t + rows) of them, t >= 0.
template <class S>
void load_inputs(const Tile& tile, const Inputs& in, int64_t t, int64_t rows, S* dst) {
  load_block(tile, in.x, t, rows, dst);
  if (!is_given(in.pre_gate) || rows <= 0) return;
  const Plane& gate = in.pre_gate;
  if (tile.channel_first) {
    multiply_row(gate.dtype, address(gate, tile.d, t), gate.time, rows, dst);
    return;
  }
  for (int64_t r = 0; r < rows; ++r) {
    multiply_row(gate.dtype, address(gate, tile.d, t + r), gate.channel, tile.cols,
                 dst + r * tile.pitch);
  }
}

// Rows t to t + rows - 1, of which those of negative times are of the initial state.
template <class S>
__attribute__((noinline)) void load_rows_of(const Tile& tile, const Inputs& in, int64_t t,
                                            int64_t rows, S* dst) {
  const int64_t before = larger(0, smaller(rows, -t));  // rows before the sequence
  if (is_given(in.initial)) {
    load_block(tile, in.initial, t + tile.width - 1, before, dst);
  } else {
    zero_rows(tile, dst, 0, before);
  }
  load_inputs(tile, in, t + before, rows - before, dst + before * tile.pitch);
}

// The width - 1 rows x~[t - (width-1)] .. x~[t - 1].
template <class S>
void load_halo(const Tile& tile, const Inputs& in, int64_t t, S* dst) {
  load_rows_of(tile, in, t - (tile.width - 1), tile.width - 1, dst);
}

// Taps as w[k] (channel_first) or w[k * pitch + c], and the bias, 0 if there is none.
template <class S>
void load_weights(const Tile& tile, const Tensor& weight, const Tensor& bias, S* w, S* w0) {
  if (tile.channel_first) {
    load_row(weight.dtype, address(weight, tile.d), weight.strides[1], tile.width, w);
  } else {
    load_rows(weight.dtype, address(weight, tile.d), weight.strides[1], weight.strides[0],
              tile.width, tile.cols, 0, w, tile.pitch);
  }
  if (is_given(bias)) {
    load_row(bias.dtype, address(bias, tile.d), bias.strides[0], tile.cols, w0);
  } else {
    __builtin_memset(w0, 0, static_cast<size_t>(padded(tile.cols)) * sizeof(S));
  }
}

}  // namespace
}  // namespace causal_conv1d
