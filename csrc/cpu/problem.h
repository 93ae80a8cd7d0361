// A forward or backward with its options, as the kernels take it. Plain data only, for the reason
// in kernel_table.h.
#pragma once

#include <stdint.h>

#include "../check.h"

namespace causal_conv1d {

// Where sequences lie in x: each batch entry is one, or `count` of them are packed in the only
// entry, sequence i at the times bounds[i] to bounds[i + 1].
struct Sequences {
  int64_t dilation;
  const int64_t* bounds;  // null: not packed
  int64_t count;
};

struct ForwardProblem : ForwardParams {
  Tensor pre_gate, post_gate, residual;
  Sequences sequences;
};

struct BackwardProblem : BackwardParams {
  Tensor pre_gate, post_gate, dpre_gate, dpost_gate;
  Sequences sequences;
  bool residual_is_x;
  // For each batch entry the time that its final states precede; null: all of its times.
  const int64_t* ends;
};

}  // namespace causal_conv1d
