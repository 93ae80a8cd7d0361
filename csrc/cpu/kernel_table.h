// What the kernels of one instruction set offer to the rest of the CPU backend. Plain data only:
// kernels are compiled for CPUs that the linker must not mix up, so nothing inline may stand here.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "problem.h"
#include "tiling.h"

namespace causal_conv1d {

// Which batch entries an update takes: all of them (null), or where some use one state row, in a
// first turn those that another one follows, which leave the state alone, and then the last ones.
struct Turn {
  const char* is_last;  // by batch entry
  bool last;
};

struct KernelTable {
  const char* name;
  bool has_direct;
  size_t (*scratch_bytes)(const Tiling& tiling, Operation operation);
  // seq_idx is int32 throughout.
  void (*forward)(const ForwardProblem& p, const Tiling& tiling, int64_t unit, char* scratch);
  // The final states of sequences, where forward's are not the right ones. ends: for each of them
  // the time of it that they precede, or -1: leave it. Its tiling is make_final_states_tiling's.
  void (*final_states)(const ForwardProblem& p, const Tiling& tiling, const int64_t* ends,
                       int64_t unit, char* scratch);
  // partials: [batch group, chunk][width + 1][dim] sums of dweight and, last, of dbias; may be
  // null.
  void (*backward)(const BackwardProblem& p, const Tiling& tiling, int64_t unit, char* scratch,
                   double* partials);
  // dweight and dbias of channels first <= d < last, from the partials.
  void (*reduce)(const BackwardParams& p, const Tiling& tiling, const double* partials,
                 int64_t first, int64_t last);
  void (*update)(const UpdateParams& p, const Tiling& tiling, Turn turn, int64_t unit,
                 char* scratch);
};

namespace avx512 {
extern const KernelTable kernels;
}
namespace avx2 {
extern const KernelTable kernels;
}
namespace neon {
extern const KernelTable kernels;
}
namespace baseline {
extern const KernelTable kernels;
}

}  // namespace causal_conv1d
