// The direct kernels for channel_first: a group is kGroup times of one channel, and taps are slid
// out of two groups. kPlain: of rows without gates and residual that are not joined, which need not
// ask for them.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "../integers.h"
#include "../simd/groups.h"
#include "direct_gates.h"
#include "direct_run.h"
#include "general_gates.h"
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

// Whether a group has all of its taps, as most groups of long sequences have: then its last step
// has as many steps before it as that takes, or its first as many behind it.
template <class T, int kWidth, bool kBack>
CAUSAL_CONV1D_INLINE bool has_all_taps(const T* reach) {
  constexpr int kNeeded = kGroup - 1 + kWidth - 1;
  static_assert(kNeeded <= Joined::kMost);
  return scalar_of(reach[kBack ? kGroup - 1 : 0]) >= static_cast<float>(kNeeded);
}

// Of joined sequences, makes taps 0 that are farther away than their sequence goes: window[k] at
// distance width - 1 - k back, or k on. reach: `before` or `behind` of the group.
template <class T, int kWidth, bool kBack>
CAUSAL_CONV1D_INLINE void keep_own(const T* reach, Vec* window) {
  if (has_all_taps<T, kWidth, kBack>(reach)) return;
  const Vec steps = load_group(reach);
  for (int distance = 1; distance < kWidth; ++distance) {
    Vec* const tap = window + (kBack ? kWidth - 1 - distance : distance);
    *tap = select_or_zero(not_less(steps, Vec::set(static_cast<float>(distance))), *tap);
  }
}

// The group before x, of which only the last width - 1 elements matter.
template <class T, int kWidth>
void group_before(float* halo, float* before) {
  plain_nans(halo, kWidth - 1);
  __builtin_memset(before, 0, kGroup * sizeof(float));
  for (int i = 0; i < kWidth - 1; ++i) before[lane_of<T>(kGroup - (kWidth - 1) + i)] = halo[i];
}

// before: the group before x, in the order of groups. reach: of joined sequences. Returns the last
// group of x.
template <class T, int kWidth, bool kJoined>
CAUSAL_CONV1D_INLINE Vec sum_groups_as(const T* x, const T* reach, int64_t groups, const float* w,
                                       float bias, Vec before, float* sums) {
  Vec taps[kWidth];
  for (int k = 0; k < kWidth; ++k) taps[k] = Vec::set(w[k]);
  const Vec start = Vec::set(bias);
#pragma GCC unroll 2
  for (int64_t g = 0; g < groups; ++g) {
    const Vec current = load_group(x + g * kGroup);
    Vec window[kWidth];
    slide_back<T, kWidth>(before, current, window);
    before = current;
    if (kJoined) keep_own<T, kWidth, true>(reach + g * kGroup, window);
    weighted<kWidth>(start, taps, window).store(sums + g * kGroup);
  }
  return before;
}

// reach may be null, and is if kPlain.
template <class T, int kWidth, bool kPlain>
CAUSAL_CONV1D_INLINE Vec sum_groups(const T* x, const T* reach, int64_t groups, const float* w,
                                    float bias, Vec before, float* sums) {
  if (!kPlain && reach != nullptr) {
    return sum_groups_as<T, kWidth, true>(x, reach, groups, w, bias, before, sums);
  }
  return sum_groups_as<T, kWidth, false>(x, reach, groups, w, bias, before, sums);
}

// ---- forward --------------------------------------------------------------------------------

// last_group: the group before x, in the order of groups; then the last one of x.
template <class T, int kWidth, bool kPlain>
void forward_groups(const ForwardGroups<T>& all, int64_t groups, const float* w, float bias,
                    float* last_group, bool with_silu, bool stream) {
  Run run;
  alignas(64) T products[kRun * kGroup];
  const auto ahead = [](Groups<const T> t) { return Ahead<T>(t.data, kAhead<T>, 0); };
  Vec before = Vec::load(last_group);
  for (int64_t g = 0, count; g < groups; g += count) {
    count = smaller(kRun, groups - g);
    const ForwardGroups<T> at = all.at(g * kGroup);
    const T* x = at.x.data;
    if (!kPlain && at.pre_gate.data != nullptr) {
      multiply_groups(at.x, at.pre_gate, 1, count, ahead(at.pre_gate), products);
      x = products;
    }
    before = sum_groups<T, kWidth, kPlain>(x, at.before.data, count, w, bias, before, run.sums);
    if (!kPlain && (at.post_gate.data != nullptr || at.residual.data != nullptr)) {
      store_gated(&run, 1, count, at, ahead(at.x), ahead(at.post_gate), ahead(at.residual),
                  with_silu, stream);
    } else {
      store_sums(&run, 1, count, at.out.data, 0, ahead(at.x), with_silu, stream);
    }
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
CAUSAL_CONV1D_INLINE Groups<T> groups_of(const Plane& p, int64_t d, int64_t t) {
  return {reinterpret_cast<T*>(p.data) + d * p.channel + t * p.time, 0};
}

// One tensor's stage: n steps of a channel, with zeros to the end of the last group, of which there
// is one at least. (Zeros of a fixed size, for others are slow to start.)
template <class T>
__attribute__((noinline)) Groups<const T> staged(const Plane& p, int64_t d, int64_t t, int64_t n,
                                                 T* stage) {
  if (n == 0 || n % kGroup != 0) {
    __builtin_memset(stage + n / kGroup * kGroup, 0, kGroup * sizeof(T));
  }
  gather(reinterpret_cast<const char*>(groups_of<T>(p, d, t).data), p.time, n, stage);
  return {stage, 0};
}

// If it is given, which nothing is if kPlain.
template <class T, bool kPlain>
CAUSAL_CONV1D_INLINE Groups<T> option_of(const Plane& p, int64_t d, int64_t t) {
  if (kPlain || !is_given(p)) return {nullptr, 0};
  return groups_of<T>(p, d, t);
}

// Steps t0 to t0 + n - 1 of channel d; halo: the width - 1 inputs before.
template <class T, int kWidth, bool kPlain>
void forward_row(const ForwardRow& row, int64_t d, int64_t t0, int64_t n, const float* w,
                 float bias, float* halo, bool with_silu, bool stream) {
  constexpr int64_t kSize = sizeof(T);
  static_assert(64 / kSize <= kStage);
  alignas(64) T stage[kPlain ? 2 : 6][kStage];
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
      const ForwardGroups<T> at = {groups_of<const T>(row.in.x, d, t),
                                   option_of<const T, kPlain>(row.in.pre_gate, d, t),
                                   option_of<const T, kPlain>(row.post_gate, d, t),
                                   option_of<const T, kPlain>(row.residual, d, t),
                                   groups_of<T>(row.out, d, t),
                                   option_of<const T, kPlain>(row.before, d, t)};
      forward_groups<T, kWidth, kPlain>(at, step.count / kGroup, w, bias, last_group, with_silu,
                                        stream);
      continue;
    }
    const int64_t groups = (step.count + kGroup - 1) / kGroup;
    const auto take = [&](const Plane& p, int i) -> Groups<const T> {
      if (kPlain || !is_given(p)) return {nullptr, 0};
      return staged<T>(p, d, t, step.count, stage[i]);
    };
    const Groups<const T> x = staged<T>(row.in.x, d, t, step.count, stage[0]);
    const Groups<const T> pre_gate = take(row.in.pre_gate, 2);
    if (pre_gate.data != nullptr) {
      multiply_groups(x, pre_gate, 1, groups, Ahead<T>(x.data, 0, 0), stage[0]);
    }
    const ForwardGroups<T> at = {
        x, {}, take(row.post_gate, 3), take(row.residual, 4), {stage[1], 0}, take(row.before, 5)};
    forward_groups<T, kWidth, kPlain>(at, groups, w, bias, last_group, with_silu, false);
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
__attribute__((noinline)) void sum_dweight(const T* x, const T* reach, const float* dz,
                                           const float* mask, int64_t groups, Carried* carried) {
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
    if (masked && mask != nullptr) {
      for (int k = 0; k < kWidth; ++k) window[k] = both_bits(window[k], Vec::load(mask));
    }
    if (masked && reach != nullptr) keep_own<T, kWidth, true>(reach + g * kGroup, window);
    const Vec here = Vec::load(dz + g * kGroup);
    accumulate<kWidth, 0>(here, window, acc);
    accumulate<kWidth, 1>(here, window, kHas32Registers ? more : acc);
  };
  if (mask == nullptr && reach == nullptr) {
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

// dx of the groups one before those of dz, as floats in the order of groups to `floats` if that is
// not null, and of the first one to `edge` if that is not; carried->dz is the group before dz, and
// then its last one. reach: of joined sequences.
template <class T, int kWidth, bool kJoined>
__attribute__((noinline)) void store_dx_as(const float* dz, T* dx, const T* reach, float* edge,
                                           float* floats, int64_t groups, const float* w,
                                           Carried* carried, bool stream) {
  Vec reversed[kWidth];
  for (int k = 0; k < kWidth; ++k) reversed[kWidth - 1 - k] = Vec::set(w[k]);
  Vec before = Vec::load(carried->dz);
  const auto next = [&](int64_t g) {
    const Vec current = Vec::load(dz + g * kGroup);
    Vec window[kWidth];
    slide_forth<T, kWidth>(before, current, window);
    before = current;
    if (kJoined) keep_own<T, kWidth, false>(reach + g * kGroup, window);
    return weighted<kWidth>(Vec::set(0.0f), reversed, window);
  };
  int64_t g = 0;
  if (edge != nullptr) next(g++).store(edge);
  if (floats != nullptr) {
    for (; g < groups; ++g) next(g).store(floats + g * kGroup);
  } else if (stream) {
    for (; g < groups; ++g) store_group(next(g), true, dx + g * kGroup);
  } else {
    for (; g < groups; ++g) store_group(next(g), false, dx + g * kGroup);
  }
  before.store(carried->dz);
}

// dz of at most kRun groups, then what follows from it. dx is of the groups one earlier; edge, if
// not null, takes that of the first one as floats in the order of groups. mask: see sum_dweight.
template <class T, int kWidth, bool kPlain>
void backward_groups(const GradientGroups<T>& at, const DxGroups<T>& dx, float* edge,
                     const float* mask, int64_t groups, const float* w, float bias,
                     Carried* carried, bool with_silu, bool stream) {
  Run run;
  alignas(64) T products[kRun * kGroup];
  const auto ahead = [](Groups<const T> t) { return Ahead<T>(t.data, kAhead<T>, 0); };
  const Ahead<T> x_ahead = ahead(at.x), dout_ahead = ahead(at.dout);
  const T* x = at.x.data;
  if (!kPlain && at.pre_gate.data != nullptr) {
    multiply_groups(at.x, at.pre_gate, 1, groups, ahead(at.pre_gate), products);
    x = products;
  }
  if (!kPlain && at.post_gate.data != nullptr) {
    sum_groups<T, kWidth, false>(x, at.before.data, groups, w, bias, Vec::load(carried->x),
                                 run.sums);
    to_gated_gradients(&run, 1, groups, at, x_ahead, dout_ahead, ahead(at.post_gate), with_silu,
                       stream);
  } else if (with_silu) {
    sum_groups<T, kWidth, kPlain>(x, at.before.data, groups, w, bias, Vec::load(carried->x),
                                  run.sums);
    to_gradients(&run, 1, groups, at.dout.data, 0, x_ahead, dout_ahead);
  } else {
    for (int64_t g = 0; g < groups; ++g) {
      x_ahead.fetch(0, g);
      dout_ahead.fetch(0, g);
      load_group(at.dout.group(0, g)).store(run.sums + g * kGroup);
    }
  }
  if (mask != nullptr) {
    for (int64_t g = 0; g < groups; ++g) {
      both_bits(Vec::load(run.sums + g * kGroup), Vec::load(mask)).store(run.sums + g * kGroup);
    }
  }
  sum_dweight<T, kWidth>(x, kPlain ? nullptr : at.before.data, run.sums, mask, groups, carried);
  if (kPlain) {
    return store_dx_as<T, kWidth, false>(run.sums, dx.dx.data, nullptr, edge, nullptr, groups, w,
                                         carried, stream);
  }
  const bool gated = dx.is_gated();
  (dx.behind.data == nullptr ? store_dx_as<T, kWidth, false>
                             : store_dx_as<T, kWidth, true>)(run.sums, dx.dx.data, dx.behind.data,
                                                             edge, gated ? run.parts : nullptr,
                                                             groups, w, carried, stream);
  const int64_t skipped = edge == nullptr ? 0 : 1;
  if (gated) {
    finish_dx(run.parts + skipped * kGroup, 1, groups - skipped, dx.at(skipped * kGroup), stream);
  }
}

// dx of the last group, behind which there is nothing.
template <class T, int kWidth, bool kPlain>
void store_last_dx(const float* w, const Carried& carried, bool stream, const DxGroups<T>& dx) {
  Vec reversed[kWidth], window[kWidth];
  for (int k = 0; k < kWidth; ++k) reversed[kWidth - 1 - k] = Vec::set(w[k]);
  slide_forth<T, kWidth>(Vec::load(carried.dz), Vec::set(0.0f), window);
  if (!kPlain && dx.behind.data != nullptr) keep_own<T, kWidth, false>(dx.behind.data, window);
  const Vec last = weighted<kWidth>(Vec::set(0.0f), reversed, window);
  if (kPlain || !dx.is_gated()) return store_group(last, stream, dx.dx.data);
  float floats[kGroup];
  last.store(floats);
  finish_dx(floats, 1, 1, dx, stream);
}

// One channel of one sequence, from its step t0 to t1.
template <class T, int kWidth, bool kPlain>
class BackwardWalk {
 public:
  // halo: the width - 1 inputs before t0. totals[k], which is added to: dweight, and last dbias.
  BackwardWalk(const BackwardRow& row, bool with_silu, int64_t d, int64_t t0, int64_t t1,
               const float* w, float bias, float* halo, bool stream, double* totals,
               const GateScratch<float>& gates)
      : row_(row),
        with_silu_(with_silu),
        d_(d),
        t0_(t0),
        t1_(t1),
        w_(w),
        bias_(bias),
        stream_(stream),
        totals_(totals),
        gates_(gates) {
    const auto starts_line = [&](const Plane& p) {
      return !is_given(p) || past_line(address(p, d, t0)) == 0;
    };
    stream_ = stream_ && starts_line(row.dx);
    if (!kPlain) stream_ = stream_ && starts_line(row.dpre_gate) && starts_line(row.dpost_gate);
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
        backward_groups<T, kWidth, kPlain>(gradient_groups(step), dx_groups(step), edge, nullptr,
                                           step.groups, w_, bias_, &carried_, with_silu_, stream_);
      } else {
        store_last_dx<T, kWidth, kPlain>(w_, carried_, stream_, dx_groups(step));
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
  static constexpr int kStages = kPlain ? 3 : 12;  // x, dout, dx, and the others

  // Whether a tensor is given that has stage i.
  static CAUSAL_CONV1D_INLINE bool has(const Plane& p, int i) { return i < kStages && is_given(p); }

  // Memory that a step reads and writes, of rows of stride 1.
  GradientGroups<T> gradient_groups(const GroupStep& step) const {
    const int64_t t = t0_ + step.begin;
    const auto read = [&](const Plane& p) { return option_of<const T, kPlain>(p, d_, t); };
    return {groups_of<const T>(row_.in.x, d_, t),
            read(row_.in.pre_gate),
            groups_of<const T>(row_.dout, d_, t),
            read(row_.post_gate),
            step.owned ? option_of<T, kPlain>(row_.dpost_gate, d_, t) : Groups<T>{},
            read(row_.before)};
  }
  // Its first group need not exist.
  DxGroups<T> dx_groups(const GroupStep& step) const {
    const int64_t t = t0_ + step.begin - kGroup;
    const auto read = [&](const Plane& p) { return option_of<const T, kPlain>(p, d_, t); };
    return {groups_of<T>(row_.dx, d_, t),
            read(row_.in.x),
            read(row_.in.pre_gate),
            row_.residual_is_x ? read(row_.dout) : Groups<const T>{},
            option_of<T, kPlain>(row_.dpre_gate, d_, t),
            read(row_.behind)};
  }

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
    const auto read = [&](const Plane& p, int i) {
      return staged<T>(p, d_, t, step.present, stage_[i]);
    };
    const auto take = [&](const Plane& p, int i) {
      return has(p, i) ? read(p, i) : Groups<const T>{nullptr, 0};
    };
    const auto give = [&](const Plane& p, int i) {
      return has(p, i) ? Groups<T>{stage_[i], 0} : Groups<T>{};
    };
    GradientGroups<T> at = {read(row_.in.x, 0),
                            take(row_.in.pre_gate, 3),
                            read(row_.dout, 1),
                            take(row_.post_gate, 5),
                            step.owned ? give(row_.dpost_gate, 4) : Groups<T>{},
                            take(row_.before, 10)};
    if (step.present == 0) at.post_gate = {};
    // dx of the groups before, but for an edge.
    const int64_t skipped = edge == nullptr ? 0 : 1, n = (step.groups - skipped) * kGroup;
    const int64_t dx_t = t + (skipped - 1) * kGroup;
    const auto take_at_dx = [&](const Plane& p, int i) -> Groups<const T> {
      if (!has(p, i)) return {nullptr, 0};
      return staged<T>(p, d_, dx_t, n, stage_[i] + skipped * kGroup).at(-skipped * kGroup);
    };
    DxGroups<T> dx = {
        give(row_.dx, 2), {}, take_at_dx(row_.in.pre_gate, 6), {}, give(row_.dpre_gate, 7)};
    if (dx.dpre_gate.data != nullptr) dx.x = take_at_dx(row_.in.x, 8);
    if (!kPlain && row_.residual_is_x) dx.dout = take_at_dx(row_.dout, 9);
    if (has(row_.behind, 11)) {  // of an edge too
      const int64_t from = larger(t0_, t - kGroup);
      const int64_t to = smaller(row_.length, t + (step.groups - 1) * kGroup);
      T* const stage = stage_[kStages - 1];
      __builtin_memset(stage, 0, sizeof(stage_[0]));
      gather(address(row_.behind, 0, from), 1, larger(0, to - from), stage + (from - (t - kGroup)));
      dx.behind = {stage, 0};
    }
    // Of nothing dz is 0 without the derivative.
    backward_groups<T, kWidth, kPlain>(at, dx, edge, whole ? nullptr : mask_, step.groups, w_,
                                       bias_, &carried_, with_silu_ && step.present > 0, false);
    const auto unstage = [&](const Groups<T>& stage, const Plane& p, int64_t from, int64_t count,
                             int64_t to) {
      if (stage.data != nullptr) scatter(stage.data + from, count, address(p, d_, to), p.time);
    };
    unstage(at.dpost_gate, row_.dpost_gate, 0, step.present, t);
    unstage(dx.dx, row_.dx, skipped * kGroup, n, dx_t);
    unstage(dx.dpre_gate, row_.dpre_gate, skipped * kGroup, n, dx_t);
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
      const int64_t count = smaller(kGroup, t1_ - first);
      const Tile tile = {true, kWidth, d_, 1, 1};
      if (!kPlain) general::gate_dx<Vec>(tile, row_, first, count, Ids{nullptr, 0}, gates_, edge_);
      store_row(row_.dx.dtype, edge_, false, address(row_.dx, d_, first), row_.dx.time, count);
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
  const GateScratch<float>& gates_;
  Carried carried_;
  alignas(64) T stage_[kStages][kStage];
  alignas(64) float edge_[kGroup + kPad] = {};  // whole vectors are read of it
  alignas(64) float mask_[kGroup];
};

template <class T, int kWidth, bool kPlain>
void backward_row(const BackwardRow& row, bool with_silu, int64_t d, int64_t t0, int64_t t1,
                  const float* w, float bias, float* halo, bool stream, double* totals,
                  const GateScratch<float>& gates) {
  BackwardWalk<T, kWidth, kPlain>(row, with_silu, d, t0, t1, w, bias, halo, stream, totals, gates)
      .run();
}

}  // namespace channel_first
}  // namespace
}  // namespace causal_conv1d
