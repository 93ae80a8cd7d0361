// The direct kernels for channel_last: a group is kGroup channels of one time. Some rows of a group
// are walked with the last width - 1 rows in registers, which wait in scratch for the next rows.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "../integers.h"
#include "../simd/groups.h"
#include "direct_gates.h"
#include "direct_run.h"
#include "direct_scratch.h"
#include "general_gates.h"
#include "group_memory.h"
#include "piece_rows.h"
#include "rows.h"
#include "steps.h"
#include "tensor.h"
#include "tile.h"

namespace causal_conv1d {
namespace {
namespace channel_last {

// Rows that are walked at a time, and the groups of them that are worked on together.
constexpr int64_t kRows = 8;
// Fewer with gates: rows are often a multiple of 4096 bytes apart, and lines of so many tensors at
// that distance would push each other out of the L1 cache.
constexpr int64_t kGatedRows = 4;
// Rows that are summed in fp32.
constexpr int64_t kSummed = 256;
// Elements of a stage: a group of some rows.
constexpr int64_t kStage = kRows * kGroup;

// What will be read 8 groups later, with `left` of `all` columns left: further along the rows, or
// at the start of the next ones.
template <class T>
CAUSAL_CONV1D_INLINE Ahead<T> ahead_of(const T* x, int64_t stride, int64_t rows, int64_t left,
                                       int64_t all) {
  constexpr int64_t kDistance = 8 * kGroup;
  return Ahead<T>(x, kDistance < left ? kDistance : rows * stride + kDistance - all, stride);
}

// `groups` groups of rows are whole lines, which can be stored past the caches: by rows, where a
// line is more than one group.
template <class T>
CAUSAL_CONV1D_INLINE bool has_whole_lines(const Plane& out, int64_t d, int64_t t, int64_t groups) {
  constexpr int64_t kSize = sizeof(T);
  return groups * kGroup * kSize % 64 == 0 && out.time * kSize % 64 == 0 &&
         past_line(address(out, d, t)) == 0;
}

// Of a group, sums of kCount vectors from kFirst on: 16 registers hold no more than one. s.x holds
// the rows before, and with kKeep then the last ones of x.
template <class T, int kWidth, bool kKeep, int kFirst, int kCount>
CAUSAL_CONV1D_INLINE void sum_part(const T* x, int64_t stride, int64_t rows, const DirectScratch& s,
                                   int64_t pitch, int64_t offset, int64_t row, float* sums) {
  using Part = VecOf<kCount>;
  constexpr int kAt = kFirst * Native::kLanes;
  Part taps[kWidth], window[kWidth];
  for (int k = 0; k < kWidth; ++k) taps[k] = Part::load(s.w + k * pitch + offset + kAt);
  for (int k = 0; k + 1 < kWidth; ++k) window[k + 1] = Part::load(s.x + k * pitch + offset + kAt);
  const Part start = Part::load(s.bias + offset + kAt);
#pragma GCC unroll 4
  for (int64_t r = 0; r < rows; ++r) {
    for (int k = 0; k + 1 < kWidth; ++k) window[k] = window[k + 1];
    window[kWidth - 1] = part_of<kFirst, kCount>(load_group(x + r * stride));
    weighted<kWidth>(start, taps, window).store(sums + r * row + kAt);
  }
  if (!kKeep) return;
  for (int k = 0; k + 1 < kWidth; ++k) window[k + 1].store(s.x + k * pitch + offset + kAt);
}

// Sums of rows x groups.
template <class T, int kWidth, bool kKeep>
void sum_rows(const T* x, int64_t stride, int64_t rows, int64_t groups, const DirectScratch& s,
              int64_t pitch, int64_t offset, float* sums) {
  static_assert(kNativesInVec == 2);
  const int64_t row = groups * kGroup;
  for (int64_t c = 0; c < row; c += kGroup) {
    const T* const from = x + c;
    if constexpr (kHas32Registers) {
      sum_part<T, kWidth, kKeep, 0, 2>(from, stride, rows, s, pitch, offset + c, row, sums + c);
    } else {
      sum_part<T, kWidth, kKeep, 0, 1>(from, stride, rows, s, pitch, offset + c, row, sums + c);
      sum_part<T, kWidth, kKeep, 1, 1>(from, stride, rows, s, pitch, offset + c, row, sums + c);
    }
  }
}

// ---- forward --------------------------------------------------------------------------------

// rows x groups, of which the first is at `offset` in s.
template <class T, int kWidth>
void forward_groups(const ForwardGroups<T>& all, int64_t rows, int64_t groups,
                    const DirectScratch& s, int64_t pitch, int64_t offset, bool with_silu,
                    bool stream) {
  Run run;
  alignas(64) T products[kMostInRun * kGroup];
  for (int64_t g = 0, count; g < groups; g += count) {
    count = smaller(kMostInRun / rows, groups - g);
    const int64_t c = g * kGroup, left = (groups - g) * kGroup;
    const ForwardGroups<T> at = all.at(c);
    const auto ahead = [&](Groups<const T> t) {
      return ahead_of(t.data, t.stride, rows, left, groups * kGroup);
    };
    Groups<const T> x = at.x;
    if (at.pre_gate.data != nullptr) {
      multiply_groups(at.x, at.pre_gate, rows, count, ahead(at.pre_gate), products);
      x = {products, count * kGroup};
    }
    sum_rows<T, kWidth, true>(x.data, x.stride, rows, count, s, pitch, offset + c, run.sums);
    if (at.post_gate.data != nullptr || at.residual.data != nullptr) {
      store_gated(&run, rows, count, at, ahead(at.x), ahead(at.post_gate), ahead(at.residual),
                  with_silu, stream);
    } else {
      store_sums(&run, rows, count, at.out.data, at.out.stride, ahead(at.x), with_silu, stream);
    }
  }
}

// One tensor's stage, if it is given: some rows of at most a group, from channel d and step t on.
template <class T>
__attribute__((noinline)) Groups<const T> staged(const Plane& p, int64_t d, int64_t t, int64_t rows,
                                                 int64_t count, T* stage) {
  if (!is_given(p)) return {nullptr, 0};
  for (int64_t r = 0; r < rows; ++r) {
    gather(address(p, d, t + r), p.channel, count, stage + r * kGroup);
  }
  return {stage, kGroup};
}

template <class T>
__attribute__((noinline)) void unstage(const Groups<T>& stage, const Plane& p, int64_t d, int64_t t,
                                       int64_t rows, int64_t count) {
  if (stage.data == nullptr) return;
  for (int64_t r = 0; r < rows; ++r) {
    scatter(stage.data + r * kGroup, count, address(p, d, t + r), p.channel);
  }
}

template <class T>
CAUSAL_CONV1D_INLINE Groups<T> groups_of(const Plane& p, int64_t d, int64_t t) {
  if (!is_given(p)) return {nullptr, 0};
  return {reinterpret_cast<T*>(address(p, d, t)), p.time};
}

CAUSAL_CONV1D_INLINE bool has_unit_strides(const Plane& p) {
  return !is_given(p) || p.channel == 1;
}

// Steps t0 to t1 of a tile of channels of one sequence.
template <class T, int kWidth>
void forward_tile(const ForwardRow& row, bool with_silu, const Tile& tile, int64_t t0, int64_t t1,
                  const DirectScratch& s, bool stream) {
  const int64_t d = tile.d, pitch = tile.pitch;
  const bool unit_strides = has_unit_strides(row.in.x) && has_unit_strides(row.out) &&
                            has_unit_strides(row.in.pre_gate) && has_unit_strides(row.post_gate) &&
                            has_unit_strides(row.residual);
  const int64_t whole = unit_strides ? tile.cols / kGroup : 0;
  stream = stream && t0 < t1 && has_whole_lines<T>(row.out, d, t0, whole);
  const bool gated = is_given(row.in.pre_gate) || is_given(row.post_gate) || is_given(row.residual);
  const int64_t most = gated ? kGatedRows : kRows;
  for (int64_t t = t0, rows; t < t1; t += rows) {
    rows = smaller(most, t1 - t);
    const ForwardGroups<T> at = {
        groups_of<const T>(row.in.x, d, t), groups_of<const T>(row.in.pre_gate, d, t),
        groups_of<const T>(row.post_gate, d, t), groups_of<const T>(row.residual, d, t),
        groups_of<T>(row.out, d, t)};
    forward_groups<T, kWidth>(at, rows, whole, s, pitch, 0, with_silu, stream);
    for (int64_t c = whole * kGroup; c < tile.cols; c += kGroup) {
      alignas(64) T stage[5][kStage] = {};
      const int64_t count = smaller(kGroup, tile.cols - c);
      const auto take = [&](const Plane& p, int i) {
        return staged<T>(p, d + c, t, rows, count, stage[i]);
      };
      const ForwardGroups<T> here = {take(row.in.x, 0),
                                     take(row.in.pre_gate, 1),
                                     take(row.post_gate, 2),
                                     take(row.residual, 3),
                                     {stage[4], kGroup}};
      forward_groups<T, kWidth>(here, rows, 1, s, pitch, c, with_silu, false);
      unstage(here.out, row.out, d + c, t, rows, count);
    }
  }
}

// ---- backward -------------------------------------------------------------------------------

// Of one group and some rows, adds dz * x to sums; `before` holds the rows of x before, and then
// the last ones. kCount vectors of it from kFirst on: 16 registers hold no more than one.
template <class T, int kWidth, int kFirst, int kCount>
CAUSAL_CONV1D_INLINE void sum_dweight_part(const T* x, int64_t stride, const float* dz,
                                           int64_t dz_stride, int64_t rows, float* before,
                                           float* sums, int64_t pitch) {
  using Part = VecOf<kCount>;
  constexpr int kAt = kFirst * Native::kLanes;
  Part window[kWidth], acc[kWidth + 1];
  for (int k = 0; k + 1 < kWidth; ++k) window[k + 1] = Part::load(before + k * pitch + kAt);
  for (int k = 0; k <= kWidth; ++k) acc[k] = Part::load(sums + k * pitch + kAt);
#pragma GCC unroll 4
  for (int64_t r = 0; r < rows; ++r) {
    for (int k = 0; k + 1 < kWidth; ++k) window[k] = window[k + 1];
    window[kWidth - 1] = part_of<kFirst, kCount>(load_group(x + r * stride));
    const Part here = Part::load(dz + r * dz_stride + kAt);
    for (int k = 0; k < kWidth; ++k) acc[k] = fma(here, window[k], acc[k]);
    acc[kWidth] = add(acc[kWidth], here);
  }
  for (int k = 0; k + 1 < kWidth; ++k) window[k + 1].store(before + k * pitch + kAt);
  for (int k = 0; k <= kWidth; ++k) acc[k].store(sums + k * pitch + kAt);
}

template <class T, int kWidth>
CAUSAL_CONV1D_INLINE void sum_dweight(const T* x, int64_t stride, const float* dz,
                                      int64_t dz_stride, int64_t rows, float* before, float* sums,
                                      int64_t pitch) {
  static_assert(kNativesInVec == 2);
  if constexpr (kHas32Registers) {
    sum_dweight_part<T, kWidth, 0, 2>(x, stride, dz, dz_stride, rows, before, sums, pitch);
  } else {
    sum_dweight_part<T, kWidth, 0, 1>(x, stride, dz, dz_stride, rows, before, sums, pitch);
    sum_dweight_part<T, kWidth, 1, 1>(x, stride, dz, dz_stride, rows, before, sums, pitch);
  }
}

// dx of them, to `floats` in rows like dz's if that is not null; `before` holds the rows of dz
// before, and then the last.
template <class T, int kWidth, int kFirst, int kCount>
CAUSAL_CONV1D_INLINE void store_dx_part(const float* dz, int64_t dz_stride, int64_t rows,
                                        const float* w, float* before, int64_t pitch, bool stream,
                                        T* dx, int64_t stride, float* floats) {
  using Part = VecOf<kCount>;
  constexpr int kAt = kFirst * Native::kLanes;
  Part reversed[kWidth], window[kWidth];
  for (int k = 0; k < kWidth; ++k) reversed[kWidth - 1 - k] = Part::load(w + k * pitch + kAt);
  for (int k = 0; k + 1 < kWidth; ++k) window[k + 1] = Part::load(before + k * pitch + kAt);
#pragma GCC unroll 4
  for (int64_t r = 0; r < rows; ++r) {
    for (int k = 0; k + 1 < kWidth; ++k) window[k] = window[k + 1];
    window[kWidth - 1] = Part::load(dz + r * dz_stride + kAt);
    const Part result = weighted<kWidth>(Part::set(0.0f), reversed, window);
    if constexpr (kCount < kNativesInVec) {
      result.store(floats + r * dz_stride + kAt);
    } else if (__builtin_expect(floats != nullptr, 0)) {
      result.store(floats + r * dz_stride);
    } else {
      store_group(result, stream, dx + r * stride);
    }
  }
  for (int k = 0; k + 1 < kWidth; ++k) window[k + 1].store(before + k * pitch + kAt);
}

// Whether dx goes to memory by way of floats always: parts of groups are no rows of it.
constexpr bool kByFloats = !kHas32Registers;

template <class T, int kWidth>
CAUSAL_CONV1D_INLINE void store_dx(const float* dz, int64_t dz_stride, int64_t rows, const float* w,
                                   float* before, int64_t pitch, bool stream, T* dx, int64_t stride,
                                   float* floats) {
  if constexpr (kByFloats) {
    store_dx_part<T, kWidth, 0, 1>(dz, dz_stride, rows, w, before, pitch, stream, dx, stride,
                                   floats);
    store_dx_part<T, kWidth, 1, 1>(dz, dz_stride, rows, w, before, pitch, stream, dx, stride,
                                   floats);
  } else {
    store_dx_part<T, kWidth, 0, 2>(dz, dz_stride, rows, w, before, pitch, stream, dx, stride,
                                   floats);
  }
}

// The rows of a step x groups, of which the first is at `offset` in s.
template <class T, int kWidth>
void backward_groups(const GradientGroups<T>& all, const DxGroups<T>& all_dx, const RowStep& step,
                     int64_t groups, const DirectScratch& s, int64_t pitch, int64_t offset,
                     bool with_silu, bool stream) {
  Run run;
  alignas(64) T products[kMostInRun * kGroup];
  const int64_t rows = step.count;
  const bool present = step.present, to_edge = step.to_edge;
  float* const sums = step.owned ? s.sums : s.unused;
  for (int64_t first = 0, count; first < groups; first += count) {
    count = smaller(kMostInRun / rows, groups - first);
    const int64_t start = first * kGroup, row = count * kGroup;
    const int64_t left = (groups - first) * kGroup;
    const GradientGroups<T> at = all.at(start);
    const DxGroups<T> at_dx = all_dx.at(start);
    const auto ahead = [&](Groups<const T> t) {
      return ahead_of(t.data, t.stride, rows, left, groups * kGroup);
    };
    Groups<const T> x = at.x;
    if (present && at.pre_gate.data != nullptr) {
      multiply_groups(at.x, at.pre_gate, rows, count, ahead(at.pre_gate), products);
      x = {products, row};
    }
    const bool post_gated = at.post_gate.data != nullptr;
    if (present && (with_silu || post_gated)) {
      sum_rows<T, kWidth, false>(x.data, x.stride, rows, count, s, pitch, offset + start, run.sums);
      if (post_gated) {
        to_gated_gradients(&run, rows, count, at, ahead(at.x), ahead(at.dout), ahead(at.post_gate),
                           with_silu, stream);
      } else {
        to_gradients(&run, rows, count, at.dout.data, at.dout.stride, ahead(at.x), ahead(at.dout));
      }
    } else {
      const auto x_ahead = ahead(at.x), dout_ahead = ahead(at.dout);
      for (int64_t i = 0; i < rows * count; ++i) {
        const int64_t r = i / count, g = i % count;
        Vec dz = Vec::set(0.0f);
        if (present) {
          x_ahead.fetch(r, g);
          dout_ahead.fetch(r, g);
          dz = load_group(at.dout.group(r, g));
        }
        dz.store(run.sums + i * kGroup);
      }
    }
    const bool later = !to_edge && (at_dx.is_gated() || kByFloats);
    for (int64_t g = 0; g < count; ++g) {
      const int64_t c = g * kGroup, column = offset + start + c;
      const float* const dz = run.sums + c;
      if (present) {
        sum_dweight<T, kWidth>(x.data + c, x.stride, dz, row, rows, s.x + column, sums + column,
                               pitch);
      }
      float* const floats = to_edge ? s.edge + column : later ? run.parts + c : nullptr;
      store_dx<T, kWidth>(dz, row, rows, s.w + column, s.dz + column, pitch, stream,
                          to_edge ? nullptr : at_dx.dx.data + c, at_dx.dx.stride, floats);
    }
    if (later) finish_dx(run.parts, rows, count, at_dx, stream);
  }
}

// Memory that a step reads and writes, from channel d on.
template <class T>
GradientGroups<T> gradient_groups(const BackwardRow& row, const RowStep& step, int64_t d) {
  if (!step.present) return {};
  const int64_t t = step.begin;
  const Groups<T> dpost_gate = groups_of<T>(row.dpost_gate, d, t);
  return {groups_of<const T>(row.in.x, d, t), groups_of<const T>(row.in.pre_gate, d, t),
          groups_of<const T>(row.dout, d, t), groups_of<const T>(row.post_gate, d, t),
          step.owned ? dpost_gate : Groups<T>{}};
}

template <class T>
DxGroups<T> dx_groups(const BackwardRow& row, const RowStep& step, int64_t halo, int64_t d) {
  if (step.to_edge) return {};
  const int64_t t = step.begin - halo;
  return {groups_of<T>(row.dx, d, t), groups_of<const T>(row.in.x, d, t),
          groups_of<const T>(row.in.pre_gate, d, t),
          row.residual_is_x ? groups_of<const T>(row.dout, d, t) : Groups<const T>{},
          groups_of<T>(row.dpre_gate, d, t)};
}

// Channels that are no whole group in unit strides, from column c on.
template <class T, int kWidth>
__attribute__((noinline)) void backward_staged(const BackwardRow& row, bool with_silu,
                                               const Tile& tile, const RowStep& step, int64_t c,
                                               const DirectScratch& s) {
  alignas(64) T stage[10][kStage] = {};
  const int64_t d = tile.d + c, t = step.begin, halo = kWidth - 1, rows = step.count;
  const int64_t count = smaller(kGroup, tile.cols - c);
  const auto take = [&](const Plane& p, int64_t time, int i) {
    return staged<T>(p, d, time, rows, count, stage[i]);
  };
  const auto give = [&](const Plane& p, int i) {
    return is_given(p) ? Groups<T>{stage[i], kGroup} : Groups<T>{};
  };
  GradientGroups<T> at = {};
  if (step.present) {
    at = {take(row.in.x, t, 0), take(row.in.pre_gate, t, 1), take(row.dout, t, 2),
          take(row.post_gate, t, 3), step.owned ? give(row.dpost_gate, 4) : Groups<T>{}};
  }
  DxGroups<T> dx = {};
  if (!step.to_edge) {
    dx = {give(row.dx, 5), {}, {}, {}, give(row.dpre_gate, 6)};
    dx.pre_gate = take(row.in.pre_gate, t - halo, 7);
    if (dx.dpre_gate.data != nullptr) dx.x = take(row.in.x, t - halo, 8);
    if (row.residual_is_x) dx.dout = take(row.dout, t - halo, 9);
  }
  backward_groups<T, kWidth>(at, dx, step, 1, s, tile.pitch, c, with_silu, false);
  unstage(at.dpost_gate, row.dpost_gate, d, t, rows, count);
  unstage(dx.dx, row.dx, d, t - halo, rows, count);
  unstage(dx.dpre_gate, row.dpre_gate, d, t - halo, rows, count);
}

// The row of dx in s.edge, of a time that may lie before the chunk t0 to t1.
template <class T, int kWidth>
__attribute__((noinline)) void take_edge(const BackwardRow& row, const Tile& tile, int64_t time,
                                         int64_t t0, const DirectScratch& s) {
  constexpr int64_t kHalo = kWidth - 1;
  const int64_t state = time - (row.length - kHalo), d = tile.d;
  from_groups<T>(s.edge, padded(tile.cols));
  if (is_given(row.dfinal) && state >= 0) {
    float gradients[kGroup];
    for (int64_t c = 0; c < tile.cols; c += kGroup) {
      const int64_t count = smaller(kGroup, tile.cols - c);
      load_row(row.dfinal.dtype, address(row.dfinal, d + c, state), row.dfinal.channel, count,
               gradients);
      for (int64_t i = 0; i < count; ++i) s.edge[c + i] += gradients[i];
    }
  }
  if (time >= t0) {
    general::gate_dx<Vec>(tile, row, time, 1, Ids{nullptr, 0}, s.gates, s.edge);
    store_row(row.dx.dtype, s.edge, false, address(row.dx, d, time), row.dx.channel, tile.cols);
  } else if (time < 0 && is_given(row.dinitial)) {
    store_row(row.dinitial.dtype, s.edge, false, address(row.dinitial, d, time + kHalo),
              row.dinitial.channel, tile.cols);
  }
}

// Steps t0 to t1 of a tile of channels of one sequence; adds to s.totals.
template <class T, int kWidth>
void backward_tile(const BackwardRow& row, bool with_silu, const Tile& tile, int64_t t0, int64_t t1,
                   const DirectScratch& s, bool stream) {
  constexpr int64_t kHalo = kWidth - 1;
  const int64_t pitch = tile.pitch, d = tile.d;
  bool unit_strides = true;
  const Plane* const read[] = {&row.in.x, &row.in.pre_gate, &row.dout, &row.post_gate};
  for (const Plane* p : read) {
    unit_strides = unit_strides && has_unit_strides(*p);
  }
  const Plane* const written[] = {&row.dx, &row.dpre_gate, &row.dpost_gate};
  for (const Plane* p : written) {
    unit_strides = unit_strides && has_unit_strides(*p);
  }
  const int64_t whole = unit_strides ? tile.cols / kGroup : 0;
  for (const Plane* p : written) {
    stream = stream && t0 < t1 && (!is_given(*p) || has_whole_lines<T>(*p, d, t0, whole));
  }
  const auto flush = [&] {
    for (int64_t i = 0; i < (kWidth + 1) * pitch; ++i) {
      s.totals[i] += static_cast<double>(s.sums[i]);
    }
    __builtin_memset(s.sums, 0, static_cast<size_t>((kWidth + 1) * pitch) * sizeof(float));
  };
  const bool gated = is_given(row.in.pre_gate) || is_given(row.post_gate);
  RowSteps steps(t0, t1, row.length, kHalo, gated ? kGatedRows : kRows);
  for (RowStep step; steps.next(&step);) {
    const int64_t t = step.begin;
    backward_groups<T, kWidth>(gradient_groups<T>(row, step, d), dx_groups<T>(row, step, kHalo, d),
                               step, whole, s, pitch, 0, with_silu, stream);
    for (int64_t c = whole * kGroup; c < tile.cols; c += kGroup) {
      backward_staged<T, kWidth>(row, with_silu, tile, step, c, s);
    }
    if (step.to_edge) take_edge<T, kWidth>(row, tile, t - kHalo, t0, s);
    if ((t + step.count - t0) % kSummed < step.count) flush();
  }
  flush();
}

}  // namespace channel_last
}  // namespace
}  // namespace causal_conv1d
