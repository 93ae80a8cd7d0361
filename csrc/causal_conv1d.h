// Depthwise causal 1-D convolution with optional SiLU: forward, backward, single- or multi-token
// update of a decode state, and the last inputs of packed sequences; on the CPU and on NVIDIA GPUs.
//
// With x of shape (batch, dim, seqlen) and weight of shape (dim, width), W = width:
//
//   out[b,d,t] = act(bias[d] + sum over k = 0..W-1 of weight[d,k] * x~[b,d,t-(W-1)+k])
//   x~[b,d,s]  = x[b,d,s] for s >= 0; initial_states[b,d,(W-1)+s] for s < 0 if given, else 0
//
// act is the identity or silu(z) = z * sigmoid(z). Sums are fp32 (fp64 for fp64 tensors) with fused
// multiply-adds in the order written: bias first, then k ascending. Outputs are therefore bitwise
// equal whatever the layout, and whether a sequence is given whole, in chunks or token by token.
//
// This is a plain C interface. It allocates no tensor, keeps no state, and needs neither torch nor
// Python. Every function checks all its arguments before it writes anything, and returns
// CAUSAL_CONV1D_INVALID_ARGUMENT for what is not as told here, params NULL included. What it cannot
// check is that the memory is there.
#ifndef CAUSAL_CONV1D_H_
#define CAUSAL_CONV1D_H_

#include <stdint.h>

// Of upstream's semantics, and the number that rises with each change here: Python's __version__ is
// MAJOR.MINOR.PATCH+portable.PORTABLE. Code that compiles with one version works with every later
// library of the same MAJOR.
#define CAUSAL_CONV1D_VERSION_MAJOR 1
#define CAUSAL_CONV1D_VERSION_MINOR 7
#define CAUSAL_CONV1D_VERSION_PATCH 0
#define CAUSAL_CONV1D_VERSION_PORTABLE 3

#define CAUSAL_CONV1D_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

// Element types. x, weight, bias and the states may each be float32, float16 or bfloat16; float64
// needs all of them float64. Index tensors are int32 or int64.
typedef enum causal_conv1d_dtype {
  CAUSAL_CONV1D_FLOAT32 = 0,
  CAUSAL_CONV1D_FLOAT16 = 1,
  CAUSAL_CONV1D_BFLOAT16 = 2,
  CAUSAL_CONV1D_FLOAT64 = 3,
  CAUSAL_CONV1D_INT32 = 4,
  CAUSAL_CONV1D_INT64 = 5,
  CAUSAL_CONV1D_UNSUPPORTED_DTYPE = 6,
  // Not supported either; these let messages name the type that was given.
  CAUSAL_CONV1D_BOOL = 7,
  CAUSAL_CONV1D_UINT8 = 8,
  CAUSAL_CONV1D_INT8 = 9,
  CAUSAL_CONV1D_INT16 = 10,
  CAUSAL_CONV1D_UINT16 = 11,
  CAUSAL_CONV1D_UINT32 = 12,
  CAUSAL_CONV1D_UINT64 = 13,
  CAUSAL_CONV1D_COMPLEX32 = 14,
  CAUSAL_CONV1D_COMPLEX64 = 15,
  CAUSAL_CONV1D_COMPLEX128 = 16,
  CAUSAL_CONV1D_FLOAT8_E4M3FN = 17,
  CAUSAL_CONV1D_FLOAT8_E5M2 = 18,
  CAUSAL_CONV1D_FLOAT8_E4M3FNUZ = 19,
  CAUSAL_CONV1D_FLOAT8_E5M2FNUZ = 20,
  CAUSAL_CONV1D_FLOAT8_E8M0FNU = 21
} causal_conv1d_dtype;

// A tensor of up to three dimensions; strides are in elements and may be anything, 0 and negative
// ones included. ndim == 0 means "not given". data is aligned to the size of an element; a tensor
// without elements may have a null one, and sizes of any magnitude: a call that has nothing to
// write returns at once. Else a tensor has up to 2^52 elements, and x up to 2^58 / width.
//
// A tensor that is written has each element in a place of its own, and shares memory with no other
// tensor of the call; but final_states_out may be initial_states itself, with the same data, dtype,
// sizes and strides. Inputs may share memory with each other. Slices of one buffer may interleave:
// elements count, not ranges. For strides of no order (no dimension within another) this can take
// too long to find out, and is refused then.
typedef struct causal_conv1d_tensor {
  void* data;
  int64_t sizes[3];
  int64_t strides[3];
  int32_t ndim;
  int32_t dtype;  // causal_conv1d_dtype
} causal_conv1d_tensor;

typedef enum causal_conv1d_code {
  CAUSAL_CONV1D_OK = 0,
  CAUSAL_CONV1D_INVALID_ARGUMENT = 1,
  CAUSAL_CONV1D_RUNTIME_ERROR = 2
} causal_conv1d_code;

// message is empty if code is CAUSAL_CONV1D_OK, else one sentence that names the argument.
typedef struct causal_conv1d_status {
  int32_t code;  // causal_conv1d_code
  char message[252];
} causal_conv1d_status;

// Zero-initialise the structs below ("= {0}") and set what is given.

// seq_idx[b,t] is the id of a position's sequence: a tap counts only for positions of its own id,
// and the initial state has the id of position 0. Negative ids are padding: out is 0 there, and the
// input counts as 0. An id has to fit int32: in an int64 tensor others are an error on the CPU, and
// on CUDA only the low 32 bits of an id are read.
//
// final_states_out holds the last width - 1 inputs (for a short sequence after initial_states);
// with seq_idx those up to the last position that is no padding, so that a row goes on from there
// with update. A row of padding alone keeps its initial_states.

typedef struct causal_conv1d_forward_params {
  causal_conv1d_tensor x;                 // (batch, dim, seqlen)
  causal_conv1d_tensor weight;            // (dim, width), width 1..65536
  causal_conv1d_tensor bias;              // optional (dim,)
  causal_conv1d_tensor seq_idx;           // optional (batch, seqlen); < 0 is padding
  causal_conv1d_tensor initial_states;    // optional (batch, dim, width - 1)
  causal_conv1d_tensor out;               // (batch, dim, seqlen), x's dtype; written
  causal_conv1d_tensor final_states_out;  // optional (batch, dim, width - 1); written
  int32_t silu;                           // 0: identity
} causal_conv1d_forward_params;

// Gradients of the forward. All outputs are overwritten, never accumulated into; any but dx may be
// left out. The result does not depend on the number of threads or the timing of blocks.
typedef struct causal_conv1d_backward_params {
  causal_conv1d_tensor x, weight, bias, dout, seq_idx, initial_states;  // dout: x's shape and dtype
  causal_conv1d_tensor dfinal_states;    // optional (batch, dim, width - 1)
  causal_conv1d_tensor dx;               // (batch, dim, seqlen), x's dtype; written
  causal_conv1d_tensor dweight;          // optional (dim, width), any float type; written
  causal_conv1d_tensor dbias;            // optional (dim,), any float type; written
  causal_conv1d_tensor dinitial_states;  // optional (batch, dim, width - 1); written
  int32_t silu;
} causal_conv1d_backward_params;

// One or more tokens appended to a running state of S = conv_state.sizes[2] >= width - 1 inputs.
// Without cache_seqlens the state shifts left by seqlen and takes x at its end; with it the state
// is a ring and token i goes to position (cache_seqlens[b] + i) mod S. conv_state_indices picks the
// state row of each batch entry; a negative one is padding: out is 0 and no state is touched. Of
// entries with the same row each starts from the row as it was before the call, and the last one
// leaves its state there. An index >= conv_state.sizes[0] is an error on the CPU; on CUDA, where it
// cannot be seen without a synchronisation, it gives NaN in out and touches no state. Without
// indices conv_state has exactly batch rows.
typedef struct causal_conv1d_update_params {
  causal_conv1d_tensor x;                   // (batch, dim) or (batch, dim, seqlen)
  causal_conv1d_tensor conv_state;          // (batch, dim, S), with indices (any, dim, S); changed
  causal_conv1d_tensor weight;              // (dim, width)
  causal_conv1d_tensor bias;                // optional (dim,)
  causal_conv1d_tensor out;                 // x's shape and dtype; written
  causal_conv1d_tensor cache_seqlens;       // optional (batch,)
  causal_conv1d_tensor conv_state_indices;  // optional (batch,)
  int32_t silu;
} causal_conv1d_update_params;

// states[i,d,j] = x[cu_seqlens[i+1] - S + j, d], or 0 where that lies before cu_seqlens[i].
typedef struct causal_conv1d_varlen_states_params {
  causal_conv1d_tensor x;           // (total_tokens, dim), float type
  causal_conv1d_tensor cu_seqlens;  // (batch + 1,)
  causal_conv1d_tensor states;      // (batch, dim, S), x's dtype; written
} causal_conv1d_varlen_states_params;

// What models put around the convolution. With x' = pre_gate * x, rounded to x's dtype as that
// product would be (x' = x without pre_gate), and d = dilation:
//
//   out[b,d,t] = act(bias[d] + sum over k of weight[d,k] * x'~[b,d,t-(W-1-k)*d]) * post_gate[b,d,t]
//                + residual[b,d,t]
//
// States are of x' and have (W-1) * d columns. The gate and the residual are applied in fp32 (fp64)
// to the unrounded activation, as one fused multiply-add; out is rounded once. Where seq_idx or
// cu_seqlens tell that t is padding, out is residual[b,d,t], or 0.
//
// cu_seqlens packs N sequences into one row: x is (1, dim, total), sequence i is the steps
// cu_seqlens[i] .. cu_seqlens[i+1] - 1 and has row i of the states, (N, dim, (W-1) * d). Outputs
// are those of each sequence alone, bit for bit. Steps before the first and after the last sequence
// are padding. On the CPU cu_seqlens that fall, or leave 0..total, are an error; on CUDA, where
// they cannot be seen, they are clamped to 0..total and to the ones before.
//
// Set size to sizeof(causal_conv1d_options), so that these structs can grow: a library takes what
// is missing as not given, and refuses a larger one unless the rest is zero.
typedef struct causal_conv1d_options {
  uint64_t size;
  int64_t dilation;                 // 1..65536; 0 is 1
  causal_conv1d_tensor cu_seqlens;  // optional (N + 1,), int32 or int64, not with seq_idx
  causal_conv1d_tensor pre_gate;    // optional (batch, dim, seqlen), x's dtype
  causal_conv1d_tensor post_gate;   // likewise
  causal_conv1d_tensor residual;    // likewise; may be x itself. Of a backward only "given" counts.
} causal_conv1d_options;

// Of a backward. dout is the gradient of out: that of residual too, which needs no call. But if the
// residual is x itself, residual_is_x adds dout to dx.
typedef struct causal_conv1d_option_gradients {
  uint64_t size;
  causal_conv1d_tensor dpre_gate;   // optional (batch, dim, seqlen), x's dtype; written
  causal_conv1d_tensor dpost_gate;  // likewise
  int32_t residual_is_x;
} causal_conv1d_option_gradients;

// A pool of states, as serving engines keep them: sequences of any lengths, chunks of a prompt and
// single tokens in one call, each continued from a row of conv_states that is changed in place.
// Sequence i is the tokens query_start_loc[i] .. query_start_loc[i+1] - 1, or token i without
// those; its slot is cache_indices[i], or i. If that is pad_slot (or out of range on CUDA; on the
// CPU an error) the sequence is skipped: out is 0 there, as it is for tokens of no sequence, and no
// state is touched.
//
// The history of a sequence, width - 1 inputs, is columns a-1 .. a+W-3 of its slot for a =
// num_accepted_tokens[i] >= 1, and a = 1 without those; or zeros where has_initial_state[i] is
// false. Afterwards, h being that history: without num_accepted_tokens columns 0 .. W-2 of the slot
// are the last W-1 of (h ++ the tokens); with it columns 0 .. W-3+L are h[1:] ++ the L tokens,
// which needs S >= W-2+L (longer sequences keep their last tokens). Other columns stay. An empty
// sequence changes nothing. Slots of one call have to differ.
typedef struct causal_conv1d_pool_params {
  uint64_t size;
  causal_conv1d_tensor x;                    // (dim, total)
  causal_conv1d_tensor conv_states;          // (slots, dim, S), S >= width - 1; changed
  causal_conv1d_tensor weight;               // (dim, width)
  causal_conv1d_tensor bias;                 // optional (dim,)
  causal_conv1d_tensor out;                  // (dim, total), x's dtype; written; may be x itself,
                                             // on CUDA for width <= 8
  causal_conv1d_tensor query_start_loc;      // optional (N + 1,), int32 or int64, else N = total
  causal_conv1d_tensor cache_indices;        // optional (N,), int32 or int64
  causal_conv1d_tensor has_initial_state;    // optional (N,), bool, uint8, int32 or int64
  causal_conv1d_tensor num_accepted_tokens;  // optional (N,), int32 or int64, not with the former
  // Optional (rows, T, dim * (width - 1)) with window_indices (N,), else rows = N: the W-1 inputs
  // that end with token t of sequence i go to row window_indices[i], t < T, as (dim, width - 1);
  // written.
  causal_conv1d_tensor windows_out, window_indices;
  int64_t pad_slot;    // a slot that is none; -1 unless the caller says otherwise
  int64_t max_seqlen;  // of the longest sequence, or 0; how CUDA divides the work, no more
  int32_t silu;
} causal_conv1d_pool_params;

// CPU. num_threads <= 0 takes as many threads as the machine has cores; small problems use fewer.
CAUSAL_CONV1D_API causal_conv1d_status
causal_conv1d_cpu_forward(const causal_conv1d_forward_params* params, int num_threads);
CAUSAL_CONV1D_API causal_conv1d_status
causal_conv1d_cpu_backward(const causal_conv1d_backward_params* params, int num_threads);
CAUSAL_CONV1D_API causal_conv1d_status
causal_conv1d_cpu_update(const causal_conv1d_update_params* params, int num_threads);
// As forward and backward, with options (and gradients), which may be NULL.
CAUSAL_CONV1D_API causal_conv1d_status
causal_conv1d_cpu_forward_with(const causal_conv1d_forward_params* params,
                               const causal_conv1d_options* options, int num_threads);
CAUSAL_CONV1D_API causal_conv1d_status causal_conv1d_cpu_backward_with(
    const causal_conv1d_backward_params* params, const causal_conv1d_options* options,
    const causal_conv1d_option_gradients* gradients, int num_threads);
CAUSAL_CONV1D_API causal_conv1d_status
causal_conv1d_cpu_pool(const causal_conv1d_pool_params* params, int num_threads);
CAUSAL_CONV1D_API causal_conv1d_status
causal_conv1d_cpu_varlen_states(const causal_conv1d_varlen_states_params* params, int num_threads);
// The instruction set in use: "avx512", "avx2", "neon" or "baseline". It is the best that this CPU
// runs, or what the environment variable CAUSAL_CONV1D_CPU_ISA names when the library is loaded. If
// that is none that this CPU runs, the functions above return CAUSAL_CONV1D_RUNTIME_ERROR, and this
// one "none".
//
// On one CPU all give the same bits of float64, and without silu of all but dweight and dbias,
// whose sums go over lanes (and but for the payloads of NaN). With silu values differ in their last
// bits.
CAUSAL_CONV1D_API const char* causal_conv1d_cpu_isa(void);

// CUDA, in a library of its own. stream is a cudaStream_t of device; nothing synchronises, and all
// calls can be captured in a CUDA graph. The caller's current device is left as it was.
CAUSAL_CONV1D_API causal_conv1d_status
causal_conv1d_cuda_forward(const causal_conv1d_forward_params* params, int device, void* stream);
// Bytes of device memory, 16-byte aligned, that the backward needs while it runs, at most 4 (8 for
// fp64) * (width + 1) * dim * batch * ceil(seqlen / 64), and with seq_idx 1.01 * batch * (seqlen +
// 800) more; -1 if the parameters are invalid.
CAUSAL_CONV1D_API int64_t
causal_conv1d_cuda_backward_workspace_size(const causal_conv1d_backward_params* params);
CAUSAL_CONV1D_API causal_conv1d_status
causal_conv1d_cuda_backward(const causal_conv1d_backward_params* params, int device, void* stream,
                            void* workspace, int64_t workspace_size);
CAUSAL_CONV1D_API causal_conv1d_status
causal_conv1d_cuda_update(const causal_conv1d_update_params* params, int device, void* stream);
// With options. workspace is device memory, 16-byte aligned, of at least the bytes that the
// function before it returns (-1 if the parameters are invalid), used while the call runs.
CAUSAL_CONV1D_API int64_t causal_conv1d_cuda_forward_with_workspace_size(
    const causal_conv1d_forward_params* params, const causal_conv1d_options* options);
CAUSAL_CONV1D_API causal_conv1d_status causal_conv1d_cuda_forward_with(
    const causal_conv1d_forward_params* params, const causal_conv1d_options* options, int device,
    void* stream, void* workspace, int64_t workspace_size);
CAUSAL_CONV1D_API int64_t causal_conv1d_cuda_backward_with_workspace_size(
    const causal_conv1d_backward_params* params, const causal_conv1d_options* options,
    const causal_conv1d_option_gradients* gradients);
CAUSAL_CONV1D_API causal_conv1d_status causal_conv1d_cuda_backward_with(
    const causal_conv1d_backward_params* params, const causal_conv1d_options* options,
    const causal_conv1d_option_gradients* gradients, int device, void* stream, void* workspace,
    int64_t workspace_size);
CAUSAL_CONV1D_API causal_conv1d_status
causal_conv1d_cuda_pool(const causal_conv1d_pool_params* params, int device, void* stream);
CAUSAL_CONV1D_API causal_conv1d_status causal_conv1d_cuda_varlen_states(
    const causal_conv1d_varlen_states_params* params, int device, void* stream);
// The embedded code, for example "sm_87 sm_90 compute_80".
CAUSAL_CONV1D_API const char* causal_conv1d_cuda_architectures(void);

#ifdef __cplusplus
}
#endif

#endif  // CAUSAL_CONV1D_H_
