// Compiles if every function that csrc/torch/stable_abi.h declares has the type that torch's own
// headers give it. Those come first: the handles declared there then are torch's types.
#define USE_CUDA 1  // declares aoti_torch_get_current_cuda_stream
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include <type_traits>

#include "torch/stable_abi.h"

namespace causal_conv1d::torch_abi {

static_assert(std::is_same_v<StableIValue, ::StableIValue>);

#define COMPARE(result, name, parameters)                                     \
  static_assert(std::is_same_v<decltype(&::name), decltype(Functions::name)>, \
                #name " is declared otherwise in torch's headers");
CAUSAL_CONV1D_TORCH_FUNCTIONS(COMPARE)
#if defined(TORCH_VERSION_2_10_0) && TORCH_FEATURE_VERSION >= TORCH_VERSION_2_10_0
CAUSAL_CONV1D_TORCH_OPTIONAL_FUNCTIONS(COMPARE)
#endif

}  // namespace causal_conv1d::torch_abi
