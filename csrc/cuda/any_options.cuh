// Options, as the kernels for any strides know them: those with OPTIONS take every combination.
#pragma once

#include "args.cuh"
#include "taps.cuh"

namespace causal_conv1d::gpu {

struct AnyOptions {
  int64_t dilation = 1;
  // Packed sequences, which are rows of the states: sequence i begins at bounds[i]. Else nullptr,
  // and a row of x is one of the states.
  const int64_t* bounds = nullptr;
  // Of a backward with seq_idx and dfinal_states: SeqIdx::end() of each row. Else rows end at L.
  const int64_t* ends = nullptr;
  int64_t rows = 0;  // of the states

  __device__ __forceinline__ int64_t begin(int64_t row) const {
    return bounds == nullptr ? 0 : bounds[row];
  }
  __device__ __forceinline__ int64_t end(int64_t row, int64_t seqlen) const {
    if (bounds != nullptr) return bounds[row + 1];
    return ends == nullptr ? seqlen : ends[row];
  }
};

// Of a row of the states.
template <typename Args>
__device__ __forceinline__ int64_t state_columns(const Args& p, const AnyOptions& o) {
  return (p.width - 1) * o.dilation;
}

// Products and sums that are not to become part of a fused multiply-add.
__device__ __forceinline__ float multiply(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double multiply(double a, double b) { return __dmul_rn(a, b); }
__device__ __forceinline__ float add(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ double add(double a, double b) { return __dadd_rn(a, b); }

// x' at s >= 0.
template <typename Args>
__device__ __forceinline__ auto gated_input(const Args& p, int64_t b, int64_t d, int64_t s) {
  using T = typename Args::Element;
  const Compute<T> x = to_compute(*p.x.at(b, d, s));
  if (!p.pre_gate.given()) return x;
  return to_compute(from_compute<T>(multiply(to_compute(*p.pre_gate.at(b, d, s)), x)));
}

// What step t of row b, with that id, takes of x'~ at s <= t.
template <bool OPTIONS, typename Args>
__device__ __forceinline__ auto tap(const Args& p, const AnyOptions& o, int64_t b, int64_t d,
                                    int64_t s, int id) {
  using F = Compute<typename Args::Element>;
  if constexpr (!OPTIONS) {
    return p.seq_idx.takes(b, s, id) ? p.input(b, d, s) : F(0);
  } else {
    const bool counts = p.seq_idx.takes(b, s, id);
    if (counts && s >= 0) return gated_input(p, b, d, s);
    if (!p.initial_states.given() || (o.bounds == nullptr && !counts)) return F(0);
    const int64_t row = o.bounds == nullptr ? b : id;
    return p.initial_states.load(row, d, s - o.begin(row) + state_columns(p, o));
  }
}

// z at t, which has that id >= 0.
template <bool OPTIONS, typename Args>
__device__ __forceinline__ auto pre_activation(const Args& p, const AnyOptions& o, int64_t b,
                                               int64_t d, int64_t t, int id) {
  using F = Compute<typename Args::Element>;
  constexpr int kUnroll =
      sizeof(F) == 8 && !OPTIONS ? 4 : 2;  // more takes registers from the callers
  return convolve_any<kUnroll>(p, d, load_bias(p, d), [&](int k) {
    const int back = p.width - 1 - k;
    return tap<OPTIONS>(p, o, b, d, t - (OPTIONS ? back * o.dilation : int64_t(back)), id);
  });
}

}  // namespace causal_conv1d::gpu
