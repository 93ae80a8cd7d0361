// Runs the CUDA operator of libcausal_conv1d_onnxruntime.so without ONNX Runtime, CUDA or a GPU,
// for tests/test_onnxruntime.py: this program is the ONNX Runtime, and built with -DCUDA_LIBRARY it
// is the CUDA library, which tells what it is given.
#include <onnxruntime_c_api.h>

#include "causal_conv1d.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#ifdef CUDA_LIBRARY

static void print(const char* name, const causal_conv1d_tensor& t) {
  std::printf("%s %p type %d:", name, t.data, t.dtype);
  for (int i = 0; i < t.ndim; ++i) {
    std::printf(" %d/%d", static_cast<int>(t.sizes[i]), static_cast<int>(t.strides[i]));
  }
  std::printf("\n");
}

causal_conv1d_status causal_conv1d_cuda_forward(const causal_conv1d_forward_params* p, int device,
                                                void* stream) {
  std::printf("device %d stream %p silu %d\n", device, stream, p->silu);
  print("x", p->x);
  print("weight", p->weight);
  print("bias", p->bias);
  print("initial_states", p->initial_states);
  print("out", p->out);
  print("final_states_out", p->final_states_out);
  causal_conv1d_status status{};
  if (device == 7) {
    status.code = CAUSAL_CONV1D_RUNTIME_ERROR;
    std::strcpy(status.message, "there is no device 7");
  }
  return status;
}

#else

namespace {

struct Value {
  std::vector<int64_t> shape;
  void* data;
};

void* at(intptr_t address) { return reinterpret_cast<void*>(address); }

// What ONNX Runtime's opaque pointers lead to here.
Value values[] = {{{2, 3, 5}, at(0x100)}, {{3, 1, 4}, at(0x200)}, {{3}, at(0x300)},
                  {{2, 3, 3}, at(0x400)}, {{}, at(0x500)},        {{}, at(0x600)}};
const OrtCustomOp* cuda_operator = nullptr;
int device = 0;

Value& value_of(const void* pointer) { return *static_cast<Value*>(const_cast<void*>(pointer)); }

OrtApi make_api() {
  OrtApi api{};
  api.CreateStatus = [](OrtErrorCode code, const char* text) noexcept {
    return reinterpret_cast<OrtStatus*>(new std::string(std::to_string(code) + ": " + text));
  };
  api.ReleaseStatus = [](OrtStatus* status) noexcept {
    delete reinterpret_cast<std::string*>(status);
  };
  api.CreateCustomOpDomain = [](const char*, OrtCustomOpDomain**) noexcept -> OrtStatus* {
    return nullptr;
  };
  api.AddCustomOpDomain = [](OrtSessionOptions*, OrtCustomOpDomain*) noexcept -> OrtStatus* {
    return nullptr;
  };
  api.CustomOpDomain_Add = [](OrtCustomOpDomain*, const OrtCustomOp* op) noexcept -> OrtStatus* {
    const char* provider = op->GetExecutionProviderType(op);
    if (provider != nullptr && std::strcmp(provider, "CUDAExecutionProvider") == 0 &&
        op->GetInputType(op, 0) == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16) {
      cuda_operator = op;
    }
    return nullptr;
  };
  api.KernelInfoGetAttribute_string = [](const OrtKernelInfo*, const char*, char* out,
                                         size_t* size) noexcept -> OrtStatus* {
    *size = 5;
    if (out != nullptr) std::strcpy(out, "silu");
    return nullptr;
  };
  api.KernelInfoGetAttribute_int64 = [](const OrtKernelInfo*, const char*, int64_t*) noexcept {
    return reinterpret_cast<OrtStatus*>(new std::string("no such attribute"));
  };
  api.KernelInfoGetAttribute_float = [](const OrtKernelInfo*, const char*, float*) noexcept {
    return reinterpret_cast<OrtStatus*>(new std::string("no such attribute"));
  };
  api.KernelContext_GetInputCount = [](const OrtKernelContext*, size_t* n) noexcept -> OrtStatus* {
    *n = 4;
    return nullptr;
  };
  api.KernelContext_GetOutputCount = [](const OrtKernelContext*, size_t* n) noexcept -> OrtStatus* {
    *n = 2;
    return nullptr;
  };
  api.KernelContext_GetInput = [](const OrtKernelContext*, size_t i,
                                  const OrtValue** value) noexcept -> OrtStatus* {
    *value = reinterpret_cast<const OrtValue*>(&values[i]);
    return nullptr;
  };
  api.KernelContext_GetOutput = [](OrtKernelContext*, size_t i, const int64_t* shape, size_t n,
                                   OrtValue** value) noexcept -> OrtStatus* {
    values[4 + i].shape.assign(shape, shape + n);
    *value = reinterpret_cast<OrtValue*>(&values[4 + i]);
    return nullptr;
  };
  api.GetTensorTypeAndShape = [](const OrtValue* value,
                                 OrtTensorTypeAndShapeInfo** info) noexcept -> OrtStatus* {
    *info = reinterpret_cast<OrtTensorTypeAndShapeInfo*>(const_cast<OrtValue*>(value));
    return nullptr;
  };
  api.ReleaseTensorTypeAndShapeInfo = [](OrtTensorTypeAndShapeInfo*) noexcept {};
  api.GetDimensionsCount = [](const OrtTensorTypeAndShapeInfo* info,
                              size_t* n) noexcept -> OrtStatus* {
    *n = value_of(info).shape.size();
    return nullptr;
  };
  api.GetDimensions = [](const OrtTensorTypeAndShapeInfo* info, int64_t* shape,
                         size_t) noexcept -> OrtStatus* {
    std::copy(value_of(info).shape.begin(), value_of(info).shape.end(), shape);
    return nullptr;
  };
  api.GetTensorMutableData = [](OrtValue* value, void** data) noexcept -> OrtStatus* {
    *data = value_of(value).data;
    return nullptr;
  };
  api.GetTensorMemoryInfo = [](const OrtValue* value,
                               const OrtMemoryInfo** memory) noexcept -> OrtStatus* {
    *memory = reinterpret_cast<const OrtMemoryInfo*>(value);
    return nullptr;
  };
  api.MemoryInfoGetId = [](const OrtMemoryInfo*, int* id) noexcept -> OrtStatus* {
    *id = device;
    return nullptr;
  };
  api.KernelContext_GetGPUComputeStream = [](const OrtKernelContext*,
                                             void** stream) noexcept -> OrtStatus* {
    *stream = at(0x700);
    return nullptr;
  };
  return api;
}

const OrtApi api = make_api();

int end_with(OrtStatus* status) {
  if (status == nullptr) return 0;
  std::printf("%s\n", reinterpret_cast<std::string*>(status)->c_str());
  return 1;
}

}  // namespace

// usage: PROGRAM LIBRARY DEVICE
int main(int, char** arguments) {
  device = std::stoi(arguments[2]);
  void* library = dlopen(arguments[1], RTLD_NOW);
  if (library == nullptr) return std::printf("%s\n", dlerror()), 2;
  const auto register_ops =
      reinterpret_cast<RegisterCustomOpsFn>(dlsym(library, "RegisterCustomOps"));
  OrtApiBase base{};
  base.GetApi = [](uint32_t) noexcept { return &api; };
  if (int failed = end_with(register_ops(nullptr, &base))) return failed;
  void* kernel;
  if (int failed = end_with(cuda_operator->CreateKernelV2(cuda_operator, &api, nullptr, &kernel)))
    return failed;
  OrtStatus* status = cuda_operator->KernelComputeV2(kernel, nullptr);
  cuda_operator->KernelDestroy(kernel);
  return end_with(status);
}

#endif
