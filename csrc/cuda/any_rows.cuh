// What the kernels for any width have in common where no ids are given: a thread has runs of eight
// adjacent steps of one channel, and goes through the taps eight at a time, over a window of two
// runs that lies in registers. With m steps back for tap W-1-m, piece q has m = 8q, 8q-1, ... 8q-7,
// so that all windows begin at multiples of eight steps.
#pragma once

#include <cstring>

#include "any_options.cuh"
#include "any_schedule.h"

namespace causal_conv1d::gpu {

constexpr int kRun = kAnyRun;

// A thread's channel among those of its block, and its line among the threads of that channel.
// Channels are a warp's lanes if there are 32, else a warp has one channel.
struct AnyPlace {
  int channel, line, lines;

  __device__ __forceinline__ explicit AnyPlace(int channels) : lines(kThreads / channels) {
    const int n = static_cast<int>(threadIdx.x);
    channel = channels == 32 ? n % 32 : n / lines;
    line = channels == 32 ? n / 32 : n % lines;
  }
};

// A channel's steps in memory. dense: a run that begins at a multiple of eight is whole words of 16
// bytes.
template <typename T>
struct AnyRow {
  T* data;
  int64_t time;
  bool dense;

  __device__ __forceinline__ AnyRow(const View<T>& view, int64_t b, int64_t d)
      : data(view.at(b, d, 0)),
        time(view.time),
        dense(view.time == 1 && reinterpret_cast<uintptr_t>(data) % 16 == 0) {}
};

struct alignas(16) AnyWords {
  uint32_t a, b, c, d;
};

template <typename T>
__device__ __forceinline__ void load_words(const T* from, Compute<T>* v) {
  constexpr int N = 16 / sizeof(T);
#pragma unroll
  for (int i = 0; i < kRun; i += N) {
    const AnyWords words = *reinterpret_cast<const AnyWords*>(from + i);
    T elements[N];
    memcpy(elements, &words, sizeof words);
#pragma unroll
    for (int j = 0; j < N; ++j) v[i + j] = to_compute(elements[j]);
  }
}

template <typename T>
__device__ __forceinline__ void store_words(const Compute<T> (&v)[kRun], T* to) {
  constexpr int N = 16 / sizeof(T);
#pragma unroll
  for (int i = 0; i < kRun; i += N) {
    T elements[N];
#pragma unroll
    for (int j = 0; j < N; ++j) elements[j] = from_compute<T>(v[i + j]);
    AnyWords words;
    memcpy(&words, elements, sizeof words);
    *reinterpret_cast<AnyWords*>(to + i) = words;
  }
}

// v[i] = value(i) for all i, by a loop, for what is rare: registers have no index.
template <typename F, typename Value>
__device__ __forceinline__ void fill_run(F* v, Value&& value) {
#pragma unroll 1
  for (int n = 0; n < kRun; ++n) {
    const F given = value(n);
#pragma unroll
    for (int i = 0; i < kRun; ++i) v[i] = i == n ? given : v[i];
  }
}

// The steps from s on; outside(t) gives those of a run that is not in [0, seqlen) as a whole.
template <typename T, typename Outside>
__device__ __forceinline__ void load_run(const AnyRow<T>& row, int64_t s, int64_t seqlen,
                                         Compute<T>* v, Outside&& outside) {
  if (s < 0 || s + kRun > seqlen) {
    fill_run(v, [&](int i) { return outside(s + i); });
  } else if (row.dense) {
    load_words(row.data + s, v);
  } else {
    const T* const from = row.data + s * row.time;
#pragma unroll
    for (int i = 0; i < kRun; ++i) v[i] = to_compute(from[i * row.time]);
  }
}

// The window's second run becomes its first, and the run of x~ from s on its second.
template <typename Args, typename T, typename F>
__device__ __forceinline__ void shift_inputs(const Args& p, const AnyRow<T>& row, int64_t b,
                                             int64_t d, int64_t s, F (&x)[2 * kRun]) {
#pragma unroll
  for (int i = 0; i < kRun; ++i) x[i] = x[kRun + i];
  load_run(row, s, p.seqlen, x + kRun,
           [&](int64_t t) { return t < p.seqlen ? p.input(b, d, t) : F(0); });
}

template <typename T>
__device__ __forceinline__ void store_run(const AnyRow<T>& row, int64_t s, int64_t seqlen,
                                          const Compute<T> (&v)[kRun]) {
  if (row.dense && s + kRun <= seqlen) {
    store_words(v, row.data + s);
    return;
  }
  T* const to = row.data + s * row.time;
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    if (s + i < seqlen) to[i * row.time] = from_compute<T>(v[i]);
  }
}

// The last piece of taps.
__device__ __forceinline__ int last_piece(int width) { return (width - 1 + kRun - 1) / kRun; }

// Weights of the pieces from q down to `to`, for channels from d0 on: that of m = 8q - i goes to
// line i of `weights`.
template <typename Args, typename F>
__device__ __forceinline__ void stage_weights(const Args& p, int64_t d0, int channels, int q,
                                              int to, F* weights) {
#pragma unroll 1
  for (int i = threadIdx.x; i < (q - to + 1) * kRun * channels; i += kThreads) {
    const int line = i / channels, m = q * kRun - line;
    const int64_t d = d0 + (i - line * channels);
    if (m >= 0 && m < p.width && d < p.dim) {
      weights[i] = p.weight.load(d, p.width - 1 - m) * p.scale;
    }
  }
}

// z += the taps of the pieces from q down to `to`, for the run from t on. weight[i * pitch] is that
// of m = 8q - i. first: x is empty, else its second run is the one that piece q begins with.
template <typename Args, typename T, typename F>
__device__ __forceinline__ void convolve_pieces(const Args& p, const AnyRow<T>& row, int64_t b,
                                                int64_t d, int64_t t, int q, int to, bool first,
                                                const F* weight, int pitch, F (&x)[2 * kRun],
                                                F (&z)[kRun]) {
  bool fills = first;
#pragma unroll 1
  while (q >= to) {
    if (q > 0 || fills) {
      shift_inputs(p, row, b, d, t - (fills ? q : q - 1) * kRun, x);
    }
    if (fills) {
      fills = false;
      continue;
    }
    if (q == 0) {
      const F w = weight[0];  // the only tap of piece 0
#pragma unroll
      for (int i = 0; i < kRun; ++i) z[i] = fma(w, x[kRun + i], z[i]);
      break;
    }
#pragma unroll
    for (int r = 0; r < kRun; ++r) {
      if (q * kRun - r >= p.width) continue;
      const F w = weight[r * pitch];
#pragma unroll
      for (int i = 0; i < kRun; ++i) z[i] = fma(w, x[i + r], z[i]);
    }
    weight += kRun * pitch;
    --q;
  }
}

}  // namespace causal_conv1d::gpu
