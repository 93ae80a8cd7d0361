// How a problem is cut into units of work for the threads. It depends on shapes, strides and types
// alone, never on the number of threads.
#pragma once

#include <stdint.h>

#include "../check.h"

namespace causal_conv1d {

enum class Operation { kForward, kBackward, kUpdate, kPool, kFinalStates };

// A unit is some batch entries x some channels x a chunk of time. It walks its channels `cols` at a
// time (1 for channel_first), and time `block` rows at a time, so that the scratch memory stays in
// the caches.
struct Tiling {
  bool channel_first;  // vectors run along time; otherwise along channels
  bool fp64;
  bool stream;  // outputs are too large for the caches: store past them
  bool direct;  // the kernels of kernels/direct.h
  bool gated;   // there are gates or a residual
  bool joined;  // sequences are one (joined.h)
  int64_t batch, dim, seqlen, width;
  int64_t apart;  // see Sequences
  int64_t cols, block;
  int64_t batches_per_unit, channels_per_unit, chunk;
  int64_t batch_groups, channel_groups, chunks;
};

// What is asked of a tiling beside x.
struct Demand {
  Operation operation;
  bool has_direct;  // of the kernels that will be used
  bool seq_idx = false, gated = false;
  bool ids_ascend = false;    // so that joining does for seq_idx (joined.h)
  bool other_states = false;  // initial states of another type than x
  int64_t dilation = 1;
  int64_t average_length = 0;  // of a pool's sequences
};

Tiling make_tiling(const Tensor& x, const Tensor& weight, const Demand& demand);

// Whether a dilated row is walked as it lies in memory, with taps that lie apart, rather than in
// phases.
bool should_walk_apart(const Tiling& tiling, const Demand& demand);

// For the final states alone, of `rows` sequences and states of `length`: a unit has all of time.
Tiling make_final_states_tiling(Tiling forward, int64_t rows, int64_t length);

int64_t units_of(const Tiling& tiling);

// In elements of a forward, each of which takes `cost` of them.
int64_t work_of(const Tiling& tiling, int64_t cost);

}  // namespace causal_conv1d
