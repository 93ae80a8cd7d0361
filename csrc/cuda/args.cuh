// What all operators' kernels are given.
#pragma once

#include "access.h"
#include "schedule.cuh"
#include "seq_idx.cuh"
#include "silu.cuh"
#include "views.cuh"

namespace causal_conv1d::gpu {

template <typename T>
struct CommonArgs {
  using Element = T;
  View<T> x;
  AnyView<Compute<T>> weight, bias;
  int64_t batch, dim, seqlen;
  int width;
  bool silu;
  Compute<T> scale;  // pre_activation_scale

  template <typename Params>
  explicit CommonArgs(const Params& params)
      : x(view<T>(params.x)),
        weight(any_view<Compute<T>>(params.weight)),
        bias(any_view<Compute<T>>(params.bias)),
        batch(params.x.sizes[0]),
        dim(params.x.sizes[1]),
        seqlen(params.x.ndim == 3 ? params.x.sizes[2] : 1),
        width(static_cast<int>(params.weight.sizes[1])),
        silu(params.silu != 0),
        scale(pre_activation_scale<T>(silu)) {}
};

// Of the forward and the backward. seq_idx may be the ids of packed sequences, which have no
// initial_states here. A dilation is given apart, to the kernels that know one.
template <typename T>
struct SequenceArgs : CommonArgs<T> {
  AnyView<Compute<T>> initial_states;
  SeqIdx seq_idx;
  View<T> pre_gate, post_gate;  // data is null if not given
  const T* x_end;               // one past x's last element
  int64_t chunk = 0;            // steps of a part of the time axis
  Columns columns;              // channel-last
  Divisor by_dim, by_chunks;    // channel-first

  template <typename Params>
  SequenceArgs(const Params& params, const Options& options)
      : CommonArgs<T>(params),
        initial_states(any_view<Compute<T>>(params.initial_states)),
        seq_idx(seq_idx_view(params.seq_idx)),
        pre_gate(view<T>(options.pre_gate)),
        post_gate(view<T>(options.post_gate)),
        x_end(this->x.data + extent(params.x)) {}

  // x~ at s < seqlen.
  __device__ __forceinline__ Compute<T> input(int64_t b, int64_t d, int64_t s) const {
    if (s >= 0) return to_compute(*this->x.at(b, d, s));
    const int64_t j = s + this->width - 1;
    return initial_states.given() && j >= 0 ? initial_states.load(b, d, j) : Compute<T>(0);
  }
};

}  // namespace causal_conv1d::gpu
