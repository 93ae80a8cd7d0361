// How the backward divides a problem, and the workspace that it needs: host C++, without CUDA.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "../check.h"
#include "access.h"
#include "schedule.h"

namespace causal_conv1d::gpu {

constexpr int kBackwardLines = kWarps;  // channel-last: chunks per block, one per warp

// Steps that a block of backward_any_tiles has, of all its channels together.
constexpr int64_t kTileEntries = 2048;

// Bytes in a row of matches before its first step and after its tiles. More than are read, so that
// blocks of find_matches begin where tiles do.
constexpr int kMatchesBefore = 2 * kThreads, kMatchesAfter = 2 * kThreads;

// The kernels write sums of dweight and dbias for parts of the problem, "partial sums", which are
// then added up in one order. Parts depend on sizes, types and the layout alone, so results do; the
// alignment of tensors decides only how they are read.
struct BackwardPlan {
  bool any_width = false, channel_last = false;
  bool vector = false;               // channel-last: channels_per_thread() at a time, else one
  bool wide = false;                 // channel-last: what is read is 16-byte aligned throughout
  Access access = Access::kStrided;  // channel-first
  int64_t chunk = 0, chunks = 0;     // steps of a part of the time axis, and how many there are
  int64_t rows = 1;                  // channel-first: batch entries per warp
  int64_t parts = 0;                 // of each channel's sums
  // channel-first: a block has all parts of a channel, and adds them up itself; 2^part_bits warps
  // are for them.
  bool whole = false;
  int part_bits = 0;
  int64_t tile_channels = 0;            // any_width: adjacent channels of a block
  int64_t matches_pitch = 0;            // channel-first with seq_idx: bytes per row of matches
  int64_t partials = 0, workspace = 0;  // bytes of the partial sums, and of all
  // Bytes of shared memory of backward_any_rows, or 0 if it is not to be used.
  int64_t any_rows = 0;

  // any: backward_any_tiles is to be used, whatever there is. alone: no other kernel adds to the
  // sums.
  explicit BackwardPlan(const BackwardParams& params, const Options& options = {},
                        const OptionGradients& gradients = {}, bool any = false, bool alone = true);

 private:
  using Tensors = std::initializer_list<const Tensor*>;
  void plan_any_width(const BackwardParams& params, int64_t batch, int64_t seqlen);
  void plan_tiles(int64_t batch, int64_t dim, int64_t seqlen);
  void plan_channel_last(const BackwardParams& params, Tensors read, Tensors all, int64_t batch,
                         int64_t seqlen);
  void plan_channel_first(const BackwardParams& params, Tensors all_tensors, int64_t batch,
                          int64_t seqlen, bool alone);
};

}  // namespace causal_conv1d::gpu
