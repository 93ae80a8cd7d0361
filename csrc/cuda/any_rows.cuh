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

// The steps from s on, in [0, seqlen) all of them; outside(t) gives those that are not.
template <typename T, typename Outside>
__device__ __forceinline__ void load_run(const AnyRow<T>& row, int64_t s, int64_t seqlen,
                                         Compute<T>* v, Outside&& outside) {
  if (s < 0 || s + kRun > seqlen) {
#pragma unroll
    for (int i = 0; i < kRun; ++i) v[i] = outside(s + i);
  } else if (row.dense) {
    load_words(row.data + s, v);
  } else {
    const T* const from = row.data + s * row.time;
#pragma unroll
    for (int i = 0; i < kRun; ++i) v[i] = to_compute(from[i * row.time]);
  }
}

// The same of x~.
template <typename Args, typename T>
__device__ __forceinline__ void load_inputs(const Args& p, const AnyRow<T>& row, int64_t b,
                                            int64_t d, int64_t s, Compute<T>* v) {
  load_run(row, s, p.seqlen, v, [&](int64_t t) {
    return t < p.seqlen ? p.input(b, d, t) : Compute<T>(0);
  });
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

// z += the taps of piece q, the weight of m = 8q - r being weight[r * pitch].
template <typename F>
__device__ __forceinline__ void convolve_piece(int q, int width, const F* weight, int pitch,
                                               const F (&x)[2 * kRun], F (&z)[kRun]) {
#pragma unroll
  for (int r = 0; r < kRun; ++r) {
    const int m = q * kRun - r;
    if (m < 0 || m >= width) continue;
    const F w = weight[r * pitch];
#pragma unroll
    for (int i = 0; i < kRun; ++i) z[i] = fma(w, x[i + r], z[i]);
  }
}

// The pieces from q down to `to`, x[8..15] being the run that piece q begins with.
template <typename Args, typename T, typename F>
__device__ __forceinline__ void convolve_pieces(const Args& p, const AnyRow<T>& row, int64_t b,
                                                int64_t d, int64_t t, int q, int to,
                                                const F* weight, int pitch, F (&x)[2 * kRun],
                                                F (&z)[kRun]) {
#pragma unroll 1
  for (; q >= to; --q) {
#pragma unroll
    for (int i = 0; i < kRun; ++i) x[i] = x[kRun + i];
    if (q > 0) load_inputs(p, row, b, d, t - (q - 1) * kRun, x + kRun);
    convolve_piece(q, p.width, weight, pitch, x, z);
    weight += kRun * pitch;
  }
}

}  // namespace causal_conv1d::gpu
