// ONNX's CausalConvWithState (opset 27) as a custom operator of ONNX Runtime, on the CPU and CUDA.
//
// ONNX Runtime loads this library when a session's options name it, and calls RegisterCustomOps.
// Nothing of ONNX Runtime is linked: OrtApi is a table of its functions.
#include <dlfcn.h>
#include <onnxruntime_c_api.h>

#include <algorithm>
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "causal_conv1d.h"
#include "element_size.h"

namespace {

using causal_conv1d::element_size;

// Of ONNX Runtime 1.17, the first whose threads a custom operator can use; later ones have it too.
constexpr uint32_t kApiVersion = 17;
// A domain of our own, for models of any opset, and ONNX's.
constexpr const char* kDomains[] = {"causal_conv1d", ""};
constexpr char kName[] = "CausalConvWithState";

enum Input : size_t { kInput, kWeight, kBias, kPastState, kInputs };
enum Output : size_t { kOutput, kPresentState, kOutputs };

// ---------------------------------------------------------------------------------------- failures

struct Failure {
  OrtStatus* status;
};

// For calls of ONNX Runtime, which give null if they succeed.
void require(OrtStatus* status) {
  if (status != nullptr) throw Failure{status};
}

[[noreturn]] void refuse(const OrtApi& api, const std::string& problem) {
  throw Failure{
      api.CreateStatus(ORT_INVALID_ARGUMENT, (std::string(kName) + ": " + problem).c_str())};
}

void require(const OrtApi& api, const causal_conv1d_status& status) {
  if (status.code == CAUSAL_CONV1D_OK) return;
  if (status.code == CAUSAL_CONV1D_INVALID_ARGUMENT) refuse(api, status.message);
  throw Failure{api.CreateStatus(ORT_RUNTIME_EXCEPTION, status.message)};
}

// No exception passes ONNX Runtime.
template <class Body>
OrtStatus* status_of(const OrtApi& api, const Body& body) {
  try {
    body();
    return nullptr;
  } catch (const Failure& failure) {
    return failure.status;
  } catch (const std::exception& error) {
    return api.CreateStatus(ORT_FAIL, error.what());
  }
}

// ----------------------------------------------------------------------------------------- tensors

using Shape = std::vector<int64_t>;

std::string text(const Shape& shape) {
  std::string result = "(";
  for (size_t i = 0; i < shape.size(); ++i) {
    result += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  }
  return result + ")";
}

Shape shape_of(const OrtApi& api, const OrtValue* value) {
  OrtTensorTypeAndShapeInfo* info;
  require(api.GetTensorTypeAndShape(value, &info));
  const std::unique_ptr<OrtTensorTypeAndShapeInfo, decltype(api.ReleaseTensorTypeAndShapeInfo)>
      owner(info, api.ReleaseTensorTypeAndShapeInfo);
  size_t ndim;
  require(api.GetDimensionsCount(info, &ndim));
  Shape shape(ndim);
  require(api.GetDimensions(info, shape.data(), ndim));
  return shape;
}

causal_conv1d_dtype dtype_of(ONNXTensorElementDataType type) {
  switch (type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT: return CAUSAL_CONV1D_FLOAT32;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16: return CAUSAL_CONV1D_FLOAT16;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16: return CAUSAL_CONV1D_BFLOAT16;
    default: return CAUSAL_CONV1D_UNSUPPORTED_DTYPE;
  }
}

// A contiguous tensor of up to three dimensions.
causal_conv1d_tensor tensor(void* data, causal_conv1d_dtype dtype, const Shape& shape) {
  causal_conv1d_tensor result{};
  result.data = data;
  result.dtype = dtype;
  result.ndim = static_cast<int32_t>(shape.size());
  int64_t stride = 1;
  for (size_t i = shape.size(); i-- > 0;) {
    result.sizes[i] = shape[i];
    result.strides[i] = stride;
    stride *= std::max<int64_t>(shape[i], 1);
  }
  // Of single positions the channels are what is adjacent.
  if (result.ndim == 3 && shape[2] == 1) result.strides[2] = std::max<int64_t>(shape[1], 1);
  return result;
}

// ------------------------------------------------------------------------------------ the operator

// One for each element type and execution provider.
struct Operator : OrtCustomOp {
  const OrtApi* api;
  ONNXTensorElementDataType type;
  bool on_cuda;
};

using CudaForward = decltype(&causal_conv1d_cuda_forward);

// Of the library beside this one, which is not linked: this one serves machines without CUDA too.
CudaForward find_cuda_forward(const OrtApi& api) {
  void* library = dlopen(CAUSAL_CONV1D_CUDA_LIBRARY, RTLD_NOW);
  void* function = library ? dlsym(library, "causal_conv1d_cuda_forward") : nullptr;
  if (function == nullptr) {
    refuse(api, std::string("the CUDA library could not be loaded (") + dlerror() +
                    "): build causal_conv1d with CUDA, or use the CPUExecutionProvider alone");
  }
  return reinterpret_cast<CudaForward>(function);
}

class Kernel {
 public:
  Kernel(const Operator& op, const OrtKernelInfo* info)
      : api_(*op.api),
        dtype_(dtype_of(op.type)),
        cuda_forward_(op.on_cuda ? find_cuda_forward(*op.api) : nullptr) {
    if (is_number(info, "activation")) refuse(api_, "activation must be a string");
    const std::string activation = string_attribute(info, "activation", "none");
    silu_ = activation == "silu" || activation == "swish";
    if (!silu_ && activation != "none") {
      refuse(api_, "activation must be 'none', 'silu' or 'swish', got '" + activation + "'");
    }
    // com.microsoft's operator of this name has them.
    require_attribute(info, "ndim", 1);
    require_attribute(info, "state_window", 0);
  }

  OrtStatus* run(OrtKernelContext* context) const {
    return status_of(api_, [&] { compute(context); });
  }

 private:
  void compute(OrtKernelContext* context) const {
    const OrtValue* values[kInputs];
    for (size_t i = 0; i < kInputs; ++i) values[i] = input(context, i);
    const Shape x = shape_of(api_, values[kInput]);
    if (x.size() != 3) refuse(api_, "input must be (batch_size, channels, length), got " + text(x));
    const Shape weight = shape_of(api_, values[kWeight]);
    if (weight.size() != 3 || weight[0] != x[1] || weight[1] != 1 || weight[2] < 1) {
      refuse(api_, "weight must be (channels, 1, k) with channels = " + std::to_string(x[1]) +
                       " and k >= 1, got " + text(weight));
    }
    const Shape state{x[0], x[1], weight[2] - 1};

    causal_conv1d_forward_params params{};
    params.x = tensor(data(values[kInput]), dtype_, x);
    params.weight = tensor(data(values[kWeight]), dtype_, {weight[0], weight[2]});
    params.bias = optional(values[kBias], "bias", "(channels)", {x[1]});
    params.initial_states =
        optional(values[kPastState], "past_state", "(batch_size, channels, k - 1)", state);
    params.out = output(context, kOutput, x);
    params.final_states_out = output(context, kPresentState, state);
    params.silu = silu_;
    if (cuda_forward_ != nullptr) {
      run_on_cuda(context, values[kInput], params);
    } else {
      run_on_cpu(context, params);
    }
  }

  std::string string_attribute(const OrtKernelInfo* info, const char* name,
                               const char* absent) const {
    size_t size = 0;
    if (OrtStatus* status = api_.KernelInfoGetAttribute_string(info, name, nullptr, &size)) {
      api_.ReleaseStatus(status);
      return absent;
    }
    std::string value(size, '\0');
    require(api_.KernelInfoGetAttribute_string(info, name, value.data(), &size));
    return value.c_str();  // without the zero that ends it
  }

  // Whether an attribute is given as a number, which the function for strings takes for absent.
  bool is_number(const OrtKernelInfo* info, const char* name) const {
    int64_t integer;
    OrtStatus* status = api_.KernelInfoGetAttribute_int64(info, name, &integer);
    if (status == nullptr) return true;
    api_.ReleaseStatus(status);
    float real;
    status = api_.KernelInfoGetAttribute_float(info, name, &real);
    if (status == nullptr) return true;
    api_.ReleaseStatus(status);
    return false;
  }

  // Given or not, it must not be another than value.
  void require_attribute(const OrtKernelInfo* info, const char* name, int64_t value) const {
    int64_t given;
    if (OrtStatus* status = api_.KernelInfoGetAttribute_int64(info, name, &given)) {
      return api_.ReleaseStatus(status);
    }
    if (given != value) {
      refuse(api_, std::string(name) + " must be " + std::to_string(value) + ", got " +
                       std::to_string(given));
    }
  }

  // Null for one that is left out.
  const OrtValue* input(const OrtKernelContext* context, size_t index) const {
    size_t count;
    require(api_.KernelContext_GetInputCount(context, &count));
    const OrtValue* value = nullptr;
    if (index < count) require(api_.KernelContext_GetInput(context, index, &value));
    return value;
  }

  void* data(const OrtValue* value) const {
    void* result;
    require(api_.GetTensorMutableData(const_cast<OrtValue*>(value), &result));
    return result;
  }

  causal_conv1d_tensor optional(const OrtValue* value, const char* name, const char* form,
                                const Shape& wanted) const {
    if (value == nullptr) return {};
    const Shape shape = shape_of(api_, value);
    if (shape != wanted) {
      refuse(api_, std::string(name) + " must be " + form + " = " + text(wanted) + ", got " +
                       text(shape));
    }
    return tensor(data(value), dtype_, shape);
  }

  causal_conv1d_tensor output(OrtKernelContext* context, size_t index, const Shape& shape) const {
    size_t count;
    require(api_.KernelContext_GetOutputCount(context, &count));
    OrtValue* value = nullptr;
    if (index < count) {
      require(api_.KernelContext_GetOutput(context, index, shape.data(), shape.size(), &value));
    }
    return value == nullptr ? causal_conv1d_tensor{} : tensor(data(value), dtype_, shape);
  }

  void run_on_cpu(const OrtKernelContext* context, const causal_conv1d_forward_params&) const;
  void run_on_cuda(const OrtKernelContext* context, const OrtValue* x,
                   const causal_conv1d_forward_params&) const;

  const OrtApi& api_;
  const causal_conv1d_dtype dtype_;
  const CudaForward cuda_forward_;  // null on the CPU
  bool silu_;
};

// Few new positions after a state are faster as an update: up to 16 of them, the bits are the same.
constexpr int64_t kUpdate = 16;

bool is_update(const causal_conv1d_forward_params& p) {
  return p.x.sizes[2] <= kUpdate && p.initial_states.ndim != 0 && p.final_states_out.ndim != 0 &&
         p.weight.sizes[1] > 1;
}

causal_conv1d_status run_part(const causal_conv1d_forward_params& p) {
  if (!is_update(p)) return causal_conv1d_cpu_forward(&p, 1);
  const causal_conv1d_tensor &from = p.initial_states, &to = p.final_states_out;
  const int64_t size = element_size(to.dtype), bytes = to.strides[0] * size;
  for (int64_t b = 0; b < to.sizes[0]; ++b) {
    std::memcpy(static_cast<char*>(to.data) + b * bytes,
                static_cast<const char*>(from.data) + b * bytes,
                static_cast<size_t>(to.sizes[1] * to.sizes[2] * size));
  }
  causal_conv1d_update_params update{};
  update.x = p.x;
  update.conv_state = to;
  update.weight = p.weight;
  update.bias = p.bias;
  update.out = p.out;
  update.silu = p.silu;
  return causal_conv1d_cpu_update(&update, 1);
}

// Parts of a forward, each of some batch entries and channels, on ONNX Runtime's threads.
class Parts {
 public:
  explicit Parts(const causal_conv1d_forward_params& whole) : whole_(whole) {
    const int64_t *sizes = whole.x.sizes, elements = sizes[1] * std::max<int64_t>(sizes[2], 1);
    if (sizes[0] == 0 || elements == 0) return;
    batch_ = std::clamp<int64_t>(kElements / elements, 1, sizes[0]);
    const int64_t parts = std::max<int64_t>(elements / kElements, 1);
    channels_ = (sizes[1] + parts - 1) / parts;
    channels_ = std::min((channels_ + 63) / 64 * 64, sizes[1]);  // whole cache lines of a position
    channel_parts_ = (sizes[1] + channels_ - 1) / channels_;
    count_ = channel_parts_ * ((sizes[0] + batch_ - 1) / batch_);
  }

  int64_t count() const { return count_; }

  static void run(void* parts, size_t index) { static_cast<Parts*>(parts)->run(index); }

  // Of the first part that failed.
  const causal_conv1d_status& status() const { return status_; }

 private:
  // What takes some ten microseconds.
  static constexpr int64_t kElements = 32 * 1024;

  void run(size_t index) {
    const int64_t batch = static_cast<int64_t>(index) / channel_parts_ * batch_;
    const int64_t channel = static_cast<int64_t>(index) % channel_parts_ * channels_;
    causal_conv1d_forward_params part = whole_;
    for (causal_conv1d_tensor* t :
         {&part.x, &part.initial_states, &part.out, &part.final_states_out}) {
      narrow(*t, 0, batch, batch_);
      narrow(*t, 1, channel, channels_);
    }
    narrow(part.weight, 0, channel, channels_);
    narrow(part.bias, 0, channel, channels_);
    const causal_conv1d_status status = run_part(part);
    if (status.code == CAUSAL_CONV1D_OK) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    if (status_.code == CAUSAL_CONV1D_OK) status_ = status;
  }

  static void narrow(causal_conv1d_tensor& t, int dimension, int64_t start, int64_t count) {
    if (t.ndim == 0) return;
    t.data = static_cast<char*>(t.data) + start * t.strides[dimension] * element_size(t.dtype);
    t.sizes[dimension] = std::min(count, t.sizes[dimension] - start);
  }

  const causal_conv1d_forward_params& whole_;
  int64_t batch_ = 0, channels_ = 0, channel_parts_ = 0, count_ = 0;
  std::mutex mutex_;
  causal_conv1d_status status_{};
};

void Kernel::run_on_cpu(const OrtKernelContext* context,
                        const causal_conv1d_forward_params& params) const {
  Parts parts(params);
  if (parts.count() <= 1) return require(api_, run_part(params));
  const size_t count = static_cast<size_t>(parts.count());
  require(api_.KernelContext_ParallelFor(context, Parts::run, count, 0, &parts));
  require(api_, parts.status());
}

void Kernel::run_on_cuda(const OrtKernelContext* context, const OrtValue* x,
                         const causal_conv1d_forward_params& params) const {
  const OrtMemoryInfo* memory;
  int device;
  void* stream;
  require(api_.GetTensorMemoryInfo(x, &memory));
  require(api_.MemoryInfoGetId(memory, &device));
  require(api_.KernelContext_GetGPUComputeStream(context, &stream));
  require(api_, cuda_forward_(&params, device, stream));
}

// ------------------------------------------------------------------------ what ONNX Runtime is
// told

const Operator& self(const OrtCustomOp* op) { return *static_cast<const Operator*>(op); }

// output is like input. What follows present_state learns its shape when it runs.
OrtStatus* infer_shapes(const OrtCustomOp* op, OrtShapeInferContext* context) {
  const OrtApi& api = *self(op).api;
  return status_of(api, [&] {
    OrtTensorTypeAndShapeInfo* info;
    require(api.ShapeInferContext_GetInputTypeShape(context, kInput, &info));
    size_t ndim;
    require(api.GetDimensionsCount(info, &ndim));
    if (ndim == 0) return;  // not known
    require(api.ShapeInferContext_SetOutputTypeShape(context, kOutput, info));
  });
}

Operator make_operator(const OrtApi& api, ONNXTensorElementDataType type, bool on_cuda) {
  Operator op{};
  op.api = &api;
  op.type = type;
  op.on_cuda = on_cuda;
  op.version = kApiVersion;
  op.GetName = [](const OrtCustomOp*) { return kName; };
  op.GetExecutionProviderType = [](const OrtCustomOp* o) -> const char* {
    return self(o).on_cuda ? "CUDAExecutionProvider" : nullptr;
  };
  op.GetInputTypeCount = [](const OrtCustomOp*) -> size_t { return kInputs; };
  op.GetInputType = [](const OrtCustomOp* o, size_t) { return self(o).type; };
  op.GetInputCharacteristic = [](const OrtCustomOp*, size_t index) {
    return index < kBias ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
  };
  op.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return OrtMemTypeDefault; };
  op.GetOutputTypeCount = [](const OrtCustomOp*) -> size_t { return kOutputs; };
  op.GetOutputType = [](const OrtCustomOp* o, size_t) { return self(o).type; };
  op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t index) {
    return index == kOutput ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
  };
  op.GetStartVersion = [](const OrtCustomOp*) { return 1; };
  op.GetEndVersion = [](const OrtCustomOp*) { return INT32_MAX; };
  op.InferOutputShapeFn = infer_shapes;
  op.CreateKernelV2 = [](const OrtCustomOp* o, const OrtApi*, const OrtKernelInfo* info,
                         void** kernel) {
    return status_of(*self(o).api, [&] { *kernel = new Kernel(self(o), info); });
  };
  op.KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
    return static_cast<const Kernel*>(kernel)->run(context);
  };
  op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  return op;
}

// What is registered with one ONNX Runtime. Sessions refer to it for as long as they live, and
// nothing tells when the last has ended.
struct Registration {
  explicit Registration(const OrtApi& api) {
    for (const ONNXTensorElementDataType type :
         {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16,
          ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16}) {
      operators.push_back(std::make_unique<Operator>(make_operator(api, type, false)));
      operators.push_back(std::make_unique<Operator>(make_operator(api, type, true)));
    }
    for (const char* name : kDomains) {
      OrtCustomOpDomain* domain;
      require(api.CreateCustomOpDomain(name, &domain));
      domains.push_back(domain);
      for (const auto& op : operators) require(api.CustomOpDomain_Add(domain, op.get()));
    }
  }

  std::vector<OrtCustomOpDomain*> domains;
  std::vector<std::unique_ptr<Operator>> operators;
};

// Made once for each ONNX Runtime of the process, and never freed: 2 kB.
const Registration& registration_with(const OrtApi& api) {
  static std::mutex mutex;
  static auto* registrations = new std::map<const OrtApi*, Registration>;
  const std::lock_guard<std::mutex> lock(mutex);
  return registrations->try_emplace(&api, api).first->second;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(
    OrtSessionOptions* options, const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(kApiVersion);
  if (api == nullptr) {
    return base->GetApi(1)->CreateStatus(
        ORT_NOT_IMPLEMENTED, "causal_conv1d's operators need ONNX Runtime 1.17 or newer");
  }
  return status_of(*api, [&] {
    for (OrtCustomOpDomain* domain : registration_with(*api).domains) {
      require(api->AddCustomOpDomain(options, domain));
    }
  });
}
