// The table of the kernels of one instruction set. A source file names it before it includes this:
//
//   #define CAUSAL_CONV1D_ISA avx2    the table's name and namespace
//   #define CAUSAL_CONV1D_ISA_AVX2    what simd/vec.h asks for
//
// Everything but the table has internal linkage, and no standard library is used: an inline
// function compiled for AVX-512 here might otherwise be linked into the code for all CPUs.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "../kernel_table.h"
#include "../simd/vec.h"
#include "general_backward.h"
#include "general_forward.h"
#include "general_states.h"
#include "general_update.h"
#include "sums.h"

#if !defined(CAUSAL_CONV1D_ONE_LANE)
#include "direct.h"
#endif

#if !defined(CAUSAL_CONV1D_ISA)
#error "define CAUSAL_CONV1D_ISA"
#endif

namespace causal_conv1d {
namespace {

#if defined(CAUSAL_CONV1D_ONE_LANE)
constexpr bool kHasDirect = false;
#else
constexpr bool kHasDirect = true;
#endif

template <class S>
size_t scratch_bytes_as(const Tiling& tiling, Operation operation) {
  Arena arena(nullptr);
  if (operation == Operation::kBackward) {
    general::BackwardScratch<S>(&arena, tiling);
  } else if (operation == Operation::kFinalStates) {
    general::take_states<S>(&arena, tiling);
  } else {
    general::ForwardScratch<S>(&arena, tiling);
  }
  return arena.used();
}

size_t scratch_bytes(const Tiling& tiling, Operation operation) {
#if !defined(CAUSAL_CONV1D_ONE_LANE)
  if (tiling.direct && operation != Operation::kFinalStates) {
    return direct::scratch_bytes(tiling, operation);
  }
#endif
  return tiling.fp64 ? scratch_bytes_as<double>(tiling, operation)
                     : scratch_bytes_as<float>(tiling, operation);
}

void forward(const ForwardProblem& p, const Tiling& tiling, int64_t unit, char* scratch) {
#if !defined(CAUSAL_CONV1D_ONE_LANE)
  if (tiling.direct) return direct::forward_unit(p, tiling, unit, scratch);
#endif
  (tiling.fp64 ? general::forward_unit<DoubleVec> : general::forward_unit<Vec>)(p, tiling, unit,
                                                                                scratch);
}

void final_states(const ForwardProblem& p, const Tiling& tiling, const int64_t* ends, int64_t unit,
                  char* scratch) {
  (tiling.fp64 ? general::final_states_unit<DoubleVec>
               : general::final_states_unit<Vec>)(p, tiling, ends, unit, scratch);
}

void backward(const BackwardProblem& p, const Tiling& tiling, int64_t unit, char* scratch,
              double* partials) {
#if !defined(CAUSAL_CONV1D_ONE_LANE)
  if (tiling.direct) return direct::backward_unit(p, tiling, unit, scratch, partials);
#endif
  (tiling.fp64 ? general::backward_unit<DoubleVec>
               : general::backward_unit<Vec>)(p, tiling, unit, scratch, partials);
}

void reduce(const BackwardParams& p, const Tiling& tiling, const double* partials, int64_t first,
            int64_t last) {
  (tiling.fp64 ? reduce_partials<DoubleVec> : reduce_partials<Vec>)(p, tiling, partials, first,
                                                                    last);
}

void update(const UpdateParams& p, const Tiling& tiling, Turn turn, int64_t unit, char* scratch) {
  (tiling.fp64 ? general::update_unit<DoubleVec> : general::update_unit<Vec>)(p, tiling, turn, unit,
                                                                              scratch);
}

#define CAUSAL_CONV1D_STRING_OF(a) #a
#define CAUSAL_CONV1D_STRING(a) CAUSAL_CONV1D_STRING_OF(a)

}  // namespace

namespace CAUSAL_CONV1D_ISA {

extern const KernelTable kernels;
const KernelTable kernels = {CAUSAL_CONV1D_STRING(CAUSAL_CONV1D_ISA),
                             kHasDirect,
                             scratch_bytes,
                             forward,
                             final_states,
                             backward,
                             reduce,
                             update};

}  // namespace CAUSAL_CONV1D_ISA
}  // namespace causal_conv1d
