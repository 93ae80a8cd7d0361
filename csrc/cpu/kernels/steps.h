// How the direct kernels walk a row: which stretch comes next, and what is special about it. Sizes
// alone, no memory and no vectors: tests/cpp/steps_test.cpp checks that the steps of a row cover it
// once and stay inside it.
#pragma once

#include <stdint.h>

#include "../integers.h"

namespace causal_conv1d {
namespace {

// ---- forward, channel_first -----------------------------------------------------------------

// Times begin to begin + count - 1 of a row.
struct TimeStep {
  int64_t begin, count;
  bool staged;  // by way of the stage; otherwise whole groups straight from and to memory
};

// Rows in unit strides: times up to where a cache line of out starts, then whole groups, then the
// rest. Other rows: one stage after another.
class TimeSteps {
 public:
  // stage: elements that a stage holds. to_line: elements before the first line, 0 if lines do not
  // matter; at most a stage.
  TimeSteps(int64_t n, int64_t group, int64_t stage, bool unit_strides, int64_t to_line)
      : n_(n), group_(group), stage_(stage), unit_strides_(unit_strides), to_line_(to_line) {}

  bool next(TimeStep* step) {
    const int64_t left = n_ - begin_;
    if (left <= 0) return false;
    const bool at_line = begin_ >= to_line_;
    const int64_t whole = unit_strides_ && at_line ? left / group_ * group_ : 0;
    if (whole > 0) {
      *step = {begin_, whole, false};
    } else {
      *step = {begin_, smaller(left, at_line ? stage_ : to_line_), true};
    }
    begin_ += step->count;
    return true;
  }

 private:
  const int64_t n_, group_, stage_;
  const bool unit_strides_;
  const int64_t to_line_;
  int64_t begin_ = 0;
};

// ---- backward, channel_first ----------------------------------------------------------------

// Some groups of x and dout of one channel. dx comes out `lag` groups earlier: dz of a group
// completes dx of the group that far before it. Times are counted from the chunk's start. With a
// lag of 1:
//
//   x, dout, dz   |  g  | g+1 |  the first of them at `begin`
//   dx       | g-1 |  g  |       the first of them at `begin` - group
struct GroupStep {
  int64_t begin, groups;
  int64_t present;  // times that have x and dout: all, or fewer, even none, of a single group
  bool owned;       // counts for dweight and dbias
  // The first dx is no plain group of dx, and is looked at time by time: it lies before the chunk,
  // or goes beyond its end, or has gradients of final states added.
  // Told for a lag of 1 alone.
  bool to_edge;
};

class GroupSteps {
 public:
  // Of n times that are owned and `present` times that have x and dout, some of them behind the
  // chunk; dx of times below `plain` is plain. Both n + halo >= present and plain + halo >=
  // present, for a halo of at most lag groups, less than one if lag is 1. n is whole groups if
  // present is more. Groups that are not whole are a step each, and so are those that are not plain
  // for a lag of 1. At most `most` groups a step.
  GroupSteps(int64_t n, int64_t present, int64_t plain, int64_t group, int64_t most,
             int64_t lag = 1)
      : present_(present),
        group_(group),
        most_(most),
        lag_(lag),
        owned_groups_((n + group - 1) / group),
        whole_groups_(present / group),
        plain_groups_(plain / group) {}

  bool next(GroupStep* step) {
    const int64_t g = next_;
    if (g >= owned_groups_ + lag_) return false;  // more than is owned, to complete dx
    step->begin = g * group_;
    step->owned = g < owned_groups_;
    const int64_t alike = step->owned ? smaller(whole_groups_, owned_groups_) : whole_groups_;
    step->groups = g < alike ? smaller(most_, alike - g) : 1;
    step->present = larger(0, smaller(step->groups * group_, present_ - step->begin));
    step->to_edge = g == 0 || g > plain_groups_;
    next_ += step->groups;
    return true;
  }

 private:
  const int64_t present_, group_, most_, lag_;
  const int64_t owned_groups_;
  const int64_t whole_groups_;  // of x and dout
  const int64_t plain_groups_;  // of dx
  int64_t next_ = 0;
};

// ---- backward, channel_last -----------------------------------------------------------------

// Rows begin to begin + count - 1 of x and dout, alike in all but time. dx comes out halo = width -
// 1 rows earlier.
struct RowStep {
  int64_t begin, count;
  bool present;  // have x and dout; dz is 0 otherwise
  bool owned;    // count for dweight and dbias
  bool to_edge;  // dx, of one row, lies before the chunk or has gradients of final states added
};

class RowSteps {
 public:
  // The chunk t0 to t1 of a sequence; at most `most` rows a step.
  RowSteps(int64_t t0, int64_t t1, int64_t seqlen, int64_t halo, int64_t most)
      : t0_(t0), t1_(t1), seqlen_(seqlen), halo_(halo), most_(most), next_(t0) {}

  bool next(RowStep* step) {
    const int64_t t = next_;
    if (t >= t1_ + halo_) return false;
    step->begin = t;
    step->present = t < seqlen_;
    step->owned = t < t1_;
    step->to_edge = t < t0_ + halo_ || t >= seqlen_;
    int64_t end = smaller(t1_ + halo_, t + (step->to_edge ? 1 : most_));
    if (step->present) end = smaller(end, seqlen_);
    if (step->owned) end = smaller(end, t1_);
    step->count = end - t;
    next_ = end;
    return true;
  }

 private:
  const int64_t t0_, t1_, seqlen_, halo_, most_;
  int64_t next_;
};

}  // namespace
}  // namespace causal_conv1d
