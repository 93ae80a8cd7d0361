// Registers the schemas and the CPU kernels with the torch of this process.
#include "register.h"

#include "ops.h"

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

void forward(StableIValue* stack, uint64_t, uint64_t) {
  const Arguments a(kForward, stack);
  const ForwardParams p = a.forward_params();
  throw_if_failed(causal_conv1d_cpu_forward(&p, num_threads()));
}

void backward(StableIValue* stack, uint64_t, uint64_t) {
  const Arguments a(kBackward, stack);
  const BackwardParams p = a.backward_params();
  throw_if_failed(causal_conv1d_cpu_backward(&p, num_threads()));
}

void update(StableIValue* stack, uint64_t, uint64_t) {
  const Arguments a(kUpdate, stack);
  const UpdateParams p = a.update_params();
  throw_if_failed(causal_conv1d_cpu_update(&p, num_threads()));
}

void varlen_states(StableIValue* stack, uint64_t, uint64_t) {
  const Arguments a(kVarlenStates, stack);
  const VarlenStatesParams p = a.varlen_states_params();
  throw_if_failed(causal_conv1d_cpu_varlen_states(&p, num_threads()));
}

}  // namespace
}  // namespace causal_conv1d::torch_abi

causal_conv1d_status causal_conv1d_register_cpu(void) {
  using namespace causal_conv1d;
  try {
    torch_abi::define_schemas();
    torch_abi::register_kernels("CPU", {torch_abi::forward, torch_abi::backward, torch_abi::update,
                                        torch_abi::varlen_states});
    return ok();
  } catch (const std::exception& e) {
    return error(CAUSAL_CONV1D_RUNTIME_ERROR, "%s", e.what());
  }
}

const char* causal_conv1d_schemas(void) { return causal_conv1d::torch_abi::schemas(); }

causal_conv1d_status causal_conv1d_check_forward(const causal_conv1d_forward_params* params) {
  return causal_conv1d::check(params);
}

causal_conv1d_status causal_conv1d_check_backward(const causal_conv1d_backward_params* params) {
  return causal_conv1d::check(params);
}

causal_conv1d_status causal_conv1d_check_update(const causal_conv1d_update_params* params) {
  return causal_conv1d::check(params);
}

causal_conv1d_status causal_conv1d_check_varlen_states(
    const causal_conv1d_varlen_states_params* params) {
  return causal_conv1d::check(params);
}
