// Launches the forward's kernels.
#include <algorithm>

#include "../layout.h"
#include "forward_any.cuh"
#include "forward_any_rows.cuh"
#include "launch.cuh"
#include "packed.h"
#include "phases.h"

#ifndef CAUSAL_CONV1D_GENERAL
#include "forward_dilated.cuh"
#include "forward_edges.cuh"
#include "forward_launch.cuh"
#endif

namespace causal_conv1d::gpu {
namespace {

#ifndef CAUSAL_CONV1D_GENERAL

// Whether the kernels of variants.cuh took the call.
template <typename T>
bool launch_fast(const ForwardParams& params, const Options& options, const ForwardArgs<T>& p,
                 cudaStream_t stream, cudaError_t* e) {
  if constexpr (sizeof(T) <= 4) {
    if (p.batch * p.dim * ceil_div(p.seqlen, 256) > kMaxParts) return false;
    if (p.width <= 4) return launch_of<Tables<T, 4>>(params, options, p, stream, e);
    if (p.width > 8) return false;
    return launch_wide(params, options, p, stream, e) ||
           launch_of<AnyStrides<T>>(params, options, p, stream, e);
  }
  return false;
}

// Whether forward_dilated took the call.
template <typename T>
bool launch_dilated(const ForwardParams& params, const Options& options, ForwardArgs<T> p,
                    cudaStream_t stream, cudaError_t* e) {
  if constexpr (sizeof(T) <= 4) {
    const DilatedRows rows(options.dilation, params.x, p.width, params.initial_states,
                           {&params.x, &params.out});
    const bool fused = p.pre_gate.given() || p.post_gate.given() || p.residual.given();
    if (rows.chunks == 0 || fused || p.seq_idx.data != nullptr || !has_every_kernel()) return false;
    p.by_dim = Divisor(p.dim);
    p.by_chunks = Divisor(rows.chunks);
    auto kernel = forward_dilated<T, 4>;
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      if (p.width > 4) kernel = forward_dilated<T, 8>;
    }
    *e = launch_pdl(kernel, p.batch * p.dim * rows.chunks * kThreads, stream, p, rows);
    return true;
  }
  return false;
}

template <typename T>
cudaError_t launch_edges(const ForwardArgs<T>& p, const AnyOptions& o, cudaStream_t stream) {
  if constexpr (sizeof(T) <= 4) {
    auto kernel = forward_edges<4, T>;
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      if (p.width > 4) kernel = forward_edges<8, T>;
    }
    return launch_pdl(kernel, o.rows * edge_channels(p.dim), stream, p, o);
  }
  return cudaErrorInvalidValue;
}

#else

template <typename T>
bool launch_fast(const ForwardParams&, const Options&, const ForwardArgs<T>&, cudaStream_t,
                 cudaError_t*) {
  return false;
}

template <typename T>
bool launch_dilated(const ForwardParams&, const Options&, ForwardArgs<T>, cudaStream_t,
                    cudaError_t*) {
  return false;
}

template <typename T>
cudaError_t launch_edges(const ForwardArgs<T>&, const AnyOptions&, cudaStream_t) {
  return cudaErrorInvalidValue;  // not called, as launch_fast() comes first
}

#endif

template <typename T>
cudaError_t launch_rows(const ForwardParams& params, const ForwardArgs<T>& p, cudaStream_t stream) {
  const int channels = any_channels(is_channel_last(params.x), p.dim, p.seqlen, 1);
  const int64_t rows = p.batch * ceil_div(p.dim, channels);
  const int64_t all = ceil_div(ceil_div(p.seqlen, kAnyRun), kThreads / channels);
  // As many runs per thread, up to 4, as leave a large GPU its blocks.
  const int runs = static_cast<int>(std::clamp<int64_t>(rows * all / kManyBlocks, 1, 4));
  const int64_t blocks = ceil_div(all, runs);
  return launch(forward_any_rows<T>, rows * blocks * kThreads, stream, p, channels, blocks, runs);
}

template <bool OPTIONS, typename T>
cudaError_t launch_any(const ForwardParams& params, const ForwardArgs<T>& p, const AnyOptions& o,
                       cudaStream_t stream) {
  const Steps steps = is_channel_last(params.x) ? Steps::kAlongChannels : Steps::kAlongTime;
  return launch(forward_any_width<OPTIONS, T>, p.batch * p.dim * p.seqlen, stream, p, o, steps);
}

template <bool OPTIONS, typename T>
cudaError_t launch_final_states(const ForwardArgs<T>& p, const AnyOptions& o, int64_t rows,
                                bool ends, cudaStream_t stream) {
  // After what reads initial_states, since the final ones may be written there.
  const int64_t row = ends ? ceil_div(p.dim, kThreads) * kThreads : p.dim;
  return launch_pdl(write_final_states<OPTIONS, T>, rows * row, stream, p, o);
}

template <typename T>
cudaError_t run(const ForwardParams& params, cudaStream_t stream) {
  const Options options{};
  const ForwardArgs<T> p(params, options);
  cudaError_t e = cudaSuccess;
  if (has_elements(params.x) && !launch_fast(params, options, p, stream, &e)) {
    e = p.seq_idx.data == nullptr ? launch_rows(params, p, stream)
                                  : launch_any<false>(params, p, AnyOptions{}, stream);
  }
  if (e != cudaSuccess || !p.final_states.given()) return e;
  return launch_final_states<false>(p, AnyOptions{}, p.batch, p.seq_idx.data != nullptr, stream);
}

// Packed sequences whose states forward_edges takes, after the kernels of variants.cuh.
bool has_edges(const ForwardParams& p, const Options& o) {
  return given(o.cu_seqlens) && o.dilation == 1 && p.weight.sizes[1] <= edge_width(p.x.dtype) &&
         (has_elements(p.initial_states) || has_elements(p.final_states_out));
}

// The same by the kernels of variants.cuh, which know no dilation, and no states of packed
// sequences: for a dilation the phases are calls of their own, and steps that take states are
// computed again. With edges final_states is written too.
template <typename T>
bool launch_phases(const ForwardParams& params, const Options& options, const AnyOptions& o,
                   cudaStream_t stream, cudaError_t* e) {
  const Phases phases(params.x, options.dilation);
  if (phases.count == 0) return false;
  const bool has_states = o.bounds == nullptr && options.dilation == 1;
  for (int64_t i = 0; i < phases.count; ++i) {
    ForwardParams own = params;
    Options own_options = options;
    for (Tensor* t : {&own.x, &own.out, &own.seq_idx, &own_options.pre_gate, &own_options.post_gate,
                      &own_options.residual}) {
      *t = phases.of(*t, i);
    }
    if (!has_states) own.initial_states = Tensor{};
    const ForwardArgs<T> p(own, own_options);
    if (!launch_fast(own, own_options, p, stream, e)) return false;
    if (*e != cudaSuccess) return true;
  }
  const ForwardArgs<T> p(params, options);
  if (has_edges(params, options)) {
    *e = launch_edges(p, o, stream);
  } else if (!has_states && p.initial_states.given()) {
    *e = launch(forward_any_width<true, T>, o.rows * p.dim * (p.width - 1) * o.dilation, stream, p,
                o, Steps::kOfStates);
  }
  return true;
}

template <typename T>
cudaError_t run_with(ForwardParams params, const Options& options, const Packing& packing,
                     cudaStream_t stream) {
  const bool packed = given(options.cu_seqlens);
  const int64_t total = params.x.sizes[2];
  cudaError_t e = cudaSuccess;
  if (packed) {
    e = launch_packing(options.cu_seqlens, total, packing, stream);
    if (e != cudaSuccess) return e;
    params.seq_idx = packing.seq_idx(total);
  }
  AnyOptions o;
  o.dilation = options.dilation;
  o.bounds = packing.bounds;
  o.rows = packed ? options.cu_seqlens.sizes[0] - 1 : params.x.sizes[0];
  const ForwardArgs<T> p(params, options);
  if (has_elements(params.x)) {
    if (!launch_dilated(params, options, p, stream, &e) &&
        !launch_phases<T>(params, options, o, stream, &e)) {
      e = launch_any<true>(params, p, o, stream);
    } else if (has_edges(params, options)) {
      return e;
    }
  }
  if (e != cudaSuccess || !p.final_states.given()) return e;
  return launch_final_states<true>(p, o, o.rows, given(params.seq_idx) && !packed, stream);
}

bool is_plain(const Options& o) {
  return o.dilation == 1 && !given(o.cu_seqlens) && !given(o.pre_gate) && !given(o.post_gate) &&
         !given(o.residual);
}

Packing packing_of(const ForwardParams& params, const Options& options, void* workspace) {
  if (!given(options.cu_seqlens)) return Packing();
  const bool states = given(params.initial_states) || given(params.final_states_out);
  return Packing(options.cu_seqlens, params.x.sizes[2], states, workspace);
}

}  // namespace
}  // namespace causal_conv1d::gpu

causal_conv1d_status causal_conv1d_cuda_forward(const causal_conv1d_forward_params* params,
                                                int device, void* stream) {
  using namespace causal_conv1d;
  return gpu::run_operator("causal_conv1d_fn", params, device, [&](auto zero) {
    return gpu::run<decltype(zero)>(*params, static_cast<cudaStream_t>(stream));
  });
}

int64_t causal_conv1d_cuda_forward_with_workspace_size(const causal_conv1d_forward_params* params,
                                                       const causal_conv1d_options* options) {
  using namespace causal_conv1d;
  Options own;
  if (check(params, options, &own).code != CAUSAL_CONV1D_OK) return -1;
  return has_work(*params) ? gpu::packing_of(*params, own, nullptr).size : 0;
}

causal_conv1d_status causal_conv1d_cuda_forward_with(const causal_conv1d_forward_params* params,
                                                     const causal_conv1d_options* options,
                                                     int device, void* stream, void* workspace,
                                                     int64_t workspace_size) {
  using namespace causal_conv1d;
  Options own;
  const Status checked = check(params, options, &own);
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const char* const caller = "causal_conv1d_fn";
  return gpu::run_checked(caller, checked, params, device, [&](auto zero) {
    using T = decltype(zero);
    const gpu::Packing packing = gpu::packing_of(*params, own, workspace);
    return gpu::run_in_workspace(caller, packing.size, workspace, workspace_size, [&] {
      return gpu::is_plain(own) ? gpu::run<T>(*params, cuda_stream)
                                : gpu::run_with<T>(*params, own, packing, cuda_stream);
    });
  });
}
