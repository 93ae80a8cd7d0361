// How the scan's CUDA backward divides a problem (csrc/cuda/scan_backward_plan.h): host code, which
// needs no GPU.
#include "cuda/scan_backward_plan.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>

namespace causal_conv1d::gpu::scan {
namespace {

BackwardProblem problem(int64_t sequences, int64_t dim, int64_t seqlen, int64_t dstate = 16) {
  BackwardProblem q{sequences, seqlen, dim, 1, dstate};
  q.multiprocessors = 132;
  return q;
}

int64_t state_of(const BackwardProblem& q) { return q.dim * q.dstate * q.size; }

// The bound in selective_scan.h.
int64_t promised(const BackwardProblem& q, const BackwardPlan& plan) {
  BackwardProblem one_chunk = q;
  one_chunk.seqlen = 1;
  one_chunk.sequences = 1;
  one_chunk.packed = false;
  const int64_t least = BackwardPlan(one_chunk).workspace;
  const int64_t rounding = 16 * BackwardPlan::kBuffers;
  return std::max(kMostOfSpan, least) + (plan.spans + 6) * state_of(q) +
         8 * (q.packed ? q.sequences + 1 : 0) + rounding;
}

TEST(ScanBackwardPlan, WhatIsTimedIsOneSpan) {
  for (const BackwardProblem& q :
       {problem(1, 1536, 2048), problem(8, 2048, 2048), problem(1, 2048, 16384),
        problem(2, 5120, 4096), problem(8, 768, 3136, 1), problem(1, 512, 1600)}) {
    const BackwardPlan plan(q);
    EXPECT_EQ(plan.spans, 1);
    EXPECT_EQ(plan.span, plan.chunks);
    EXPECT_FALSE(plan.sweep);
    EXPECT_EQ(plan.once(), 0);
  }
}

TEST(ScanBackwardPlan, DoesNotGrowWithTime) {
  const auto workspace = [](int64_t seqlen) {
    return BackwardPlan(problem(1, 2048, seqlen)).workspace;
  };
  EXPECT_GT(workspace(1 << 16), workspace(1 << 14));
  for (int64_t seqlen = 1 << 16; seqlen < int64_t{1} << 31; seqlen *= 2) {
    const BackwardPlan plan(problem(1, 2048, seqlen));
    EXPECT_TRUE(plan.sweep);
    const int64_t tensors = seqlen * 2048 * 2 * 7;  // u, delta, z, dout, du, ddelta, dz of 16 bits
    EXPECT_LE(plan.workspace - plan.once(), kMostOfSpan);
    EXPECT_LE(plan.once(), 5 * state_of(problem(1, 2048, 1)) + tensors / 1000);
  }
}

TEST(ScanBackwardPlan, RowsThatFitAreNotDivided) {
  const BackwardPlan plan(problem(64, 2048, 2048));
  EXPECT_GT(plan.spans, 4);
  EXPECT_EQ(plan.span % plan.chunks_a_row, 0);
  EXPECT_FALSE(plan.sweep);
  EXPECT_EQ(plan.bytes[BackwardPlan::kBorders], 0);
}

TEST(ScanBackwardPlan, NothingToDo) {
  for (const BackwardProblem& q : {problem(0, 8, 100), problem(2, 0, 100), problem(2, 8, 0)}) {
    const BackwardPlan plan(q);
    EXPECT_EQ(plan.spans, 1);
    EXPECT_LE(plan.workspace, 8 * 1024);
  }
}

TEST(ScanBackwardPlan, AnyProblem) {
  std::mt19937_64 random(1);
  const auto below = [&](double most) {
    return static_cast<int64_t>(
        std::exp(std::uniform_real_distribution<double>(0, std::log(most))(random)));
  };
  for (int i = 0; i < 3000; ++i) {
    BackwardProblem q = problem(below(5000), 1, below(1e7), std::min<int64_t>(below(400), 256));
    q.groups = below(9);
    q.dim = q.groups * below(5000);
    q.packed = below(4) > 1;
    q.B_constant = below(4) > 2;
    q.C_constant = below(4) > 2;
    q.size = below(4) > 2 ? 8 : 4;
    if (q.size == 8) q.steps = 32;
    q.multiprocessors = below(2) > 1 ? 16 : 132;
    const BackwardPlan plan(q);
    ASSERT_GE(plan.span, 1);
    ASSERT_GE(plan.spans * plan.span, plan.chunks);
    ASSERT_LT((plan.spans - 1) * plan.span, plan.chunks);
    ASSERT_GE(plan.parts * plan.passes, (q.dim / q.groups + q.channels - 1) / q.channels);
    ASSERT_LE(plan.workspace, promised(q, plan)) << i;
    int64_t sum = 0;
    for (const int64_t bytes : plan.bytes) {
      ASSERT_EQ(bytes % 16, 0);
      sum += bytes;
    }
    ASSERT_EQ(sum, plan.workspace);
    const bool divided = !q.packed && plan.span % std::max<int64_t>(1, plan.chunks_a_row) != 0;
    ASSERT_EQ(plan.sweep, plan.spans > 1 && (q.packed || divided));
  }
}

}  // namespace
}  // namespace causal_conv1d::gpu::scan
