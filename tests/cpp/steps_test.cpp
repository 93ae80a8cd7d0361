// The steps of the direct CPU kernels along a row: whatever its size, they take each element once
// and stay inside, and write dx as the kernels do.
#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <vector>

#include "../../csrc/cpu/kernels/steps.h"

namespace test {
namespace {

using causal_conv1d::GroupStep;
using causal_conv1d::GroupSteps;
using causal_conv1d::RowStep;
using causal_conv1d::RowSteps;
using causal_conv1d::TimeStep;
using causal_conv1d::TimeSteps;

// How often each of n elements was taken; those outside are failures.
class Taken {
 public:
  explicit Taken(int64_t n) : times_(static_cast<size_t>(n)) {}

  void take(int64_t begin, int64_t count) {
    ASSERT_GE(count, 0);
    if (count == 0) return;
    ASSERT_GE(begin, 0);
    ASSERT_LE(begin + count, static_cast<int64_t>(times_.size()));
    for (int64_t i = begin; i < begin + count; ++i) ++times_[static_cast<size_t>(i)];
  }

  void expect_once() const {
    for (size_t i = 0; i < times_.size(); ++i) EXPECT_EQ(times_[i], 1) << "element " << i;
  }

 private:
  std::vector<int> times_;
};

class Steps : public testing::Test {
 protected:
  int64_t any(int64_t least, int64_t most) {
    return std::uniform_int_distribution<int64_t>(least, most)(random_);
  }
  // Small ones as often as large ones.
  int64_t size() { return any(0, any(0, 1) == 0 ? 40 : 2000); }
  int64_t group() { return int64_t{4} << any(0, 3); }

 private:
  std::mt19937 random_{1};
};

constexpr int kCases = 20000;

TEST_F(Steps, OfTheForwardCoverARow) {
  for (int i = 0; i < kCases && !HasFailure(); ++i) {
    const int64_t n = size(), lanes = group(), stage = 16 * lanes, to_line = any(0, 31);
    const bool unit_strides = any(0, 3) != 0;
    SCOPED_TRACE(testing::Message() << n << " times, group " << lanes << ", to line " << to_line
                                    << ", unit strides " << unit_strides);
    Taken taken(n);
    TimeSteps steps(n, lanes, stage, unit_strides, to_line);
    int64_t expected = 0;
    for (TimeStep step; steps.next(&step);) {
      EXPECT_EQ(step.begin, expected) << "in order";
      EXPECT_GT(step.count, 0);
      expected = step.begin + step.count;
      if (step.staged) {
        EXPECT_LE(step.count, stage);
      } else {
        EXPECT_TRUE(unit_strides);
        EXPECT_EQ(step.count % lanes, 0) << "whole groups";
        EXPECT_EQ(step.begin, to_line) << "all of them, from a line's start on";
      }
      // The kernel makes the group before anew where this holds, and nowhere else is one cut.
      if (expected < n && (step.count % lanes != 0)) {
        EXPECT_LT(step.begin, to_line);
      }
      taken.take(step.begin, step.count);
    }
    taken.expect_once();
  }
}

TEST_F(Steps, OfTheForwardStageLessThanAGroupBehindTheLine) {
  for (int i = 0; i < kCases && !HasFailure(); ++i) {
    const int64_t n = size(), lanes = group(), to_line = any(0, 31);
    int64_t staged = 0;
    TimeSteps steps(n, lanes, 16 * lanes, true, to_line);
    for (TimeStep step; steps.next(&step);) {
      if (step.staged && step.begin >= to_line) staged += step.count;
    }
    EXPECT_LT(staged, lanes) << n << " times, to line " << to_line;
  }
}

// A chunk of a channel_first row as the backward sees it.
struct Chunk {
  int64_t seqlen, t0, t1, halo;
  bool dfinal_states;

  int64_t n() const { return t1 - t0; }
  int64_t present() const { return std::min(seqlen, t1 + halo) - t0; }
  int64_t plain() const { return dfinal_states ? std::min(n(), seqlen - halo - t0) : n(); }
};

testing::Message describe(const Chunk& c) {
  return testing::Message() << c.t0 << " to " << c.t1 << " of " << c.seqlen << ", halo " << c.halo
                            << ", final states " << c.dfinal_states;
}

TEST_F(Steps, OfTheBackwardByGroupsCoverAChunk) {
  constexpr int64_t kMost = 16;
  for (int i = 0; i < kCases && !HasFailure(); ++i) {
    const int64_t lanes = group(), chunk = 64 * any(1, 8);
    Chunk c = {size(), 0, 0, any(1, 3), any(0, 1) == 1};
    c.t0 = any(0, std::max<int64_t>(0, c.seqlen - 1) / chunk) * chunk;
    c.t1 = std::min(c.seqlen, c.t0 + chunk);
    SCOPED_TRACE(describe(c) << ", group " << lanes);
    Taken read(c.present()), summed(c.n()), dx(c.n());
    bool before = false;
    int64_t expected = 0;
    GroupSteps steps(c.n(), c.present(), c.plain(), lanes, kMost);
    for (GroupStep step; steps.next(&step);) {
      EXPECT_EQ(step.begin, expected) << "in order";
      ASSERT_GT(step.groups, 0);
      const int64_t first = step.begin / lanes;
      EXPECT_LE(first % kMost + step.groups, kMost) << "within a run";
      expected += step.groups * lanes;
      EXPECT_TRUE(step.groups == 1 || step.present == step.groups * lanes) << "whole";
      EXPECT_TRUE(step.groups == 1 || first == 0 || !step.to_edge);
      read.take(step.begin, step.present);
      // What is summed for dweight: all that is owned, and in a step that is not nothing that is.
      EXPECT_EQ(step.owned, step.begin < c.n());
      if (step.owned) summed.take(step.begin, std::min(step.present, c.n() - step.begin));
      // The kernel writes the first dx by its times if it goes to the edge, all others whole.
      const int64_t dx_begin = step.begin - lanes;
      EXPECT_EQ(step.to_edge, dx_begin < 0 || dx_begin + lanes > c.plain());
      if (step.to_edge && dx_begin < 0) {
        EXPECT_FALSE(before);
        before = true;
      } else if (step.to_edge) {
        dx.take(dx_begin, std::min(lanes, c.n() - dx_begin));
      } else {
        dx.take(dx_begin, lanes);
      }
      dx.take(dx_begin + lanes, (step.groups - 1) * lanes);
      const int64_t dx_end = step.begin + (step.groups - 1) * lanes;
      EXPECT_TRUE(step.groups == 1 || dx_end <= c.plain()) << "plain";
    }
    EXPECT_TRUE(before) << "dx of the times before the chunk";
    dx.expect_once();
    summed.expect_once();
    if (c.present() <= expected) read.expect_once();
    // dz of halo times behind the chunk is needed.
    EXPECT_GE(expected, c.present());
  }
}

// dx of rows whose taps are apart comes out several groups late.
TEST_F(Steps, OfTheBackwardByGroupsCoverAChunkWithALag) {
  constexpr int64_t kMost = 16;
  for (int i = 0; i < kCases && !HasFailure(); ++i) {
    const int64_t lanes = group(), chunk = 64 * any(1, 8), lag = any(1, 12);
    Chunk c = {size(), 0, 0, any(1, lag * lanes), any(0, 1) == 1};
    c.t0 = any(0, std::max<int64_t>(0, c.seqlen - 1) / chunk) * chunk;
    c.t1 = std::min(c.seqlen, c.t0 + chunk);
    SCOPED_TRACE(describe(c) << ", group " << lanes << ", lag " << lag);
    Taken read(c.present()), summed(c.n());
    int64_t expected = 0;
    GroupSteps steps(c.n(), c.present(), c.plain(), lanes, kMost, lag);
    for (GroupStep step; steps.next(&step);) {
      EXPECT_EQ(step.begin, expected) << "in order";
      ASSERT_GT(step.groups, 0);
      EXPECT_LE(step.groups, kMost);
      expected += step.groups * lanes;
      EXPECT_TRUE(step.groups == 1 || step.present == step.groups * lanes) << "whole";
      read.take(step.begin, step.present);
      EXPECT_EQ(step.owned, step.begin < c.n());
      if (step.owned) summed.take(step.begin, step.present);
    }
    EXPECT_EQ(expected, ((c.n() + lanes - 1) / lanes + lag) * lanes) << "all of dx";
    read.expect_once();
    summed.expect_once();
  }
}

TEST_F(Steps, OfTheBackwardByRowsCoverAChunk) {
  constexpr int64_t kMost = 8;
  for (int i = 0; i < kCases && !HasFailure(); ++i) {
    const int64_t chunk = 64 * any(1, 8);
    Chunk c = {size(), 0, 0, any(1, 3), true};
    c.t0 = any(0, std::max<int64_t>(0, c.seqlen - 1) / chunk) * chunk;
    c.t1 = std::min(c.seqlen, c.t0 + chunk);
    SCOPED_TRACE(describe(c));
    Taken read(c.present()), summed(c.n()), dx(c.n() + c.halo);
    int64_t expected = c.t0;
    RowSteps steps(c.t0, c.t1, c.seqlen, c.halo, kMost);
    for (RowStep step; steps.next(&step);) {
      EXPECT_EQ(step.begin, expected) << "in order";
      ASSERT_GT(step.count, 0);
      EXPECT_LE(step.count, step.to_edge ? 1 : kMost);
      expected += step.count;
      if (step.present) read.take(step.begin - c.t0, step.count);
      if (step.owned) summed.take(step.begin - c.t0, step.count);
      const int64_t time = step.begin - c.halo;
      dx.take(time + c.halo - c.t0, step.count);  // from the halo before the chunk on
      if (!step.to_edge) {
        EXPECT_GE(time, c.t0);
        EXPECT_LE(time + step.count, std::min(c.t1, c.seqlen - c.halo)) << "no final states";
      }
    }
    read.expect_once();
    summed.expect_once();
    dx.expect_once();
  }
}

}  // namespace
}  // namespace test
