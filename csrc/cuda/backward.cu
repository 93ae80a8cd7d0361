// Launches the backward's kernels.
#include <algorithm>

#include "backward_any_rows.cuh"
#include "backward_options.cuh"
#include "dilated_rows.h"
#include "launch.cuh"
#include "packed.h"
#include "phases.h"
#include "reduce.cuh"
#include "variants.cuh"

#ifndef CAUSAL_CONV1D_GENERAL
#include "backward_dilated.cuh"
#include "backward_edges.cuh"
#endif

namespace causal_conv1d::gpu {
namespace {

template <typename T>
cudaError_t launch_fast(const BackwardArgs<T>& p, const BackwardPlan& plan, cudaStream_t stream) {
  if constexpr (kHasVariants && sizeof(T) <= 4) {
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
cudaError_t launch_tiles(const BackwardArgs<T>& p, const AnyOptions& o, const BackwardPlan& plan,
                         cudaStream_t stream) {
  const int64_t blocks = plan.parts * ceil_div(p.dim, plan.tile_channels);
  return launch(backward_any_tiles<T>, blocks * kThreads, stream, p, o,
                static_cast<int>(plan.tile_channels));
}

// dx, and partial sums, without options.
template <typename T>
cudaError_t launch_any(const BackwardArgs<T>& p, const BackwardPlan& plan, cudaStream_t stream) {
  if (plan.any_rows == 0) {
    AnyOptions o;
    o.rows = p.batch;
    return launch_tiles(p, o, plan, stream);
  }
  const int64_t blocks = plan.parts * ceil_div(p.dim, plan.tile_channels);
  return launch_shared(backward_any_rows<T>, blocks * kThreads, plan.any_rows, stream, p,
                       static_cast<int>(plan.tile_channels));
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
      e = launch_any(p, plan, stream);
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
  // Packed sequences whose states backward_edges takes, after the kernels of variants.cuh.
  bool has_edges() const {
    return packed() && options.dilation == 1 &&
           params.weight.sizes[1] <= edge_width(params.x.dtype) &&
           (has_elements(params.initial_states) || has_elements(params.dinitial_states) ||
            has_elements(params.dfinal_states));
  }
  // Whether initial_states, where they are given, are no hindrance to the kernels of variants.cuh.
  bool takes_states() const {
    if (!has_elements(params.initial_states)) return true;
    return options.dilation == 1 && (!packed() || has_edges());
  }
  // Threads of a channel that backward_edges has: enough for a GPU, and few partial sums.
  int64_t edge_parts() const {
    const int64_t rows = options.cu_seqlens.sizes[0] - 1;
    return std::clamp<int64_t>(ceil_div(1 << 18, params.x.sizes[1]), 1, std::max<int64_t>(rows, 1));
  }
  // Partial sums that it adds.
  int64_t edge_sums() const {
    return has_edges() && has_elements(params.initial_states) ? edge_parts() : 0;
  }
  Call phase(const Phases& phases, int64_t i) const {
    Call own = *this;
    for (Tensor* t : {&own.params.x, &own.params.dout, &own.params.seq_idx, &own.params.dx,
                      &own.options.pre_gate, &own.options.post_gate, &own.gradients.dpre_gate,
                      &own.gradients.dpost_gate}) {
      *t = phases.of(*t, i);
    }
    own.params.dfinal_states = Tensor{};  // added afterwards
    if (packed()) own.params.initial_states = Tensor{};
    return own;
  }
  BackwardPlan plan(bool any, bool alone = true) const {
    return BackwardPlan(params, options, gradients, any, alone);
  }
  // For backward_dilated.
  DilatedRows dilated() const {
    const bool plain = !packed() && !fused() && !given(params.seq_idx);
    return DilatedRows(plain ? options.dilation : 1, params.x, params.weight.sizes[1],
                       params.initial_states, {&params.x, &params.dout, &params.dx});
  }
};

// What a call with options has in its workspace: what is made of cu_seqlens, or the ends of rows;
// then the partial sums of its phases and edges, one after the other, and the phases' matches; or
// the partial sums of the kernels for any strides.
struct Room {
  Packing packing;
  int64_t* ends = nullptr;
  char *sums = nullptr, *matches = nullptr;
  int64_t size = 0;
  bool alone = true;  // a single kernel has all of the sums

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
    alone = phases.count <= 1 && call->edge_sums() == 0;
    int64_t parts = call->edge_sums(), all_matches = 0;
    for (int64_t i = 0; i < phases.count; ++i) {
      const BackwardPlan plan = call->phase(phases, i).plan(false, alone);
      if (plan.partials > 0) parts += plan.parts;
      all_matches += ceil_div(plan.workspace - plan.partials, 16) * 16;
    }
    parts = std::max(parts, p.x.sizes[0] * call->dilated().chunks);
    const int64_t sum_bytes = ceil_div(parts * bytes_of_part(p), 16) * 16;
    if (workspace != nullptr) matches = sums + sum_bytes;
    size += std::max(sum_bytes + all_matches, call->plan(true).workspace);
  }

  static int64_t bytes_of_part(const BackwardParams& p) {
    return (p.weight.sizes[1] + 1) * p.x.sizes[1] * (p.x.dtype == CAUSAL_CONV1D_FLOAT64 ? 8 : 4);
  }
};

template <typename T>
bool has_kernel(const BackwardArgs<T>& p, const BackwardPlan& plan, bool fused) {
  if constexpr (sizeof(T) <= 4) {
    const Case wanted{p.width, p.seq_idx.data != nullptr, plan.access, plan.vector, fused};
    const auto in = [&](auto table) {
      using Table = decltype(table);
      return plan.channel_last ? has_variant(typename Table::LastBackward{}, wanted)
                               : has_variant(typename Table::FirstBackward{}, wanted);
    };
    return !plan.any_width && (p.width <= 4 ? in(Tables<T, 4>{}) : in(Tables<T, 8>{}));
  }
  return false;
}

#ifndef CAUSAL_CONV1D_GENERAL

// Whether backward_dilated took the call, but for what concerns dfinal_states and dinitial_states.
template <typename T>
bool launch_dilated(const Call& call, const Room& room, cudaStream_t stream, cudaError_t* e) {
  if constexpr (sizeof(T) <= 4) {
    const DilatedRows rows = call.dilated();
    if (rows.chunks == 0 || !has_every_kernel()) return false;
    BackwardPlan plan = call.plan(false, false);
    plan.parts = call.params.x.sizes[0] * rows.chunks;
    plan.chunks = rows.chunks;
    plan.whole = false;
    const BackwardArgs<T> p(call.params, call.options, call.gradients, plan, room.sums);
    auto kernel = backward_dilated<T, 4>;
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      if (p.width > 4) kernel = backward_dilated<T, 8>;
    }
    *e = launch_pdl(kernel, plan.parts * p.dim * kThreads, stream, p, rows);
    if (*e == cudaSuccess && p.sums) *e = launch_reduce(p, stream);
    return true;
  }
  return false;
}

template <typename T>
cudaError_t launch_edges(const BackwardArgs<T>& p, const AnyOptions& o, const Call& call,
                         int64_t sums_at, cudaStream_t stream) {
  if constexpr (sizeof(T) <= 4) {
    auto kernel = backward_edges<4, T>;
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      if (p.width > 4) kernel = backward_edges<8, T>;
    }
    const int64_t parts = call.edge_parts();
    return launch_pdl(kernel, kEdgePlaces * parts * edge_channels(p.dim), stream, p, o, parts,
                      sums_at);
  }
  return cudaErrorInvalidValue;
}

#else

template <typename T>
bool launch_dilated(const Call&, const Room&, cudaStream_t, cudaError_t*) {
  return false;
}

template <typename T>
cudaError_t launch_edges(const BackwardArgs<T>&, const AnyOptions&, const Call&, int64_t,
                         cudaStream_t) {
  return cudaErrorInvalidValue;  // not called, as has_kernel() comes first
}

#endif

// Whether the kernels of variants.cuh took the call, but for what concerns dfinal_states and
// dinitial_states unless it has edges.
template <typename T>
bool launch_phases(const Call& call, const Room& room, const AnyOptions& o, cudaStream_t stream,
                   cudaError_t* e) {
  const Phases phases(call.params.x, call.options.dilation);
  if (phases.count == 0 || !call.takes_states()) return false;
  int64_t parts = 0, matches = 0;
  bool whole = false;
  for (int64_t i = 0; i < phases.count; ++i) {
    const Call own = call.phase(phases, i);
    const BackwardPlan plan = own.plan(false, room.alone);
    char* const sums = room.sums + parts * Room::bytes_of_part(call.params);
    const BackwardArgs<T> p(own.params, own.options, own.gradients, plan, sums,
                            room.matches + matches);
    if (!has_kernel(p, plan, call.fused())) return false;
    *e = launch_fast(p, plan, stream);
    if (*e != cudaSuccess) return true;
    parts += plan.parts;
    matches += ceil_div(plan.workspace - plan.partials, 16) * 16;
    whole = plan.whole;
  }
  BackwardPlan plan = call.plan(false, room.alone);
  plan.parts = parts + call.edge_sums();
  const BackwardArgs<T> p(call.params, call.options, call.gradients, plan, room.sums);
  if (call.has_edges()) *e = launch_edges(p, o, call, parts, stream);
  if (*e == cudaSuccess && p.sums && !whole) *e = launch_reduce(p, stream);
  return true;
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
  } else if (!launch_dilated<T>(call, room, stream, &e) &&
             !launch_phases<T>(call, room, o, stream, &e)) {
    e = launch_tiles(p, o, plan, stream);
    if (e == cudaSuccess && p.sums) e = launch_reduce(p, stream);
  } else if (call.has_edges()) {
    return e;
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
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const char* const caller = "causal_conv1d_bwd";
  return gpu::run_operator(caller, params, device, [&](auto zero) {
    const gpu::BackwardPlan plan(*params);
    return gpu::run_in_workspace(caller, plan.workspace, workspace, workspace_size, [&] {
      return gpu::run<decltype(zero)>(*params, plan, workspace, cuda_stream);
    });
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
  if (checked.code == CAUSAL_CONV1D_OK && call.is_plain()) {
    return causal_conv1d_cuda_backward(params, device, stream, workspace, workspace_size);
  }
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const char* const caller = "causal_conv1d_bwd";
  return gpu::run_checked(caller, checked, params, device, [&](auto zero) {
    call.params = *params;
    const gpu::Room room(&call, workspace);
    return gpu::run_in_workspace(caller, room.size, workspace, workspace_size, [&] {
      return gpu::run_with<decltype(zero)>(call, room, cuda_stream);
    });
  });
}
