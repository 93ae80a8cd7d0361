// How the CUDA backward divides a problem (csrc/cuda/backward_plan.h), and which layout kernels
// take x for (csrc/layout.h): host code, which needs no GPU.
#include "cuda/backward_plan.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <tuple>

#include "cuda/phases.h"
#include "layout.h"

namespace causal_conv1d::gpu {
namespace {

struct Problem {
  int64_t batch, dim, seqlen;
  int64_t width = 4;
  int32_t dtype = CAUSAL_CONV1D_BFLOAT16;
  bool channel_last = false, seq_idx = false, sums = true;
};

Tensor tensor(const Problem& q) {
  Tensor t{};
  t.data = reinterpret_cast<void*>(uintptr_t(4096));  // never read; aligned
  t.ndim = 3;
  t.dtype = q.dtype;
  t.sizes[0] = q.batch;
  t.sizes[1] = q.dim;
  t.sizes[2] = q.seqlen;
  t.strides[0] = q.dim * q.seqlen;
  t.strides[1] = q.channel_last ? 1 : q.seqlen;
  t.strides[2] = q.channel_last ? q.dim : 1;
  return t;
}

BackwardParams params(const Problem& q) {
  BackwardParams p{};
  p.x = p.dout = p.dx = tensor(q);
  p.weight.ndim = 2;
  p.weight.sizes[0] = q.dim;
  p.weight.sizes[1] = q.width;
  if (q.sums) p.dweight = p.weight;
  if (q.seq_idx) p.seq_idx.ndim = 2;
  return p;
}

BackwardPlan plan(const Problem& q) { return BackwardPlan(params(q)); }

Problem channel_last(int64_t batch, int64_t dim, int64_t seqlen) {
  Problem q{batch, dim, seqlen};
  q.channel_last = true;
  return q;
}

// The bound in causal_conv1d.h.
int64_t promised(const Problem& q) {
  const int64_t size = q.dtype == CAUSAL_CONV1D_FLOAT64 ? 8 : 4;
  const int64_t bound = size * (q.width + 1) * q.dim * q.batch * ((q.seqlen + 63) / 64);
  return bound + (q.seq_idx ? q.batch * (q.seqlen + 800) * 101 / 100 : 0);
}

TEST(BackwardPlan, WorkspaceIsNoLargerThanPromised) {
  std::mt19937 random(1);
  const auto below = [&](int64_t n) { return static_cast<int64_t>(random() % n); };
  int64_t most = 0;  // per mille of the bound
  for (int i = 0; i < 200000; ++i) {
    Problem q{1 + below(i % 2 == 0 ? 4 : 100), 1 + below(i % 3 == 0 ? 8 : 3000),
              1 + below(i % 5 == 0 ? 70 : 20000)};
    q.width = 1 + below(i % 7 == 0 ? 40 : 8);
    q.dtype = static_cast<int32_t>(below(4));
    q.channel_last = below(2) != 0;
    q.seq_idx = below(2) != 0;
    const int64_t size = plan(q).workspace;
    ASSERT_LE(size, promised(q)) << q.batch << " x " << q.dim << " x " << q.seqlen << ", width "
                                 << q.width << ", dtype " << q.dtype << ", channel-last "
                                 << q.channel_last << ", seq_idx " << q.seq_idx;
    most = std::max(most, size * 1000 / promised(q));
  }
  EXPECT_GE(most, 990) << "the bound could be tighter";
}

TEST(BackwardPlan, NeedsNoWorkspaceWithoutSumsOrPositions) {
  for (const bool last : {false, true}) {
    Problem q{4, 512, 9000};
    q.channel_last = last;
    EXPECT_GT(plan(q).workspace, 0);
    q.sums = false;
    EXPECT_EQ(plan(q).workspace, 0);
    q.sums = true;
    q.batch = 0;
    q.dim = int64_t(1) << 60;  // without elements sizes are of any magnitude
    q.seqlen = 1;              // but strides are numbers
    EXPECT_EQ(plan(q).workspace, 0);
  }
}

// All of x is in some part.
TEST(BackwardPlan, PartsCoverTheProblem) {
  std::mt19937 random(2);
  const auto below = [&](int64_t n) { return static_cast<int64_t>(random() % n); };
  for (int i = 0; i < 20000; ++i) {
    Problem q{1 + below(20), 1 + below(3000), 1 + below(20000)};
    q.width = 1 + below(8);
    q.dtype = static_cast<int32_t>(below(3));
    q.channel_last = below(2) != 0;
    const BackwardPlan p = plan(q);
    ASSERT_EQ(p.channel_last, is_channel_last(tensor(q)));
    ASSERT_GE(p.chunk * p.chunks, q.seqlen);
    ASSERT_LT(p.chunk * (p.chunks - 1), q.seqlen + 7);  // the first tile may begin so much early
    if (p.channel_last) {
      ASSERT_EQ(p.parts, q.batch * ceil_div(p.chunks, kBackwardLines));
    } else {
      ASSERT_EQ(p.parts, ceil_div(q.batch, p.rows) * p.chunks);
      if (p.whole) {
        ASSERT_LE(p.parts, 1 << p.part_bits);
      }
    }
  }
}

// The order of sums must not depend on where tensors lie.
TEST(BackwardPlan, AlignmentChangesNoPart) {
  for (const bool last : {false, true}) {
    Problem q{3, 768, 2000};
    q.channel_last = last;
    BackwardParams moved = params(q);
    moved.x.data = reinterpret_cast<void*>(uintptr_t(4096 + 2));
    moved.dx.strides[0] += 1;
    const BackwardPlan a = plan(q), b(moved);
    EXPECT_TRUE(a.vector != b.vector || a.access != b.access);
    EXPECT_EQ(a.chunk, b.chunk);
    EXPECT_EQ(a.parts, b.parts);
    EXPECT_EQ(a.rows, b.rows);
    EXPECT_EQ(a.whole, b.whole);
    EXPECT_EQ(a.workspace, b.workspace);
  }
}

// The examples of backward_plan.cpp.
TEST(BackwardPlan, ChannelLastChunksAreLongWhereThereAreBlocksEnough) {
  EXPECT_EQ(plan(channel_last(8, 512, 8192)).chunk, 129);
  EXPECT_EQ(plan(channel_last(8, 2048, 2048)).chunk, 65);
  EXPECT_EQ(plan(channel_last(1, 2048, 2048)).chunk, 17);
  EXPECT_EQ(plan(channel_last(2, 5120, 8192)).chunk, 53);
  EXPECT_EQ(plan(channel_last(2, 4096, 8192)).chunk, 129);
  Problem wide = channel_last(3, 1000, 3000);
  wide.width = 8;
  EXPECT_EQ(plan(wide).chunk % 8, 1);
}

TEST(BackwardPlan, ChannelFirstBlocksHaveAllOfAChannelWhereTheyCan) {
  struct Example {
    Problem problem;
    bool whole;
    int warps;  // per channel
    int64_t tiles;
  };
  const Example examples[] = {
      {{4, 4096, 2048}, true, 1, 32},  // 4096 warps are enough
      {{8, 2048, 2048}, true, 2, 32},  // 2048 are not
      {{8, 2240, 2048}, true, 4, 16},  // 8960 leave fewer places idle at the end than 4480
      {{16, 1024, 4096}, true, 4, 64},
      {{17, 1024, 4096}, false, 0, 16},  // 68 tiles per warp would be too many
      {{8, 512, 8192}, false, 0, 8},     // as 64 are of few channels
  };
  for (const Example& e : examples) {
    const BackwardPlan p = plan(e.problem);
    SCOPED_TRACE(e.problem.batch);
    SCOPED_TRACE(e.problem.dim);
    EXPECT_EQ(p.whole, e.whole);
    if (e.whole) {
      EXPECT_EQ(1 << p.part_bits, e.warps);
      EXPECT_EQ(p.workspace, 0);
    }
    EXPECT_EQ(p.rows * p.chunk / 256, e.tiles);
  }
  Problem fp32{4, 4096, 2048};  // 8192 warps are wanted
  fp32.dtype = CAUSAL_CONV1D_FLOAT32;
  EXPECT_EQ(1 << plan(fp32).part_bits, 2);
}

// The most tiles a warp takes if a block has not all of a channel: 8 to 16, for 16384 warps.
TEST(BackwardPlan, ChannelFirstWarpsTakeEightToSixteenTiles) {
  const auto tiles = [](int64_t batch, int64_t dim, int64_t seqlen) {
    const BackwardPlan p = plan({batch, dim, seqlen});
    EXPECT_FALSE(p.whole);
    return p.chunk / 256;
  };
  EXPECT_EQ(tiles(1, 64, 65536), 8);
  EXPECT_EQ(tiles(1, 512, 65536), 8);
  EXPECT_EQ(tiles(6, 1000, 8192), 11);  // 6 * 1000 * 32 / 16384 = 11.7, in three even chunks
  EXPECT_EQ(tiles(64, 512, 65536), 16);
}

TEST(BackwardPlan, AnyWidthIsForWideFiltersAndDoubles) {
  Problem q{2, 64, 5000};
  EXPECT_FALSE(plan(q).any_width);
  q.width = 8;
  EXPECT_FALSE(plan(q).any_width);
  q.width = 9;
  EXPECT_TRUE(plan(q).any_width);
  EXPECT_EQ(plan(q).parts, 2 * 2);  // of 4096 steps
  EXPECT_GT(plan(q).any_rows, 0);
  q.seq_idx = true;
  EXPECT_EQ(plan(q).any_rows, 0);
  q.seq_idx = false;
  q.width = 4;
  q.dtype = CAUSAL_CONV1D_FLOAT64;
  EXPECT_TRUE(plan(q).any_width);
  EXPECT_EQ(plan(q).workspace, 2 * 3 * 5 * 64 * 8);               // of 2048 steps
  EXPECT_TRUE(plan({int64_t(1) << 20, 1 << 10, 256}).any_width);  // more parts than 2^31
}

// Blocks of backward_any_rows fit into every GPU's shared memory, and into the promised workspace.
TEST(BackwardPlan, AnyRowsFitOrAreLeftToTiles) {
  for (const int32_t dtype : {CAUSAL_CONV1D_BFLOAT16, CAUSAL_CONV1D_FLOAT64}) {
    for (const bool last : {false, true}) {
      for (const int64_t dim : {1, 3, 4, 5, 100}) {
        for (const int64_t width : {9, 10, 64, 65, 150, 700, 5000, 65536}) {
          for (const int64_t seqlen : {1, 63, 64, 65, 1000, 9000}) {
            const Problem q{2, dim, seqlen, width, dtype, last};
            const BackwardPlan p = plan(q);
            EXPECT_LE(p.any_rows, 48 * 1024);
            EXPECT_LE(p.workspace, promised(q));
            const int64_t fits = dtype == CAUSAL_CONV1D_FLOAT64 ? 10 : 65;
            EXPECT_TRUE(p.any_rows > 0 || width > fits) << width << " " << dim << " " << seqlen;
            EXPECT_TRUE(p.any_rows == 0 || width < 65536);
          }
        }
      }
    }
  }
}

TEST(Layout, IsThatOfTheAxisWithUnitStrideOrTheShorterOne) {
  EXPECT_FALSE(is_channel_last(64, 100, 100, 1));
  EXPECT_TRUE(is_channel_last(64, 100, 1, 64));
  EXPECT_TRUE(is_channel_last(64, 100, 1, 0));      // one step for all times
  EXPECT_FALSE(is_channel_last(64, 100, 0, 1));     // one channel for all
  EXPECT_TRUE(is_channel_last(64, 100, 2, 300));    // every other channel
  EXPECT_FALSE(is_channel_last(64, 100, 300, -2));  // backwards
  EXPECT_FALSE(is_channel_last(64, 100, -300, 2));
  EXPECT_FALSE(is_channel_last(64, 100, 1, 1));  // alike
}

TEST(Layout, AnAxisOfOneElementIsNoneToRunAlong) {
  EXPECT_TRUE(is_channel_last(64, 1, 1, 1));  // contiguous (2, 64, 1)
  EXPECT_TRUE(is_channel_last(64, 1, 100, 1));
  EXPECT_FALSE(is_channel_last(1, 100, 100, 1));
  EXPECT_FALSE(is_channel_last(1, 100, 1, 3));
}

// 16-byte accesses of 8 elements of 2 bytes.
TEST(Access, IsWhatHoldsForAllTensors) {
  const auto access = [](int64_t dim, int64_t seqlen, int64_t row, uintptr_t offset) {
    Tensor t = tensor({2, dim, seqlen});
    t.strides[1] = row;
    t.strides[0] = dim * row;
    t.data = reinterpret_cast<void*>(4096 + offset);
    const Tensor other = tensor({2, dim, 64});
    return common_access({&t, &other}, 2);
  };
  EXPECT_EQ(access(3, 64, 64, 0), Access::kAligned);
  EXPECT_EQ(access(3, 64, 72, 0), Access::kAligned);
  EXPECT_EQ(access(3, 63, 63, 0), Access::kDense);
  EXPECT_EQ(access(3, 63, 63, 2), Access::kUnit);
  EXPECT_EQ(access(3, 63, 65, 0), Access::kUnit);
  Tensor strided = tensor({2, 3, 64});
  strided.strides[2] = 2;
  EXPECT_EQ(common_access({&strided}, 2), Access::kStrided);
}

TEST(Access, TensorsEndAfterTheirLastElementInMemory) {
  Tensor t = tensor({2, 3, 10});
  EXPECT_EQ(extent(t), 60);
  t.strides[1] = -10;  // the first channel comes last
  EXPECT_EQ(extent(t), 40);
  t.strides[0] = 0;
  EXPECT_EQ(extent(t), 10);
  t.sizes[0] = 0;
  EXPECT_EQ(extent(t), 0);
}

TEST(Access, ChannelsAreAsManyAsAllTensorsGiveAtOnce) {
  Tensor x = tensor(channel_last(2, 24, 10));
  EXPECT_EQ(common_channels(4, 2, 24, {&x}), 4);
  EXPECT_EQ(common_channels(8, 2, 24, {&x}), 8);
  EXPECT_EQ(common_channels(16, 2, 24, {&x}), 8);
  x.data = reinterpret_cast<void*>(uintptr_t(4096 + 4));
  EXPECT_EQ(common_channels(4, 2, 24, {&x}), 2);
  x.strides[1] = 2;
  EXPECT_EQ(common_channels(4, 2, 24, {&x}), 0);
}

// Division by multiplication, as split() does it on the device.
TEST(Divisor, DividesAllThatItMay) {
  std::mt19937 random(3);
  for (int i = 0; i < 200000; ++i) {
    const uint32_t bits = random() % 31;
    const uint32_t count = 1 + random() % (1u << bits);
    const uint32_t n = i % 3 == 0 ? 0x7fffffff - random() % 3 : random() % 0x80000000u;
    const Divisor by(count);
    const uint64_t q = by.multiplier == 0 ? n : uint64_t(n) * by.multiplier >> 31 >> by.shift;
    ASSERT_EQ(q, n / count) << n << " / " << count;
  }
}

// Gates decide how tensors are read, as x does.
TEST(BackwardPlan, GatesCountForTheAccess) {
  for (const bool last : {false, true}) {
    Problem q{2, 512, 1024};
    q.channel_last = last;
    Options options{};
    OptionGradients gradients{};
    options.pre_gate = gradients.dpost_gate = tensor(q);
    const BackwardPlan good(params(q), options, gradients);
    gradients.dpost_gate.data = static_cast<char*>(gradients.dpost_gate.data) + 2;
    const BackwardPlan bad(params(q), options, gradients);
    EXPECT_EQ(good.parts, bad.parts);
    if (last) {
      EXPECT_TRUE(good.vector && good.wide && !bad.vector && bad.wide);  // it is not read
    } else {
      EXPECT_TRUE(good.access == Access::kAligned && bad.access == Access::kUnit);
    }
  }
}

TEST(BackwardPlan, TilesHaveAsManyChannelsAsThereAre) {
  for (const auto& [last, dim, channels] :
       {std::tuple{false, 512, 1}, std::tuple{true, 512, 32}, std::tuple{true, 17, 32},
        std::tuple{true, 16, 16}, std::tuple{true, 3, 4}, std::tuple{true, 1, 1}}) {
    Problem q{2, dim, 9000};
    q.channel_last = last;
    EXPECT_FALSE(plan(q).any_width);
    const BackwardPlan p(params(q), {}, {}, true);
    EXPECT_TRUE(p.any_width);
    EXPECT_EQ(p.tile_channels, channels);
    EXPECT_EQ(p.chunk * p.tile_channels, kTileEntries);
    EXPECT_EQ(p.parts, 2 * ceil_div(9000, p.chunk));
    EXPECT_EQ(p.workspace, p.parts * 5 * dim * 4);
  }
}

// Each step is in one phase, at its place.
TEST(Phases, HaveEachStepOnce) {
  const Problem q = channel_last(2, 3, 101);
  const Tensor x = tensor(q);
  const Phases phases(x, 4);
  ASSERT_EQ(phases.count, 4);
  int64_t steps = 0;
  for (int64_t i = 0; i < phases.count; ++i) {
    const Tensor t = phases.of(x, i);
    EXPECT_EQ(static_cast<char*>(t.data) - static_cast<char*>(x.data), i * 3 * 2);
    EXPECT_EQ(t.strides[2], 4 * 3);
    EXPECT_EQ(t.strides[0], x.strides[0]);
    EXPECT_LT(i + (t.sizes[2] - 1) * 4, 101);
    steps += t.sizes[2];
  }
  EXPECT_EQ(steps, 101);
}

TEST(Phases, AreForLongRows) {
  const auto count = [](const Problem& q, int64_t dilation) {
    return Phases(tensor(q), dilation).count;
  };
  EXPECT_EQ(count(channel_last(1, 8, 4), 1), 1);
  EXPECT_EQ(count(channel_last(1, 8, 32), 2), 2);
  EXPECT_EQ(count(channel_last(1, 8, 31), 2), 0);
  EXPECT_EQ(count(channel_last(1, 8, 9000), 17), 0);
  EXPECT_EQ(count(Problem{1, 8, 9000}, 2), 2);
  EXPECT_EQ(count(Problem{1, 8, 9000}, 1), 1);
}

}  // namespace
}  // namespace causal_conv1d::gpu
