// What the selective scan's kernels of one instruction set offer to scan_api.cpp, and how a problem
// is cut into units of work. Plain data only, as in kernel_table.h.
//
// A unit is some channels of a group (a block) in one segment: a batch entry, or a packed sequence.
// It walks time in tiles, whose inputs it turns into float (double) scratch of vectors over
// channels. A backward goes over time in spans of many tiles, the last first: between two spans the
// gradients of B and C, sums over the blocks, are added up, so that memory for them is bounded.
// Nothing here depends on the number of threads.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "../scan_check.h"

namespace causal_conv1d {

struct ScanPlan {
  bool fp64, constant_B, constant_C;
  int64_t dim, dstate, groups, group_dim;
  int64_t lanes;          // channels of a vector
  int64_t row;            // dstate, to whole vectors: values of a step of B and C in scratch
  int64_t tile, span;     // steps
  int64_t block, blocks;  // channels of a unit, units of a group
  int64_t vectors;        // of a block
};

struct ScanSegment {
  int64_t batch, begin, end;
  int64_t states;  // its row in the tensors of states
};

// One span of a backward's unit. The pointers are to float, double with fp64.
struct ScanSpan {
  int64_t begin, end;
  bool last, first;  // of the segment
  // States before the span, [vector of the block][dstate][lane], null: the segment's initial ones.
  const void* start;
  // [vector of the block][kScanSums...][lane]: see sums_of_vector. Kept from span to span.
  void* sums;
  // [step of the span][row]: sums over the block's channels; null if constant or not wanted.
  void *partial_dB, *partial_dC;
};

// The values of ScanSpan::sums for a vector, times lanes: the gradients of the states before the
// span, of A, of constant B and C (dstate each), of D and of delta_bias.
#define CAUSAL_CONV1D_SCAN_SUMS(dstate) (4 * (dstate) + 2)

#define CAUSAL_CONV1D_UPDATE_BLOCK 256

struct ScanKernels {
  int64_t lanes;  // of float; one of double
  size_t (*forward_scratch)(const ScanPlan& plan);
  size_t (*backward_scratch)(const ScanPlan& plan);
  size_t (*update_scratch)(const StateUpdateParams& p);
  void (*forward)(const ScanForwardParams& p, const ScanPlan& plan, const ScanSegment& segment,
                  int64_t group, int64_t block, char* scratch);
  // Leaves the states before each span but the first one in starts: [span - 1][vector of the
  // block][dstate][lane], spans `stride` values apart.
  void (*span_starts)(const ScanInputs& in, const ScanPlan& plan, const ScanSegment& segment,
                      int64_t group, int64_t block, void* starts, int64_t stride, char* scratch);
  void (*backward)(const ScanBackwardParams& p, const ScanPlan& plan, const ScanSegment& segment,
                   const ScanSpan& span, int64_t group, int64_t block, char* scratch);
  // Rows of a gradient of B or C from the partial sums of `blocks` blocks, `stride` values apart.
  void (*reduce)(const Tensor4& out, const ScanPlan& plan, int64_t batch, int64_t group,
                 int64_t begin, int64_t end, void* partials, int64_t stride);
  // The gradients of parameters from a block's sums, added up over all segments.
  void (*store_sums)(const ScanBackwardParams& p, const ScanPlan& plan, int64_t group,
                     int64_t block, const void* sums);
  // Channels first .. first + count - 1 of a head, CAUSAL_CONV1D_UPDATE_BLOCK at most, in batch
  // entries begin .. end - 1. state_rows: the state row of each, negative: none; null: its own.
  void (*update)(const StateUpdateParams& p, const int64_t* state_rows, int64_t head, int64_t first,
                 int64_t count, int64_t begin, int64_t end, char* scratch);
};

namespace avx512 {
extern const ScanKernels scan_kernels;
}
namespace avx2 {
extern const ScanKernels scan_kernels;
}
namespace neon {
extern const ScanKernels scan_kernels;
}
namespace baseline {
extern const ScanKernels scan_kernels;
}

}  // namespace causal_conv1d
