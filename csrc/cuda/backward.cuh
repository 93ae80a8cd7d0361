// Backward. With z the pre-activation and dz[t] = dout[t] * act'(z[t]) (0 where seq_idx < 0):
//
//   dx[s]      = sum over t = s..s+W-1, ascending, of weight[W-1-(t-s)] * dz[t]   (t < L)
//                + dfinal_states[s-(L-(W-1))] where that exists; rows that end in padding, or have
//                it among their last W-1 steps, are put right by a kernel of their own
//   dweight[k] = sum over b, t of dz[t] * x~[t-(W-1)+k]        dbias = sum over b, t of dz[t]
//   dinitial_states[j] is dx at s = j-(W-1)
//
// One pass: x and dout are read once and z is recomputed. dx[s] needs dz up to s+W-1, so it is
// written W-1 steps late, and a chunk of time needs the W-1 dz after its end too.
// dweight and dbias: every chunk writes its partial sums to the workspace, whose size depends on
// shapes alone, and a second kernel adds them up in a fixed order; or, channel_first, a block has
// all of a channel and adds up its warps' sums itself. No atomics.
#pragma once

#include "common.cuh"
#include "tiles.cuh"

namespace causal_conv1d::gpu {

template <typename T>
struct BackwardArgs {
  using Element = T;
  View<T> x, dout, dx;
  AnyView<Compute<T>> weight, bias, initial_states, dfinal_states, dweight, dbias, dinitial_states;
  SeqIdx seq_idx;
  // channel_first: rows of bytes for Matches, and what find_matches tells of each block of them, or
  // nullptr if no seq_idx.
  const uint8_t *matches, *mismatches;
  int64_t matches_pitch;
  Compute<T>* partials;  // (parts, W + 1, dim): for each part dweight[k], then dbias, by scale
  int64_t batch, dim, seqlen;
  int width;
  bool silu;
  Compute<T> scale;                 // pre_activation_scale
  const T *x_end, *dout_end;        // one past the last elements
  int64_t x_row, dout_row, dx_row;  // channel_last: bytes from a step to the next
  int64_t chunks, chunk;            // parts of the time axis, and the length of one
  int64_t parts;                    // of partials
  bool sums, whole;           // are dweight or dbias wanted; has a block all parts of a channel,
  int part_bits;              // the power of two of them that it has room for
  int64_t rows;               // channel_first: batch entries a warp
  Columns columns;            // channel_last
  bool wide;                  // channel_last: may x and dout be read by 16 bytes
  Divisor by_dim, by_chunks;  // channel_first

  // x~ at s < seqlen.
  __device__ __forceinline__ Compute<T> input(int64_t b, int64_t d, int64_t s) const {
    if (s >= 0) return to_compute(*x.at(b, d, s));
    const int64_t j = s + width - 1;
    return initial_states.given() && j >= 0 ? initial_states.load(b, d, j) : Compute<T>(0);
  }

  __device__ __forceinline__ Compute<T> gradient(Compute<T> z, Compute<T> g) const {
    return silu ? silu_backward<T>(z, g) : g;
  }

  // Turns N pre-activations into dz, which is 0 where not inside.
  template <int N>
  __device__ __forceinline__ void gradients(const float (&g)[N], bool inside, float (&z)[N]) const {
    if (!inside) {
#pragma unroll
      for (int i = 0; i < N; ++i) z[i] = 0.0f;
    } else if (silu) {
#pragma unroll
      for (int i = 0; i < N; ++i) z[i] = silu_backward<T>(z[i], g[i]);
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) z[i] = g[i];
    }
  }

  // What dfinal_states adds to dx at s if the row has no padding among its last W-1 steps.
  __device__ __forceinline__ Compute<T> dfinal(int64_t b, int64_t d, int64_t s) const {
    const int64_t j = s - (seqlen - (width - 1));
    return dfinal_states.given() && j >= 0 ? dfinal_states.load(b, d, j) : Compute<T>(0);
  }
  // The same of any row; end is one past its last step that is not padding, or 0. Padding takes
  // nothing, nor what comes before a row that begins with it.
  __device__ __forceinline__ Compute<T> dfinal(int64_t b, int64_t d, int64_t s, int64_t end) const {
    const int64_t j = s - (end - (width - 1));
    if (j < 0 || s >= end) return Compute<T>(0);
    const bool takes = end == 0 || seq_idx.at(b, max(s, int64_t(0))) >= 0;
    return takes ? dfinal_states.load(b, d, j) : Compute<T>(0);
  }

  __device__ __forceinline__ Compute<T>* partial(int64_t part, int k, int64_t d) const {
    return partials + (part * (width + 1) + k) * dim + d;
  }
  // Partial sums are to stay in L2 until they are read, beside all that passes through it.
  template <int C>
  __device__ __forceinline__ void store_partials(const float (&sums)[C], int64_t part, int k,
                                                 int64_t d) const {
    store_for_reading_once(pack<float>(sums), partial(part, k, d));
  }
  // The whole sum of dweight[d, k], or for k == width of dbias[d].
  __device__ __forceinline__ void store_sum(Compute<T> sum, int k, int64_t d) const {
    const bool is_weight = k < width;
    AnyView<Compute<T>> to;
    to.data = is_weight ? dweight.data : dbias.data;
    to.dtype = is_weight ? dweight.dtype : dbias.dtype;
    to.strides[0] = is_weight ? dweight.strides[0] : dbias.strides[0];
    to.strides[1] = dweight.strides[1];
    to.strides[2] = 0;
    if (to.given()) to.store(sum * scale, d, is_weight ? k : 0);
  }
};

constexpr int kBackwardLines = 4;  // channel_last: chunks a block, one a warp

// How the backward divides a problem. It depends on sizes and types alone, so that the sums' order
// does; the workspace follows from it.
struct BackwardPlan {
  bool any_width, channel_last;
  int vector;  // channels or time steps a thread; 1: any strides (channel_last)
  Access access = Access::kStrided;  // channel_first
  int64_t chunk, chunks, rows = 1;
  Columns columns;
  bool wide = false;  // channel_last: all of x and dout is 16-byte aligned
  int64_t parts;
  bool whole = false;         // channel_first: a block has all parts of a channel, and adds them up
  int part_bits = 0;          // of the number of warps that are for them
  int64_t matches_pitch = 0;  // channel_first with seq_idx: bytes a row of matches
  int64_t partials, workspace;  // bytes of the partial sums, and of all

  explicit BackwardPlan(const BackwardParams& params);
};

// For widths up to 8 and floats of up to 32 bits: start the kernel that writes dx and the sums, or
// partial sums.
template <typename T>
cudaError_t launch_backward_channel_first(const BackwardArgs<T>& p, const BackwardPlan& plan,
                                          cudaStream_t stream);
template <typename T>
cudaError_t launch_backward_channel_last(const BackwardArgs<T>& p, const BackwardPlan& plan,
                                         cudaStream_t stream);

}  // namespace causal_conv1d::gpu
