// The direct kernels for plain rows of channel_first, those without options: a group is kGroup
// times of one channel, and taps are slid out of two groups.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "../integers.h"
#include "../simd/groups.h"
#include "direct_run.h"
#include "group_memory.h"
#include "piece_rows.h"
#include "rows.h"
#include "steps.h"
#include "sums.h"
#include "tensor.h"

namespace causal_conv1d {
namespace {
namespace channel_first {

// Groups of a run: few, for stores past the caches are many in one of its loops and none in others.
constexpr int64_t kRun = 16;
// How far ahead of what is read.
template <class T>
constexpr int64_t kAhead = 2048 / sizeof(T);
// Elements of a stage: a run.
constexpr int64_t kStage = kRun * kGroup;

// window[k] = x of width - 1 - k earlier.
template <class T, int kWidth, int k = 0>
CAUSAL_CONV1D_INLINE void slide_back(Vec before, Vec x, Vec* window) {
  if constexpr (k + 1 == kWidth) {
    window[k] = x;
  } else {
    window[k] = slide<T, kGroup - (kWidth - 1 - k)>(before, x);
    slide_back<T, kWidth, k + 1>(before, x, window);
  }
}

// window[k] = dz of k later.
template <class T, int kWidth, int k = 0>
CAUSAL_CONV1D_INLINE void slide_forth(Vec dz, Vec after, Vec* window) {
  if constexpr (k < kWidth) {
    window[k] = slide<T, k>(dz, after);
    slide_forth<T, kWidth, k + 1>(dz, after, window);
  }
}

// The group before x, of which only the last width - 1 elements matter.
template <class T, int kWidth>
void group_before(float* halo, float* before) {
  plain_nans(halo, kWidth - 1);
  __builtin_memset(before, 0, kGroup * sizeof(float));
  for (int i = 0; i < kWidth - 1; ++i) before[lane_of<T>(kGroup - (kWidth - 1) + i)] = halo[i];
}

// before: the group before x, in the order of groups. Returns the last group of x.
template <class T, int kWidth>
CAUSAL_CONV1D_INLINE Vec sum_groups(const T* x, int64_t groups, const float* w, float bias,
                                    Vec before, float* sums) {
  Vec taps[kWidth];
  for (int k = 0; k < kWidth; ++k) taps[k] = Vec::set(w[k]);
  const Vec start = Vec::set(bias);
#pragma GCC unroll 2
  for (int64_t g = 0; g < groups; ++g) {
    const Vec current = load_group(x + g * kGroup);
    Vec window[kWidth];
    slide_back<T, kWidth>(before, current, window);
    before = current;
    weighted<kWidth>(start, taps, window).store(sums + g * kGroup);
  }
  return before;
}

// ---- forward --------------------------------------------------------------------------------

// last_group: the group before x, in the order of groups; then the last one of x.
template <class T, int kWidth>
void forward_groups(const T* x, T* out, int64_t groups, const float* w, float bias,
                    float* last_group, bool with_silu, bool stream) {
  Run run;
  Vec before = Vec::load(last_group);
  for (int64_t g = 0, count; g < groups; g += count) {
    count = smaller(kRun, groups - g);
    const T* const at = x + g * kGroup;
    before = sum_groups<T, kWidth>(at, count, w, bias, before, run.sums);
    store_sums(&run, 1, count, out + g * kGroup, 0, Ahead<T>(at, kAhead<T>, 0), with_silu, stream);
  }
  before.store(last_group);
}

// Of the width - 1 inputs in `halo` and the n of x that follow them, the last width - 1 to `halo`.
template <class T, int kWidth>
void advance(const T* x, int64_t n, float* halo) {
  constexpr int64_t kHalo = kWidth - 1;
  for (int64_t i = 0; i < kHalo; ++i) {
    const int64_t from = n - kHalo + i;
    halo[i] = from < 0 ? halo[kHalo + from] : scalar_of(x[from]);
  }
}

template <class T>
CAUSAL_CONV1D_INLINE T* elements_of(const Plane& p, int64_t d, int64_t t) {
  return reinterpret_cast<T*>(p.data) + d * p.channel + t * p.time;
}

// One tensor's stage: n steps of a channel, with zeros to the end of the last group, of which there
// is one at least. (Zeros of a fixed size, for others are slow to start.)
template <class T>
__attribute__((noinline)) const T* staged(const Plane& p, int64_t d, int64_t t, int64_t n,
                                          T* stage) {
  if (n == 0 || n % kGroup != 0) {
    __builtin_memset(stage + n / kGroup * kGroup, 0, kGroup * sizeof(T));
  }
  gather(reinterpret_cast<const char*>(elements_of<T>(p, d, t)), p.time, n, stage);
  return stage;
}

// Steps t0 to t0 + n - 1 of channel d; halo: the width - 1 inputs before.
template <class T, int kWidth>
void forward_row(const ForwardRow& row, int64_t d, int64_t t0, int64_t n, const float* w,
                 float bias, float* halo, bool with_silu, bool stream) {
  constexpr int64_t kSize = sizeof(T);
  static_assert(64 / kSize <= kStage);
  alignas(64) T stage[2][kStage];
  alignas(64) float last_group[kGroup];
  const bool unit_strides = row.unit_time;
  const int64_t past = past_line(address(row.out, d, t0));
  stream = stream && unit_strides && past % kSize == 0;
  const int64_t to_line = stream && past != 0 ? (64 - past) / kSize : 0;
  group_before<T, kWidth>(halo, last_group);
  TimeSteps steps(n, kGroup, kStage, unit_strides, to_line);
  for (TimeStep step; steps.next(&step);) {
    const int64_t t = t0 + step.begin;
    if (!step.staged) {
      forward_groups<T, kWidth>(elements_of<const T>(row.in.x, d, t), elements_of<T>(row.out, d, t),
                                step.count / kGroup, w, bias, last_group, with_silu, stream);
      continue;
    }
    staged<T>(row.in.x, d, t, step.count, stage[0]);
    forward_groups<T, kWidth>(stage[0], stage[1], (step.count + kGroup - 1) / kGroup, w, bias,
                              last_group, with_silu, false);
    scatter(stage[1], step.count, address(row.out, d, t), row.out.time);
    if (step.begin < to_line) {
      advance<T, kWidth>(stage[0], step.count, halo);
      group_before<T, kWidth>(halo, last_group);
    }
  }
}

// ---- backward -------------------------------------------------------------------------------

// Groups that are summed in fp32.
constexpr int64_t kSummed = 256;

// What goes from run to run of groups of one channel.
struct Carried {
  alignas(64) float x[kGroup], dz[kGroup];  // the group before, in the order of groups
  alignas(64) float sums[(4 + 1) * Native::kLanes];
};

template <bool kValue>
struct Flag {
  constexpr operator bool() const { return kValue; }
};

// Of a group, what vectors i add to the sums. (A loop over i would keep acc out of registers.)
template <int kWidth, int i>
CAUSAL_CONV1D_INLINE void accumulate(Vec dz, const Vec* window, Native* acc) {
  static_assert(kNativesInVec == 2);
  for (int k = 0; k < kWidth; ++k) acc[k] = fma(dz.v[i], window[k].v[i], acc[k]);
  acc[kWidth] = add(acc[kWidth], dz.v[i]);
}

// Adds to carried->sums; carried->x is the group before x, and then the last one of x. mask (may be
// null) has all bits of a lane set where x exists. (Apart from dx: together they overflow the
// registers.)
template <class T, int kWidth>
__attribute__((noinline)) void sum_dweight(const T* x, const float* dz, const float* mask,
                                           int64_t groups, Carried* carried) {
  Vec before = Vec::load(carried->x);
  // Both vectors of a group would wait for each other's sums, but 16 registers hold no more.
  Native acc[kWidth + 1], more[kWidth + 1];
  for (int k = 0; k <= kWidth; ++k) acc[k] = Native::load(carried->sums + k * Native::kLanes);
  for (int k = 0; k <= kWidth; ++k) more[k] = Native::set(0.0f);
  const auto add_group = [&](int64_t g, auto masked) {
    const Vec current = load_group(x + g * kGroup);
    Vec window[kWidth];
    slide_back<T, kWidth>(before, current, window);
    before = current;
    for (int k = 0; masked && k < kWidth; ++k) window[k] = both_bits(window[k], Vec::load(mask));
    const Vec here = Vec::load(dz + g * kGroup);
    accumulate<kWidth, 0>(here, window, acc);
    accumulate<kWidth, 1>(here, window, kHas32Registers ? more : acc);
  };
  if (mask == nullptr) {
    for (int64_t g = 0; g < groups; ++g) add_group(g, Flag<false>());
  } else {
    for (int64_t g = 0; g < groups; ++g) add_group(g, Flag<true>());
  }
  before.store(carried->x);
  for (int k = 0; k <= kWidth; ++k) {
    if (kHas32Registers) acc[k] = add(acc[k], more[k]);
    acc[k].store(carried->sums + k * Native::kLanes);
  }
}

// dx of the groups one before those of dz, but of the first one as floats in the order of groups to
// `edge` if that is not null; carried->dz is the group before dz, and then its last one.
template <class T, int kWidth>
__attribute__((noinline)) void store_dx(const float* dz, T* dx, float* edge, int64_t groups,
                                        const float* w, Carried* carried, bool stream) {
  Vec reversed[kWidth];
  for (int k = 0; k < kWidth; ++k) reversed[kWidth - 1 - k] = Vec::set(w[k]);
  Vec before = Vec::load(carried->dz);
  const auto next = [&](int64_t g) {
    const Vec current = Vec::load(dz + g * kGroup);
    Vec window[kWidth];
    slide_forth<T, kWidth>(before, current, window);
    before = current;
    return weighted<kWidth>(Vec::set(0.0f), reversed, window);
  };
  int64_t g = 0;
  if (edge != nullptr) next(g++).store(edge);
  if (stream) {
    for (; g < groups; ++g) store_group(next(g), true, dx + g * kGroup);
  } else {
    for (; g < groups; ++g) store_group(next(g), false, dx + g * kGroup);
  }
  before.store(carried->dz);
}

// dz of at most kRun groups, then what follows from it: dx of the groups one earlier (see store_dx)
// and sums (see sum_dweight).
template <class T, int kWidth>
void backward_groups(const T* x, const T* dout, T* dx, float* edge, const float* mask,
                     int64_t groups, const float* w, float bias, Carried* carried, bool with_silu,
                     bool stream) {
  Run run;
  const Ahead<T> x_ahead(x, kAhead<T>, 0), dout_ahead(dout, kAhead<T>, 0);
  if (with_silu) {
    sum_groups<T, kWidth>(x, groups, w, bias, Vec::load(carried->x), run.sums);
    to_gradients(&run, 1, groups, dout, 0, x_ahead, dout_ahead);
  } else {
    for (int64_t g = 0; g < groups; ++g) {
      x_ahead.fetch(0, g);
      dout_ahead.fetch(0, g);
      load_group(dout + g * kGroup).store(run.sums + g * kGroup);
    }
  }
  if (mask != nullptr) {
    for (int64_t g = 0; g < groups; ++g) {
      both_bits(Vec::load(run.sums + g * kGroup), Vec::load(mask)).store(run.sums + g * kGroup);
    }
  }
  sum_dweight<T, kWidth>(x, run.sums, mask, groups, carried);
  store_dx<T, kWidth>(run.sums, dx, edge, groups, w, carried, stream);
}

// dx of the last group, behind which there is nothing.
template <class T, int kWidth>
void store_last_dx(const float* w, const Carried& carried, bool stream, T* dx) {
  Vec reversed[kWidth], window[kWidth];
  for (int k = 0; k < kWidth; ++k) reversed[kWidth - 1 - k] = Vec::set(w[k]);
  slide_forth<T, kWidth>(Vec::load(carried.dz), Vec::set(0.0f), window);
  store_group(weighted<kWidth>(Vec::set(0.0f), reversed, window), stream, dx);
}

// One channel of one sequence, from its step t0 to t1.
template <class T, int kWidth>
class BackwardWalk {
 public:
  // halo: the width - 1 inputs before t0. totals[k], which is added to: dweight, and last dbias.
  BackwardWalk(const BackwardRow& row, bool with_silu, int64_t d, int64_t t0, int64_t t1,
               const float* w, float bias, float* halo, bool stream, double* totals)
      : row_(row),
        with_silu_(with_silu),
        d_(d),
        t0_(t0),
        t1_(t1),
        w_(w),
        bias_(bias),
        stream_(stream),
        totals_(totals) {
    stream_ = stream_ && past_line(address(row.dx, d, t0)) == 0;
    group_before<T, kWidth>(halo, carried_.x);
    __builtin_memset(carried_.dz, 0, sizeof(carried_.dz));
    __builtin_memset(carried_.sums, 0, sizeof(carried_.sums));
  }

  void run() {
    static_assert(kHalo < kGroup, "as GroupSteps asks for");
    static_assert(kSummed % kRun == 0, "no step goes beyond a multiple of kSummed");
    const int64_t n = t1_ - t0_, present = smaller(row_.length, t1_ + kHalo) - t0_;
    const int64_t plain = is_given(row_.dfinal) ? smaller(n, row_.length - kHalo - t0_) : n;
    GroupSteps steps(n, present, plain, kGroup, kRun);
    for (GroupStep step; steps.next(&step);) {
      if (!step.owned) flush();  // what is summed after that is not ours
      float* const edge = step.to_edge ? edge_ : nullptr;
      const bool whole = step.present == step.groups * kGroup;
      if (!row_.unit_time || (!whole && (step.to_edge || step.present > 0))) {
        take_staged(step, whole, edge);
      } else if (whole) {
        const int64_t t = t0_ + step.begin;
        backward_groups<T, kWidth>(elements_of<const T>(row_.in.x, d_, t),
                                   elements_of<const T>(row_.dout, d_, t), dx_before(t), edge,
                                   nullptr, step.groups, w_, bias_, &carried_, with_silu_, stream_);
      } else {
        store_last_dx<T, kWidth>(w_, carried_, stream_, dx_before(t0_ + step.begin));
      }
      // What lies before t0 belongs to another chunk or, for t0 = 0, to the initial state.
      if (step.to_edge && (step.begin > 0 || (t0_ == 0 && is_given(row_.dinitial)))) {
        take_edge(t0_ + step.begin - kGroup);
      }
      if (step.owned && (step.begin / kGroup + step.groups) % kSummed == 0) flush();
    }
  }

 private:
  static constexpr int64_t kHalo = kWidth - 1;

  // Of the group before step t, which need not exist.
  T* dx_before(int64_t t) const { return elements_of<T>(row_.dx, d_, t - kGroup); }

  void flush() {
    for (int k = 0; k <= kWidth; ++k) {
      totals_[k] += sum_of_lanes(Native::load(carried_.sums + k * Native::kLanes));
    }
    __builtin_memset(carried_.sums, 0, sizeof(carried_.sums));
  }

  __attribute__((noinline)) void take_staged(const GroupStep& step, bool whole, float* edge) {
    if (!whole) {
#pragma GCC unroll 32
      for (int i = 0; i < kGroup; ++i) {
        const uint32_t bits = i < step.present ? 0xffffffffu : 0u;
        __builtin_memcpy(&mask_[lane_of<T>(i)], &bits, sizeof(bits));
      }
    }
    const int64_t t = t0_ + step.begin;
    staged<T>(row_.in.x, d_, t, step.present, stage_[0]);
    staged<T>(row_.dout, d_, t, step.present, stage_[1]);
    // Of nothing dz is 0 without the derivative.
    backward_groups<T, kWidth>(stage_[0], stage_[1], stage_[2], edge, whole ? nullptr : mask_,
                               step.groups, w_, bias_, &carried_, with_silu_ && step.present > 0,
                               false);
    // dx of the groups before, but for an edge.
    const int64_t skipped = edge == nullptr ? 0 : kGroup, n = step.groups * kGroup - skipped;
    const int64_t dx_t = t + skipped - kGroup;
    scatter(stage_[2] + skipped, n, address(row_.dx, d_, dx_t), row_.dx.time);
  }

  // Times first to first + kGroup - 1.
  __attribute__((noinline)) void take_edge(int64_t first) {
    const bool before = first < t0_;
    from_groups<T>(edge_, kGroup);
    for (int64_t j = 0; is_given(row_.dfinal) && j < kHalo; ++j) {
      const int64_t i = row_.length - kHalo + j - first;
      if (i < 0 || i >= kGroup) continue;
      float value[Vec::kLanes];
      load_row(row_.dfinal.dtype, address(row_.dfinal, d_, j), 1, 1, value);
      edge_[i] += value[0];
    }
    if (!before) {
      store_row(row_.dx.dtype, edge_, false, address(row_.dx, d_, first), row_.dx.time,
                smaller(kGroup, t1_ - first));
    } else {
      store_row(row_.dinitial.dtype, edge_ + kGroup - kHalo, false, address(row_.dinitial, d_),
                row_.dinitial.time, kHalo);
    }
  }

  const BackwardRow& row_;
  const bool with_silu_;
  const int64_t d_, t0_, t1_;
  const float* const w_;
  const float bias_;
  bool stream_;
  double* const totals_;
  Carried carried_;
  alignas(64) T stage_[3][kStage];              // x, dout, dx
  alignas(64) float edge_[kGroup + kPad] = {};  // whole vectors are read of it
  alignas(64) float mask_[kGroup];
};

}  // namespace channel_first
}  // namespace
}  // namespace causal_conv1d
