// What a pool's sequence leaves behind: its state, and the inputs before each of its tokens.
#pragma once

#include <stdint.h>

#include "../integers.h"
#include "../problem.h"
#include "pieces.h"
#include "rows.h"
#include "tensor.h"
#include "tile.h"

namespace causal_conv1d {
namespace {

// history: the width - 1 inputs before the sequence; row: scratch for one. x is still what it was,
// and the state too.
template <class S>
__attribute__((noinline)) void leave_state(const Tile& tile, const ForwardProblem& p,
                                           const Piece& piece, const Plane& x, const S* history,
                                           S* row) {
  const int64_t halo = tile.width - 1, length = piece.length, d = tile.d;
  // Input i of the history and then the tokens.
  const auto input = [&](int64_t i) -> const S* {
    if (i < halo) return history + i * tile.pitch;
    load_row(x.dtype, address(x, d, i - halo), x.channel, tile.cols, row);
    return row;
  };
  if (piece.window_row >= 0) {
    const Tensor& windows = p.windows;
    const int64_t column = windows.strides[2];
    for (int64_t t = 0; t < smaller(length, windows.sizes[1]); ++t) {
      for (int64_t j = 0; j < halo; ++j) {
        store_row(windows.dtype, input(t + 1 + j), false,
                  address(windows, piece.window_row, t, d * halo + j), column * halo, tile.cols);
      }
    }
  }
  const Tensor& states = p.initial_states;
  const int64_t columns = p.keeps_accepted ? smaller(states.sizes[2], halo - 1 + length) : halo;
  for (int64_t c = 0; c < columns; ++c) {
    store_row(states.dtype, input(halo + length - columns + c), false,
              address(states, piece.row, d, c), states.strides[1], tile.cols);
  }
}

}  // namespace
}  // namespace causal_conv1d
