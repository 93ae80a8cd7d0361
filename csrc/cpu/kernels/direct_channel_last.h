// The direct kernels for channel_last: a group is kGroup channels of one time. Some rows of a group
// are walked with the last width - 1 rows in registers, which wait in scratch for the next rows.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "../integers.h"
#include "../simd/groups.h"
#include "direct_run.h"
#include "direct_scratch.h"
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
constexpr int64_t kRows = 8, kStrip = kMostInRun / kRows;
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

// Whole groups of rows are whole lines, which can be stored past the caches.
template <class T>
CAUSAL_CONV1D_INLINE bool has_whole_lines(const Plane& out, int64_t d, int64_t t) {
  constexpr int64_t kSize = sizeof(T);
  return kGroup * kSize >= 64 && out.time * kSize % 64 == 0 && past_line(address(out, d, t)) == 0;
}

// Strides of rows, in elements.
struct RowStrides {
  int64_t x, dout, out;
};

// Sums of rows x groups; s.x holds the rows before, and with kKeep then the last ones of x.
template <class T, int kWidth, bool kKeep>
void sum_rows(const T* x, int64_t stride, int64_t rows, int64_t groups, const DirectScratch& s,
              int64_t pitch, int64_t offset, float* sums) {
  for (int64_t g = 0; g < groups; ++g, offset += kGroup) {
    const int64_t c = g * kGroup;
    Vec taps[kWidth], window[kWidth];
    for (int k = 0; k < kWidth; ++k) taps[k] = Vec::load(s.w + k * pitch + offset);
    for (int k = 0; k + 1 < kWidth; ++k) window[k + 1] = Vec::load(s.x + k * pitch + offset);
    const Vec start = Vec::load(s.bias + offset);
#pragma GCC unroll 4
    for (int64_t r = 0; r < rows; ++r) {
      for (int k = 0; k + 1 < kWidth; ++k) window[k] = window[k + 1];
      window[kWidth - 1] = load_group(x + r * stride + c);
      weighted<kWidth>(start, taps, window).store(sums + r * groups * kGroup + c);
    }
    if (!kKeep) continue;
    for (int k = 0; k + 1 < kWidth; ++k) window[k + 1].store(s.x + k * pitch + offset);
  }
}

// ---- forward --------------------------------------------------------------------------------

// rows x groups, of which the first is at `offset` in s.
template <class T, int kWidth>
void forward_groups(const T* x, T* out, RowStrides strides, int64_t rows, int64_t groups,
                    const DirectScratch& s, int64_t pitch, int64_t offset, bool with_silu,
                    bool stream) {
  Run run;
  for (int64_t g = 0, count; g < groups; g += count) {
    count = smaller(kStrip, groups - g);
    const int64_t c = g * kGroup;
    sum_rows<T, kWidth, true>(x + c, strides.x, rows, count, s, pitch, offset + c, run.sums);
    store_sums(&run, rows, count, out + c, strides.out,
               ahead_of(x + c, strides.x, rows, (groups - g) * kGroup, groups * kGroup), with_silu,
               stream);
  }
}

// Steps t0 to t1 of a tile of channels of one sequence.
template <class T, int kWidth>
void forward_tile(const Plane& x, const Plane& out, bool with_silu, const Tile& tile, int64_t t0,
                  int64_t t1, const DirectScratch& s, bool stream) {
  const int64_t d = tile.d, pitch = tile.pitch;
  const bool unit_strides = x.channel == 1 && out.channel == 1;
  const int64_t whole = unit_strides ? tile.cols / kGroup : 0;
  stream = stream && t0 < t1 && has_whole_lines<T>(out, d, t0);
  for (int64_t t = t0, rows; t < t1; t += rows) {
    rows = smaller(kRows, t1 - t);
    forward_groups<T, kWidth>(reinterpret_cast<const T*>(address(x, d, t)),
                              reinterpret_cast<T*>(address(out, d, t)), {x.time, 0, out.time}, rows,
                              whole, s, pitch, 0, with_silu, stream);
    for (int64_t c = whole * kGroup; c < tile.cols; c += kGroup) {
      alignas(64) T stage_x[kStage] = {};
      alignas(64) T stage_out[kStage];
      const int64_t count = smaller(kGroup, tile.cols - c);
      for (int64_t r = 0; r < rows; ++r) {
        gather(address(x, d + c, t + r), x.channel, count, stage_x + r * kGroup);
      }
      forward_groups<T, kWidth>(stage_x, stage_out, {kGroup, 0, kGroup}, rows, 1, s, pitch, c,
                                with_silu, false);
      for (int64_t r = 0; r < rows; ++r) {
        scatter(stage_out + r * kGroup, count, address(out, d + c, t + r), out.channel);
      }
    }
  }
}

// ---- backward -------------------------------------------------------------------------------

// Of one group and some rows, adds dz * x to sums; `before` holds the rows of x before, and then
// the last ones.
template <class T, int kWidth>
CAUSAL_CONV1D_INLINE void sum_dweight(const T* x, int64_t stride, const float* dz,
                                      int64_t dz_stride, int64_t rows, float* before, float* sums,
                                      int64_t pitch) {
  Vec window[kWidth], acc[kWidth + 1];
  for (int k = 0; k + 1 < kWidth; ++k) window[k + 1] = Vec::load(before + k * pitch);
  for (int k = 0; k <= kWidth; ++k) acc[k] = Vec::load(sums + k * pitch);
#pragma GCC unroll 4
  for (int64_t r = 0; r < rows; ++r) {
    for (int k = 0; k + 1 < kWidth; ++k) window[k] = window[k + 1];
    window[kWidth - 1] = load_group(x + r * stride);
    const Vec here = Vec::load(dz + r * dz_stride);
    for (int k = 0; k < kWidth; ++k) acc[k] = fma(here, window[k], acc[k]);
    acc[kWidth] = add(acc[kWidth], here);
  }
  for (int k = 0; k + 1 < kWidth; ++k) window[k + 1].store(before + k * pitch);
  for (int k = 0; k <= kWidth; ++k) acc[k].store(sums + k * pitch);
}

// dx of them, to `edge` if that is not null; `before` holds the rows of dz before, and then the
// last.
template <class T, int kWidth>
CAUSAL_CONV1D_INLINE void store_dx(const float* dz, int64_t dz_stride, int64_t rows, const float* w,
                                   float* before, int64_t pitch, bool stream, T* dx, int64_t stride,
                                   float* edge) {
  Vec reversed[kWidth], window[kWidth];
  for (int k = 0; k < kWidth; ++k) reversed[kWidth - 1 - k] = Vec::load(w + k * pitch);
  for (int k = 0; k + 1 < kWidth; ++k) window[k + 1] = Vec::load(before + k * pitch);
#pragma GCC unroll 4
  for (int64_t r = 0; r < rows; ++r) {
    for (int k = 0; k + 1 < kWidth; ++k) window[k] = window[k + 1];
    window[kWidth - 1] = Vec::load(dz + r * dz_stride);
    const Vec result = weighted<kWidth>(Vec::set(0.0f), reversed, window);
    if (__builtin_expect(edge != nullptr, 0)) {
      result.store(edge);
    } else {
      store_group(result, stream, dx + r * stride);
    }
  }
  for (int k = 0; k + 1 < kWidth; ++k) window[k + 1].store(before + k * pitch);
}

// The rows of a step x groups, of which the first is at `offset` in s.
template <class T, int kWidth>
void backward_groups(const T* x, const T* dout, T* dx, RowStrides strides, const RowStep& step,
                     int64_t groups, const DirectScratch& s, int64_t pitch, int64_t offset,
                     bool with_silu, bool stream) {
  Run run;
  const int64_t rows = step.count;
  const bool present = step.present, to_edge = step.to_edge;
  float* const sums = step.owned ? s.sums : s.unused;
  for (int64_t first = 0, count; first < groups; first += count) {
    count = smaller(kStrip, groups - first);
    const int64_t start = first * kGroup, row = count * kGroup;
    const int64_t left = (groups - first) * kGroup, all = groups * kGroup;
    const auto x_ahead = ahead_of(x + start, strides.x, rows, left, all);
    const auto dout_ahead = ahead_of(dout + start, strides.dout, rows, left, all);
    if (with_silu && present) {
      sum_rows<T, kWidth, false>(x + start, strides.x, rows, count, s, pitch, offset + start,
                                 run.sums);
      to_gradients(&run, rows, count, dout + start, strides.dout, x_ahead, dout_ahead);
    } else {
      for (int64_t i = 0; i < rows * count; ++i) {
        const int64_t r = i / count, g = i % count;
        Vec dz = Vec::set(0.0f);
        if (present) {
          x_ahead.fetch(r, g);
          dout_ahead.fetch(r, g);
          dz = load_group(dout + start + r * strides.dout + g * kGroup);
        }
        dz.store(run.sums + i * kGroup);
      }
    }
    for (int64_t g = 0; g < count; ++g) {
      const int64_t c = start + g * kGroup, at = offset + c;
      const float* const dz = run.sums + g * kGroup;
      if (present) {
        sum_dweight<T, kWidth>(x + c, strides.x, dz, row, rows, s.x + at, sums + at, pitch);
      }
      store_dx<T, kWidth>(dz, row, rows, s.w + at, s.dz + at, pitch, stream, dx + c, strides.out,
                          to_edge ? s.edge + at : nullptr);
    }
  }
}

// Channels that are no whole group in unit strides, from column c on.
template <class T, int kWidth>
void backward_staged(const BackwardRow& row, bool with_silu, const Tile& tile, const RowStep& step,
                     int64_t c, const DirectScratch& s) {
  alignas(64) T stage_x[kStage] = {};
  alignas(64) T stage_dout[kStage] = {};
  alignas(64) T stage_dx[kStage];
  const int64_t d = tile.d + c, t = step.begin, count = smaller(kGroup, tile.cols - c);
  for (int64_t r = 0; step.present && r < step.count; ++r) {
    gather(address(row.in.x, d, t + r), row.in.x.channel, count, stage_x + r * kGroup);
    gather(address(row.dout, d, t + r), row.dout.channel, count, stage_dout + r * kGroup);
  }
  backward_groups<T, kWidth>(stage_x, stage_dout, stage_dx, {kGroup, kGroup, kGroup}, step, 1, s,
                             tile.pitch, c, with_silu, false);
  for (int64_t r = 0; !step.to_edge && r < step.count; ++r) {
    scatter(stage_dx + r * kGroup, count, address(row.dx, d, t - (kWidth - 1) + r), row.dx.channel);
  }
}

// The row of dx in s.edge, of a time that may lie before the chunk t0 to t1.
template <class T, int kWidth>
void take_edge(const BackwardRow& row, const Tile& tile, int64_t time, int64_t t0,
               const DirectScratch& s) {
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
  const bool unit_strides = row.in.x.channel == 1 && row.dout.channel == 1 && row.dx.channel == 1;
  const int64_t whole = unit_strides ? tile.cols / kGroup : 0;
  stream = stream && t0 < t1 && has_whole_lines<T>(row.dx, d, t0);
  const auto flush = [&] {
    for (int64_t i = 0; i < (kWidth + 1) * pitch; ++i) {
      s.totals[i] += static_cast<double>(s.sums[i]);
    }
    __builtin_memset(s.sums, 0, static_cast<size_t>((kWidth + 1) * pitch) * sizeof(float));
  };
  RowSteps steps(t0, t1, row.length, kHalo, kRows);
  for (RowStep step; steps.next(&step);) {
    const int64_t t = step.begin;
    const char* const x = step.present ? address(row.in.x, d, t) : nullptr;
    const char* const dout = step.present ? address(row.dout, d, t) : nullptr;
    char* const dx = step.to_edge ? nullptr : address(row.dx, d, t - kHalo);
    backward_groups<T, kWidth>(
        reinterpret_cast<const T*>(x), reinterpret_cast<const T*>(dout), reinterpret_cast<T*>(dx),
        {row.in.x.time, row.dout.time, row.dx.time}, step, whole, s, pitch, 0, with_silu, stream);
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
