// Forward: out[b,d,t] = act(bias[d] + sum over k of weight[d,k] * x~[b,d,t-(W-1)+k]).
//
// forward_channel_last: a thread owns C adjacent channels over a chunk of steps; it loads several
//   steps at once and keeps the last W-1 inputs in registers.
// forward_channel_first: a warp owns a few tiles of one row, a lane V adjacent steps of each. It
//   loads the W-1 inputs before its own too, which its neighbour has just brought to L1.
// forward_dilated: channel-first with a dilation; a block owns a few tiles of one row.
// forward_any_rows: everything else without ids, a thread has eight adjacent steps of a channel.
// forward_any_width: everything else, one thread per output.
// Then forward_edges computes what states change of packed sequences, and write_final_states writes
// final_states where no other kernel does.
//
// Chunks are short, so that the threads at work at any time are in one region of memory: a copy
// that walks along 64 tiles per warp is 10 % slower than one that takes four (H200).
// For the same reason neighbouring warps take neighbouring parts of a row, then rows: numbered by
// channel first they reach 0.92 to 0.96 of a copy instead of 0.96 to 0.97 (bf16, large shapes).
//
// Arrays that are to stay in registers are apart from objects of scalars, here and in the backward:
// the compiler takes an object with arrays to pieces only after it has unrolled all loops, and the
// kernels came out up to 20 % longer.
#pragma once

#include "args.cuh"
#include "variants.cuh"

namespace causal_conv1d::gpu {

template <typename T>
struct ForwardArgs : SequenceArgs<T> {
  View<T> out;
  View<T> residual;  // data is null if not given
  AnyView<Compute<T>> final_states;

  ForwardArgs(const ForwardParams& params, const Options& options)
      : SequenceArgs<T>(params, options),
        out(view<T>(params.out)),
        residual(view<T>(options.residual)),
        final_states(any_view<Compute<T>>(params.final_states_out)) {}
};

// Grids with more blocks let the next kernel start early; in smaller ones, which the GPU holds
// whole, that was slower.
constexpr unsigned kManyBlocks = 2048;

}  // namespace causal_conv1d::gpu
