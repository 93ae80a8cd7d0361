// Packs of adjacent elements in registers: loads, stores, conversion.
#pragma once

#include <cstring>
#include <type_traits>

#include "ptx.cuh"
#include "types.cuh"

namespace causal_conv1d::gpu {

#ifdef CAUSAL_CONV1D_HIP  // whose kernels have none

template <typename T, int N>
struct Pack;
template <typename T, int N>
Pack<T, N> pack(const float (&values)[N]);

#else

// N elements, together a multiple of 4 bytes, or one of 2 bytes; loaded and stored by up to 16
// bytes at a time. They are 32-bit words and move by assembly: the compiler splits other forms, or
// takes them for accesses to any memory.
template <typename T, int N>
struct Pack {
  static constexpr int kBytes = static_cast<int>(sizeof(T)) * N;
  static constexpr int kWords = (kBytes + 3) / 4;
  // A Pack's address is a multiple of it: the largest power of two up to 16 that divides kBytes.
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

  // The i-th part of M elements, which are whole words.
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
    } else if constexpr (kBytes % 4 == 0) {
#pragma unroll
      for (int i = 0; i < kWords; ++i) p.w[i] = static_cast<const uint32_t*>(from)[i];
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
    } else if constexpr (kBytes % 4 == 0) {
#pragma unroll
      for (int i = 0; i < kWords; ++i) static_cast<uint32_t*>(to)[i] = w[i];
    } else {
      static_assert(N == 1, "no vector type of this size");
      *static_cast<T*>(to) = element(0);
    }
  }

  // store() if condition, for 4 and 8 bytes without a branch.
  __device__ __forceinline__ void store_if(bool condition, void* to) const {
    if constexpr (kBytes == 8) {
      asm volatile(
          "{ .reg .pred p; setp.ne.b32 p, %3, 0; @p st.global.v2.b32 [%0], {%1, %2}; }" ::"l"(to),
          "r"(w[0]), "r"(w[1]), "r"(int(condition))
          : "memory");
    } else if constexpr (kBytes == 4) {
      asm volatile("{ .reg .pred p; setp.ne.b32 p, %2, 0; @p st.global.b32 [%0], %1; }" ::"l"(to),
                   "r"(w[0]), "r"(int(condition))
                   : "memory");
    } else if (condition) {
      store(to);
    }
  }
};

// N sums rounded to T, two at a time where there is an instruction for it.
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
      p.w[i / 2] = pack_two<T>(values[i], values[i + 1]);
    }
  }
  return p;
}

template <typename T>
__device__ __forceinline__ float round_to(float v) {
  return to_compute(from_compute<T>(v));
}

// The products of their elements, rounded to T.
template <typename T, int N>
__device__ __forceinline__ Pack<T, N> product(const Pack<T, N>& a, const Pack<T, N>& b) {
  Pack<T, N> p;
#pragma unroll
  for (int i = 0; i < Pack<T, N>::kWords; ++i) {
    // As a sum with -0, which changes no product: bf16 has no multiplication of its own before
    // compute capability 9.0.
    if constexpr (kTuring && std::is_same_v<T, __nv_bfloat16>) {
      p.w[i] = pack_two<T>(a.get(2 * i) * b.get(2 * i), a.get(2 * i + 1) * b.get(2 * i + 1));
    } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      asm("fma.rn.bf16x2 %0, %1, %2, %3;"
          : "=r"(p.w[i])
          : "r"(a.w[i]), "r"(b.w[i]), "r"(0x80008000));
    } else if constexpr (std::is_same_v<T, __half>) {
      asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(p.w[i]) : "r"(a.w[i]), "r"(b.w[i]));
    } else {
      p.w[i] = __float_as_uint(__uint_as_float(a.w[i]) * __uint_as_float(b.w[i]));
    }
  }
  return p;
}

// Stores what a later kernel reads with load_evict_first(): it stays in L2 until then.
template <int N>
__device__ __forceinline__ void store_evict_last(const Pack<float, N>& p, float* to) {
  if constexpr (kTuring) return p.store(to);
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  if constexpr (N == 4) {
    asm volatile("st.global.L2::cache_hint.v4.b32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(to),
                 "r"(p.w[0]), "r"(p.w[1]), "r"(p.w[2]), "r"(p.w[3]), "l"(policy)
                 : "memory");
  } else if constexpr (N == 2) {
    asm volatile("st.global.L2::cache_hint.v2.b32 [%0], {%1, %2}, %3;" ::"l"(to), "r"(p.w[0]),
                 "r"(p.w[1]), "l"(policy)
                 : "memory");
  } else {
    asm volatile("st.global.L2::cache_hint.b32 [%0], %1, %2;" ::"l"(to), "r"(p.w[0]), "l"(policy)
                 : "memory");
  }
}

template <typename T, int N>
__device__ __forceinline__ Pack<T, N> load_shared(uint32_t from) {
  Pack<T, N> p;
  constexpr int kStep = Pack<T, N>::kAlignment;
#pragma unroll
  for (int i = 0; i < Pack<T, N>::kBytes / kStep; ++i) {
    uint32_t* w = &p.w[i * kStep / 4];
    if constexpr (kStep == 16) {
      asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
                   : "r"(from + i * 16)
                   : "memory");
    } else if constexpr (kStep == 8) {
      asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];"
                   : "=r"(w[0]), "=r"(w[1])
                   : "r"(from + i * 8)
                   : "memory");
    } else {
      asm volatile("ld.shared.b32 %0, [%1];" : "=r"(w[0]) : "r"(from + i * 4) : "memory");
    }
  }
  return p;
}

template <typename T>
__device__ __forceinline__ void store_shared(uint32_t to, T value) {
  if constexpr (sizeof(T) == 4) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(__float_as_uint(value)) : "memory");
  } else {
    uint16_t bits;
    memcpy(&bits, &value, sizeof bits);
    asm volatile("st.shared.b16 [%0], %1;" ::"r"(to), "h"(bits) : "memory");
  }
}

template <typename T, int N>
__device__ __forceinline__ void store_shared(uint32_t to, const Pack<T, N>& p) {
  static_assert(Pack<T, N>::kBytes % 16 == 0, "whole vectors");
#pragma unroll
  for (int i = 0; i < Pack<T, N>::kWords; i += 4) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to + i * 4), "r"(p.w[i]),
                 "r"(p.w[i + 1]), "r"(p.w[i + 2]), "r"(p.w[i + 3])
                 : "memory");
  }
}

template <typename T>
__device__ __forceinline__ T load_shared(uint32_t from) {
  uint32_t bits;
  if constexpr (sizeof(T) == 4) {
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(bits) : "r"(from) : "memory");
  } else {
    asm volatile("ld.shared.u16 %0, [%1];" : "=r"(bits) : "r"(from) : "memory");
  }
  T value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// Elements in a vector, the 16 bytes of the widest access.
template <typename T>
constexpr int kPerVector = 16 / static_cast<int>(sizeof(T));

// Elements from the vector that p lies in to p.
template <typename T>
__device__ __forceinline__ int misalignment(const T* p) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(p) / sizeof(T) % kPerVector<T>);
}

// Drops the first `offset` elements of w, 0 <= offset < kPerVector.
template <typename T, int WORDS>
__device__ __forceinline__ void drop_elements(uint32_t (&w)[WORDS], int offset) {
  const int word = offset * static_cast<int>(sizeof(T)) / 4;
  if (word & 2) {
#pragma unroll
    for (int i = 0; i < WORDS - 2; ++i) w[i] = w[i + 2];
  }
  if (word & 1) {
#pragma unroll
    for (int i = 0; i < WORDS - 1; ++i) w[i] = w[i + 1];
  }
  if (sizeof(T) == 2 && (offset & 1)) {
#pragma unroll
    for (int i = 0; i < WORDS - 1; ++i) w[i] = __funnelshift_r(w[i], w[i + 1], 16);
  }
}

#endif

}  // namespace causal_conv1d::gpu
