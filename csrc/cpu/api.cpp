// The CPU half of the C API: what of the arguments only their values tell, and errors as statuses.
#include <exception>
#include <new>
#include <vector>

#include "../causal_conv1d.h"
#include "../check.h"
#include "dispatch.h"
#include "index_tensor.h"
#include "operations.h"

namespace causal_conv1d {
namespace {

Status check_ids(const char* op, const Tensor& seq_idx) {
  if (!given(seq_idx) || seq_idx.dtype != CAUSAL_CONV1D_INT64) return ok();
  for (int64_t b = 0; b < seq_idx.sizes[0]; ++b) {
    for (int64_t t = 0; t < seq_idx.sizes[1]; ++t) {
      const int64_t id = index_at(seq_idx, b, t);
      if (id == static_cast<int32_t>(id)) continue;
      return error(
          CAUSAL_CONV1D_INVALID_ARGUMENT, "%s: seq_idx must fit int32, got %lld at (%lld, %lld)",
          op, static_cast<long long>(id), static_cast<long long>(b), static_cast<long long>(t));
    }
  }
  return ok();
}

Status check_values(const UpdateParams& p) {
  if (!given(p.conv_state_indices)) return ok();
  const int64_t rows = p.conv_state.sizes[0];
  for (int64_t b = 0; b < p.conv_state_indices.sizes[0]; ++b) {
    const int64_t row = index_at(p.conv_state_indices, b);
    if (row >= rows) {
      return error(CAUSAL_CONV1D_INVALID_ARGUMENT,
                   "causal_conv1d_update: conv_state_indices must be < %lld, got %lld at %lld",
                   static_cast<long long>(rows), static_cast<long long>(row),
                   static_cast<long long>(b));
    }
  }
  return ok();
}

// Bounds of packed sequences.
Status check_bounds(const char* op, const char* name, const Tensor& bounds, int64_t total) {
  int64_t previous = 0;
  for (int64_t i = 0; i < bounds.sizes[0]; ++i) {
    const int64_t value = index_at(bounds, i);
    if (value < previous || value > total) {
      return error(CAUSAL_CONV1D_INVALID_ARGUMENT,
                   "%s: %s must not decrease and lie within 0..%lld (total_tokens), got %lld at "
                   "%lld",
                   op, name, static_cast<long long>(total), static_cast<long long>(value),
                   static_cast<long long>(i));
    }
    previous = value;
  }
  return ok();
}

Status check_values(const VarlenStatesParams& p) {
  return check_bounds("causal_conv1d_varlen_states", "cu_seqlens", p.cu_seqlens, p.x.sizes[0]);
}

// What run returns, or the error that it throws.
template <class Run>
Status without_exceptions(const char* name, Run run) noexcept {
  try {
    return run();
  } catch (const std::bad_alloc&) {
    return error(CAUSAL_CONV1D_RUNTIME_ERROR, "%s: out of memory", name);
  } catch (const std::exception& e) {
    return error(CAUSAL_CONV1D_RUNTIME_ERROR, "%s: %s", name, e.what());
  } catch (...) {
    return error(CAUSAL_CONV1D_RUNTIME_ERROR, "%s: unknown error", name);
  }
}

template <class Params, class Run>
Status checked(const char* name, const Params* params, int num_threads, Run run) noexcept {
  return without_exceptions(name, [&]() -> Status {
    Status status = check(params);
    if (status.code != CAUSAL_CONV1D_OK || !has_work(*params)) return status;
    if (active_kernels == nullptr) return no_kernels(name);
    status = check_values(*params);
    if (status.code == CAUSAL_CONV1D_OK) run(*params, num_threads);
    return status;
  });
}

// The sequences of a problem, the bounds of which go to memory.
Status read_sequences(const char* op, const Tensor& seq_idx, const Options& options, int64_t total,
                      Sequences* sequences, std::vector<int64_t>* bounds) {
  *sequences = {options.dilation, nullptr, 0, nullptr};
  if (!given(options.cu_seqlens)) return check_ids(op, seq_idx);
  const Status status = check_bounds(op, "cu_seqlens", options.cu_seqlens, total);
  if (status.code != CAUSAL_CONV1D_OK) return status;
  const int64_t size = options.cu_seqlens.sizes[0];
  for (int64_t i = 0; i < size; ++i) bounds->push_back(index_at(options.cu_seqlens, i));
  sequences->bounds = bounds->data();
  sequences->count = size - 1;
  return status;
}

Status forward(const ForwardParams* params, const Options* given_options, int num_threads) {
  Options options;
  Status status = check(params, given_options, &options);
  if (status.code != CAUSAL_CONV1D_OK || !has_work(*params)) return status;
  if (active_kernels == nullptr) return no_kernels("causal_conv1d_fwd");
  ForwardProblem p = {};
  static_cast<ForwardParams&>(p) = *params;
  p.pre_gate = options.pre_gate;
  p.post_gate = options.post_gate;
  p.residual = options.residual;
  std::vector<int64_t> bounds;
  status =
      read_sequences("causal_conv1d_fn", p.seq_idx, options, p.x.sizes[2], &p.sequences, &bounds);
  if (status.code == CAUSAL_CONV1D_OK) run_forward(p, num_threads);
  return status;
}

Status backward(const BackwardParams* params, const Options* given_options,
                const OptionGradients* given_gradients, int num_threads) {
  Options options;
  OptionGradients gradients;
  Status status = check(params, given_options, given_gradients, &options, &gradients);
  if (status.code != CAUSAL_CONV1D_OK || !has_work(*params)) return status;
  if (active_kernels == nullptr) return no_kernels("causal_conv1d_bwd");
  BackwardProblem p = {};
  static_cast<BackwardParams&>(p) = *params;
  p.pre_gate = options.pre_gate;
  p.post_gate = options.post_gate;
  p.dpre_gate = gradients.dpre_gate;
  p.dpost_gate = gradients.dpost_gate;
  p.residual_is_x = gradients.residual_is_x != 0;
  std::vector<int64_t> bounds;
  status =
      read_sequences("causal_conv1d_bwd", p.seq_idx, options, p.x.sizes[2], &p.sequences, &bounds);
  if (status.code == CAUSAL_CONV1D_OK) run_backward(p, num_threads);
  return status;
}

Status pool(const PoolParams* params, int num_threads) {
  PoolParams p;
  Status status = read(params, &p);
  if (status.code == CAUSAL_CONV1D_OK) status = check(&p);
  if (status.code != CAUSAL_CONV1D_OK || !has_work(p)) return status;
  if (active_kernels == nullptr) return no_kernels("causal_conv1d_pool");
  status = check_bounds("causal_conv1d_pool", "query_start_loc", p.query_start_loc, p.x.sizes[1]);
  return status.code == CAUSAL_CONV1D_OK ? run_pool(p, num_threads) : status;
}

}  // namespace
}  // namespace causal_conv1d

using namespace causal_conv1d;

causal_conv1d_status causal_conv1d_cpu_forward(const causal_conv1d_forward_params* params,
                                               int num_threads) {
  return causal_conv1d_cpu_forward_with(params, nullptr, num_threads);
}

causal_conv1d_status causal_conv1d_cpu_backward(const causal_conv1d_backward_params* params,
                                                int num_threads) {
  return causal_conv1d_cpu_backward_with(params, nullptr, nullptr, num_threads);
}

causal_conv1d_status causal_conv1d_cpu_forward_with(const causal_conv1d_forward_params* params,
                                                    const causal_conv1d_options* options,
                                                    int num_threads) {
  return without_exceptions("causal_conv1d_fwd",
                            [&] { return forward(params, options, num_threads); });
}

causal_conv1d_status causal_conv1d_cpu_backward_with(
    const causal_conv1d_backward_params* params, const causal_conv1d_options* options,
    const causal_conv1d_option_gradients* gradients, int num_threads) {
  return without_exceptions("causal_conv1d_bwd",
                            [&] { return backward(params, options, gradients, num_threads); });
}

causal_conv1d_status causal_conv1d_cpu_update(const causal_conv1d_update_params* params,
                                              int num_threads) {
  return checked("causal_conv1d_update", params, num_threads, run_update);
}

causal_conv1d_status causal_conv1d_cpu_pool(const causal_conv1d_pool_params* params,
                                            int num_threads) {
  return without_exceptions("causal_conv1d_pool", [&] { return pool(params, num_threads); });
}

causal_conv1d_status causal_conv1d_cpu_varlen_states(
    const causal_conv1d_varlen_states_params* params, int num_threads) {
  return checked("causal_conv1d_varlen_states", params, num_threads, run_varlen_states);
}

const char* causal_conv1d_cpu_isa(void) {
  return active_kernels == nullptr ? "none" : active_kernels->name;
}
