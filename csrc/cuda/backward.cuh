// Backward. With z the pre-activation and dz[t] = dout[t] * act'(z[t]) (0 where seq_idx < 0):
//
//   dx[s]      = sum over t = s..s+W-1, ascending, of weight[W-1-(t-s)] * dz[t]   (t < L)
//                + dfinal_states[s-(L-(W-1))] where that exists; rows with padding among their last
//                W-1 steps are put right by a kernel of their own
//   dweight[k] = sum over b, t of dz[t] * x~[t-(W-1)+k]        dbias = sum over b, t of dz[t]
//   dinitial_states[j] is dx at s = j-(W-1)
//
// One pass: x and dout are read once and z is recomputed. dx[s] needs dz up to s+W-1, so it is
// written W-1 steps late, and a chunk of time needs the W-1 dz after its end too.
// dweight and dbias: every part of the problem writes its sums to the workspace, and a second
// kernel adds them up in a fixed order; or, channel-first, a block has all of a channel and adds up
// its warps' sums itself. No atomics. backward_plan.h tells how a problem is divided.
#pragma once

#include "args.cuh"
#include "backward_plan.h"
#include "pack.cuh"

namespace causal_conv1d::gpu {

template <typename T>
struct BackwardArgs : SequenceArgs<T> {
  using F = Compute<T>;
  View<T> dout, dx, dpre_gate, dpost_gate;  // data of the last two is null if not given
  bool add_dout;                            // to dx
  AnyView<F> dfinal_states, dweight, dbias, dinitial_states;
  // channel-first: rows of bytes for Matches, and for each block of find_matches whether they are
  // not all kAllMatch; nullptr without seq_idx.
  const uint8_t *matches = nullptr, *mismatches = nullptr;
  int64_t matches_pitch;
  F* partials;  // (parts, W + 1, dim): for each part dweight[k], then dbias, by scale
  const T* dout_end;
  int64_t x_row, dout_row, dx_row;  // channel-last: bytes from a step to the next
  int64_t chunks, parts, rows;      // these six: see BackwardPlan
  bool sums;                        // are dweight or dbias wanted
  bool whole, wide;
  int part_bits;

  BackwardArgs(const BackwardParams& params, const Options& options,
               const OptionGradients& gradients, const BackwardPlan& plan, void* workspace,
               void* own_matches = nullptr)  // else they come after the partial sums
      : SequenceArgs<T>(params, options),
        dout(view<T>(params.dout)),
        dx(view<T>(params.dx)),
        dpre_gate(view<T>(gradients.dpre_gate)),
        dpost_gate(view<T>(gradients.dpost_gate)),
        add_dout(gradients.residual_is_x != 0),
        dfinal_states(any_view<F>(params.dfinal_states)),
        dweight(any_view<F>(params.dweight)),
        dbias(any_view<F>(params.dbias)),
        dinitial_states(any_view<F>(params.dinitial_states)),
        matches_pitch(plan.matches_pitch),
        partials(plan.partials > 0 ? static_cast<F*>(workspace) : nullptr),
        dout_end(dout.data + extent(params.dout)),
        x_row(this->x.time * static_cast<int64_t>(sizeof(T))),
        dout_row(dout.time * static_cast<int64_t>(sizeof(T))),
        dx_row(dx.time * static_cast<int64_t>(sizeof(T))),
        chunks(plan.chunks),
        parts(plan.parts),
        rows(plan.rows),
        sums(given(params.dweight) || given(params.dbias)),
        whole(plan.whole),
        wide(plan.wide),
        part_bits(plan.part_bits) {
    this->chunk = plan.chunk;
    this->by_dim = Divisor(this->dim);
    this->by_chunks = Divisor(plan.chunks);
    if (matches_pitch > 0) {
      matches = own_matches != nullptr ? static_cast<uint8_t*>(own_matches)
                                       : static_cast<uint8_t*>(workspace) + plan.partials;
      mismatches = matches + this->batch * matches_pitch;
    }
  }

  __device__ __forceinline__ F gradient(F z, F g) const {
    return this->silu ? silu_backward<T>(z, g) : g;
  }

  // Turns N pre-activations into dz, which is 0 where not inside.
  template <int N>
  __device__ __forceinline__ void gradients(const float (&g)[N], bool inside, float (&z)[N]) const {
    if (!inside) {
#pragma unroll
      for (int i = 0; i < N; ++i) z[i] = 0.0f;
    } else if (this->silu) {
#pragma unroll
      for (int i = 0; i < N; ++i) z[i] = silu_backward<T>(z[i], g[i]);
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) z[i] = g[i];
    }
  }

  // What dfinal_states adds to dx at s if the row has no padding among its last W-1 steps.
  __device__ __forceinline__ F dfinal(int64_t b, int64_t d, int64_t s) const {
    const int64_t j = s - (this->seqlen - (this->width - 1));
    return dfinal_states.given() && j >= 0 ? dfinal_states.load(b, d, j) : F(0);
  }
  // The same of any row; end is one past its last step that is not padding, or 0. Padding takes
  // nothing, nor what comes before a row that begins with it.
  __device__ __forceinline__ F dfinal(int64_t b, int64_t d, int64_t s, int64_t end) const {
    const int64_t j = s - (end - (this->width - 1));
    if (j < 0 || s >= end) return F(0);
    const bool takes = end == 0 || this->seq_idx.at(b, max(s, int64_t(0))) >= 0;
    return takes ? dfinal_states.load(b, d, j) : F(0);
  }

  __device__ __forceinline__ F* partial(int64_t part, int k, int64_t d) const {
    return partials + (part * (this->width + 1) + k) * this->dim + d;
  }
  // Partial sums are to stay in L2 until they are read, beside all that passes through it.
  template <int C>
  __device__ __forceinline__ void store_partials(const float (&sums)[C], int64_t part, int k,
                                                 int64_t d) const {
    store_evict_last(pack<float>(sums), partial(part, k, d));
  }
  // The whole sum of dweight[d, k], or for k == width of dbias[d].
  __device__ __forceinline__ void store_sum(F sum, int k, int64_t d) const {
    const bool is_weight = k < this->width;
    AnyView<F> to;
    to.data = is_weight ? dweight.data : dbias.data;
    to.dtype = is_weight ? dweight.dtype : dbias.dtype;
    to.strides[0] = is_weight ? dweight.strides[0] : dbias.strides[0];
    to.strides[1] = dweight.strides[1];
    to.strides[2] = 0;
    if (to.given()) to.store(sum * this->scale, d, is_weight ? k : 0);
  }
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
