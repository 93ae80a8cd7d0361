// Which sizes and strides the update's kernels take, where several of them ask. Host code.
#pragma once

#include "access.h"
#include "schedule.cuh"
#include "update.cuh"

namespace causal_conv1d::gpu {

inline int64_t whole_blocks(int64_t threads) { return ceil_div(threads, kThreads) * kThreads; }

// Whether a thread's channels of t, n elements each, are one dense block for a Pack.
template <typename Pack>
bool is_dense(const Tensor& t, int channels, int64_t n, int size) {
  return (t.ndim == 2 || n == 1 || t.strides[2] == 1) && (t.strides[1] == n || channels == 1) &&
         reinterpret_cast<uintptr_t>(t.data) % Pack::kAlignment == 0 &&
         t.strides[0] * size % Pack::kAlignment == 0 &&
         channels * t.strides[1] * size % Pack::kAlignment == 0;
}

// Whether a variant of Token suits, with or without indices.
template <typename K>
bool suits(const UpdateParams& params) {
  constexpr int C = K::C, S = K::S, size = sizeof(typename K::Element);
  const Tensor &x = params.x, &out = params.out, &state = params.conv_state;
  const int64_t tokens = x.ndim == 2 ? 1 : x.sizes[2];
  if (tokens != K::L || state.sizes[2] != S || x.sizes[1] % C != 0) return false;
  if (K::L == 1) {
    if (vector_width(x, 1, C, size) != C || vector_width(out, 1, C, size) != C) return false;
  } else if (!is_dense<typename K::Tokens>(x, C, K::L, size) ||
             !is_dense<typename K::Tokens>(out, C, K::L, size)) {
    return false;
  }
  if (K::DIM_FASTEST) return vector_width(state, 1, C, size) == C;
  return is_dense<typename K::State>(state, C, S, size);
}

}  // namespace causal_conv1d::gpu
