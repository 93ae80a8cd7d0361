// The PTX instructions that the sources have, by their names with _ for what joins their parts. An
// address that is no multiple of the access ends the process, as does one outside shared memory.
#pragma once

#include <cmath>
#include <deque>
#include <vector>

#include "cuda_bf16.h"
#include "cuda_fp16.h"

namespace gpu_on_cpu::ptx {

template <size_t SIZE, typename T>
T* aligned(T* p) {
  if (reinterpret_cast<uintptr_t>(p) % SIZE != 0) fail("an access to memory is not aligned");
  return p;
}
template <size_t SIZE>
char* shared_at(uint32_t address) {
  if (address + SIZE > kMostStatic + kMostDynamic) fail("an access outside shared memory");
  return aligned<SIZE>(shared_memory + address);
}

// Words to and from global memory.
template <typename... Words>
void load(const void* from, Words&... words) {
  const char* at = aligned<4 * sizeof...(Words)>(static_cast<const char*>(from));
  ((std::memcpy(&words, at, 4), at += 4), ...);
}
template <typename... Words>
void store(void* to, Words... words) {
  char* at = aligned<4 * sizeof...(Words)>(static_cast<char*>(to));
  ((std::memcpy(at, &words, 4), at += 4), ...);
}
using Word = uint32_t;
inline void ld_global_v4_b32(Word& a, Word& b, Word& c, Word& d, const void* p) {
  load(p, a, b, c, d);
}
inline void ld_global_v2_b32(Word& a, Word& b, const void* p) { load(p, a, b); }
inline void ld_global_L2_cache_hint_f32(float& v, const float* p, uint64_t) { load(p, v); }
inline void st_global_b32(void* p, Word a) { store(p, a); }
inline void st_global_v2_b32(void* p, Word a, Word b) { store(p, a, b); }
inline void st_global_v4_b32(void* p, Word a, Word b, Word c, Word d) { store(p, a, b, c, d); }
inline void st_global_L2_cache_hint_b32(void* p, Word a, uint64_t) { store(p, a); }
inline void st_global_L2_cache_hint_v2_b32(void* p, Word a, Word b, uint64_t) { store(p, a, b); }
inline void st_global_L2_cache_hint_v4_b32(void* p, Word a, Word b, Word c, Word d, uint64_t) {
  store(p, a, b, c, d);
}
inline void createpolicy_fractional_L2_evict_first_b64(uint64_t& policy, double) { policy = 0; }
inline void createpolicy_fractional_L2_evict_last_b64(uint64_t& policy, double) { policy = 0; }
inline void prefetch_global_L1(const void*) {}
inline void prefetch_global_L2(const void*) {}

// To and from shared memory.
inline void ld_shared_b32(Word& a, uint32_t from) { load(shared_at<4>(from), a); }
inline void ld_shared_v2_b32(Word& a, Word& b, uint32_t from) { load(shared_at<8>(from), a, b); }
inline void ld_shared_v4_b32(Word& a, Word& b, Word& c, Word& d, uint32_t from) {
  load(shared_at<16>(from), a, b, c, d);
}
inline void ld_shared_u16(Word& a, uint32_t from) {
  a = 0;
  std::memcpy(&a, shared_at<2>(from), 2);
}
inline void st_shared_b16(uint32_t to, uint16_t v) { std::memcpy(shared_at<2>(to), &v, 2); }
inline void st_shared_b32(uint32_t to, Word a) { store(shared_at<4>(to), a); }
inline void st_shared_v2_b32(uint32_t to, Word a, Word b) { store(shared_at<8>(to), a, b); }
inline void st_shared_v4_b32(uint32_t to, Word a, Word b, Word c, Word d) {
  store(shared_at<16>(to), a, b, c, d);
}

// Copies to shared memory. Each happens, as is drawn, at once or not before the thread waits for
// it, so that neither a missing wait nor a buffer that is still read goes unnoticed.
struct Copy {
  char* to;
  const void* from;
  int size;
  bool zeros;

  void make() const { zeros ? std::memset(to, 0, size) : std::memcpy(to, from, size); }
};
struct Copies {
  uint64_t of = 0;  // the block_run
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
};
inline Copies& own_copies() {
  static std::vector<Copies> of_thread(1024);
  Copies& own = of_thread[threadIdx.x];
  if (own.of != block_run) own = Copies{block_run, {}, {}};
  return own;
}
template <int SIZE>
void start_copy(uint32_t to, const void* from, bool zeros) {
  if (!zeros) aligned<SIZE>(from);
  const Copy copy{shared_at<SIZE>(to), from, SIZE, zeros};
  if (draw() % 2 != 0) return copy.make();
  own_copies().open.push_back(copy);
}
inline void cp_async_cg_shared_global(uint32_t to, const void* from, int size, bool zeros) {
  if (size != 16) fail("cp.async.cg copies 16 bytes");
  start_copy<16>(to, from, zeros);
}
inline void cp_async_ca_shared_global(uint32_t to, const void* from, int size, bool zeros) {
  switch (size) {
    case 4: return start_copy<4>(to, from, zeros);
    case 8: return start_copy<8>(to, from, zeros);
    case 16: return start_copy<16>(to, from, zeros);
    default: fail("cp.async.ca copies 4, 8 or 16 bytes");
  }
}
inline void cp_async_commit_group() {
  Copies& own = own_copies();
  own.groups.emplace_back();
  own.groups.back().swap(own.open);
}
inline void cp_async_wait_group(int most) {
  auto& groups = own_copies().groups;
  for (; groups.size() > static_cast<size_t>(most); groups.pop_front()) {
    for (const Copy& copy : groups.front()) copy.make();
  }
}

inline void bar_sync(int) { wait_for_block(); }
inline void griddepcontrol_wait() {}
inline void griddepcontrol_launch_dependents() {}
inline void mov_u32(uint32_t& v, uint32_t from) { v = from; }

// Arithmetic.
inline void tanh_approx_f32(float& r, float v) { r = std::tanh(v); }
inline float no_subnormal(float v) { return std::fabs(v) < 0x1p-126f ? std::copysign(0.f, v) : v; }
inline void rcp_approx_ftz_f32(float& r, float v) { r = no_subnormal(1.f / no_subnormal(v)); }
inline void ex2_approx_ftz_f32(float& r, float v) { r = no_subnormal(std::exp2(no_subnormal(v))); }
inline void fma_rn_f32(float& r, float a, float b, float c) { r = std::fma(a, b, c); }
inline void mul_rn_f16x2(Word& r, Word a, Word b) {
  const auto product = [&](int shift) -> Word {
    const __half x{static_cast<uint16_t>(a >> shift)}, y{static_cast<uint16_t>(b >> shift)};
    return __float2half_rn(__half2float(x) * __half2float(y)).bits;
  };
  r = product(0) | product(16) << 16;
}
inline void fma_rn_bf16x2(Word& r, Word a, Word b, Word c) {
  if (c != 0x80008000) fail("bf16x2 is for products");  // more would round twice
  const auto product = [&](int shift) -> Word {
    const __nv_bfloat16 x{static_cast<uint16_t>(a >> shift)}, y{static_cast<uint16_t>(b >> shift)};
    return __float2bfloat16_rn(__bfloat162float(x) * __bfloat162float(y)).bits;
  };
  r = product(0) | product(16) << 16;
}
inline void mul_f32(float& r, float a, float b) { r = a * b; }

// Of a warp, in parts of which c has the lanes' numbers: see shfl.sync.
inline void shfl_sync_up_b32(float& r, bool& there, float v, int n, int c, int) {
  const int lane = static_cast<int>(threadIdx.x % 32), first = lane & c >> 8;
  there = lane - n >= first;
  r = exchange(v, there ? lane - n : lane, 32);
}
inline void shfl_sync_up_b32(float& r, float v, int n, int c, int) {
  bool there;
  shfl_sync_up_b32(r, there, v, n, c, -1);
}
inline void shfl_sync_down_b32(float& r, bool& there, float v, int n, int c, int) {
  const int lane = static_cast<int>(threadIdx.x % 32), part = c >> 8;
  const int last = (lane & part) | (c & 31 & ~part);
  there = lane + n <= last;
  r = exchange(v, there ? lane + n : lane, 32);
}
inline void shfl_sync_down_b32(float& r, float v, int n, int c, int) {
  bool there;
  shfl_sync_down_b32(r, there, v, n, c, -1);
}

}  // namespace gpu_on_cpu::ptx
