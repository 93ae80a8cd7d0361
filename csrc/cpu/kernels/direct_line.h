// What the kernels for rows of channel_first with options (direct_options.h) keep in the L1 cache:
// a line is a stretch of a row behind the `reach` elements before it, so that taps that lie `apart`
// steps from each other are loads from it.
#pragma once

#include <stdint.h>

#include "../simd/groups.h"
#include "group_memory.h"
#include "tile.h"

namespace causal_conv1d {
namespace {

// Elements of a line: it is moved back to its start when there is no room for a further stretch.
inline int64_t line_capacity(int64_t reach) {
  constexpr int64_t kRoom = 2048;
  return padded(reach) + larger(padded(reach), kRoom);
}

// Inputs of one channel.
template <class T>
class InputLine {
 public:
  // memory: of line_capacity(reach) elements and a group.
  InputLine(T* memory, int64_t reach)
      : memory_(memory), reach_(reach), kept_(padded(reach)), capacity_(line_capacity(reach)) {}

  // The step that the next element is of; -1 before start.
  int64_t time() const { return time_; }
  // Elements before it that stay, at least a group, and where they end.
  int64_t kept() const { return kept_; }
  const T* end() const { return memory_ + end_; }

  // The inputs before step t, of a state of x's type.
  __attribute__((noinline)) void start(const Inputs& in, int64_t d, int64_t t) {
    constexpr int64_t kBlock = 256;
    time_ = t;
    end_ = kept_;
    T* const first = memory_ + kept_ - reach_;
    if (t == 0 && !is_given(in.initial)) {
      __builtin_memset(first, 0, static_cast<size_t>(reach_) * sizeof(T));
      return;
    }
    const Tile tile = {true, reach_ + 1, d, 1, 1};
    float block[kBlock + 2 * kPad];
    for (int64_t i = 0, count; i < reach_; i += count) {
      count = smaller(kBlock, reach_ - i);
      load_rows_of(tile, in, t - reach_ + i, count, block);
      for (int64_t j = 0; j < count; j += Vec::kLanes) {
        Vec::load(block + j).store(first + i + j);
      }
    }
  }

  // Where the next n elements go; what lies before them stays there.
  CAUSAL_CONV1D_INLINE T* add(int64_t n) {
    if (end_ + n > capacity_) {
      __builtin_memmove(memory_, memory_ + end_ - kept_, static_cast<size_t>(kept_) * sizeof(T));
      end_ = kept_;
    }
    end_ += n;
    time_ += n;
    return memory_ + end_ - n;
  }

 private:
  T* const memory_;
  const int64_t reach_, kept_, capacity_;
  int64_t end_ = 0, time_ = -1;
};

// The two vectors of a group.
struct GroupAddress {
  float *first, *second;
};

// Gradients of sums, whole groups in fp32. Of bfloat16 the elements of even and of odd index are
// apart, as in a group.
template <class T>
class GradientLine {
 public:
  // keep: elements that stay before what is added, a multiple of kPad.
  GradientLine(float* memory, int64_t keep)
      : keep_(keep), capacity_(line_capacity(keep)), end_(keep) {
    static_assert(kNativesInVec == 2);
    planes_[0] = memory;
    planes_[1] = memory + capacity_ / 2 + kPad;
    for (int i = 0; i < kPlanes; ++i) {
      __builtin_memset(planes_[i], 0, static_cast<size_t>(keep / kPlanes) * sizeof(float));
    }
  }

  // Adds groups. Returns where they are.
  int64_t add(const float* groups, int64_t count) {
    const int64_t n = count * kGroup;
    if (end_ + n > capacity_) {
      for (int i = 0; i < kPlanes; ++i) {
        __builtin_memmove(planes_[i], planes_[i] + (end_ - keep_) / kPlanes,
                          static_cast<size_t>(keep_ / kPlanes) * sizeof(float));
      }
      end_ = keep_;
    }
    for (int64_t i = 0; i < n; i += kGroup) {
      const GroupAddress to = address(end_ + i);
      const Vec group = Vec::load(groups + i);
      group.v[0].store(to.first);
      group.v[1].store(to.second);
    }
    end_ += n;
    return end_ - n;
  }

  // Of the group that starts at element i; the next one is kStep floats on.
  static constexpr int64_t kStep = kEvenOdd<T> ? Native::kLanes : kGroup;
  CAUSAL_CONV1D_INLINE GroupAddress address(int64_t i) const {
    if (!kEvenOdd<T>) return {planes_[0] + i, planes_[0] + i + Native::kLanes};
    return {planes_[i % 2] + i / 2, planes_[1 - i % 2] + (i + 1) / 2};
  }

 private:
  static constexpr int kPlanes = kEvenOdd<T> ? 2 : 1;
  float* planes_[2];
  const int64_t keep_, capacity_;
  int64_t end_;
};

}  // namespace
}  // namespace causal_conv1d
