// How the kernels for channel-first rows with a dilation divide them: host code, without CUDA.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "../check.h"
#include "../element_size.h"
#include "../layout.h"
#include "access.h"
#include "packed.h"
#include "schedule.h"

namespace causal_conv1d::gpu {

// A thread has so many steps of one phase. The number is odd, so that the threads of a warp find
// them in different banks of shared memory.
constexpr int kPhaseSteps = 9;
constexpr int kDilatedTile = kThreads * kPhaseSteps;  // steps of a tile, at most
constexpr int kMostHalo = 512;                        // before a tile, at most

// A block has `chunk` steps of a row, tile by tile. Parts depend on sizes alone, as the order of
// sums does.
struct DilatedRows {
  int64_t dilation = 1, chunk = 0, chunks = 0;  // chunks: 0 if the kernels cannot take the call
  int tile = 0;

  DilatedRows(int64_t dilation_, const Tensor& x, int64_t width, const Tensor& initial_states,
              std::initializer_list<const Tensor*> rows)
      : dilation(dilation_) {
    const int size = static_cast<int>(element_size(x.dtype));
    const int64_t halo = (width > 4 ? 7 : 3) * dilation;
    if (dilation == 1 || dilation > kThreads || halo > kMostHalo || width > edge_width(x.dtype) ||
        size > 4 || is_channel_last(x) || common_access(rows, size) == Access::kStrided ||
        (has_elements(initial_states) && initial_states.dtype != x.dtype)) {
      return;
    }
    constexpr int64_t kTilesPerBlock = 4;
    tile = static_cast<int>(kThreads / dilation * dilation) * kPhaseSteps;
    const int64_t tiles = ceil_div(x.sizes[2], tile), blocks = ceil_div(tiles, kTilesPerBlock);
    if (blocks == 0 || x.sizes[0] * x.sizes[1] * blocks > kMaxParts) return;
    chunk = ceil_div(tiles, blocks) * tile;
    chunks = blocks;
  }
};

}  // namespace causal_conv1d::gpu
