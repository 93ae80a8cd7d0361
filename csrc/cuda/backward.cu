// Launches the backward's kernels.
#include <algorithm>

#include "backward_options.cuh"
#include "launch.cuh"
#include "packed.h"
#include "phases.h"
#include "reduce.cuh"
#include "variants.cuh"

namespace causal_conv1d::gpu {
namespace {

template <typename T>
cudaError_t launch_fast(const BackwardArgs<T>& p, const BackwardPlan& plan, cudaStream_t stream) {
  if constexpr (sizeof(T) <= 4) {
    return plan.channel_last ? launch_backward_channel_last<T>(p, plan, stream)
                             : launch_backward_channel_first<T>(p, plan, stream);
  }
  return cudaErrorInvalidValue;
}

template <typename T>
cudaError_t launch_reduce(const BackwardArgs<T>& p, cudaStream_t stream) {
  return launch_pdl(reduce_partials<T>, (p.width + 1) * p.dim * kLanes, stream, p);
}

template <typename T>
cudaError_t run(const BackwardParams& params, const BackwardPlan& plan, void* workspace,
                cudaStream_t stream) {
  const BackwardArgs<T> p(params, Options{}, OptionGradients{}, plan, workspace);
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
    } else {
      e = launch_fast(p, plan, stream);
    }
  }
  if (e == cudaSuccess && p.sums && !plan.whole) {  // no positions at all: the sums are zero
    e = launch_reduce(p, stream);
  }
  if (e == cudaSuccess && padded_ends) {
    const int slots = p.width - 1 < 8 ? p.width - 1 : 8;
    const int64_t row = ceil_div(p.dim, kThreads) * kThreads;
    e = launch_pdl(backward_padded_ends<T>, p.batch * row * slots, stream, p, slots);
  }
  return e;
}

// A backward with options, or one of its phases.
struct Call {
  BackwardParams params;
  Options options;
  OptionGradients gradients;

  bool packed() const { return given(options.cu_seqlens); }
  bool fused() const {
    return given(options.pre_gate) || given(options.post_gate) || gradients.residual_is_x != 0;
  }
  bool is_plain() const { return options.dilation == 1 && !packed() && !fused(); }
  // Whether the kernels of variants.cuh take initial_states, where they are given.
  bool takes_states() const {
    return (!packed() && options.dilation == 1) || !has_elements(params.initial_states);
  }
  Call phase(const Phases& phases, int64_t i) const {
    Call own = *this;
    for (Tensor* t : {&own.params.x, &own.params.dout, &own.params.seq_idx, &own.params.dx,
                      &own.options.pre_gate, &own.options.post_gate, &own.gradients.dpre_gate,
                      &own.gradients.dpost_gate}) {
      *t = phases.of(*t, i);
    }
    own.params.dfinal_states = Tensor{};  // added afterwards
    return own;
  }
  BackwardPlan plan(bool any) const { return BackwardPlan(params, options, gradients, any); }
};

// What a call with options has in its workspace: what is made of cu_seqlens, or the ends of rows;
// then the partial sums of its phases, or those of the kernels for any strides.
struct Room {
  Packing packing;
  int64_t* ends = nullptr;
  char* sums = nullptr;
  int64_t size = 0;

  // Sets the call's seq_idx to the packed sequences' ids.
  Room(Call* call, void* workspace) {
    const int64_t total = call->params.x.sizes[2];
    const BackwardParams& p = call->params;
    const bool states =
        given(p.initial_states) || given(p.dinitial_states) || given(p.dfinal_states);
    const bool padded = given(p.seq_idx) && given(p.dfinal_states);
    if (call->packed()) {
      packing = Packing(call->options.cu_seqlens, total, states, workspace);
      call->params.seq_idx = packing.seq_idx(total);
    }
    size = packing.size + (padded ? ceil_div(p.x.sizes[0], 2) * 16 : 0);
    if (workspace != nullptr) {
      char* const bytes = static_cast<char*>(workspace);
      if (padded) ends = reinterpret_cast<int64_t*>(bytes + packing.size);
      sums = bytes + size;
    }
    const Phases phases(p.x, call->options.dilation);
    int64_t needed = 0;
    for (int64_t i = 0; i < phases.count; ++i) {
      needed += call->phase(phases, i).plan(false).workspace;
    }
    size += std::max(needed, call->plan(true).workspace);
  }
};

template <typename T>
bool has_kernel(const BackwardArgs<T>& p, const BackwardPlan& plan, bool fused) {
  if constexpr (sizeof(T) <= 4) {
    const Case wanted{p.width, p.seq_idx.data != nullptr, plan.access, plan.vector, fused};
    const auto in = [&](auto table) {
      using Table = decltype(table);
      return plan.channel_last ? has_variant(typename Table::LastBackward{}, wanted)
                               : has_variant(typename Table::First{}, wanted);
    };
    return !plan.any_width && (p.width <= 4 ? in(Tables<T, 4>{}) : in(Tables<T, 8>{}));
  }
  return false;
}

// Whether the kernels of variants.cuh took the call, but for what concerns dfinal_states and
// dinitial_states.
template <typename T>
bool launch_phases(const Call& call, const Room& room, cudaStream_t stream, cudaError_t* e) {
  const Phases phases(call.params.x, call.options.dilation);
  if (phases.count == 0 || !call.takes_states()) return false;
  int64_t parts = 0, used = 0;
  bool whole = false;
  for (int64_t i = 0; i < phases.count; ++i) {
    const Call own = call.phase(phases, i);
    const BackwardPlan plan = own.plan(false);
    const BackwardArgs<T> p(own.params, own.options, own.gradients, plan, room.sums + used);
    if (!has_kernel(p, plan, call.fused())) return false;
    *e = launch_fast(p, plan, stream);
    if (*e != cudaSuccess) return true;
    parts += plan.parts;
    used += plan.partials;
    whole = plan.whole;
  }
  if (whole) return true;
  // The phases' partial sums lie one after the other.
  BackwardPlan plan = call.plan(false);
  plan.parts = parts;
  const BackwardArgs<T> p(call.params, call.options, call.gradients, plan, room.sums);
  if (p.sums) *e = launch_reduce(p, stream);
  return true;
}

template <typename T>
cudaError_t launch_tiles(const BackwardArgs<T>& p, const AnyOptions& o, const BackwardPlan& plan,
                         cudaStream_t stream) {
  const int64_t blocks = plan.parts * ceil_div(p.dim, plan.tile_channels);
  const cudaError_t e = launch(backward_any_tiles<T>, blocks * kThreads, stream, p, o,
                               static_cast<int>(plan.tile_channels));
  return e == cudaSuccess && p.sums ? launch_reduce(p, stream) : e;
}

template <typename T>
cudaError_t run_with(const Call& call, const Room& room, cudaStream_t stream) {
  const Tensor &x = call.params.x, &cu_seqlens = call.options.cu_seqlens;
  cudaError_t e = cudaSuccess;
  if (call.packed()) e = launch_packing(cu_seqlens, x.sizes[2], room.packing, stream);
  if (e == cudaSuccess && room.ends != nullptr)
    e = launch_ends(call.params.seq_idx, room.ends, stream);
  if (e != cudaSuccess) return e;
  AnyOptions o;
  o.dilation = call.options.dilation;
  o.bounds = room.packing.bounds;
  o.ends = room.ends;
  o.rows = call.packed() ? cu_seqlens.sizes[0] - 1 : x.sizes[0];
  const BackwardPlan plan = call.plan(true);
  const BackwardArgs<T> p(call.params, call.options, call.gradients, plan, room.sums);
  if (!has_elements(x)) {
    if (p.sums) e = launch_reduce(p, stream);  // which are zero
  } else if (!launch_phases<T>(call, room, stream, &e)) {
    e = launch_tiles(p, o, plan, stream);
  }
  if (e != cudaSuccess || !(p.dfinal_states.given() || p.dinitial_states.given())) return e;
  return launch(backward_states<T>, o.rows * p.dim * 2 * (p.width - 1) * o.dilation, stream, p, o);
}

}  // namespace
}  // namespace causal_conv1d::gpu

using namespace causal_conv1d;

int64_t causal_conv1d_cuda_backward_workspace_size(const causal_conv1d_backward_params* params) {
  if (check(params).code != CAUSAL_CONV1D_OK) return -1;
  return gpu::BackwardPlan(*params).workspace;
}

causal_conv1d_status causal_conv1d_cuda_backward(const causal_conv1d_backward_params* params,
                                                 int device, void* stream, void* workspace,
                                                 int64_t workspace_size) {
  return gpu::run_operator("causal_conv1d_bwd", params, device, [&](auto zero) {
    const gpu::BackwardPlan plan(*params);
    if (!gpu::has_room(plan.workspace, workspace, workspace_size)) return cudaErrorInvalidValue;
    return gpu::run<decltype(zero)>(*params, plan, workspace, static_cast<cudaStream_t>(stream));
  });
}

int64_t causal_conv1d_cuda_backward_with_workspace_size(
    const causal_conv1d_backward_params* params, const causal_conv1d_options* options,
    const causal_conv1d_option_gradients* gradients) {
  gpu::Call call;
  if (check(params, options, gradients, &call.options, &call.gradients).code != CAUSAL_CONV1D_OK) {
    return -1;
  }
  if (!has_work(*params)) return 0;
  call.params = *params;
  return call.is_plain() ? gpu::BackwardPlan(*params).workspace : gpu::Room(&call, nullptr).size;
}

causal_conv1d_status causal_conv1d_cuda_backward_with(
    const causal_conv1d_backward_params* params, const causal_conv1d_options* options,
    const causal_conv1d_option_gradients* gradients, int device, void* stream, void* workspace,
    int64_t workspace_size) {
  gpu::Call call;
  const Status checked = check(params, options, gradients, &call.options, &call.gradients);
  return gpu::run_checked("causal_conv1d_bwd", checked, params, device, [&](auto zero) {
    using T = decltype(zero);
    const auto cuda_stream = static_cast<cudaStream_t>(stream);
    call.params = *params;
    if (call.is_plain()) {
      const gpu::BackwardPlan plan(*params);
      if (!gpu::has_room(plan.workspace, workspace, workspace_size)) return cudaErrorInvalidValue;
      return gpu::run<T>(*params, plan, workspace, cuda_stream);
    }
    const gpu::Room room(&call, workspace);
    if (!gpu::has_room(room.size, workspace, workspace_size)) return cudaErrorInvalidValue;
    return gpu::run_with<T>(call, room, cuda_stream);
  });
}
