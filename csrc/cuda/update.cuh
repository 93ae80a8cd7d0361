// Update: the convolution of one or more new tokens with a running state, which takes them in.
//
// update_decode: one token without a ring, W = 4, weights and bias of x's type, a state as
//   update_token takes it. Few arguments and little code for where the time is that of a launch; a
//   thread has one batch entry or, of large calls, two through shared memory.
// update_token: what is left with one token, or four of bf16 with unit stride over time; W <= 4, a
//   state of 3 or 4 inputs of x's type with unit stride over them or, for one token, over channels.
//   A thread owns C channels of ENTRIES batch entries and has the states in registers.
// update_rows: several tokens or a ring, W <= 4, x and a state of 3 or 4 inputs of x's type with
//   unit stride over channels. A thread owns the channels of 8 bytes of a batch entry.
// update_staged: what is left with W <= 4, x and a state of x's type with unit stride over time. A
//   block takes the channels of a batch entry that it owns through shared memory, so that all
//   accesses to memory are whole lines.
// update_any: everything else, a thread per channel.
//
// With conv_state_indices several batch entries may share a row of the state. All of them read it
// as it was, and the last one's state stays. So that no block waits for another, the thread of the
// first of them computes them all and the others nothing; to know, each block looks at all indices.
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
  int entries = 1;           // update_token: batch entries of a thread
  bool whole_warps = false;  // update_token: a warp has channels of one batch entry alone
  // Threads, in update_staged blocks, that have all channels of a batch entry, or of `entries`.
  Divisor by_column;
  int64_t columns = 0;  // the same for update_any
  int channels = 0;     // update_staged: of a block
  bool may_share;       // whether batch entries may have one row of the state
  // Of a pool: indices differ, and an index that is no row, or is pad_slot, gives 0.
  bool slots = false;
  int64_t pad_slot = -1;

  explicit UpdateArgs(const UpdateParams& params)
      : CommonArgs<T>(params),
        out(view<T>(params.out)),
        state(any_view<Compute<T>>(params.conv_state)),
        cache_seqlens(index_view(params.cache_seqlens)),
        conv_state_indices(index_view(params.conv_state_indices)),
        states(params.conv_state.sizes[0]),
        state_len(params.conv_state.sizes[2]),
        may_share(given(params.conv_state_indices) && params.x.sizes[0] > 1) {}

  __device__ __forceinline__ bool has_indices() const { return conv_state_indices.data != nullptr; }
  __device__ __forceinline__ bool is_ring() const { return cache_seqlens.data != nullptr; }

  // An index as a row of the state, or -1 if it is none.
  __device__ __forceinline__ int64_t row_of(int64_t index) const {
    return index >= 0 && index < states && index != pad_slot ? index : -1;
  }

  // The outputs of a batch entry whose index is no row, of channels d .. d + count - 1. One out of
  // range gives NaN: reading that row would be worse, and the host cannot be told.
  __device__ __forceinline__ void write_without_row(int64_t index, int64_t b, int64_t d,
                                                    int count) const {
    const Compute<T> v = index < 0 || slots ? Compute<T>(0) : Compute<T>(NAN);
#pragma unroll 1
    for (int c = 0; c < count; ++c) {
#pragma unroll 1
      for (int64_t t = 0; t < this->seqlen; ++t) *out.at(b, d + c, t) = from_compute<T>(v);
    }
  }

  // The first batch entry of [from, to) with that row, or to.
  __device__ __forceinline__ int64_t find(int64_t row, int64_t from, int64_t to) const {
#pragma unroll 1
    while (from < to && conv_state_indices.at(from) != row) ++from;
    return from;
  }

  // Where in the ring of S batch entry b's first token goes.
  template <typename Int>
  __device__ __forceinline__ int ring_start(int64_t b, Int S) const {
    const int64_t start = cache_seqlens.at(b) % S;
    return static_cast<int>(start < 0 ? start + S : start);
  }
};

}  // namespace causal_conv1d::gpu
