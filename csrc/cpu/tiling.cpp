#include "tiling.h"

#include <algorithm>

#include "../layout.h"

namespace causal_conv1d {
namespace {

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Outputs of more bytes are stored past the caches, which saves reading the lines first.
constexpr int64_t kStreamBytes = 16 << 20;

// Bytes of a row that the direct kernels for channel_last walk along before the next rows: with
// those of some rows the L1 cache holds them.
constexpr int64_t kDirectBytes = 2048;
// Channels of a tile where sequences are not divided, as threads are to share them.
constexpr int64_t kPoolColumns = 512;
// Rows of a chunk at least, so that what is done once for a chunk does not count.
constexpr int64_t kDirectRows = 512;
// Chunks of time are multiples of it: whole vectors.
constexpr int64_t kChunkStep = 64;
// Inputs before a step that kernels hold in the caches.
constexpr int64_t kMostReach = 1 << 15;
// Channels of a unit that has final states alone.
constexpr int64_t kFinalStatesChannels = 1024;

int64_t size_of(int32_t dtype) {
  return dtype == CAUSAL_CONV1D_FLOAT64 ? 8 : dtype == CAUSAL_CONV1D_FLOAT32 ? 4 : 2;
}

// Scratch of a block fits the L1 or, with its neighbours, the L2 cache, and the width - 1 rows
// carried from block to block stay a small part.
void set_block(Tiling* t, Operation operation, int64_t size) {
  const bool update = operation == Operation::kUpdate;
  const int64_t rows = t->seqlen + (operation == Operation::kBackward ? t->width - 1 : 0);
  const int64_t wide = 4 * (t->width - 1);
  if (t->channel_first) {
    t->cols = 1;
    t->block = std::max<int64_t>(2048, wide);
  } else if (t->direct) {
    t->cols = operation == Operation::kPool ? kPoolColumns : kDirectBytes / size;
    t->block = 1;
  } else {
    // Pieces of 512 bytes, 4096 elements a block: the fastest of 128 to 4096 columns on Zen 5.
    const bool narrow = size == 2 && operation == Operation::kForward;
    t->cols = t->width > 64                             ? 32
              : update || operation == Operation::kPool ? 512
              : narrow                                  ? 256
                                                        : 128;
    t->block = std::max<int64_t>(4096 / t->cols, wide);
  }
  t->cols = std::min(t->cols, std::max<int64_t>(1, t->dim));
  t->block = std::max<int64_t>(1, std::min(t->block, rows));
}

// Units large enough to be worth handing out, small enough to go round on many cores.
void set_units(Tiling* t, Operation operation, int64_t dilation) {
  const bool update = operation == Operation::kUpdate;
  const int64_t total = t->batch * t->dim * t->seqlen;
  int64_t unit = std::min<int64_t>(1 << 20, std::max<int64_t>(1 << 16, total / 512));
  if (update) unit = 1 << 14;
  if (operation == Operation::kPool) {
    unit = 1 << 15;
  } else if (t->direct && !t->channel_first) {
    unit = std::max(unit, kDirectRows * t->cols);
  }
  const int64_t whole = std::max<int64_t>(1, t->seqlen);
  const int64_t chunk = std::max(unit / t->cols, 8 * (t->width - 1) * dilation);
  t->chunk = update ? whole : std::min(whole, divide_up(chunk, kChunkStep) * kChunkStep);
  t->chunks = divide_up(whole, t->chunk);
  const int64_t batches = t->chunks > 1 ? 1 : std::min(unit / (t->chunk * t->cols), t->batch);
  t->batches_per_unit = std::max<int64_t>(1, batches);
  const int64_t tiles = unit / (t->chunk * t->cols * t->batches_per_unit);
  t->channels_per_unit = t->cols * std::max<int64_t>(1, tiles);
  t->batch_groups = divide_up(t->batch, t->batches_per_unit);
  t->channel_groups = divide_up(t->dim, t->channels_per_unit);
}

}  // namespace

Tiling make_tiling(const Tensor& x, const Tensor& weight, const Demand& demand) {
  Tiling t = {};
  t.fp64 = x.dtype == CAUSAL_CONV1D_FLOAT64;
  t.batch = x.sizes[0];
  t.dim = x.sizes[1];
  t.seqlen = x.sizes[2];
  t.width = weight.sizes[1];
  t.apart = 1;
  t.gated = demand.gated;
  const bool update = demand.operation == Operation::kUpdate;
  const int64_t size = size_of(x.dtype);
  const bool pool = demand.operation == Operation::kPool;
  const bool is_short = (update && t.seqlen < 32) || (pool && demand.average_length < 32);
  t.channel_first = !is_channel_last(x) && !is_short;
  t.stream = t.batch * t.dim * t.seqlen * size >= kStreamBytes;
  t.direct = demand.has_direct && !update && !t.fp64 && t.width >= 2 && t.width <= 4;
  // Channel_first, options take states of x's type alone, and ids that can be joined.
  if (demand.seq_idx) t.direct = t.direct && t.channel_first && demand.ids_ascend;
  if (t.channel_first && t.gated && demand.other_states) t.direct = false;
  set_block(&t, demand.operation, size);
  set_units(&t, demand.operation, demand.dilation);
  return t;
}

bool should_walk_apart(const Tiling& t, const Demand& demand) {
  return demand.dilation > 1 && t.direct && t.channel_first && !demand.other_states &&
         (t.width - 1) * demand.dilation <= kMostReach;
}

Tiling make_final_states_tiling(Tiling t, int64_t rows, int64_t length) {
  t.batch = rows;
  t.width = length + 1;
  t.chunk = t.seqlen;
  t.chunks = 1;
  t.batches_per_unit = 1;
  t.batch_groups = t.batch;
  t.channels_per_unit = divide_up(kFinalStatesChannels, t.cols) * t.cols;
  t.channel_groups = divide_up(t.dim, t.channels_per_unit);
  return t;
}

int64_t units_of(const Tiling& t) { return t.batch_groups * t.channel_groups * t.chunks; }

int64_t work_of(const Tiling& t, int64_t cost) {
  return t.batch * t.dim * t.seqlen * (cost + t.width / 8);
}

}  // namespace causal_conv1d
