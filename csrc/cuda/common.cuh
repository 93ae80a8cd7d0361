// What all kernels share: element types and their conversion, SiLU, vector access, launching.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "../check.h"

namespace causal_conv1d::gpu {

// Sums are fp32, fp64 for fp64 tensors.
template <typename T>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};
template <typename T>
using Compute = typename ComputeType<T>::type;

__device__ __forceinline__ float to_compute(float v) { return v; }
__device__ __forceinline__ double to_compute(double v) { return v; }
__device__ __forceinline__ float to_compute(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_compute(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename T>
__device__ __forceinline__ T from_compute(Compute<T> v);
template <>
__device__ __forceinline__ float from_compute<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ double from_compute<double>(double v) {
  return v;
}
template <>
__device__ __forceinline__ __half from_compute<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_compute<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

// N elements that travel together, a multiple of 4 bytes in accesses of up to 16, or one of 2
// bytes.
// They are kept as 32-bit words, and loaded and stored by assembly: other forms the compiler
// splits, or takes for accesses to any memory.
template <typename T, int N>
struct Pack {
  static constexpr int kBytes = static_cast<int>(sizeof(T)) * N;
  static constexpr int kWords = (kBytes + 3) / 4;
  // The largest power of two up to 16 that divides kBytes; where a Pack lies is a multiple of it.
  static constexpr int kAlignment = kBytes % 16 == 0 ? 16 : kBytes & -kBytes;
  uint32_t w[kWords] = {};

  __device__ __forceinline__ float get(int i) const {
    if constexpr (sizeof(T) == 4) return __uint_as_float(w[i]);
    const uint32_t word = w[i / 2];
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      return __uint_as_float(i % 2 == 0 ? word << 16 : word & 0xffff0000u);
    } else {
      const uint32_t bits = i % 2 == 0 ? word : word >> 16;
      return __half2float(__ushort_as_half(static_cast<uint16_t>(bits)));
    }
  }

  __device__ __forceinline__ T element(int i) const {
    T r;
    const uint32_t bits = sizeof(T) == 2 ? w[i / 2] >> (i % 2 * 16) : w[i];
    __builtin_memcpy(&r, &bits, sizeof r);
    return r;
  }

  __device__ __forceinline__ void set_element(int i, T v) {  // of zeros
    uint32_t bits = 0;
    __builtin_memcpy(&bits, &v, sizeof v);
    if constexpr (sizeof(T) == 2) {
      w[i / 2] |= bits << (i % 2 * 16);
    } else {
      w[i] = bits;
    }
  }

  // Its i-th part of M elements, which are whole words.
  template <int M>
  __device__ __forceinline__ Pack<T, M> part(int i) const {
    Pack<T, M> p;
#pragma unroll
    for (int j = 0; j < Pack<T, M>::kWords; ++j) p.w[j] = w[i * Pack<T, M>::kWords + j];
    return p;
  }
  template <int M>
  __device__ __forceinline__ void set_part(int i, const Pack<T, M>& p) {
#pragma unroll
    for (int j = 0; j < Pack<T, M>::kWords; ++j) w[i * Pack<T, M>::kWords + j] = p.w[j];
  }

  // From global memory.
  static __device__ __forceinline__ Pack load(const void* from) {
    Pack p;
    if constexpr (kBytes % 16 == 0) {
#pragma unroll
      for (int i = 0; i < kBytes / 16; ++i) {
        asm volatile("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(p.w[4 * i]), "=r"(p.w[4 * i + 1]), "=r"(p.w[4 * i + 2]),
                       "=r"(p.w[4 * i + 3])
                     : "l"(static_cast<const uint4*>(from) + i)
                     : "memory");
      }
    } else if constexpr (kBytes % 8 == 0) {
#pragma unroll
      for (int i = 0; i < kBytes / 8; ++i) {
        asm volatile("ld.global.v2.b32 {%0, %1}, [%2];"
                     : "=r"(p.w[2 * i]), "=r"(p.w[2 * i + 1])
                     : "l"(static_cast<const uint2*>(from) + i)
                     : "memory");
      }
    } else if constexpr (kBytes == 4) {
      p.w[0] = *static_cast<const uint32_t*>(from);
    } else {
      static_assert(N == 1, "no vector type of this size");
      p.set_element(0, *static_cast<const T*>(from));
    }
    return p;
  }

  __device__ __forceinline__ void store(void* to) const {
    if constexpr (kBytes % 16 == 0) {
#pragma unroll
      for (int i = 0; i < kBytes / 16; ++i) {
        asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(static_cast<uint4*>(to) + i),
                     "r"(w[4 * i]), "r"(w[4 * i + 1]), "r"(w[4 * i + 2]), "r"(w[4 * i + 3])
                     : "memory");
      }
    } else if constexpr (kBytes % 8 == 0) {
#pragma unroll
      for (int i = 0; i < kBytes / 8; ++i) {
        asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(static_cast<uint2*>(to) + i),
                     "r"(w[2 * i]), "r"(w[2 * i + 1])
                     : "memory");
      }
    } else if constexpr (kBytes == 4) {
      *static_cast<uint32_t*>(to) = w[0];
    } else {
      *static_cast<T*>(to) = element(0);
    }
  }

  // The same if condition, where it matters without a branch.
  __device__ __forceinline__ void store_if(bool condition, void* to) const {
    if constexpr (kBytes == 8) {
      asm volatile(
          "{ .reg .pred p; setp.ne.b32 p, %3, 0; @p st.global.v2.b32 [%0], {%1, %2}; }" ::"l"(to),
          "r"(w[0]), "r"(w[1]), "r"(int(condition))
          : "memory");
    } else if (condition) {
      store(to);
    }
  }
};

// N sums rounded to T, in pairs where there is an instruction for it.
template <typename T, int N>
__device__ __forceinline__ Pack<T, N> pack(const float (&values)[N]) {
  Pack<T, N> p;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if constexpr (sizeof(T) == 4) {
      p.w[i] = __float_as_uint(values[i]);
    } else if constexpr (N == 1) {
      p.set_element(0, from_compute<T>(values[0]));
    } else if (i % 2 == 0) {
      if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        const __nv_bfloat162 two = __floats2bfloat162_rn(values[i], values[i + 1]);
        __builtin_memcpy(&p.w[i / 2], &two, 4);
      } else {
        const __half2 two = __floats2half2_rn(values[i], values[i + 1]);
        __builtin_memcpy(&p.w[i / 2], &two, 4);
      }
    }
  }
  return p;
}

// Loads N words, 2 or 4, from global memory into w, if condition, without a branch.
template <int N>
__device__ __forceinline__ void load_words_if(bool condition, const void* from, uint32_t* w) {
  static_assert(N == 2 || N == 4, "a vector type");
  if constexpr (N == 4) {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %5, 0; @p ld.global.v4.b32 {%0, %1, %2, %3}, [%4]; }"
        : "+r"(w[0]), "+r"(w[1]), "+r"(w[2]), "+r"(w[3])
        : "l"(from), "r"(int(condition))
        : "memory");
  } else {
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %3, 0; @p ld.global.v2.b32 {%0, %1}, [%2]; }"
                 : "+r"(w[0]), "+r"(w[1])
                 : "l"(from), "r"(int(condition))
                 : "memory");
  }
}

// A pointer with element strides over (batch, dim, time).
template <typename T>
struct View {
  T* data;
  int64_t batch, dim, time;

  __device__ __forceinline__ T* at(int64_t b, int64_t d, int64_t t) const {
    return data + b * batch + d * dim + t * time;
  }
};

// A small tensor of any float type (weight, bias, states), converted to F (float, or double if the
// tensor is fp64) as it is read and written.
template <typename F>
struct AnyView {
  void* data;
  int32_t dtype;
  int64_t strides[3];

  __host__ __device__ __forceinline__ bool given() const { return data != nullptr; }

  // An element's bits, if it has up to 32, and their value.
  __device__ __forceinline__ uint32_t bits(int64_t i, int64_t j = 0, int64_t k = 0) const {
    const int64_t o = i * strides[0] + j * strides[1] + k * strides[2];
    return dtype == CAUSAL_CONV1D_FLOAT32 ? static_cast<const uint32_t*>(data)[o]
                                          : static_cast<const uint16_t*>(data)[o];
  }
  // Selects instead of branches: kernels load many of these in unrolled code.
  static __device__ __forceinline__ float convert(uint32_t bits, int32_t dtype) {
    const float half = __half2float(__ushort_as_half(static_cast<uint16_t>(bits)));
    const float other = __uint_as_float(dtype == CAUSAL_CONV1D_BFLOAT16 ? bits << 16 : bits);
    return dtype == CAUSAL_CONV1D_FLOAT16 ? half : other;
  }

  __device__ __forceinline__ F load(int64_t i, int64_t j = 0, int64_t k = 0) const {
    if constexpr (sizeof(F) == 8) {
      return static_cast<const double*>(data)[i * strides[0] + j * strides[1] + k * strides[2]];
    } else {
      return convert(bits(i, j, k), dtype);
    }
  }

  __device__ __forceinline__ void store(F v, int64_t i, int64_t j = 0, int64_t k = 0) const {
    const int64_t o = i * strides[0] + j * strides[1] + k * strides[2];
    if constexpr (sizeof(F) == 8) {
      static_cast<double*>(data)[o] = v;
    } else if (dtype == CAUSAL_CONV1D_FLOAT32) {
      static_cast<float*>(data)[o] = v;
    } else if (dtype == CAUSAL_CONV1D_BFLOAT16) {
      static_cast<__nv_bfloat16*>(data)[o] = from_compute<__nv_bfloat16>(v);
    } else {
      static_cast<__half*>(data)[o] = from_compute<__half>(v);
    }
  }
};

// Weights and bias of C adjacent channels from d on: the constructor starts to load them and get()
// converts, so that their latencies, and those of other loads in between, overlap.
template <int WMAX, int C>
class Parameters {
 public:
  template <typename Args>
  __device__ __forceinline__ Parameters(const Args& p, int64_t d)
      : width_(p.width), dtype_(p.weight.dtype), bias_dtype_(p.bias.dtype) {
    if (dtype_ == CAUSAL_CONV1D_FLOAT32) {
      load<uint32_t>(p.weight, d);
    } else {
      load<uint16_t>(p.weight, d);
    }
    if (!p.bias.given()) return;
#pragma unroll
    for (int c = 0; c < C; ++c) bias_[c] = p.bias.bits(d + c);
  }

  // Taps WMAX - W .. WMAX - 1 of w, and the bias or 0, times scale.
  __device__ __forceinline__ void get(float scale, float (&w)[WMAX][C], float (&bias)[C]) const {
    if (dtype_ == CAUSAL_CONV1D_FLOAT32) {
      convert<CAUSAL_CONV1D_FLOAT32>(scale, w);
    } else if (dtype_ == CAUSAL_CONV1D_BFLOAT16) {
      convert<CAUSAL_CONV1D_BFLOAT16>(scale, w);
    } else {
      convert<CAUSAL_CONV1D_FLOAT16>(scale, w);
    }
#pragma unroll
    for (int c = 0; c < C; ++c) bias[c] = AnyView<float>::convert(bias_[c], bias_dtype_) * scale;
  }

 private:
  template <typename Word>
  __device__ __forceinline__ void load(const AnyView<float>& weight, int64_t d) {
    const Word* p = static_cast<const Word*>(weight.data) + d * weight.strides[0];
    using Block = Pack<std::conditional_t<sizeof(Word) == 4, float, __half>, WMAX * C>;
    const bool dense = width_ == WMAX && weight.strides[1] == 1 && weight.strides[0] == WMAX;
    if (dense && reinterpret_cast<uintptr_t>(p) % Block::kAlignment == 0) {
      const Block block = Block::load(p);
#pragma unroll
      for (int i = 0; i < Block::kWords; ++i) w_[i] = block.w[i];
      return;
    }
    const int first = WMAX - width_;
#pragma unroll
    for (int c = 0; c < C; ++c) {
#pragma unroll
      for (int k = 0; k < WMAX; ++k) {
        if (k < first) continue;
        const uint32_t bits = p[c * weight.strides[0] + (k - first) * weight.strides[1]];
        const int i = c * WMAX + k;
        if constexpr (sizeof(Word) == 4) {
          w_[i] = bits;
        } else {
          w_[i / 2] |= bits << k % 2 * 16;
        }
      }
    }
  }

  template <int32_t DTYPE>
  __device__ __forceinline__ void convert(float scale, float (&w)[WMAX][C]) const {
#pragma unroll
    for (int c = 0; c < C; ++c) {
#pragma unroll
      for (int k = 0; k < WMAX; ++k) {
        const int i = c * WMAX + k;
        const uint32_t bits =
            DTYPE == CAUSAL_CONV1D_FLOAT32 ? w_[i] : w_[i / 2] >> k % 2 * 16 & 0xffff;
        w[k][c] = AnyView<float>::convert(bits, DTYPE) * scale;
      }
    }
  }

  uint32_t w_[WMAX * C] = {}, bias_[C] = {};  // 16-bit weights are two a word
  int width_;
  int32_t dtype_, bias_dtype_;
};

// x~ at the H steps before t, of C adjacent channels from d on, in the same way.
template <typename T, int H, int C>
class History {
 public:
  template <typename Args>
  __device__ __forceinline__ History(const Args& p, int64_t b, int64_t d, int64_t t) {
    const T* x = p.x.at(b, d, t - H);
#pragma unroll
    for (int j = 0; j < H; ++j) {
      if (t >= H) rows_[j] = Pack<T, C>::load(x);
      x += p.x.time;
    }
  }

  template <typename Args>
  __device__ __forceinline__ void get(const Args& p, int64_t b, int64_t d, int64_t t,
                                      float (&h)[H][C]) const {
#pragma unroll
    for (int j = 0; j < H; ++j) {
#pragma unroll
      for (int c = 0; c < C; ++c) {
        h[j][c] = rows_[j].get(c);
        if (t < H) h[j][c] = p.input(b, d + c, t - H + j);
      }
    }
  }

 private:
  Pack<T, C> rows_[H];
};

// SiLU and its derivative, one for each element type of x, so that every kernel rounds alike.
//
// 16-bit types: with h = z/2, silu(z) = h + h tanh(h) and 2 silu'(z) = (1 + tanh(h)) (1 + h (1 -
// tanh(h))), by the machine's tanh. PTX bounds its relative error by 2^-11, which is at most 2^-12
// |z| here, under the types' own roundings (2^-11 and 2^-8); on an H200 it is far smaller and adds
// 2e-6 to dweight in the 2-norm. So that h costs nothing, kernels multiply weight and bias by
// `scale` as they load them: what they compute is h, and what they call dz is twice that. A factor
// of two rounds nothing (but numbers below 2^-126).
//
// fp32 takes the accurate exponential, with a relative error near 2e-7, and scale = 1. A sigmoid
// below 2^-126, which z * sigmoid(z) may still lift above it, is kept: the reciprocal, which
// flushes such numbers to zero, is taken of a sixteenth.
template <typename T>
Compute<T> pre_activation_scale(bool silu) {
  return Compute<T>(silu && sizeof(T) == 2 ? 0.5 : 1.0);
}

__device__ __forceinline__ float tanh_approx(float h) {
  float t;
  asm("tanh.approx.f32 %0, %1;" : "=f"(t) : "f"(h));
  return t;
}

__device__ __forceinline__ float sigmoid(float z) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(fmaf(expf(-z), 0.0625f, 0.0625f)));
  return r * 0.0625f;
}
__device__ __forceinline__ double sigmoid(double z) { return 1.0 / (1.0 + exp(-z)); }

// Of scale * z.
template <typename T>
__device__ __forceinline__ Compute<T> silu(Compute<T> h) {
  if constexpr (sizeof(T) == 2) return fmaf(h, tanh_approx(h), h);
  return h * sigmoid(h);
}

// g * silu'(z) / scale, of scale * z. Factors are joined as fused multiply-adds round least.
template <typename T>
__device__ __forceinline__ Compute<T> silu_backward(Compute<T> h, Compute<T> g) {
  Compute<T> a, b;  // the derivative is (1 + b) * a / g
  if constexpr (sizeof(T) == 2) {
    const float t = tanh_approx(h);
    a = fmaf(g, t, g);
    b = fmaf(h, -t, h);
  } else {
    const Compute<T> s = sigmoid(h);
    a = g * s;
    b = fma(h, -s, h);
  }
  return fma(a, b, a);
}

// Splits n = outer * count + i into its parts; 32-bit where it can.
__device__ __forceinline__ int64_t split(int64_t n, int64_t count, int64_t* i) {
  if (n >= 0 && n <= 0xffffffffll && count <= 0xffffffffll) {
    const uint32_t q = static_cast<uint32_t>(n) / static_cast<uint32_t>(count);
    *i = static_cast<uint32_t>(n) - q * static_cast<uint32_t>(count);
    return q;
  }
  *i = n % count;
  return n / count;
}

// With CAUSAL_CONV1D_SMALL_PTX, kernels that do not suit all strides are empty in the PTX, which
// serves the GPUs that the build has no machine code for; there the host does not choose them.
#if defined(CAUSAL_CONV1D_SMALL_PTX) && defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 800
constexpr bool kSmallPtx = true;
#else
constexpr bool kSmallPtx = false;
#endif

// Whether every kernel is there on the current device.
inline bool has_every_kernel() {
#ifdef CAUSAL_CONV1D_SMALL_PTX
  int device = 0, major = 0, minor = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  return major == 8 && minor == 7;
#else
  return true;
#endif
}

// Makes device current for its lifetime.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : device_(device) {
    status_ = cudaGetDevice(&previous_);
    if (status_ == cudaSuccess && previous_ != device) status_ = cudaSetDevice(device);
  }
  ~DeviceGuard() {
    if (status_ == cudaSuccess && previous_ != device_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  cudaError_t status() const { return status_; }

 private:
  int device_, previous_ = 0;
  cudaError_t status_;
};

inline Status to_status(const char* caller, cudaError_t e) {
  if (e == cudaSuccess) return ok();
  cudaGetLastError();  // or whoever launches the next kernel would find this error again
  return error(CAUSAL_CONV1D_RUNTIME_ERROR, "%s: CUDA: %s (%s)", caller, cudaGetErrorString(e),
               cudaGetErrorName(e));
}

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename T>
View<T> view(const Tensor& t) {
  // The stride of a dimension of size 1 is arbitrary; kernels that take time for adjacent rely
  // on 1.
  const int64_t time = t.ndim < 3 ? 0 : (t.sizes[2] == 1 ? 1 : t.strides[2]);
  return {static_cast<T*>(t.data), t.strides[0], t.strides[1], time};
}

// One without elements counts as not given, so that what is given has a nearest one.
template <typename F>
AnyView<F> any_view(const Tensor& t) {
  AnyView<F> v{t.data, t.dtype, {0, 0, 0}};
  if (!given(t)) v.data = nullptr;
  for (int i = 0; i < t.ndim; ++i) {
    v.strides[i] = t.strides[i];
    if (t.sizes[i] == 0) v.data = nullptr;
  }
  return v;
}

// Elements from t's first to one past its last in memory.
inline int64_t extent(const Tensor& t) {
  if (!has_elements(t)) return 0;
  int64_t n = 1;
  for (int i = 0; i < t.ndim; ++i) n += (t.sizes[i] - 1) * t.strides[i];
  return n;
}

// The largest n <= max, a power of two, such that rows of n adjacent elements along dimension
// axis (1: dim, 2: time) are n * size bytes aligned wherever they start; 0 if axis has a stride.
inline int vector_width(const Tensor& t, int axis, int max, int size) {
  if (t.sizes[axis] > 1 && t.strides[axis] != 1) return 0;
  int n = max;
  auto aligned = [n_bytes = [&] { return static_cast<int64_t>(n) * size; }](int64_t bytes) {
    return bytes % n_bytes() == 0;
  };
  while (n > 1) {
    bool all = aligned(static_cast<int64_t>(reinterpret_cast<uintptr_t>(t.data)));
    for (int i = 0; i < 3; ++i) {
      if (i != axis && t.sizes[i] > 1) all = all && aligned(t.strides[i] * size);
    }
    if (all) break;
    n /= 2;
  }
  return n;
}

// Calls f with a value of x's element type.
template <typename F>
void dispatch_dtype(int32_t dtype, F&& f) {
  switch (dtype) {
    case CAUSAL_CONV1D_FLOAT16: f(__half{}); break;
    case CAUSAL_CONV1D_BFLOAT16: f(__nv_bfloat16{}); break;
    case CAUSAL_CONV1D_FLOAT32: f(float{}); break;
    default: f(double{});
  }
}

}  // namespace causal_conv1d::gpu
