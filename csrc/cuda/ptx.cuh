// PTX instructions that CUDA C++ has no function for, or a slower one.
#pragma once

#include <cstdint>
#include <type_traits>

#include "gpu.h"

#ifndef CAUSAL_CONV1D_HIP

namespace causal_conv1d::gpu {

// Programmatic dependent launch (compute capability 9.0 on; nothing elsewhere).
//
// Lets the blocks of the next kernel start once all of this one have, if launch_pdl() starts it.
__device__ __forceinline__ void pdl_launch() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
// Waits until the kernel before this one has ended: comes before any access to global memory.
__device__ __forceinline__ void pdl_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
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

// Loads what store_evict_last() stored; it may leave L2 then.
__device__ __forceinline__ float load_evict_first(const float* from) {
  if constexpr (kTuring) return *from;
  float v;
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile("ld.global.L2::cache_hint.f32 %0, [%1], %2;" : "=f"(v) : "l"(from), "l"(policy));
  return v;
}
__device__ __forceinline__ double load_evict_first(const double* from) { return *from; }

// __syncthreads() that the warps of a block may reach in different places of the code.
__device__ __forceinline__ void synchronize_warps() { asm volatile("bar.sync 0;" ::: "memory"); }

// cp.async. Of cuda_pipeline.h's functions the one that fills with zeros becomes a long switch, and
// computes each address anew. Addresses in shared memory are 32-bit ones.
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// BYTES on their way to shared memory, until wait_for_copies(). Where there is no cp.async they are
// in registers, HELD, until land().
template <int BYTES, bool HELD = kTuring>
class InFlight {
 public:
  // Zeros unless inside; from is not accessed then.
  __device__ __forceinline__ void start(bool inside, uint32_t to, const void* from) {
    if constexpr (BYTES == 16) {
      asm volatile(
          "{ .reg .pred p; setp.eq.b32 p, %2, 0; cp.async.cg.shared.global [%0], [%1], 16, p; }" ::
              "r"(to),
          "l"(from), "r"(int(inside))
          : "memory");
    } else {
      asm volatile(
          "{ .reg .pred p; setp.eq.b32 p, %2, 0; cp.async.ca.shared.global [%0], [%1], %3, p; }" ::
              "r"(to),
          "l"(from), "r"(int(inside)), "n"(BYTES)
          : "memory");
    }
  }
  __device__ __forceinline__ void land(uint32_t) const {}
};

template <int BYTES>
class InFlight<BYTES, true> {
 public:
  __device__ __forceinline__ void start(bool inside, uint32_t, const void* from) {
#pragma unroll
    for (int i = 0; i < BYTES / 4; ++i) w_[i] = 0;
    if constexpr (BYTES == 4) {
      if (inside) w_[0] = *static_cast<const uint32_t*>(from);
    } else {
      load_words_if<BYTES / 4>(inside, from, w_);
    }
  }
  // to: that of start().
  __device__ __forceinline__ void land(uint32_t to) const {
    if constexpr (BYTES == 4) {
      asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(w_[0]) : "memory");
    } else if constexpr (BYTES == 8) {
      asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(to), "r"(w_[0]), "r"(w_[1]) : "memory");
    } else {
      asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(w_[0]), "r"(w_[1]),
                   "r"(w_[2]), "r"(w_[3])
                   : "memory");
    }
  }

 private:
  uint32_t w_[BYTES / 4];
};

// The same at once: without cp.async it is done when this returns.
template <int BYTES>
__device__ __forceinline__ void copy_async_or_zero(bool inside, uint32_t to, const void* from) {
  InFlight<BYTES> piece;
  piece.start(inside, to, from);
  piece.land(to);
}

__device__ __forceinline__ void commit_copies() {
  if constexpr (!kTuring) asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most the last N groups are in flight.
template <int N>
__device__ __forceinline__ void wait_for_copies() {
  if constexpr (!kTuring) asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// The least v of the warp's lanes. All must call it.
__device__ __forceinline__ unsigned least_of_warp(unsigned v) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  return __reduce_min_sync(0xffffffff, v);
#else
#pragma unroll
  for (int n = 16; n > 0; n /= 2) v = min(v, __shfl_xor_sync(0xffffffff, v, n));
  return v;
#endif
}

// Keeps the compiler from computing v again at each use: it cannot see through a shuffle, even one
// from the lane itself. All lanes must call it.
template <typename T>
__device__ __forceinline__ void keep(T& v) {
  const int lane = threadIdx.x % 32;
  if constexpr (std::is_pointer_v<T>) {
    v = reinterpret_cast<T>(__shfl_sync(0xffffffff, reinterpret_cast<uintptr_t>(v), lane));
  } else {
    v = __shfl_sync(0xffffffff, v, lane);
  }
}

// blockIdx.x, for what is rather computed again than kept in registers.
__device__ __forceinline__ uint32_t block_again() {
  uint32_t block;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(block));
  return block;
}

// Keeps the compiler from seeing through a value.
__device__ __forceinline__ void opaque(char*& p) { asm volatile("" : "+l"(p)); }
__device__ __forceinline__ void opaque(int64_t& i) { asm volatile("" : "+l"(i)); }
__device__ __forceinline__ void opaque(int64_t& i, int64_t& j) {
  asm volatile("" : "+l"(i), "+l"(j));
}

// v, which is the same in all lanes, so that the compiler knows it is: it then uses uniform
// registers, and branches without preparing for lanes to diverge. All lanes must call it.
template <typename T>
__device__ __forceinline__ T uniform(T v) {
  return __shfl_sync(0xffffffff, v, 0);
}

// Two numbers rounded to T, which has 16 bits, as they lie in memory.
template <typename T>
__device__ __forceinline__ uint32_t pack_two(float low, float high) {
  uint32_t word;
  if constexpr (!std::is_same_v<T, __nv_bfloat16>) {
    const __half2 two = __floats2half2_rn(low, high);
    __builtin_memcpy(&word, &two, 4);
  } else if constexpr (kTuring) {
    const auto rounded = [](float v) {  // in the upper half
      const uint32_t bits = __float_as_uint(v);
      return v != v ? 0x7fff0000u : bits + 0x7fffu + (bits >> 16 & 1);
    };
    word = __byte_perm(rounded(low), rounded(high), 0x7632);
  } else {
    const __nv_bfloat162 two = __floats2bfloat162_rn(low, high);
    __builtin_memcpy(&word, &two, 4);
  }
  return word;
}

__device__ __forceinline__ float tanh_approx(float h) {
  float t;
  asm("tanh.approx.f32 %0, %1;" : "=f"(t) : "f"(h));
  return t;
}

__device__ __forceinline__ float reciprocal_approx(float v) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}

}  // namespace causal_conv1d::gpu

#endif
