// How the kernels for any width divide a problem: host C++, without CUDA.
#pragma once

#include <cstdint>

#include "schedule.h"

namespace causal_conv1d::gpu {

// The kernels for any width: adjacent steps of a thread, and taps that it takes at a time.
constexpr int kAnyRun = 8;

// Channels of their blocks, a thread having so many runs: those of a warp's lanes, or one per warp
// or more warps.
constexpr int any_channels(bool channel_last, int64_t dim, int64_t seqlen, int64_t runs) {
  if (channel_last && dim > kWarps) return 32;
  int channels = 1;
  while (channels < kWarps && channels < dim &&
         seqlen * channels * 2 <= int64_t(kThreads) * kAnyRun * runs) {
    channels *= 2;
  }
  return channels;
}

}  // namespace causal_conv1d::gpu
