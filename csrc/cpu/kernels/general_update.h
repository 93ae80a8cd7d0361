// The update of a decode state: its last width - 1 inputs and the new tokens are one short sequence
// for the forward.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "../integers.h"
#include "../kernel_table.h"
#include "general_forward.h"
#include "rows.h"
#include "tensor.h"
#include "tile.h"

namespace causal_conv1d {
namespace {
namespace general {

template <class T>
void move_elements(char* to, const char* from, int64_t stride, int64_t n) {
  const int64_t step = stride * static_cast<int64_t>(sizeof(T));
  for (int64_t i = 0; i < n; ++i) __builtin_memcpy(to + i * step, from + i * step, sizeof(T));
}

// Moves positions [shift, size) of the state to [0, size - shift); what the others hold then is
// unspecified.
inline void shift_state(const Tile& tile, const Tensor& state, int64_t row, int64_t shift) {
  const int64_t size = state.sizes[2], stride = state.strides[1];
  const int64_t bytes = element_size(state.dtype);
  const auto move = bytes == 2   ? move_elements<uint16_t>
                    : bytes == 4 ? move_elements<uint32_t>
                                 : move_elements<uint64_t>;
  char* const first = address(state, row, tile.d);
  if (state.strides[2] == 1 && stride == size) {
    const int64_t moved = (tile.cols * size - shift) * bytes;
    __builtin_memmove(first, first + shift * bytes, static_cast<size_t>(moved));
    return;
  }
  for (int64_t j = 0; j + shift < size; ++j) {
    char* const to = address(state, row, tile.d, j);
    const char* const from = address(state, row, tile.d, j + shift);
    if (stride == 1) {
      __builtin_memmove(to, from, static_cast<size_t>(tile.cols * bytes));
    } else {
      move(to, from, stride, tile.cols);
    }
  }
}

// Asks for a row of states that will be needed next: it lies too far off to be foreseen.
CAUSAL_CONV1D_INLINE void prefetch_state(const Tile& tile, const Tensor& state, int64_t row) {
  const int64_t size = state.sizes[2], bytes = tile.cols * element_size(state.dtype);
  const bool interleaved = state.strides[2] == 1 && state.strides[1] == size;
  if (row < 0 || (!interleaved && state.strides[1] != 1)) return;
  for (int64_t j = 0; j < (interleaved ? 1 : size); ++j) {
    const char* const p = address(state, row, tile.d, j);
    for (int64_t i = 0; i < (interleaved ? size : 1) * bytes; i += 64) __builtin_prefetch(p + i, 1);
  }
}

// Where token 0 goes, and token i to (head + i) mod size; the last inputs lie just before. 0 for a
// state that shifts.
CAUSAL_CONV1D_INLINE int64_t head_of(const UpdateParams& p, int64_t b) {
  const int64_t size = p.conv_state.sizes[2];
  if (!is_given(p.cache_seqlens) || size == 0) return 0;
  const int64_t head = read_index(p.cache_seqlens, b) % size;
  return head < 0 ? head + size : head;
}

// The last width - 1 inputs of a state.
template <class S>
CAUSAL_CONV1D_INLINE void load_state(const Tile& tile, const Tensor& state, int64_t row,
                                     int64_t head, S* x) {
  const int64_t size = state.sizes[2], halo = tile.width - 1;
  if (head == 0) {
    load_rows(state.dtype, address(state, row, tile.d), state.strides[2], state.strides[1], size,
              tile.cols, size - halo, x, tile.pitch);
    return;
  }
  for (int64_t j = 0; j < halo; ++j) {
    const int64_t position = (head + size - halo + j) % size;
    load_row(state.dtype, address(state, row, tile.d, position), state.strides[1], tile.cols,
             x + j * tile.pitch);
  }
}

// The tokens into the state; `token` is scratch for one.
template <class S>
CAUSAL_CONV1D_INLINE void store_state(const Tile& tile, const UpdateParams& p, int64_t b,
                                      int64_t row, int64_t head, S* token) {
  const Tensor& state = p.conv_state;
  const int64_t size = state.sizes[2], seqlen = p.x.sizes[2];
  const bool ring = is_given(p.cache_seqlens);
  if (!ring && seqlen < size) shift_state(tile, state, row, seqlen);
  for (int64_t i = larger(0, seqlen - size); i < seqlen; ++i) {
    const int64_t position = ring ? (head + i) % size : size - seqlen + i;
    load_row(p.x.dtype, address(p.x, b, tile.d, i), p.x.strides[1], tile.cols, token);
    store_row(state.dtype, token, false, address(state, row, tile.d, position), state.strides[1],
              tile.cols);
  }
}

template <class V>
void update_unit(const UpdateParams& p, const Tiling& tiling, Turn turn, int64_t unit,
                 char* scratch) {
  using S = typename V::Scalar;
  Arena arena(scratch);
  const ForwardScratch<S> s(&arena, tiling);
  const Range range = range_of(tiling, unit);
  const int64_t seqlen = tiling.seqlen;
  const auto row_of = [&](int64_t b) -> int64_t {
    return is_given(p.conv_state_indices) ? read_index(p.conv_state_indices, b) : b;
  };
  for (int64_t d = range.d0; d < range.d1; d += tiling.cols) {
    const Tile tile = tile_at(tiling, d, range.d1);
    load_weights(tile, p.weight, p.bias, s.w, s.bias);
    for (int64_t b = range.b0; b < range.b1; ++b) {
      if (turn.is_last != nullptr && (turn.is_last[b] != 0) != turn.last) continue;
      const int64_t row = row_of(b);
      const Plane out = plane_of(p.out, b);
      if (b + 1 < range.b1) prefetch_state(tile, p.conv_state, row_of(b + 1));
      if (row < 0) {
        zero_rows(tile, s.z, 0, smaller(tiling.block, seqlen));
        for (int64_t t = 0; t < seqlen; t += tiling.block) {
          store_block(tile, s.z, tiling.stream, out, t, smaller(tiling.block, seqlen - t));
        }
        continue;
      }
      const int64_t head = head_of(p, b);
      load_state(tile, p.conv_state, row, head, s.x);
      // The state first: out may be x, in place.
      if (turn.is_last == nullptr || turn.last) store_state(tile, p, b, row, head, s.z);
      const ForwardRow tokens = {{plane_of(p.x, b), {}, {}}, out, {}, {}, {}, {}, {}, false, false};
      forward_rows<V>(tile, tiling, tokens, p.silu != 0, 0, seqlen, s);
    }
  }
  finish_streams();
}

}  // namespace general
}  // namespace
}  // namespace causal_conv1d
