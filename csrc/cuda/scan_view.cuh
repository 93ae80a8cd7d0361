// Tensors of any float type and any strides, read and written in the type of the sums, and what the
// scan's kernels compute with them.
#pragma once

#include <cmath>

#include "../scan_check.h"
#include "ptx.cuh"
#include "views.cuh"

namespace causal_conv1d::gpu::scan {

// Time steps that a thread owns: 16 or 32 bytes of a tensor.
template <typename F>
constexpr int kItems = sizeof(F) == 8 ? 4 : 8;

// Strides are in bytes. Time is the last dimension; vectors tells that time steps are adjacent and
// any kItems of them from a multiple of kItems on are aligned for vector access.
struct View {
  char* data;
  int64_t strides[4];
  int64_t step;  // of the last dimension
  int32_t dtype;
  bool vectors;

  __host__ __device__ __forceinline__ bool given() const { return data != nullptr; }
  __device__ __forceinline__ int64_t offset(int64_t i, int64_t j = 0, int64_t k = 0) const {
    return i * strides[0] + j * strides[1] + k * strides[2];
  }
  __device__ __forceinline__ char* at(int64_t i, int64_t j = 0, int64_t k = 0) const {
    return data + offset(i, j, k);
  }
};

inline int64_t element_size(int32_t dtype) {
  return dtype == CAUSAL_CONV1D_FLOAT64 || dtype == CAUSAL_CONV1D_INT64   ? 8
         : dtype == CAUSAL_CONV1D_FLOAT32 || dtype == CAUSAL_CONV1D_INT32 ? 4
                                                                          : 2;
}

// One without elements counts as not given.
inline View view(const Tensor4& t) {
  View v{};
  if (!has_elements(t)) return v;
  const int64_t size = element_size(t.dtype);
  const int last = t.ndim - 1;
  v.data = static_cast<char*>(t.data);
  v.dtype = t.dtype;
  for (int i = 0; i < t.ndim; ++i) v.strides[i] = t.strides[i] * size;
  v.step = v.strides[last];
  v.vectors = t.sizes[last] > 1 && v.step == size && reinterpret_cast<uintptr_t>(v.data) % 16 == 0;
  for (int i = 0; i < last; ++i) {
    v.vectors = v.vectors && (t.sizes[i] == 1 || v.strides[i] % 16 == 0);
  }
  return v;
}

// The four bytes or fewer of an element as a float.
__device__ __forceinline__ float to_float(uint32_t bits, int32_t dtype) {
  return AnyView<float>::convert(bits, dtype);
}

template <typename F>
__device__ __forceinline__ F load_number(const void* from, int32_t dtype) {
  if constexpr (sizeof(F) == 8) return *static_cast<const double*>(from);
  const uint32_t bits = dtype == CAUSAL_CONV1D_FLOAT32 ? *static_cast<const uint32_t*>(from)
                                                       : *static_cast<const uint16_t*>(from);
  return to_float(bits, dtype);
}

template <typename F>
__device__ __forceinline__ F load_or(const View& v, F otherwise, int64_t i, int64_t j = 0,
                                     int64_t k = 0) {
  return v.given() ? load_number<F>(v.at(i, j, k), v.dtype) : otherwise;
}

__device__ __forceinline__ uint16_t to_half_word(float x, int32_t dtype) {
  return dtype == CAUSAL_CONV1D_BFLOAT16 ? __bfloat16_as_ushort(__float2bfloat16_rn(x))
                                         : __half_as_ushort(__float2half_rn(x));
}

template <typename F>
__device__ __forceinline__ void store(void* to, int32_t dtype, F x) {
  if constexpr (sizeof(F) == 8) {
    *static_cast<double*>(to) = x;
  } else if (dtype == CAUSAL_CONV1D_FLOAT32) {
    *static_cast<float*>(to) = x;
  } else {
    *static_cast<uint16_t*>(to) = to_half_word(x, dtype);
  }
}

// N numbers in accesses of 16 bytes, from or to shared or global memory.
template <typename F, int N>
__device__ __forceinline__ void load_vector(const F* from, F (&x)[N]) {
  if constexpr (sizeof(F) == 8) {
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      const double2 v = *reinterpret_cast<const double2*>(from + i);
      x[i] = v.x, x[i + 1] = v.y;
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      const float4 v = *reinterpret_cast<const float4*>(from + i);
      x[i] = v.x, x[i + 1] = v.y, x[i + 2] = v.z, x[i + 3] = v.w;
    }
  }
}
template <typename F, int N>
__device__ __forceinline__ void store_vector(F* to, const F (&x)[N]) {
  if constexpr (sizeof(F) == 8) {
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      *reinterpret_cast<double2*>(to + i) = make_double2(x[i], x[i + 1]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      *reinterpret_cast<float4*>(to + i) = make_float4(x[i], x[i + 1], x[i + 2], x[i + 3]);
    }
  }
}

// N elements of 16 bits, in words, in one access.
template <int N>
__device__ __forceinline__ void load_words(const char* from, uint32_t (&w)[N / 2]) {
  if constexpr (N == 8) {
    const uint4 q = *reinterpret_cast<const uint4*>(from);
    w[0] = q.x, w[1] = q.y, w[2] = q.z, w[3] = q.w;
  } else {
    static_assert(N == 4, "8 or 16 bytes");
    const uint2 q = *reinterpret_cast<const uint2*>(from);
    w[0] = q.x, w[1] = q.y;
  }
}
template <int N>
__device__ __forceinline__ void store_words(const uint32_t (&w)[N / 2], char* to) {
  if constexpr (N == 8) {
    *reinterpret_cast<uint4*>(to) = make_uint4(w[0], w[1], w[2], w[3]);
  } else {
    static_assert(N == 4, "8 or 16 bytes");
    *reinterpret_cast<uint2*>(to) = make_uint2(w[0], w[1]);
  }
}

template <int N>
__device__ __forceinline__ void unpack(const uint32_t (&w)[N / 2], bool bfloat16, float (&x)[N]) {
  if (bfloat16) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      x[i] = __uint_as_float(i % 2 == 0 ? w[i / 2] << 16 : w[i / 2] & 0xffff0000u);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      __half2 h;
      __builtin_memcpy(&h, &w[i / 2], 4);
      const float2 f = __half22float2(h);
      x[i] = f.x, x[i + 1] = f.y;
    }
  }
}
template <int N>
__device__ __forceinline__ void pack(const float (&x)[N], bool bfloat16, uint32_t (&w)[N / 2]) {
  if (bfloat16) {
#pragma unroll
    for (int i = 0; i < N; i += 2) w[i / 2] = pack_two<__nv_bfloat16>(x[i], x[i + 1]);
  } else {
#pragma unroll
    for (int i = 0; i < N; i += 2) w[i / 2] = pack_two<__half>(x[i], x[i + 1]);
  }
}

// Which of a thread's steps 0 .. n - 1 are its own: first .. last - 1, which may lie beyond them.
struct Part {
  int first, last;
  // Of steps from t on, those in begin .. end - 1.
  static __device__ __forceinline__ Part of(int64_t t, int64_t begin, int64_t end) {
    constexpr int64_t far = 1 << 20;
    return {static_cast<int>(max(-far, min(far, begin - t))),
            static_cast<int>(max(-far, min(far, end - t)))};
  }
  __device__ __forceinline__ Part from(int i) const { return {first - i, last - i}; }
  __device__ __forceinline__ bool has(int i) const { return i >= first && i < last; }
  __device__ __forceinline__ bool has_all(int n) const { return first <= 0 && last >= n; }
  __device__ __forceinline__ bool has_any(int n) const { return first < n && last > 0; }
};

// Loads four words where wide, else two where narrow, in place: a register that the compiler moves
// the result to would be waited for at once.
__device__ __forceinline__ void load_if(bool wide, bool narrow, const void* from,
                                        uint32_t (&w)[4]) {
  asm volatile(
      "{ .reg .pred p, q; setp.ne.b32 p, %5, 0; setp.ne.b32 q, %6, 0;\n"
      "@p ld.global.v4.b32 {%0, %1, %2, %3}, [%4];\n"
      "@q ld.global.v2.b32 {%0, %1}, [%4]; }"
      : "+r"(w[0]), "+r"(w[1]), "+r"(w[2]), "+r"(w[3])
      : "l"(from), "r"(int(wide)), "r"(int(narrow))
      : "memory");
}

// Four or eight adjacent elements as they lie in memory, or as floats: a thread starts all its
// loads before it converts what comes first.
template <typename F, int N>
struct Raw {
  static_assert(N == 4 || N == 8, "whole vectors");
  uint32_t w[N / 4][4] = {};  // set, or registers would be kept for what they held before

  // If there.
  __device__ __forceinline__ void load_adjacent(const char* from, int32_t dtype, bool there) {
    const bool wide = dtype == CAUSAL_CONV1D_FLOAT32;
    if constexpr (N == 8) {
      load_words_if<4>(there, from, w[0]);
      load_words_if<4>(there && wide, from + 16, w[1]);
    } else {
      load_if(there && wide, there && !wide, from, w[0]);
    }
  }

  // Steps from p on where any of them is part's, else 0. v.vectors is true, and rows have a
  // multiple of N steps, so that all of them are there.
  __device__ __forceinline__ void load_together(const View& v, const char* p, Part part) {
    load_adjacent(p, v.dtype, part.has_any(N));
  }

  // The same for any strides, and 0 for what is not part's.
  __device__ __forceinline__ void load_any(const View& v, const char* p, Part part) {
    if (v.vectors && part.has_all(N)) {
      load_adjacent(p, v.dtype, true);
    } else if (v.dtype == CAUSAL_CONV1D_FLOAT32) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        w[i / 4][i % 4] = part.has(i) ? *reinterpret_cast<const uint32_t*>(p + i * v.step) : 0;
      }
    } else {
      uint32_t bits[N];
#pragma unroll
      for (int i = 0; i < N; ++i) {
        bits[i] = part.has(i) ? *reinterpret_cast<const uint16_t*>(p + i * v.step) : 0;
      }
#pragma unroll
      for (int i = 0; i < N / 2; ++i) w[0][i] = bits[2 * i] | bits[2 * i + 1] << 16;
    }
  }

  __device__ __forceinline__ void get(int32_t dtype, float (&to)[N]) const {
    if (dtype == CAUSAL_CONV1D_FLOAT32) {
#pragma unroll
      for (int i = 0; i < N; ++i) to[i] = __uint_as_float(w[i / 4][i % 4]);
    } else {
      uint32_t half[N / 2];
#pragma unroll
      for (int i = 0; i < N / 2; ++i) half[i] = w[0][i];
      unpack<N>(half, dtype == CAUSAL_CONV1D_BFLOAT16, to);
    }
  }
};

template <int N>
struct Raw<double, N> {
  double x[N] = {};

  __device__ __forceinline__ void load_adjacent(const char* from, int32_t, bool there) {
    if (there) load_vector(reinterpret_cast<const double*>(from), x);
  }
  __device__ __forceinline__ void load_any(const View& v, const char* p, Part part) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      x[i] = part.has(i) ? *reinterpret_cast<const double*>(p + i * v.step) : 0.0;
    }
  }
  __device__ __forceinline__ void get(int32_t, double (&to)[N]) const {
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = x[i];
  }
};

// A number likewise, 0 if not there.
template <typename F>
struct RawNumber {
  uint32_t bits;
  __device__ __forceinline__ void load(const View& v, const char* p, bool there) {
    bits = 0;
    if (!there) return;
    bits = v.dtype == CAUSAL_CONV1D_FLOAT32 ? *reinterpret_cast<const uint32_t*>(p)
                                            : *reinterpret_cast<const uint16_t*>(p);
  }
  __device__ __forceinline__ F get(const View& v) const { return to_float(bits, v.dtype); }
};
template <>
struct RawNumber<double> {
  double x;
  __device__ __forceinline__ void load(const View&, const char* p, bool there) {
    x = there ? *reinterpret_cast<const double*>(p) : 0.0;
  }
  __device__ __forceinline__ double get(const View&) const { return x; }
};

template <typename F, int N>
__device__ __forceinline__ void keep_part(Part part, F (&x)[N]) {
  if (part.has_all(N)) return;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (!part.has(i)) x[i] = 0;
  }
}

// FAST tells which of the two ways suits all tensors of a call.
template <bool FAST, typename F, int N>
__device__ __forceinline__ void start_load(Raw<F, N>& raw, const View& v, const char* p,
                                           Part part) {
  if constexpr (FAST) {
    raw.load_together(v, p, part);
  } else {
    raw.load_any(v, p, part);
  }
}
template <bool FAST, typename F, int N>
__device__ __forceinline__ void end_load(const Raw<F, N>& raw, const View& v, Part part,
                                         F (&x)[N]) {
  raw.get(v.dtype, x);
  if (FAST) keep_part(part, x);
}

template <typename F, int N>
__device__ __forceinline__ void load_part(const View& v, const char* p, Part part, F (&x)[N]) {
  Raw<F, N> raw;
  raw.load_any(v, p, part);
  raw.get(v.dtype, x);
}

// Brings steps that are read later near, if they can be read together.
__device__ __forceinline__ void prefetch(const char* p, bool there) {
  if (there) asm volatile("prefetch.global.L1 [%0];" ::"l"(p));
}

template <typename F, int N>
__device__ __forceinline__ void store_part(const View& v, char* p, Part part, const F (&x)[N]) {
  if (v.vectors && part.has_all(N)) {
    if (sizeof(F) == 8 || v.dtype == CAUSAL_CONV1D_FLOAT32) {
      store_vector(reinterpret_cast<F*>(p), x);
    } else if constexpr (sizeof(F) == 4) {
      uint32_t w[N / 2];
      pack<N>(x, v.dtype == CAUSAL_CONV1D_BFLOAT16, w);
      store_words<N>(w, p);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (part.has(i)) store<F>(p + i * v.step, v.dtype, x[i]);
  }
}

}  // namespace causal_conv1d::gpu::scan
