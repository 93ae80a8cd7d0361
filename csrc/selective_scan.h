// The selective scan of Mamba: forward, backward, and the update of a state by one token; on the
// CPU and on NVIDIA GPUs. The rules of causal_conv1d.h hold here too: plain C, every argument
// checked before anything is written, tensors of any strides, nothing kept between calls.
//
// With u, delta, z of shape (batch, dim, seqlen), A (dim, dstate), and g = d / (dim / groups):
//
//   dt[b,d,t]  = delta[b,d,t] + delta_bias[d], through log(1 + exp(.)) with delta_softplus
//   h[b,d,n,t] = exp(dt[b,d,t] A[d,n]) h[b,d,n,t-1] + dt[b,d,t] B[b,g,n,t] u[b,d,t]
//   y[b,d,t]   = sum over n of C[b,g,n,t] h[b,d,n,t], + D[d] u[b,d,t]
//   out[b,d,t] = y[b,d,t] z[b,d,t] sigmoid(z[b,d,t]), or y without z
//
// h before step 0 is initial_states, 0 if not given; after the last step it is last_states. With
// cu_seqlens the batch is 1, and sequence i is the steps cu_seqlens[i] .. cu_seqlens[i+1] - 1, each
// with states of its own; steps before the first and after the last are 0 in all results. B and C
// may each be (dim, dstate) instead, constant in time.
//
// Sums and states are fp32, fp64 if u is fp64. Results do not depend on the number of threads, on
// the timing of blocks, or, on the CPU, on strides: CUDA takes another order of sums where tensors
// are not aligned to 16 bytes.
#ifndef CAUSAL_CONV1D_SELECTIVE_SCAN_H_
#define CAUSAL_CONV1D_SELECTIVE_SCAN_H_

#include "causal_conv1d.h"

#ifdef __cplusplus
extern "C" {
#endif

// As causal_conv1d_tensor, of up to four dimensions.
typedef struct causal_conv1d_tensor4 {
  void* data;
  int64_t sizes[4];
  int64_t strides[4];
  int32_t ndim;   // 0: not given
  int32_t dtype;  // causal_conv1d_dtype
} causal_conv1d_tensor4;

// Zero-initialise the structs below ("= {0}") and set what is given. Each float tensor has a type
// of its own: float32, float16 or bfloat16; float64 needs all of them float64. dstate is 1..256.
typedef struct causal_conv1d_scan_inputs {
  causal_conv1d_tensor4 u;               // (batch, dim, seqlen)
  causal_conv1d_tensor4 delta;           // (batch, dim, seqlen)
  causal_conv1d_tensor4 A;               // (dim, dstate)
  causal_conv1d_tensor4 B;               // (batch, groups, dstate, seqlen) or (dim, dstate)
  causal_conv1d_tensor4 C;               // likewise
  causal_conv1d_tensor4 D;               // optional (dim,)
  causal_conv1d_tensor4 z;               // optional (batch, dim, seqlen)
  causal_conv1d_tensor4 delta_bias;      // optional (dim,)
  causal_conv1d_tensor4 initial_states;  // optional (batch or sequences, dim, dstate)
  causal_conv1d_tensor4 cu_seqlens;      // optional (sequences + 1,), int32 or int64; batch is 1
  int32_t delta_softplus;                // 0: none
} causal_conv1d_scan_inputs;

typedef struct causal_conv1d_scan_forward_params {
  causal_conv1d_scan_inputs inputs;
  causal_conv1d_tensor4 out;          // (batch, dim, seqlen); written
  causal_conv1d_tensor4 ungated;      // optional (batch, dim, seqlen): y; written
  causal_conv1d_tensor4 last_states;  // optional (batch or sequences, dim, dstate); written
} causal_conv1d_scan_forward_params;

// Gradients of the forward. All outputs are overwritten, never accumulated into; any may be left
// out. Sums are rounded once, to the type of the tensor that takes them.
typedef struct causal_conv1d_scan_backward_params {
  causal_conv1d_scan_inputs inputs;
  causal_conv1d_tensor4 dout;          // (batch, dim, seqlen)
  causal_conv1d_tensor4 dlast_states;  // optional (batch or sequences, dim, dstate)
  causal_conv1d_tensor4 du;            // u's shape, and so on; written
  causal_conv1d_tensor4 ddelta;
  causal_conv1d_tensor4 dA;
  causal_conv1d_tensor4 dB;
  causal_conv1d_tensor4 dC;
  causal_conv1d_tensor4 dD;
  causal_conv1d_tensor4 dz;
  causal_conv1d_tensor4 ddelta_bias;
  causal_conv1d_tensor4 dinitial_states;
  causal_conv1d_tensor4 out;  // optional: the forward's out once more; written
} causal_conv1d_scan_backward_params;

// One token: state[s,h,p,n] = exp(dt A) state + dt B x, out = sum over n of C state + D x, gated by
// z. Heads share B and C by groups: g = h / (heads / groups). Mamba-1 has one head of dim channels.
// state_indices picks the state row s of each batch entry, else s = b; a negative one is padding:
// out is 0 there. Two entries must not name the same row. An index >= states is an error on the
// CPU; on CUDA it gives NaN in out and touches no state.
typedef struct causal_conv1d_state_update_params {
  causal_conv1d_tensor4 state;          // (states, heads, dim, dstate); changed
  causal_conv1d_tensor4 x;              // (batch, heads, dim)
  causal_conv1d_tensor4 dt;             // (batch, heads, dim)
  causal_conv1d_tensor4 A;              // (heads, dim, dstate)
  causal_conv1d_tensor4 B;              // (batch, groups, dstate)
  causal_conv1d_tensor4 C;              // (batch, groups, dstate)
  causal_conv1d_tensor4 D;              // optional (heads, dim)
  causal_conv1d_tensor4 z;              // optional (batch, heads, dim)
  causal_conv1d_tensor4 dt_bias;        // optional (heads, dim)
  causal_conv1d_tensor4 state_indices;  // optional (batch,), int32 or int64
  causal_conv1d_tensor4 out;            // (batch, heads, dim); written
  int32_t dt_softplus;
} causal_conv1d_state_update_params;

// CPU. num_threads as in causal_conv1d_cpu_forward.
CAUSAL_CONV1D_API causal_conv1d_status
causal_conv1d_cpu_scan_forward(const causal_conv1d_scan_forward_params* params, int num_threads);
CAUSAL_CONV1D_API causal_conv1d_status
causal_conv1d_cpu_scan_backward(const causal_conv1d_scan_backward_params* params, int num_threads);
CAUSAL_CONV1D_API causal_conv1d_status
causal_conv1d_cpu_state_update(const causal_conv1d_state_update_params* params, int num_threads);

// CUDA. workspace is device memory, 16-byte aligned, of at least the bytes that the function before
// it returns (-1 if the parameters are invalid), used while the call runs.
//
// The backward's is at most 128 MiB, or what 64 steps of all channels need if that is more, and 8
// bytes a sequence of cu_seqlens. Longer problems are taken in spans of time for it, the last one
// first; they need 6 states of (dim, dstate) beside it and one more a span, less than a hundredth
// of the tensors in a Mamba of 16 states. Where one span follows another, sums over time are added
// in another order, and two calls of the same sizes still give the same bits.
CAUSAL_CONV1D_API int64_t causal_conv1d_cuda_scan_forward_workspace_size(
    const causal_conv1d_scan_forward_params* params, int device);
CAUSAL_CONV1D_API causal_conv1d_status
causal_conv1d_cuda_scan_forward(const causal_conv1d_scan_forward_params* params, int device,
                                void* stream, void* workspace, int64_t workspace_size);
CAUSAL_CONV1D_API int64_t causal_conv1d_cuda_scan_backward_workspace_size(
    const causal_conv1d_scan_backward_params* params, int device);
CAUSAL_CONV1D_API causal_conv1d_status
causal_conv1d_cuda_scan_backward(const causal_conv1d_scan_backward_params* params, int device,
                                 void* stream, void* workspace, int64_t workspace_size);
CAUSAL_CONV1D_API causal_conv1d_status causal_conv1d_cuda_state_update(
    const causal_conv1d_state_update_params* params, int device, void* stream);

#ifdef __cplusplus
}
#endif

#endif  // CAUSAL_CONV1D_SELECTIVE_SCAN_H_
