// Launches the backward's kernels.
#include "backward_any.cuh"
#include "launch.cuh"
#include "reduce.cuh"

namespace causal_conv1d::gpu {
namespace {

template <typename T>
cudaError_t run(const BackwardParams& params, const BackwardPlan& plan, void* workspace,
                cudaStream_t stream) {
  Options options{};
  options.dilation = 1;
  const BackwardArgs<T> p(params, options, OptionGradients{}, plan, workspace);
  cudaError_t e = cudaSuccess;
  const bool padded_ends = p.dfinal_states.given() && p.seq_idx.data != nullptr && p.seqlen > 0;
  if (p.dinitial_states.given() && !padded_ends) {
    e = launch(backward_initial_states<T>, p.batch * p.dim * (p.width - 1), stream, p);
  }
  if (e == cudaSuccess && has_elements(params.x)) {
    if (plan.any_width) {
      e = launch(backward_any_width<T>, p.batch * p.dim * p.seqlen, stream, p, plan.channel_last);
      if (e == cudaSuccess && p.partials != nullptr) {
        e = launch(backward_any_width_partials<T>, p.batch * p.chunks * p.dim * kThreads, stream,
                   p);
      }
    } else if constexpr (sizeof(T) <= 4) {
      e = plan.channel_last ? launch_backward_channel_last<T>(p, plan, stream)
                            : launch_backward_channel_first<T>(p, plan, stream);
    }
  }
  if (e == cudaSuccess && p.sums && !plan.whole) {  // no positions at all: the sums are zero
    e = launch_pdl(reduce_partials<T>, (p.width + 1) * p.dim * kLanes, stream, p);
  }
  if (e == cudaSuccess && padded_ends) {
    const int slots = p.width - 1 < 8 ? p.width - 1 : 8;
    const int64_t row = ceil_div(p.dim, kThreads) * kThreads;
    e = launch_pdl(backward_padded_ends<T>, p.batch * row * slots, stream, p, slots);
  }
  return e;
}

}  // namespace
}  // namespace causal_conv1d::gpu

int64_t causal_conv1d_cuda_backward_workspace_size(const causal_conv1d_backward_params* params) {
  using namespace causal_conv1d;
  if (check(params).code != CAUSAL_CONV1D_OK) return -1;
  return gpu::BackwardPlan(*params).workspace;
}

causal_conv1d_status causal_conv1d_cuda_backward(const causal_conv1d_backward_params* params,
                                                 int device, void* stream, void* workspace,
                                                 int64_t workspace_size) {
  using namespace causal_conv1d;
  return gpu::run_operator("causal_conv1d_bwd", params, device, [&](auto zero) {
    const gpu::BackwardPlan plan(*params);
    if (plan.workspace > workspace_size || (plan.workspace > 0 && workspace == nullptr)) {
      return cudaErrorInvalidValue;
    }
    return gpu::run<decltype(zero)>(*params, plan, workspace, static_cast<cudaStream_t>(stream));
  });
}
