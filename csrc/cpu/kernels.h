// What the kernels of one instruction set offer to the rest of the CPU backend, and how a problem
// is cut into units of work. Plain data only: kernels.inl is compiled for CPUs that the linker must
// not mix up, so nothing inline may stand here.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "../check.h"

namespace causal_conv1d {

// A unit is some batch entries x some channels x a stretch of time. It walks its channels `cols` at
// a time (1 for channel_first), and time `block` rows at a time, so that the scratch memory stays
// in the caches. It depends on shapes, strides and types alone, never on the number of threads.
struct Tiling {
  bool channel_first;  // vectors run along time; otherwise along channels
  bool fp64;
  bool stream;  // outputs are too large for the caches: store past them
  bool direct;  // the kernels of direct.inl
  int64_t batch, dim, seqlen, width;
  int64_t cols, block;
  int64_t batches_per_unit, channels_per_unit, chunk;
  int64_t batch_groups, channel_groups, chunks;
};

enum class Operation { kForward, kBackward, kUpdate, kFinalStates };

// Which batch entries an update takes: all of them (null), or where some use one state row, in a
// first turn those that another one follows, which leave the state alone, and then the last ones.
struct Turn {
  const char* is_last;  // by batch entry
  bool last;
};

struct Kernels {
  const char* name;
  bool has_direct;
  size_t (*scratch_bytes)(const Tiling& tiling, Operation operation);
  void (*forward)(const ForwardParams& p, const Tiling& tiling, int64_t unit, char* scratch);
  // The final states of a unit that has all of time, where forward's are not the right ones. ends:
  // for each batch entry the time that they precede, or -1: leave it. seq_idx is int32 throughout.
  void (*final_states)(const ForwardParams& p, const Tiling& tiling, const int64_t* ends,
                       int64_t unit, char* scratch);
  // ends: the same; null: the sequence's. partials: [batch group, chunk][width + 1][dim] sums of
  // dweight and, last, of dbias; may be null.
  void (*backward)(const BackwardParams& p, const Tiling& tiling, const int64_t* ends, int64_t unit,
                   char* scratch, double* partials);
  // dweight and dbias of channels first <= d < last, from the partials.
  void (*reduce)(const BackwardParams& p, const Tiling& tiling, const double* partials,
                 int64_t first, int64_t last);
  void (*update)(const UpdateParams& p, const Tiling& tiling, Turn turn, int64_t unit,
                 char* scratch);
};

namespace avx512 {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace neon {
extern const Kernels kernels;
}
namespace baseline {
extern const Kernels kernels;
}

// The kernels in use: the best that this CPU runs. A test may set another.
extern const Kernels* active_kernels;

}  // namespace causal_conv1d
