// Steps before the first and after the last sequence of cu_seqlens: 0 in all results.
#pragma once

#include "scan_segments.cuh"

namespace causal_conv1d::gpu::scan {

struct OutsideSteps {
  // A tensor of (1, rows, width, time), or (1, rows, time) with a width of 1.
  struct Task {
    View to;
    int64_t rows, width;
  };
  Task tasks[6];
  int count;
  Sequences sequences;

  void add(const View& to, int64_t rows, int64_t width) {
    if (to.given()) tasks[count++] = {to, rows, width};
  }
};

cudaError_t clear(const OutsideSteps& p, cudaStream_t stream);

}  // namespace causal_conv1d::gpu::scan
