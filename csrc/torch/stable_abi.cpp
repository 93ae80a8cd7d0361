#include "stable_abi.h"

#include <dlfcn.h>
#include <link.h>

#include <cstring>
#include <stdexcept>
#include <vector>

namespace causal_conv1d::torch_abi {
namespace {

int collect_torch_library(dl_phdr_info* info, size_t, void* data) {
  const char* path = info->dlpi_name;
  const char* slash = std::strrchr(path, '/');
  const char* file = slash ? slash + 1 : path;
  if (std::strncmp(file, "libtorch", 8) == 0 || std::strncmp(file, "_C.", 3) == 0) {
    static_cast<std::vector<std::string>*>(data)->emplace_back(path);
  }
  return 0;
}

Functions resolve() {
  Functions f;
#define CAUSAL_CONV1D_FIND(type, name, parameters) \
  f.name = reinterpret_cast<decltype(f.name)>(find_symbol(#name));
#define CAUSAL_CONV1D_REQUIRE(type, name, parameters) \
  CAUSAL_CONV1D_FIND(type, name, parameters)          \
  if (f.name == nullptr) throw std::runtime_error("the loaded torch lacks " #name);
  CAUSAL_CONV1D_TORCH_FUNCTIONS(CAUSAL_CONV1D_REQUIRE)
  CAUSAL_CONV1D_TORCH_OPTIONAL_FUNCTIONS(CAUSAL_CONV1D_FIND)
#undef CAUSAL_CONV1D_FIND
#undef CAUSAL_CONV1D_REQUIRE
  for (const char* name : {"_ZN5torch8autograd4impl12bump_versionERKN2at6TensorE",
                           "_ZN5torch8autograd4impl12bump_versionERKN2at10TensorBaseE"}) {
    if (f.bump_version != nullptr) break;
    f.bump_version = reinterpret_cast<decltype(f.bump_version)>(find_symbol(name));
  }
  if (f.bump_version == nullptr) throw std::runtime_error("the loaded torch lacks bump_version");
  f.cpu = f.aoti_torch_device_type_cpu();
  f.cuda = f.aoti_torch_device_type_cuda();
  f.float32 = f.aoti_torch_dtype_float32();
  f.float16 = f.aoti_torch_dtype_float16();
  f.bfloat16 = f.aoti_torch_dtype_bfloat16();
  f.float64 = f.aoti_torch_dtype_float64();
  f.int32 = f.aoti_torch_dtype_int32();
  f.int64 = f.aoti_torch_dtype_int64();
  f.uint8 = f.aoti_torch_dtype_uint8();
  return f;
}

}  // namespace

// torch loads its libraries with RTLD_LOCAL, hence the search by name; RTLD_NOLOAD loads nothing.
void* find_symbol(const char* name) {
  static const std::vector<void*> libraries = [] {
    std::vector<std::string> paths;
    dl_iterate_phdr(&collect_torch_library, &paths);
    std::vector<void*> handles;
    for (const std::string& path : paths) {
      if (void* handle = dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD)) handles.push_back(handle);
    }
    return handles;
  }();
  for (void* library : libraries) {
    if (void* symbol = dlsym(library, name)) return symbol;
  }
  return dlsym(RTLD_DEFAULT, name);
}

const Functions& functions() {
  static const Functions f = resolve();
  return f;
}

}  // namespace causal_conv1d::torch_abi
