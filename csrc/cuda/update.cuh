// Update: the convolution of one or more new tokens with a running state, which takes them in.
//
// update_token: one token, W <= 4, a state of x's type of 3 or 4 inputs, which has unit stride over
//   them or over channels. A thread owns C channels and goes through kEntries batch entries; it has
//   the states in registers, where it shifts them.
// update_any: everything else, a thread per channel. It computes all outputs before it writes the
//   state, from which they read.
//
// INDEXED: with conv_state_indices, several batch entries may share a row of the state. All of them
// read it as it was, and the last one's state stays. So that no block waits for another, the thread
// of the first of them computes them all and the others nothing; to know, each warp looks at all
// indices.
#pragma once

#include "args.cuh"
#include "index.cuh"

namespace causal_conv1d::gpu {

template <typename T>
struct UpdateArgs : CommonArgs<T> {
  View<T> out;
  AnyView<Compute<T>> state;
  Index cache_seqlens, conv_state_indices;
  int64_t states, state_len;
  int entries = 1;      // update_token: batch entries per thread,
  Divisor by_column;    // and threads per so many
  int64_t columns = 0;  // update_any: threads per batch entry
  bool index_packs;     // conv_state_indices can be read four at a time

  explicit UpdateArgs(const UpdateParams& params)
      : CommonArgs<T>(params),
        out(view<T>(params.out)),
        state(any_view<Compute<T>>(params.conv_state)),
        cache_seqlens(index_view(params.cache_seqlens)),
        conv_state_indices(index_view(params.conv_state_indices)),
        states(params.conv_state.sizes[0]),
        state_len(params.conv_state.sizes[2]) {
    const Index& rows = conv_state_indices;
    index_packs = rows.data != nullptr && rows.stride == 1 && !rows.wide && this->batch % 4 == 0 &&
                  reinterpret_cast<uintptr_t>(rows.data) % 16 == 0;
  }

  // The state row of batch entry b by its index, or -1 if it has none: then its outputs, of
  // channels d .. d + channels - 1, are written here. An index out of range gives NaN: reading that
  // row would be worse, and the host cannot be told.
  __device__ __forceinline__ int64_t state_row(int64_t b, int64_t d, int channels) const {
    const int64_t row = conv_state_indices.at(b);
    if (row >= 0 && row < states) return row;
    const Compute<T> v = row < 0 ? Compute<T>(0) : Compute<T>(NAN);
    for (int c = 0; c < channels; ++c) {
      for (int64_t t = 0; t < this->seqlen; ++t) *out.at(b, d + c, t) = from_compute<T>(v);
    }
    return -1;
  }

  // The first batch entry of [from, to) with that row, or to.
  template <typename Int>
  __device__ __forceinline__ Int find(Int row, Int from, Int to) const {
#pragma unroll 1
    while (from < to && conv_state_indices.at(from) != row) ++from;
    return from;
  }

  // Where in the ring batch entry b's first token goes.
  __device__ __forceinline__ int ring_start(int64_t b) const {
    const int64_t start = cache_seqlens.at(b) % state_len;
    return static_cast<int>(start < 0 ? start + state_len : start);
  }
};

}  // namespace causal_conv1d::gpu
