// Registers the schemas and the CPU kernels with the torch of this process.
#include "register.h"

#include "../layout.h"
#include "boxed.h"
#include "options_boxed.h"
#include "pool_boxed.h"
#include "scan_boxed.h"

namespace causal_conv1d::torch_abi {
namespace {

// torch's own setting, so that torch.set_num_threads holds here too.
int num_threads() {
  uint32_t n = 0;
  if (functions().torch_get_num_threads != nullptr) {
    if (functions().torch_get_num_threads(&n) == 0) return static_cast<int>(n);
  }
  // Before torch 2.10 only the C++ function at::get_num_threads() tells.
  static const auto get = reinterpret_cast<int (*)()>(find_symbol("_ZN2at15get_num_threadsEv"));
  return get != nullptr ? get() : 0;
}

struct Cpu {
  static bool replaced(const Signature&, Operation, StableIValue*) { return false; }
  static void run(const ForwardParams& p, int32_t) {
    throw_if_failed(causal_conv1d_cpu_forward(&p, num_threads()));
  }
  static void run(const BackwardParams& p, int32_t) {
    throw_if_failed(causal_conv1d_cpu_backward(&p, num_threads()));
  }
  static void run(const ForwardParams& p, const Options& options, int32_t) {
    throw_if_failed(causal_conv1d_cpu_forward_with(&p, &options, num_threads()));
  }
  static void run(const BackwardParams& p, const Options& options, const OptionGradients& gradients,
                  int32_t) {
    throw_if_failed(causal_conv1d_cpu_backward_with(&p, &options, &gradients, num_threads()));
  }
  static void run(const UpdateParams& p, int32_t) {
    throw_if_failed(causal_conv1d_cpu_update(&p, num_threads()));
  }
  static void run(const PoolParams& p, int32_t) {
    throw_if_failed(causal_conv1d_cpu_pool(&p, num_threads()));
  }
  static void run(const VarlenStatesParams& p, int32_t) {
    throw_if_failed(causal_conv1d_cpu_varlen_states(&p, num_threads()));
  }
  static void run(const ScanForwardParams& p, int32_t) {
    throw_if_failed(causal_conv1d_cpu_scan_forward(&p, num_threads()));
  }
  static void run(const ScanBackwardParams& p, int32_t) {
    throw_if_failed(causal_conv1d_cpu_scan_backward(&p, num_threads()));
  }
  static void run(const StateUpdateParams& p, int32_t) {
    throw_if_failed(causal_conv1d_cpu_state_update(&p, num_threads()));
  }
};

}  // namespace
}  // namespace causal_conv1d::torch_abi

causal_conv1d_status causal_conv1d_register_cpu(const char* name_space) {
  using namespace causal_conv1d;
  try {
    torch_abi::define_schemas(name_space);
    torch_abi::Boxed<torch_abi::Cpu>::register_all(name_space, "CPU");
    torch_abi::OptionsBoxed<torch_abi::Cpu>::register_all(name_space, "CPU");
    torch_abi::PoolBoxed<torch_abi::Cpu>::register_all(name_space, "CPU");
    torch_abi::ScanBoxed<torch_abi::Cpu>::register_all(name_space, "CPU");
    return ok();
  } catch (const std::exception& e) {
    return error(CAUSAL_CONV1D_RUNTIME_ERROR, "%s", e.what());
  }
}

int causal_conv1d_is_channel_last(int64_t dim, int64_t seqlen, int64_t dim_stride,
                                  int64_t time_stride) {
  return causal_conv1d::is_channel_last(dim, seqlen, dim_stride, time_stride);
}

const char* causal_conv1d_schemas(void) { return causal_conv1d::torch_abi::schemas(); }

causal_conv1d_status causal_conv1d_check_forward(const causal_conv1d_forward_params* params) {
  return causal_conv1d::check(params);
}

causal_conv1d_status causal_conv1d_check_backward(const causal_conv1d_backward_params* params) {
  return causal_conv1d::check(params);
}

causal_conv1d_status causal_conv1d_check_conv_forward(const causal_conv1d_forward_params* params,
                                                      const causal_conv1d_options* options) {
  causal_conv1d::Options own;
  return causal_conv1d::check(params, options, &own);
}

causal_conv1d_status causal_conv1d_check_conv_backward(
    const causal_conv1d_backward_params* params, const causal_conv1d_options* options,
    const causal_conv1d_option_gradients* gradients) {
  causal_conv1d::Options own;
  causal_conv1d::OptionGradients own_gradients;
  return causal_conv1d::check(params, options, gradients, &own, &own_gradients);
}

causal_conv1d_status causal_conv1d_check_update(const causal_conv1d_update_params* params) {
  return causal_conv1d::check(params);
}

causal_conv1d_status causal_conv1d_check_pool(const causal_conv1d_pool_params* params) {
  causal_conv1d::PoolParams full;
  const causal_conv1d_status status = causal_conv1d::read(params, &full);
  return status.code == CAUSAL_CONV1D_OK ? causal_conv1d::check(&full) : status;
}

causal_conv1d_status causal_conv1d_check_varlen_states(
    const causal_conv1d_varlen_states_params* params) {
  return causal_conv1d::check(params);
}

causal_conv1d_status causal_conv1d_check_varlen_sizes(
    const causal_conv1d_varlen_states_params* params, int64_t state_len) {
  return causal_conv1d::check_varlen_sizes(params->x, params->cu_seqlens, state_len);
}

causal_conv1d_status causal_conv1d_check_scan_forward(
    const causal_conv1d_scan_forward_params* params) {
  return causal_conv1d::check(params);
}

causal_conv1d_status causal_conv1d_check_scan_backward(
    const causal_conv1d_scan_backward_params* params) {
  return causal_conv1d::check(params);
}

causal_conv1d_status causal_conv1d_check_state_update(
    const causal_conv1d_state_update_params* params) {
  return causal_conv1d::check(params);
}
