// Scratch of the direct kernels for a tile of channels, in the order of groups, rows of `pitch`
// floats.
#pragma once

#include <stdint.h>

#include "../simd/groups.h"
#include "../tiling.h"
#include "direct_line.h"
#include "scratch.h"

namespace causal_conv1d {
namespace {

inline int64_t direct_pitch(const Tiling& tiling) {
  return tiling.channel_first ? kGroup : padded(tiling.cols);
}

struct DirectScratch {
  float *w, *bias, *x, *row = nullptr, *dz = nullptr, *sums = nullptr, *unused = nullptr,
                       *edge = nullptr;
  double* totals = nullptr;
  // Lines of channel_first: see direct_line.h. Not at the scratch's start: with rows of x at pages'
  // starts, as they often are, loads would wait for stores to the same place of another page.
  float *inputs = nullptr, *gradients = nullptr;
  GateScratch<float> gates;

  DirectScratch(Arena* arena, const Tiling& tiling, bool backward) {
    const int64_t width = tiling.width, pitch = direct_pitch(tiling);
    const int64_t line = line_capacity((width - 1) * tiling.apart) + 2 * kPad;
    const bool plain = !tiling.gated && !tiling.joined && tiling.apart == 1;
    const bool has_lines = tiling.channel_first && !plain;
    w = arena->take<float>(width * pitch);
    bias = arena->take<float>(pitch);
    x = arena->take<float>((width - 1) * pitch);
    if (!backward) {
      row = arena->take<float>(pitch);
      if (has_lines) inputs = arena->take<float>(line);
      return;
    }
    dz = arena->take<float>((width - 1) * pitch);
    sums = arena->take<float>((width + 1) * pitch);
    unused = arena->take<float>((width + 1) * pitch);  // sums of rows that do not count
    edge = arena->take<float>(pitch);
    totals = arena->take<double>((width + 1) * pitch);
    if (has_lines) {
      inputs = arena->take<float>(line);
      gradients = arena->take<float>(line);
    }
    if (!tiling.gated) return;
    gates.gate = arena->take<float>(pitch);
    gates.other = arena->take<float>(pitch);
  }
};

}  // namespace
}  // namespace causal_conv1d
