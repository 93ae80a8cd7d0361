// Scratch of the direct kernels for a tile of channels, in the order of groups, rows of `pitch`
// floats.
#pragma once

#include <stdint.h>

#include "../simd/groups.h"
#include "../tiling.h"
#include "scratch.h"

namespace causal_conv1d {
namespace {

struct DirectScratch {
  float *w, *bias, *x, *row = nullptr, *dz = nullptr, *sums = nullptr, *unused = nullptr,
                       *edge = nullptr;
  double* totals = nullptr;
  GateScratch<float> gates;

  DirectScratch(Arena* arena, int64_t width, int64_t pitch, bool backward, bool gated) {
    w = arena->take<float>(width * pitch);
    bias = arena->take<float>(pitch);
    x = arena->take<float>((width - 1) * pitch);
    if (!backward) {
      row = arena->take<float>(pitch);
      return;
    }
    dz = arena->take<float>((width - 1) * pitch);
    sums = arena->take<float>((width + 1) * pitch);
    unused = arena->take<float>((width + 1) * pitch);  // sums of rows that do not count
    edge = arena->take<float>(pitch);
    totals = arena->take<double>((width + 1) * pitch);
    if (!gated) return;
    gates.gate = arena->take<float>(pitch);
    gates.other = arena->take<float>(pitch);
  }
};

inline int64_t direct_pitch(const Tiling& tiling) {
  return tiling.channel_first ? kGroup : padded(tiling.cols);
}

}  // namespace
}  // namespace causal_conv1d
