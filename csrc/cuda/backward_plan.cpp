#include "backward_plan.h"

#include <algorithm>

#include "../element_size.h"
#include "../layout.h"
#include "any_schedule.h"

namespace causal_conv1d::gpu {
namespace {

// The GPU that the thresholds were measured on, an H200: blocks that its 132 SMs run at a time,
// four each. They hold for any GPU, as the order of sums must not depend on it.
constexpr int64_t kBlocksAtATime = 132 * 4;

int size_of(const Tensor& t) { return static_cast<int>(element_size(t.dtype)); }

// The steps per warp of a channel-last chunk, of a multiple of the W steps that a warp reads at
// once plus 1, so that the dz before the next warp's chunk need no more than one such group.
//
// Long chunks repeat less work at their ends, short ones make more blocks. The time of a length is
// that of its blocks' steps one after the other, kBlocksAtATime blocks at a time, with per block 3
// steps more, a fifth of a chunk until the last blocks have ended, and 0.15 steps to add up its
// sums: so fitted to 21 shapes in two types. Examples of bf16 and W = 4: 129 steps for 8 x 512
// channels of 8192 steps; 65 for 8 x 2048 of 2048; 17 for 1 x 2048 of 2048, where longer ones leave
// SMs idle.
//
// across: blocks beside each other over the channels. They are counted as if tensors were aligned,
// so that the order of sums does not depend on alignment.
int64_t choose_chunk(int64_t batch, int64_t seqlen, int64_t across, int64_t group) {
  int64_t best = 1, least = INT64_MAX, down_before = 0;
  for (int64_t most = 129; most >= 17 && seqlen > 0; most -= group) {
    const int64_t down = ceil_div(seqlen, most * kBackwardLines);  // blocks over the time axis
    if (down == down_before) continue;
    down_before = down;
    const int64_t even = ceil_div(seqlen, down * kBackwardLines);
    const int64_t steps = ceil_div(even - 1, group) * group + 1;
    const int64_t blocks = batch * ceil_div(ceil_div(seqlen, steps), kBackwardLines);
    const int64_t rounds = ceil_div(blocks * across, kBlocksAtATime);
    const int64_t time = 20 * rounds * (steps + 3) + 4 * steps + 3 * blocks;  // in steps / 20
    if (time >= least) continue;
    least = time;
    best = steps;
  }
  return best;
}

// Of 100 places for blocks, those that are idle until the last blocks have ended, with 2^bits warps
// per channel. Example: 2048 channels of one warp are 512 blocks for 528 places, 4 %.
int64_t idle_places(int64_t dim, int bits) {
  const int64_t blocks = ceil_div(dim << bits, kWarps), rounds = ceil_div(blocks, kBlocksAtATime);
  return 100 - 100 * blocks / (rounds * kBlocksAtATime);
}

}  // namespace

BackwardPlan::BackwardPlan(const BackwardParams& params, const Options& options,
                           const OptionGradients& gradients, bool any, bool alone) {
  const Tensor& x = params.x;
  const int size = size_of(x);
  const bool none = !has_elements(x);  // the other sizes may then be of any magnitude
  const int64_t batch = none ? 0 : x.sizes[0], dim = x.sizes[1], seqlen = none ? 0 : x.sizes[2];
  const int64_t width = params.weight.sizes[1];
  // Gates that are not given are aligned in every way.
  const Tensors read = {&params.x, &params.dout, &options.pre_gate, &options.post_gate};
  const Tensors all = {
      &params.x,          &params.dout,         &params.dx,           &options.pre_gate,
      &options.post_gate, &gradients.dpre_gate, &gradients.dpost_gate};
  any_width = any || !kHasVariants || width > 8 || size == 8 ||
              batch * dim * ceil_div(seqlen, 64) > kMaxParts;
  channel_last = is_channel_last(x);
  if (any) {
    plan_tiles(batch, dim, seqlen);
  } else if (any_width) {
    plan_any_width(params, batch, seqlen);
  } else if (channel_last) {
    plan_channel_last(params, read, all, batch, seqlen);
  } else {
    plan_channel_first(params, all, batch, seqlen, alone);
  }
  const bool sums = given(params.dweight) || given(params.dbias);
  if (sums && !whole) partials = parts * (width + 1) * dim * (size == 8 ? 8 : 4);
  if (matches_pitch > 0) partials = ceil_div(partials, 8) * 8;  // matches are read by 8 bytes
  workspace = partials + batch * (matches_pitch + matches_pitch / kThreads);
}

// A part is a block's: four runs per thread, or two of fp64, if there are no ids and the dz that it
// needs fit into shared memory.
void BackwardPlan::plan_any_width(const BackwardParams& params, int64_t batch, int64_t seqlen) {
  constexpr int64_t kMostMemory = 48 * 1024;
  const int64_t dim = params.x.sizes[1], pieces = ceil_div(params.weight.sizes[1] - 1, kAnyRun) + 1;
  const int size = size_of(params.x) == 8 ? 8 : 4, runs = 16 / size;
  tile_channels = any_channels(channel_last, dim, seqlen, runs);
  chunk = kThreads * kAnyRun * runs / tile_channels;
  // dz, weights, and the sums of a block's warps.
  any_rows = ((chunk / kAnyRun + pieces) * (kAnyRun + 1) * tile_channels +
              pieces * kAnyRun * tile_channels + kThreads * kAnyRun) *
             size;
  if (given(params.seq_idx) || any_rows > kMostMemory) {
    any_rows = 0;
    plan_tiles(batch, dim, seqlen);
    return;
  }
  chunks = ceil_div(seqlen, chunk);
  parts = batch * chunks;
}

// A part is a block's.
void BackwardPlan::plan_tiles(int64_t batch, int64_t dim, int64_t seqlen) {
  tile_channels = channel_last ? 32 : 1;
  while (tile_channels > 1 && tile_channels / 2 >= dim) tile_channels /= 2;
  chunk = kTileEntries / tile_channels;
  chunks = ceil_div(seqlen, chunk);
  parts = batch * chunks;
}

// A part is a block's: kBackwardLines chunks.
void BackwardPlan::plan_channel_last(const BackwardParams& params, Tensors read, Tensors all,
                                     int64_t batch, int64_t seqlen) {
  const Tensor& x = params.x;
  const int64_t dim = x.sizes[1], width = params.weight.sizes[1];
  const int size = size_of(x), widest = channels_per_thread(width, size);
  vector = common_channels(widest, size, dim, all) == widest;
  wide = common_channels(16 / size, size, dim, read) == 16 / size;
  chunk = choose_chunk(batch, seqlen, ceil_div(ceil_div(dim, widest), 32), width > 4 ? 8 : 4);
  chunks = ceil_div(seqlen, chunk);
  parts = batch * ceil_div(chunks, kBackwardLines);
}

// A part is a warp's: some tiles of a row, or whole rows of a channel.
void BackwardPlan::plan_channel_first(const BackwardParams& params, Tensors all_tensors,
                                      int64_t batch, int64_t seqlen, bool alone) {
  const int64_t dim = params.x.sizes[1];
  const int size = size_of(params.x), G = 16 / size;
  const int64_t tile = 32 * steps_per_lane(params.weight.sizes[1], size);
  access = common_access(all_tensors, size);
  // Rows of other lengths than whole vectors may begin their first tile up to G - 1 steps early.
  const bool ragged = seqlen % G != 0;
  const int64_t tiles = ceil_div(seqlen + (ragged ? G - 1 : 0), tile);
  const int64_t all = batch * tiles;       // of a channel
  const auto divide = [&](int64_t most) {  // so many tiles per warp
    chunks = ceil_div(tiles, most);
    chunk = chunks > 0 ? ceil_div(tiles, chunks) * tile : tile;
    rows = chunks == 1 ? std::min(most / tiles, batch) : 1;
    parts = rows > 0 ? ceil_div(batch, rows) * chunks : 0;
  };
  // A block that has all of a channel needs no partial sums. It has one, two or four warps per
  // channel, if each then gets at most 64 tiles, or 8 where there are fewer than 1024 channels.
  // More warps than one are for fewer than 4096 warps in all (8192 of fp32), or if they leave 10 of
  // 100 places less idle, and each still gets 8 tiles. Examples of bf16, W = 4:
  //   4 x 4096 channels of 2048 steps   32 tiles per channel, one warp
  //   8 x 2048 of 2048                  64 tiles, 2048 warps are too few: two
  //   8 x 2240 of 2048                  4480 warps leave 30 places idle, 8960 leave 16: four
  //   8 x 512 of 8192                   256 tiles, too many for a block: 8 per warp, 32 parts
  const int64_t warps = size == 2 ? 4096 : 8192;
  for (int bits = 0; bits <= 2 && !whole && alone && all > 0; ++bits) {
    const int64_t most = ceil_div(all, 1 << bits);
    const bool few = dim << bits < warps ||
                     (!ragged && idle_places(dim, bits) > idle_places(dim, bits + 1) + 10);
    const bool more = bits < 2 && most >= 16 && few;
    if (more || most > (dim >= 1024 ? 64 : 8)) continue;
    divide(most);
    whole = parts <= 1 << bits;
    part_bits = bits;
  }
  // Else 8 to 16 tiles per warp, as makes 16384 warps.
  if (!whole) divide(std::clamp<int64_t>(ceil_div(dim * all, 16384), 8, 16));
  if (given(params.seq_idx)) matches_pitch = kMatchesBefore + tiles * tile + kMatchesAfter;
}

}  // namespace causal_conv1d::gpu
