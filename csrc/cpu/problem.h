// A forward or backward with its options, as the kernels take it. Plain data only, for the reason
// in kernel_table.h.
#pragma once

#include <stdint.h>

#include "../check.h"

namespace causal_conv1d {

// Of a pool's sequence: its slot, or -1 if it is skipped, the first column of its history there,
// and the row of windows_out that it fills, or -1.
struct PoolSequence {
  int64_t slot, first_column, window_row;
  bool has_history;
};

// Where sequences lie in x: each batch entry is one, or `count` of them are packed in the only
// entry, sequence i at the times bounds[i] to bounds[i + 1].
struct Sequences {
  int64_t dilation;
  const int64_t* bounds;  // null: not packed
  int64_t count;
  const PoolSequence* pool;  // null: none
  // Steps from a tap to the next one, within a phase: with 1 sequences are taken apart into their
  // phases, else they are one.
  int64_t apart = 1;
};

// Of sequences of a row without states whose steps the direct kernels for channel_first walk as one
// sequence: for each step, how many taps of its sequence could be before it, and how many behind
// it, at most kMost, of x's shape and type. Those count that are not farther away.
struct Joined {
  static constexpr int64_t kMost = 64;
  Tensor before, behind;
};

// Of a pool, initial_states are its states, which are changed.
struct ForwardProblem : ForwardParams {
  Tensor pre_gate, post_gate, residual;
  Sequences sequences;
  Joined joined;
  Tensor windows;
  bool keeps_accepted;  // the states afterwards go back to the second input of the history
};

struct BackwardProblem : BackwardParams {
  Tensor pre_gate, post_gate, dpre_gate, dpost_gate;
  Sequences sequences;
  Joined joined;
  bool residual_is_x;
  // For each batch entry the time that its final states precede; null: all of its times.
  const int64_t* ends;
};

}  // namespace causal_conv1d
