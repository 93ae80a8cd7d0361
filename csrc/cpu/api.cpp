// The CPU half of the C API: what of the arguments only their values tell, and errors as statuses.
#include <exception>
#include <new>

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

Status check_values(const ForwardParams& p) { return check_ids("causal_conv1d_fn", p.seq_idx); }
Status check_values(const BackwardParams& p) { return check_ids("causal_conv1d_bwd", p.seq_idx); }

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

Status check_values(const VarlenStatesParams& p) {
  int64_t previous = 0;
  for (int64_t i = 0; i < p.cu_seqlens.sizes[0]; ++i) {
    const int64_t value = index_at(p.cu_seqlens, i);
    if (value < previous || value > p.x.sizes[0]) {
      return error(CAUSAL_CONV1D_INVALID_ARGUMENT,
                   "causal_conv1d_varlen_states: cu_seqlens must not decrease and lie within "
                   "0..%lld (total_tokens), got %lld at %lld",
                   static_cast<long long>(p.x.sizes[0]), static_cast<long long>(value),
                   static_cast<long long>(i));
    }
    previous = value;
  }
  return ok();
}

template <class Params, class Run>
Status checked(const char* name, const Params* params, int num_threads, Run run) noexcept {
  try {
    Status status = check(params);
    if (status.code != CAUSAL_CONV1D_OK || !has_work(*params)) return status;
    if (active_kernels == nullptr) return no_kernels(name);
    status = check_values(*params);
    if (status.code == CAUSAL_CONV1D_OK) run(*params, num_threads);
    return status;
  } catch (const std::bad_alloc&) {
    return error(CAUSAL_CONV1D_RUNTIME_ERROR, "%s: out of memory", name);
  } catch (const std::exception& e) {
    return error(CAUSAL_CONV1D_RUNTIME_ERROR, "%s: %s", name, e.what());
  } catch (...) {
    return error(CAUSAL_CONV1D_RUNTIME_ERROR, "%s: unknown error", name);
  }
}

}  // namespace
}  // namespace causal_conv1d

using namespace causal_conv1d;

causal_conv1d_status causal_conv1d_cpu_forward(const causal_conv1d_forward_params* params,
                                               int num_threads) {
  return checked("causal_conv1d_fwd", params, num_threads, run_forward);
}

causal_conv1d_status causal_conv1d_cpu_backward(const causal_conv1d_backward_params* params,
                                                int num_threads) {
  return checked("causal_conv1d_bwd", params, num_threads, run_backward);
}

causal_conv1d_status causal_conv1d_cpu_update(const causal_conv1d_update_params* params,
                                              int num_threads) {
  return checked("causal_conv1d_update", params, num_threads, run_update);
}

causal_conv1d_status causal_conv1d_cpu_varlen_states(
    const causal_conv1d_varlen_states_params* params, int num_threads) {
  return checked("causal_conv1d_varlen_states", params, num_threads, run_varlen_states);
}

const char* causal_conv1d_cpu_isa(void) {
  return active_kernels == nullptr ? "none" : active_kernels->name;
}
