// The direct kernels for rows of channel_first with options: taps that lie `apart` steps from each
// other, gates, a residual, joined sequences. Taps are loads from a line (direct_line.h). Only the
// innermost functions know the width when they are compiled.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "../integers.h"
#include "../simd/groups.h"
#include "direct_channel_first.h"
#include "direct_gates.h"
#include "direct_line.h"
#include "direct_run.h"
#include "direct_scratch.h"
#include "general_gates.h"
#include "group_memory.h"
#include "piece_rows.h"
#include "rows.h"
#include "steps.h"
#include "sums.h"
#include "tensor.h"

namespace causal_conv1d {
namespace {
namespace with_options {

using channel_first::Flag;
using channel_first::kSummed;

constexpr int kMostWidth = 4;
// Groups of a run: more than of plain rows, for there is more to do for each run.
constexpr int64_t kRun = 32;
static_assert(kRun <= kMostInRun && kSummed % kRun == 0);
// Fewer with a gate before: one of its loops asks for all lines of a run at once.
CAUSAL_CONV1D_INLINE int64_t groups_in_run(const Inputs& in) {
  return is_given(in.pre_gate) ? kRun / 2 : kRun;
}
// How far ahead of what is read.
template <class T>
constexpr int64_t kAhead = 4096 / sizeof(T);
// Elements of a stage: a run.
constexpr int64_t kStage = kRun * kGroup;

// A channel's filter.
struct Taps {
  const float* w;
  float bias;
  int64_t width, apart;
  // Taps before a group's last step, or behind its first, with which the group has all of its own.
  float all;

  Taps(const float* w_, float bias_, int64_t width_, int64_t apart_)
      : w(w_),
        bias(bias_),
        width(width_),
        apart(apart_),
        all(static_cast<float>(width_ + (kGroup - 2) / apart_)) {
    static_assert(kMostWidth + kGroup - 2 <= Joined::kMost);
  }
  int64_t reach() const { return (width - 1) * apart; }
};

// Of joined sequences, makes taps 0 that are farther away than their sequence goes: window[k] at
// distance width - 1 - k back, or k on. steps: `before` or `behind` of the group, counted in taps.
template <int kWidth, bool kBack>
CAUSAL_CONV1D_INLINE void keep_own(Vec steps, Vec* window) {
  for (int distance = 1; distance < kWidth; ++distance) {
    Vec* const tap = window + (kBack ? kWidth - 1 - distance : distance);
    *tap = select_or_zero(not_less(steps, Vec::set(static_cast<float>(distance))), *tap);
  }
}

// Whether a group has all of its taps, as most groups of long sequences have.
template <class T, bool kBack>
CAUSAL_CONV1D_INLINE bool has_all_taps(const T* steps, const Taps& taps) {
  return scalar_of(steps[kBack ? kGroup - 1 : 0]) >= taps.all;
}

// Where groups of inputs are. Before them are as many as taps reach, but if those are adjacent the
// group before is at `before`.
template <class T>
struct InputsAt {
  const T *x, *before;
};

// The taps of group g, window[k] at distance width - 1 - k back. last: the group before it, and
// then itself, from which those of adjacent taps (kApart false) are slid.
template <class T, int kWidth, bool kApart>
CAUSAL_CONV1D_INLINE void load_window(const InputsAt<T>& in, int64_t g, int64_t apart, Vec* last,
                                      Vec* window) {
  if constexpr (kApart) {
    for (int k = 0; k < kWidth; ++k) {
      window[k] = load_group(in.x + g * kGroup - (kWidth - 1 - k) * apart);
    }
  } else {
    const Vec current = load_group(in.x + g * kGroup);
    channel_first::slide_back<T, kWidth>(*last, current, window);
    *last = current;
  }
}

// Sums of groups. before may be null.
template <class T, int kWidth, bool kApart>
__attribute__((noinline)) void sum_groups(InputsAt<T> in, const T* before, int64_t groups,
                                          const Taps& taps, float* sums) {
  Vec w[kWidth];
  for (int k = 0; k < kWidth; ++k) w[k] = Vec::set(taps.w[k]);
  const Vec start = Vec::set(taps.bias);
  const int64_t apart = taps.apart;
  Vec last = kApart ? start : load_group(in.before);
  const auto next = [&](int64_t g, auto joined) {
    Vec window[kWidth];
    load_window<T, kWidth, kApart>(in, g, apart, &last, window);
    if (joined && !has_all_taps<T, true>(before + g * kGroup, taps)) {
      keep_own<kWidth, true>(load_group(before + g * kGroup), window);
    }
    weighted<kWidth>(start, w, window).store(sums + g * kGroup);
  };
  if (before == nullptr) {
#pragma GCC unroll 2
    for (int64_t g = 0; g < groups; ++g) next(g, Flag<false>());
  } else {
#pragma GCC unroll 2
    for (int64_t g = 0; g < groups; ++g) next(g, Flag<true>());
  }
}

// Adds dz * x to the lanes of sums of the taps, and last of dz. mask (may be null) has all bits of
// a lane set where dz exists.
template <class T, int kWidth, bool kApart>
__attribute__((noinline)) void sum_dweight(InputsAt<T> in, const T* before, const float* dz,
                                           const float* mask, int64_t groups, const Taps& taps,
                                           float* sums) {
  // Both vectors of a group would wait for each other's sums, but 16 registers hold no more.
  Native acc[kWidth + 1], more[kWidth + 1];
  for (int k = 0; k <= kWidth; ++k) acc[k] = Native::load(sums + k * Native::kLanes);
  for (int k = 0; k <= kWidth; ++k) more[k] = Native::set(0.0f);
  const int64_t apart = taps.apart;
  Vec last = kApart ? Vec::set(0.0f) : load_group(in.before);
  const auto next = [&](int64_t g, auto masked) {
    Vec window[kWidth];
    load_window<T, kWidth, kApart>(in, g, apart, &last, window);
    if (masked && mask != nullptr) {
      for (int k = 0; k < kWidth; ++k) window[k] = both_bits(window[k], Vec::load(mask));
    }
    if (masked && before != nullptr && !has_all_taps<T, true>(before + g * kGroup, taps)) {
      keep_own<kWidth, true>(load_group(before + g * kGroup), window);
    }
    const Vec here = Vec::load(dz + g * kGroup);
    channel_first::accumulate<kWidth, 0>(here, window, acc);
    channel_first::accumulate<kWidth, 1>(here, window, kHas32Registers ? more : acc);
  };
  if (mask == nullptr && before == nullptr) {
    for (int64_t g = 0; g < groups; ++g) next(g, Flag<false>());
  } else {
    for (int64_t g = 0; g < groups; ++g) next(g, Flag<true>());
  }
  for (int k = 0; k <= kWidth; ++k) {
    if (kHas32Registers) acc[k] = add(acc[k], more[k]);
    acc[k].store(sums + k * Native::kLanes);
  }
}

// Where dz of groups is: for taps that are apart from element `first` of the line on, else the
// first group at `here` and those behind it from `after` on.
template <class T>
struct GradientsAt {
  const GradientLine<T>& line;
  int64_t first;
  const float *here, *after;
};

// dx of groups, to `floats` in the order of groups if that is not null. behind may be null.
template <class T, int kWidth, bool kApart>
__attribute__((noinline)) void store_dx(const GradientsAt<T>& from, const T* behind, int64_t groups,
                                        const Taps& taps, T* dx, float* floats, bool stream) {
  Vec reversed[kWidth];
  GroupAddress at[kWidth];
  for (int k = 0; k < kWidth; ++k) {
    reversed[kWidth - 1 - k] = Vec::set(taps.w[k]);
    if (kApart) at[k] = from.line.address(from.first + k * taps.apart);
  }
  Vec here = kApart ? Vec::set(0.0f) : Vec::load(from.here);
  const float* const dz = from.after;
  for (int64_t g = 0; g < groups; ++g) {
    Vec window[kWidth];
    if constexpr (kApart) {
      for (int k = 0; k < kWidth; ++k) {
        window[k].v[0] = Native::load(at[k].first + g * GradientLine<T>::kStep);
        window[k].v[1] = Native::load(at[k].second + g * GradientLine<T>::kStep);
      }
    } else {
      const Vec after = Vec::load(dz + g * kGroup);
      channel_first::slide_forth<T, kWidth>(here, after, window);
      here = after;
    }
    if (behind != nullptr && !has_all_taps<T, false>(behind + g * kGroup, taps)) {
      keep_own<kWidth, false>(load_group(behind + g * kGroup), window);
    }
    const Vec result = weighted<kWidth>(Vec::set(0.0f), reversed, window);
    if (floats != nullptr) {
      result.store(floats + g * kGroup);
    } else {
      store_group(result, stream, dx + g * kGroup);
    }
  }
}

// Those functions of one width.
template <class T>
struct Kernels {
  decltype(&sum_groups<T, 4, true>) sum_groups;
  decltype(&sum_dweight<T, 4, true>) sum_dweight;
  decltype(&store_dx<T, 4, true>) store_dx;
};
template <class T, int kWidth, bool kApart>
constexpr Kernels<T> kernels_of = {sum_groups<T, kWidth, kApart>, sum_dweight<T, kWidth, kApart>,
                                   store_dx<T, kWidth, kApart>};

// What the walks along a channel share.
template <class T>
CAUSAL_CONV1D_INLINE Groups<T> groups_of(const Plane& p, int64_t d, int64_t t) {
  if (!is_given(p)) return {nullptr, 0};
  return {reinterpret_cast<T*>(p.data) + d * p.channel + t * p.time, 0};
}

// One tensor's stage, if it is given: n steps of a channel, with zeros to the end of the group.
template <class T>
CAUSAL_CONV1D_INLINE Groups<const T> staged(const Plane& p, int64_t d, int64_t t, int64_t n,
                                            T* stage) {
  if (!is_given(p)) return {nullptr, 0};
  return {channel_first::staged<T>(p, d, t, n, stage), 0};
}

template <class T>
CAUSAL_CONV1D_INLINE void unstage(const Groups<T>& stage, const Plane& p, int64_t d, int64_t t,
                                  int64_t n) {
  if (stage.data != nullptr) scatter(stage.data, n, address(p, d, t), p.time);
}

template <class T>
CAUSAL_CONV1D_INLINE Ahead<T> ahead_of(Groups<const T> t) {
  return Ahead<T>(t.data, kAhead<T>, 0);
}

// n inputs from step t on go to the line, with zeros to the end of the last group. direct: whole
// groups of unit strides.
template <class T>
__attribute__((noinline)) const T* add_inputs(const Inputs& in, int64_t d, int64_t t, int64_t n,
                                              bool direct, InputLine<T>* line) {
  if (line->time() != t) line->start(in, d, t);
  T* const x = line->add(n);
  const Groups<const T> from = groups_of<const T>(in.x, d, t);
  const Groups<const T> gate = groups_of<const T>(in.pre_gate, d, t);
  if (direct && gate.data == nullptr) {
    __builtin_memcpy(x, from.data, static_cast<size_t>(n) * sizeof(T));
  } else if (direct) {
    multiply_groups(from, gate, 1, n / kGroup, ahead_of(gate), x);
  } else {
    alignas(64) T stage[kStage];
    channel_first::staged<T>(in.x, d, t, n, x);
    if (gate.data == nullptr) return x;
    multiply_groups({x, 0}, staged<T>(in.pre_gate, d, t, n, stage), 1, (n + kGroup - 1) / kGroup,
                    ahead_of<T>({x, 0}), x);
  }
  return x;
}

// The same inputs with those before them. direct: where they are, or null if they are not whole
// groups of unit strides.
template <class T>
CAUSAL_CONV1D_INLINE InputsAt<T> take_inputs(const Inputs& in, int64_t d, int64_t t, int64_t n,
                                             const T* direct, bool apart, InputLine<T>* line) {
  if (direct != nullptr && !is_given(in.pre_gate)) {
    if (t >= line->kept()) return {direct, direct - kGroup};
    if (!apart) {
      line->start(in, d, t);
      return {direct, line->end() - kGroup};
    }
  }
  const T* const x = add_inputs(in, d, t, n, direct != nullptr, line);
  return {x, x - kGroup};
}

// ---- forward --------------------------------------------------------------------------------

template <class T>
CAUSAL_CONV1D_INLINE void forward_run(InputsAt<T> in, const ForwardGroups<T>& at, int64_t groups,
                                      const Kernels<T>& kernels, const Taps& taps, Run* run,
                                      bool with_silu, bool stream) {
  kernels.sum_groups(in, at.before.data, groups, taps, run->sums);
  if (at.post_gate.data != nullptr || at.residual.data != nullptr) {
    store_gated(run, 1, groups, at, ahead_of(at.x), ahead_of(at.post_gate), ahead_of(at.residual),
                with_silu, stream);
  } else {
    store_sums(run, 1, groups, at.out.data, 0, ahead_of(at.x), with_silu, stream);
  }
}

// At most a stage of steps from t on that are not whole groups of unit strides.
template <class T>
__attribute__((noinline)) void forward_staged(const ForwardRow& row, int64_t d, int64_t t,
                                              int64_t n, const Kernels<T>& kernels,
                                              const Taps& taps, InputLine<T>* line, Run* run,
                                              bool with_silu) {
  alignas(64) T stage[3][kStage];
  const T* const nowhere = nullptr;
  const InputsAt<T> in = take_inputs(row.in, d, t, n, nowhere, taps.apart > 1, line);
  const ForwardGroups<T> at = {{in.x, 0},
                               {},
                               staged<T>(row.post_gate, d, t, n, stage[0]),
                               staged<T>(row.residual, d, t, n, stage[1]),
                               {stage[2], 0},
                               groups_of<const T>(row.before, d, t)};
  forward_run(in, at, (n + kGroup - 1) / kGroup, kernels, taps, run, with_silu, false);
  unstage(at.out, row.out, d, t, n);
}

// Steps t0 to t1 of channel d.
template <class T>
void forward_row(const ForwardRow& row, int64_t d, int64_t t0, int64_t t1,
                 const Kernels<T>& kernels, const Taps& taps, const DirectScratch& s,
                 bool with_silu, bool stream) {
  Run run;
  InputLine<T> line(reinterpret_cast<T*>(s.inputs), taps.reach());
  const bool apart = taps.apart > 1;
  const int64_t most = groups_in_run(row.in) * kGroup;
  const int64_t first = apart ? padded(taps.reach()) : 0;  // steps that go by way of the line
  constexpr int64_t kSize = sizeof(T);
  const int64_t past = past_line(address(row.out, d, t0));
  stream = stream && row.unit_time && past % kSize == 0;
  const int64_t to_line = stream && past != 0 ? (64 - past) / kSize : 0;
  TimeSteps steps(t1 - t0, kGroup, kStage, row.unit_time, to_line);
  for (TimeStep step; steps.next(&step);) {
    const int64_t begin = t0 + step.begin;
    if (step.staged) {
      forward_staged(row, d, begin, step.count, kernels, taps, &line, &run, with_silu);
      continue;
    }
    const ForwardGroups<T> all = {groups_of<const T>(row.in.x, d, begin),
                                  {},
                                  groups_of<const T>(row.post_gate, d, begin),
                                  groups_of<const T>(row.residual, d, begin),
                                  groups_of<T>(row.out, d, begin),
                                  groups_of<const T>(row.before, d, begin)};
    for (int64_t i = 0, count; i < step.count; i += count) {
      const int64_t t = begin + i;
      count = smaller(t < first ? smaller(most, first) : most, step.count - i);
      const ForwardGroups<T> at = all.at(i);
      const InputsAt<T> in = take_inputs(row.in, d, t, count, at.x.data, apart, &line);
      forward_run(in, at, count / kGroup, kernels, taps, &run, with_silu, stream);
    }
  }
}

// ---- backward -------------------------------------------------------------------------------

// One channel of one sequence, from its step t0 to t1. dx comes out `lag` groups late, when there
// are all of the dz that it takes.
template <class T>
class BackwardWalk {
 public:
  // totals[k], which is added to: dweight, and last dbias.
  BackwardWalk(const BackwardRow& row, bool with_silu, int64_t d, int64_t t0, int64_t t1,
               const Kernels<T>& kernels, const Taps& taps, const DirectScratch& s, bool stream)
      : row_(row),
        with_silu_(with_silu),
        d_(d),
        t0_(t0),
        t1_(t1),
        kernels_(kernels),
        taps_(taps),
        lag_(taps.apart > 1 ? padded(taps.reach()) / kGroup : 1),
        totals_(s.totals),
        gates_(s.gates),
        inputs_(reinterpret_cast<T*>(s.inputs), taps.reach()),
        gradients_(s.gradients, padded(taps.reach())) {
    const auto starts_line = [&](const Plane& p) {
      return !is_given(p) || past_line(address(p, d, t0)) == 0;
    };
    stream_ =
        stream && starts_line(row.dx) && starts_line(row.dpre_gate) && starts_line(row.dpost_gate);
    __builtin_memset(sums_, 0, sizeof(sums_));
  }

  void run() {
    const int64_t n = t1_ - t0_, reach = taps_.reach();
    const int64_t present = smaller(row_.length, t1_ + reach) - t0_;
    const int64_t plain = is_given(row_.dfinal) ? smaller(n, row_.length - reach - t0_) : n;
    plain_groups_ = larger(0, plain) / kGroup;
    GroupSteps steps(n, present, plain, kGroup, groups_in_run(row_.in), lag_);
    for (GroupStep step; steps.next(&step);) {
      take_gradients(step);
      const int64_t group = step.begin / kGroup;
      const bool apart = taps_.apart > 1;
      first_ = group - lag_;
      if (apart) at_ = gradients_.add(run_.sums, step.groups) - lag_ * kGroup;
      take_dx(step.groups);
      if (!apart) Vec::load(run_.sums + (step.groups - 1) * kGroup).store(last_);
      if (step.owned && (group + step.groups) % kSummed == 0) flush();
    }
    flush();
  }

 private:
  void flush() {
    for (int64_t k = 0; k <= taps_.width; ++k) {
      totals_[k] += sum_of_lanes(Native::load(sums_ + k * Native::kLanes));
    }
    __builtin_memset(sums_, 0, sizeof(sums_));
  }

  // dz of a step to run_.sums, and what it adds to dweight.
  void take_gradients(const GroupStep& step) {
    const int64_t t = t0_ + step.begin, n = step.present, groups = step.groups;
    if (n == 0) {
      __builtin_memset(run_.sums, 0, kGroup * sizeof(float));
      return;
    }
    const bool whole = n == groups * kGroup, direct = whole && row_.unit_time;
    const T* const where = direct ? groups_of<const T>(row_.in.x, d_, t).data : nullptr;
    const InputsAt<T> in = take_inputs(row_.in, d_, t, n, where, taps_.apart > 1, &inputs_);
    const T* const before = groups_of<const T>(row_.before, d_, t).data;
    GradientGroups<T> at = {};
    if (direct) {
      at = {groups_of<const T>(row_.in.x, d_, t),
            {},
            groups_of<const T>(row_.dout, d_, t),
            groups_of<const T>(row_.post_gate, d_, t),
            groups_of<T>(row_.dpost_gate, d_, t)};
    } else {
      at = {{in.x, 0},
            {},
            staged<T>(row_.dout, d_, t, n, stage_[0]),
            staged<T>(row_.post_gate, d_, t, n, stage_[1]),
            {is_given(row_.dpost_gate) ? stage_[2] : nullptr, 0}};
    }
    if (!step.owned) at.dpost_gate = {};
    const Ahead<T> x_ahead = ahead_of(at.x), dout_ahead = ahead_of(at.dout);
    if (with_silu_ || at.post_gate.data != nullptr) {
      kernels_.sum_groups(in, before, groups, taps_, run_.sums);
    }
    if (at.post_gate.data != nullptr) {
      to_gated_gradients(&run_, 1, groups, at, x_ahead, dout_ahead, ahead_of(at.post_gate),
                         with_silu_, stream_ && direct);
    } else if (with_silu_) {
      to_gradients(&run_, 1, groups, at.dout.data, 0, x_ahead, dout_ahead);
    } else {
      for (int64_t g = 0; g < groups; ++g) {
        x_ahead.fetch(0, g);
        dout_ahead.fetch(0, g);
        load_group(at.dout.group(0, g)).store(run_.sums + g * kGroup);
      }
    }
    if (!direct) unstage(at.dpost_gate, row_.dpost_gate, d_, t, n);
    if (!whole) mask_last(n - (groups - 1) * kGroup, groups);
    if (!step.owned) return;
    kernels_.sum_dweight(in, before, run_.sums, whole ? nullptr : mask_, groups, taps_, sums_);
  }

  // Of a step's last group, which has `present` steps, there is no dz behind them.
  __attribute__((noinline)) void mask_last(int64_t present, int64_t groups) {
    for (int i = 0; i < kGroup; ++i) {
      const uint32_t bits = i < present ? 0xffffffffu : 0u;
      __builtin_memcpy(&mask_[lane_of<T>(i)], &bits, sizeof(bits));
    }
    float* const last = run_.sums + (groups - 1) * kGroup;
    both_bits(Vec::load(last), Vec::load(mask_)).store(last);
  }

  // dx of groups, of which the first may lie before the chunk, and others behind it.
  void take_dx(int64_t groups) {
    const int64_t end = first_ + groups;
    for (int64_t g = first_, count; g < end; g += count) {
      count = 1;
      if (g >= 0 && g < plain_groups_) {
        count = smaller(end, plain_groups_) - g;
        store_groups(g, count);
      } else if (g >= 0 || (t0_ == 0 && is_given(row_.dinitial))) {
        store_edge(g);
      }
    }
  }

  // dz from that of group g on.
  GradientsAt<T> gradients_from(int64_t g) const {
    const int64_t i = (g - first_) * kGroup;
    return {gradients_, at_ + i, i == 0 ? last_ : run_.sums + i - kGroup, run_.sums + i};
  }

  void store_groups(int64_t g, int64_t groups) {
    const int64_t n = groups * kGroup, t = t0_ + g * kGroup;
    const bool direct = row_.unit_time;
    const T* const behind = groups_of<const T>(row_.behind, d_, t).data;
    DxGroups<T> dx = {};
    if (direct) {
      dx = {groups_of<T>(row_.dx, d_, t), groups_of<const T>(row_.in.x, d_, t),
            groups_of<const T>(row_.in.pre_gate, d_, t),
            row_.residual_is_x ? groups_of<const T>(row_.dout, d_, t) : Groups<const T>{},
            groups_of<T>(row_.dpre_gate, d_, t)};
    } else {
      dx = {{stage_[0], 0},
            staged<T>(is_given(row_.dpre_gate) ? row_.in.x : Plane{}, d_, t, n, stage_[1]),
            staged<T>(row_.in.pre_gate, d_, t, n, stage_[2]),
            staged<T>(row_.residual_is_x ? row_.dout : Plane{}, d_, t, n, stage_[3]),
            {is_given(row_.dpre_gate) ? stage_[4] : nullptr, 0}};
    }
    float* const floats = dx.is_gated() ? run_.parts : nullptr;
    const bool stream = stream_ && direct;
    kernels_.store_dx(gradients_from(g), behind, groups, taps_, dx.dx.data, floats, stream);
    if (floats != nullptr) finish_dx(floats, 1, groups, dx, stream);
    if (direct) return;
    unstage(dx.dx, row_.dx, d_, t, n);
    unstage(dx.dpre_gate, row_.dpre_gate, d_, t, n);
  }

  // Of group g, which may go beyond the chunk or have gradients of states.
  __attribute__((noinline)) void store_edge(int64_t g) {
    const int64_t reach = taps_.reach(), states = row_.length - reach, t = t0_ + g * kGroup;
    const T* const behind = groups_of<const T>(row_.behind, d_, t).data;
    kernels_.store_dx(gradients_from(g), behind, 1, taps_, nullptr, edge_, false);
    from_groups<T>(edge_, kGroup);
    const int64_t begin = larger(t, states), end = smaller(t + kGroup, row_.length);
    if (is_given(row_.dfinal) && begin < end) {
      float gradients[kGroup + kPad];
      load_row(row_.dfinal.dtype, address(row_.dfinal, d_, begin - states), row_.dfinal.time,
               end - begin, gradients);
      for (int64_t i = begin; i < end; ++i) edge_[i - t] += gradients[i - begin];
    }
    if (t < 0) {
      const int64_t skipped = larger(0, -reach - t);
      if (skipped >= kGroup) return;
      store_row(row_.dinitial.dtype, edge_ + skipped, false,
                address(row_.dinitial, d_, t + skipped + reach), row_.dinitial.time,
                kGroup - skipped);
      return;
    }
    const int64_t count = smaller(kGroup, t1_ - t);
    if (count <= 0) return;
    const Tile tile = {true, taps_.width, d_, 1, 1};
    general::gate_dx<Vec>(tile, row_, t, count, Ids{nullptr, 0}, gates_, edge_);
    store_row(row_.dx.dtype, edge_, false, address(row_.dx, d_, t), row_.dx.time, count);
  }

  const BackwardRow& row_;
  const bool with_silu_;
  const int64_t d_, t0_, t1_;
  const Kernels<T>& kernels_;
  const Taps taps_;
  const int64_t lag_;  // groups
  bool stream_;
  int64_t plain_groups_ = 0;
  int64_t first_ = 0, at_ = 0;  // the group that dx starts with, and where its dz is in the line
  double* const totals_;
  const GateScratch<float>& gates_;
  InputLine<T> inputs_;
  GradientLine<T> gradients_;
  Run run_;
  alignas(64) float sums_[(kMostWidth + 1) * Native::kLanes];
  alignas(64) T stage_[5][kStage];
  alignas(64) float last_[kGroup] = {};         // the last dz, of taps that are not apart
  alignas(64) float edge_[kGroup + kPad] = {};  // whole vectors are read of it
  alignas(64) float mask_[kGroup];
};

}  // namespace with_options
}  // namespace
}  // namespace causal_conv1d
