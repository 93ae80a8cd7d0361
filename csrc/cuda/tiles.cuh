// How the fast kernels read and write rows: tiles of adjacent time steps (channel-first) or rows of
// adjacent channels (channel-last).
#pragma once

#include <initializer_list>

#include "common.cuh"

namespace causal_conv1d::gpu {

constexpr int kThreads = 128;  // a block, in all fast kernels

// Whether tap k counts, first being WMAX - W. Kernels of 8 taps are for W > 4; so most of them do
// whatever W is, and there are predicate registers for the others.
template <int WMAX>
__device__ __forceinline__ constexpr bool has_tap(int k, int first) {
  return (WMAX == 8 && k >= 3) || k >= first;
}

// Lets the next kernel's blocks take their places once all of this one's have theirs, if that is
// started by launch_early(); else it follows when this one has ended, as it does on a GPU before
// compute capability 9.0.
__device__ __forceinline__ void let_next_kernel_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
// Waits until the kernel before has ended; what it reads and writes may be touched after this.
__device__ __forceinline__ void wait_for_kernel_before() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Bytes of static shared memory that, with USED others, leave no room for more than BLOCKS blocks
// on a multiprocessor of compute capability 9.0. More than measured best there, as fewer registers
// may bring, get in each other's way at the memory, and all take 1 to 10 % longer. Static memory
// can do that for four or more.
template <int BLOCKS, int USED = 0>
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
constexpr int kRoomFor = BLOCKS < 4 ? 1 : 228 * 1024 / (BLOCKS + 1) - 1023 - USED;
#else
constexpr int kRoomFor = 1;
#endif

// seq_idx, (batch, seqlen); without one every position has id 0. One of 64 bits is its lower
// halves: what has their signs and differs as they do, and needs no code of its own.
struct SeqIdx {
  const int32_t* data;
  int64_t batch, time;

  __device__ __forceinline__ int at(int64_t b, int64_t t) const {
    return data == nullptr ? 0 : data[b * batch + t * time];
  }
  // The same with its origin at (b, t).
  __device__ __forceinline__ SeqIdx from(int64_t b, int64_t t) const {
    return {data == nullptr ? nullptr : data + b * batch + t * time, 0, time};
  }

  // One past the last position of row b that is not padding; 0 if it has none. All lanes of a warp
  // must call it: they look at kEach steps each at a time, from the row's end on.
  __device__ __forceinline__ int64_t end(int64_t b, int64_t seqlen) const {
    if (data == nullptr) return seqlen;
    constexpr unsigned kEach = 8, kSteps = 32 * kEach;
    for (int64_t end = seqlen; end > 0; end -= kSteps) {
      unsigned after = kSteps;  // steps between the last that counts and end
#pragma unroll
      for (unsigned i = 0; i < kEach; ++i) {
        const unsigned back = i * 32 + threadIdx.x % 32;
        const int64_t t = end - 1 - back;
        if (at(b, max(t, int64_t(0))) >= 0 && t >= 0) after = min(after, back);
      }
      after = __reduce_min_sync(0xffffffff, after);
      if (after < kSteps) return end - after;
    }
    return 0;
  }
};

inline SeqIdx seq_idx_view(const Tensor& t) {
  if (!given(t)) return {nullptr, 0, 0};
  const int words = t.dtype == CAUSAL_CONV1D_INT64 ? 2 : 1;  // an id; the lower one comes first
  return {static_cast<const int32_t*>(t.data), t.strides[0] * words, t.strides[1] * words};
}

// Starts to bring what lies there to L2.
__device__ __forceinline__ void prefetch(const void* from) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
}

// Stores what a later kernel reads from L2, where it stays while other things come and go.
template <int N>
__device__ __forceinline__ void store_for_reading_once(const Pack<float, N>& p, float* to) {
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
// Loads that, after which it may leave L2.
__device__ __forceinline__ float load_once(const float* from) {
  float v;
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile("ld.global.L2::cache_hint.f32 %0, [%1], %2;" : "=f"(v) : "l"(from), "l"(policy));
  return v;
}
__device__ __forceinline__ double load_once(const double* from) { return *from; }

// For all warps of a block, which with __syncthreads() would have to come to it in one place.
__device__ __forceinline__ void synchronize_warps() { asm volatile("bar.sync 0;" ::: "memory"); }

// cp.async by assembly: of cuda_pipeline.h's functions the one with zeros becomes a long switch,
// and addresses are computed anew for each. Addresses in shared memory are 32-bit ones.
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Zeros unless inside; from is not accessed then.
template <int BYTES>
__device__ __forceinline__ void copy_async_or_zero(bool inside, uint32_t to, const void* from) {
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

__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits for all but the last N groups.
template <int N>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
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
  static_assert(Pack<T, N>::kBytes % 16 == 0, "whole granules");
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

// Rows of two tensors, of which each lane of a warp reads its own C adjacent channels, a column,
// and lanes from the number of columns on the last column. They come in groups of U, those from
// count on as zeros, by cp.async through a ring of GROUPS groups in shared memory: one is read
// while the others are on their way. With C == 1 there is no such copy for 2 bytes, so they are
// loaded as they are used.
//
// With 16-bit elements and `wide`, which is for rows that begin and end 16-byte aligned, lanes copy
// 16 bytes each, of several rows at a time: fewer instructions than one copy a lane and row.
template <typename T, int C, int U, int GROUPS>
class RowPairs {
  static constexpr int kBytes = Pack<T, C>::kBytes, kPitch = kThreads * kBytes;
  static constexpr int kGroup = 2 * U * kPitch;
  // Columns that a lane copies of a row, and rows that a warp copies at a time.
  static constexpr int kWide = sizeof(T) == 2 ? 16 / kBytes : 1;
  static_assert(U % kWide == 0, "a group is whole copies");

 public:
  struct alignas(128) Shared {
    char bytes[GROUPS * kGroup];
  };

  // x and g: the lane's own in the first row.
  __device__ __forceinline__ RowPairs(Shared* shared, const T* x, const T* g, int64_t x_row,
                                      int64_t g_row, int columns, int count, bool wide)
      : left_(count), wide_(wide) {
    const int n = wide ? kWide : 1;
    const int lane = threadIdx.x % 32, own = min(lane, columns - 1);
    const int row = lane * n / 32, column = lane * n % 32;
    const int from = (min(column, columns - n) - own) * C;
    const uint32_t warp = shared_address(shared) + (threadIdx.x - lane) * kBytes;
    from_ = warp + own * kBytes;
    to_ = warp + 2 * row * kPitch + column * kBytes;
    left_ -= row;
    next_x_ = reinterpret_cast<const char*>(x + from) + row * x_row;
    next_g_ = reinterpret_cast<const char*>(g + from) + row * g_row;
  }

  // Starts to copy the next group; to be called GROUPS times before the first read, and once after
  // each group's last, by all lanes. It takes effect with commit_copies(). x_row and g_row are
  // parameters of the kernel, which cost no registers.
  __device__ __forceinline__ void start(const int64_t& x_row, const int64_t& g_row) {
    const uint32_t to = to_ + slot_;
    if (kWide > 1 && !wide_) {
#pragma unroll 1
      for (int u = 0; u < U; ++u) copy<1>(u, to, x_row, g_row);
    } else {
#pragma unroll
      for (int u = 0; u < U; u += kWide) copy<kWide>(u, to, x_row, g_row);
    }
    left_ -= U;
    slot_ = slot_ + kGroup == GROUPS * kGroup ? 0 : slot_ + kGroup;
  }

  // Row u of the group in hand, once all lanes have waited for it.
  __device__ __forceinline__ Pack<T, C> read_x(int u) const {
    return load_shared<T, C>(from_ + slot_ + 2 * u * kPitch);
  }
  __device__ __forceinline__ Pack<T, C> read_g(int u) const {
    return load_shared<T, C>(from_ + slot_ + (2 * u + 1) * kPitch);
  }

 private:
  // The lane's part of N rows from u on, or zeros.
  template <int N>
  __device__ __forceinline__ void copy(int u, uint32_t to, const int64_t& x_row,
                                       const int64_t& g_row) {
    copy_async_or_zero<N * kBytes>(u < left_, to + 2 * u * kPitch, next_x_);
    copy_async_or_zero<N * kBytes>(u < left_, to + (2 * u + 1) * kPitch, next_g_);
    next_x_ += N * x_row;
    next_g_ += N * g_row;
  }

  uint32_t from_, to_;  // where the lane reads, and copies to
  const char *next_x_, *next_g_;
  int left_;  // rows, from the lane's on
  bool wide_;
  int slot_ = 0;
};

template <typename T, int U, int GROUPS>
class RowPairs<T, 1, U, GROUPS> {
 public:
  struct Shared {};

  __device__ __forceinline__ RowPairs(Shared*, const T* x, const T* g, int64_t, int64_t, int,
                                      int count, bool)
      : next_x_(reinterpret_cast<const char*>(x)),
        next_g_(reinterpret_cast<const char*>(g)),
        left_(count) {}

  __device__ __forceinline__ void start(const int64_t& x_row, const int64_t& g_row) {
    if (++groups_ > GROUPS) {
      next_x_ += U * x_row;
      next_g_ += U * g_row;
      left_ -= U;
    }
    x_row_ = x_row;
    g_row_ = g_row;
  }

  __device__ __forceinline__ Pack<T, 1> read_x(int u) const {
    return left_ > u ? Pack<T, 1>::load(next_x_ + u * x_row_) : Pack<T, 1>{};
  }
  __device__ __forceinline__ Pack<T, 1> read_g(int u) const {
    return left_ > u ? Pack<T, 1>::load(next_g_ + u * g_row_) : Pack<T, 1>{};
  }

 private:
  const char *next_x_, *next_g_;
  int64_t x_row_ = 0, g_row_ = 0;
  int left_, groups_ = 0;
};

// Keeps the compiler from computing v anew wherever it is used: it cannot see through a shuffle, be
// it from the lane itself. All lanes must call it.
template <typename T>
__device__ __forceinline__ void keep(T& v) {
  const int lane = threadIdx.x % 32;
  if constexpr (std::is_pointer_v<T>) {
    v = reinterpret_cast<T>(__shfl_sync(0xffffffff, reinterpret_cast<uintptr_t>(v), lane));
  } else {
    v = __shfl_sync(0xffffffff, v, lane);
  }
}

// v of lane 0, if it is the same in all lanes, which the compiler then knows: it keeps what follows
// from it in uniform registers, and takes branches without preparing for lanes to part. All lanes
// must call it.
template <typename T>
__device__ __forceinline__ T uniform(T v) {
  return __shfl_sync(0xffffffff, v, 0);
}

// How a channel-first kernel may access the rows of its tensors: they begin and end 16-byte
// aligned; they are as far from that as rows that lie one after the other from an aligned one on;
// they have unit stride over time, but any alignment; or any stride.
enum class Access { kAligned, kDense, kUnit, kStrided };

// Whether rows may begin or end within a granule that they share with others.
template <Access ACCESS>
constexpr bool kIsRagged = ACCESS == Access::kDense || ACCESS == Access::kUnit;

constexpr int kFar = 1 << 30;  // further than any step of a tile
constexpr int kNowhere = -kFar;

// Elements in the 16 bytes that memory is accessed by.
template <typename T>
constexpr int kGranule = 16 / static_cast<int>(sizeof(T));

template <typename T>
__device__ __forceinline__ int misalignment(const T* p) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(p) / sizeof(T) % kGranule<T>);
}

// Words w from element `offset` on, 0 <= offset < kGranule.
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

// Reads a row in tiles of 32 lanes with V adjacent time steps each, and with them the HP steps
// before. Steps t are relative to `data`. The row is [lo, hi); elsewhere a lane gets anything,
// or zeros where it touches no memory. With unit stride memory is read by whole granules, also
// those that the row shares with its neighbours, if they lie before `end`, the tensor's end.
template <typename T, int V, int HP, Access ACCESS>
class RowReader {
  static constexpr int kWords = Pack<T, HP + V>::kWords, kHalo = kWords - Pack<T, V>::kWords;
  static constexpr int kRaw = kWords + (ACCESS == Access::kUnit ? 4 : 0);
  static constexpr int G = kGranule<T>;

 public:
  struct Raw {
    uint32_t w[kRaw] = {};
  };

  __device__ __forceinline__ RowReader(const T* data, int64_t stride, const T* end, int lo, int hi,
                                       int lane)
      : data_(data), stride_(stride), lo_(lo), hi_(hi), lane_(lane) {
    if (ACCESS == Access::kUnit) shift_ = misalignment(data);
    const int64_t room = (end - data) + shift_ - V - (shift_ == 0 ? 0 : G);
    whole_ = static_cast<int>(min(room, int64_t(1) << 30));
    own_ = data + (lane * V - shift_);
    asm volatile("" : "+l"(own_));
  }

  // Whether granules() may read the tiles up to end.
  __device__ __forceinline__ bool whole(int end) const {
    // Aligned rows end with their granules, as does the tensor.
    if (ACCESS == Access::kAligned && V == G) return true;
    return ACCESS != Access::kStrided && (end - 1) / V * V <= whole_;
  }

  // Starts to load what own() makes steps t - HP .. t + V - 1 of, t being the lane's first in the
  // tile at base, by granules.
  __device__ __forceinline__ Raw granules(int base) const {
    Raw r;
    const int t = base + lane_ * V, begin = t - shift_;
    const bool inside = t < hi_;
    const T* p = own_ + base;
#pragma unroll
    for (int i = 0; i < V; i += G) {
      const bool touches = ACCESS != Access::kUnit || begin + i + G > lo_;
      load_words_if<4>(inside && touches, p + i, &r.w[kHalo + i / G * 4]);
    }
    if constexpr (ACCESS == Access::kUnit) {
      load_words_if<4>(inside && shift_ != 0, p + V, &r.w[kWords]);
    }
    if constexpr (kHalo > 4) {  // two granules
      load_words_if<4>(inside && begin - G > lo_, p - 2 * G, &r.w[0]);
      load_words_if<4>(inside && begin > lo_, p - G, &r.w[4]);
    } else if constexpr (kHalo > 0) {
      load_words_if<kHalo>(inside && begin > lo_, p - HP, &r.w[0]);
    }
    return r;
  }

  // The same for any tile.
  __device__ __forceinline__ Raw load(int base) const {
    if (whole(base + lane_ * V + V)) return granules(base);
    Raw r;
    const int begin = base + lane_ * V - shift_ - HP;
    // Not unrolled: with unit stride only the end of a tensor comes here.
#pragma unroll 1
    for (int i = 0; i < kRaw * 4 / static_cast<int>(sizeof(T)); ++i) {
      if (begin + i < lo_ || begin + i >= hi_) continue;
      const T* p = data_ + (begin + i) * (ACCESS == Access::kStrided ? stride_ : 1);
      uint32_t bits = 0;
      if constexpr (sizeof(T) == 2) {
        bits = uint32_t(*reinterpret_cast<const uint16_t*>(p)) << i % 2 * 16;
      } else {
        bits = *reinterpret_cast<const uint32_t*>(p);
      }
      const int word = i * static_cast<int>(sizeof(T)) / 4;
#pragma unroll
      for (int j = 0; j < kRaw; ++j) r.w[j] |= j == word ? bits : 0;
    }
    return r;
  }

  __device__ __forceinline__ Pack<T, HP + V> own(Raw r) const {
    if (ACCESS == Access::kUnit && shift_ != 0) drop_elements<T>(r.w, shift_);
    Pack<T, HP + V> p;
#pragma unroll
    for (int i = 0; i < kWords; ++i) p.w[i] = r.w[i];
    return p;
  }

 private:
  const T* data_;
  int64_t stride_;
  const T* own_;
  int lo_, hi_, lane_, whole_, shift_ = 0;
};

// Reads rows in the same tiles by cp.async to shared memory that each warp has for itself. A tile
// comes with the granules before and after it that its lanes need. Memory is read by whole
// granules; those without a step of the row read as zero, and what outside() tells is to be made
// zero when the tile has come.
template <typename T, int V, int HP, Access ACCESS>
class TileReader {
  static constexpr int kWords = Pack<T, HP + V>::kWords, kHalo = kWords - Pack<T, V>::kWords;
  static constexpr int kRaw = kWords + (ACCESS == Access::kUnit ? 4 : 0);
  static constexpr int G = kGranule<T>, TILE = 32 * V, kSize = static_cast<int>(sizeof(T));
  static constexpr int kBefore = (kHalo + 3) / 4, kAfter = ACCESS == Access::kUnit ? 1 : 0;

 public:
  // Whether a tile in shared memory begins where it does in a line of memory.
  static constexpr bool kPlaced = ACCESS == Access::kDense;
  // Those in shared memory before and after a tile that are written too.
  static constexpr int kBytesBefore = kBefore * 16, kBytesAfter = kAfter * 16;

  __device__ __forceinline__ explicit TileReader(int lane) : lane_(lane) {}

  // Before the first row(): step 0 of a row is at data, if its tiles begin there, and then the row
  // begins at step lo.
  __device__ __forceinline__ void begin(const T* data, int64_t stride, int lo) {
    mine_ = ACCESS == Access::kStrided ? data : data + lane_ * V;
    stride_ = stride;
    place_ = lane_ * V - (lo - (G - 1));
  }
  // What start() reads from now on: the row so many elements after the one before, whose tiles
  // begin `offset` steps before lo's would. lo is as before.
  __device__ __forceinline__ void row(int64_t after, int offset, int lo) {
    const int before = lane_ * V + (G - 1) - place_ - lo;  // how many steps mine_ was moved back by
    int shift = 0;
    if (ACCESS == Access::kStrided) {
      mine_ += after + (before - offset) * stride_;
    } else {
      mine_ += after + (before - offset);
      if (ACCESS == Access::kUnit) shift = uniform(misalignment(mine_));
      mine_ -= shift;
    }
    shifted_ = shift != 0;
    if (ACCESS != Access::kStrided) keep(mine_);
    if (kPlaced) {
      line_ = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(mine_)) - lane_ * V * kSize;
      line_ &= 127;
    }
    place_ = lane_ * V - (lo + offset + shift - (G - 1));
  }

  // Granules of a row [lo, hi) begin less than this after the first that may have a step of it.
  static __device__ __forceinline__ uint32_t span(int lo, int hi) {
    return static_cast<uint32_t>(hi) - static_cast<uint32_t>(lo) + (G - 1);
  }

  // Starts to read the tile at base of a row to where the lane's own bytes are `to`. It takes
  // effect with commit_copies().
  __device__ __forceinline__ void start(uint32_t to, int base, uint32_t span) const {
    if (kPlaced) to += line_;
    const int place = base + place_;
    if constexpr (ACCESS == Access::kStrided) {
#pragma unroll
      for (int i = 0; i < V; i += G) granule(to + i * kSize, base, lane_ * V + i, span);
      const int i = (lane_ - kBefore) * G - lane_ * V;
      if (lane_ < kBefore) granule(to + i * kSize, base, lane_ * V + i, span);
    } else {
      const T* from = mine_ + base;
#pragma unroll
      for (int i = 0; i < V; i += G) {
        copy_async_or_zero<16>(static_cast<uint32_t>(place + i) < span, to + i * kSize, from + i);
      }
      if (kBefore > 0 && lane_ < kBefore) {
        const int i = (lane_ - kBefore) * G - lane_ * V;
        copy_async_or_zero<16>(static_cast<uint32_t>(place + i) < span, to + i * kSize, from + i);
      }
    }
  }

  // Whether start_after() is needed: the row is misaligned.
  __device__ __forceinline__ bool is_shifted() const { return kAfter > 0 && shifted_; }
  // Starts to read the granule after that tile.
  __device__ __forceinline__ void start_after(uint32_t to, int base, uint32_t span) const {
    const bool inside = static_cast<uint32_t>(base + place_ + V) < span;
    if (lane_ == 31) copy_async_or_zero<16>(inside, to + V * kSize, mine_ + base + V);
  }

  // Of a row [lo, hi) misaligned by shift, with kDense or kUnit: the place, from the row's tile at
  // 0 on, that one of 2 * G lanes is to make zero where a tile has it, since it shares the first or
  // the last step's granule; or kNowhere.
  static __device__ __forceinline__ int outside(int lo, int hi, int shift, int lane) {
    const bool last = (lane & G) != 0;
    const int edge = (last ? hi : lo) + shift, place = (edge & -G) + lane % G;
    return (last ? place >= edge : place < edge) ? place : kNowhere;
  }
  // Where place 0 of the tile is of which the lane's own bytes are at own.
  __device__ __forceinline__ uint32_t tile(uint32_t own) const { return own - lane_ * V * kSize; }
  // Places of a tile, with the granule after it.
  static constexpr int kPlaces = TILE + kAfter * G;

  // Loads the last G steps of a row [lo, hi), misaligned by shift and with step 0 at data, if they
  // are of the tile at base, to it.
  __device__ __forceinline__ void load_end(uint32_t own, int base, int lo, int hi, int shift,
                                           const T* data) const {
    const int t = hi - 1 - lane_, i = t + shift - base;
    if (lane_ < G && t >= lo && i >= -kBefore * G && i < kPlaces) {
      store_shared(tile(own) + i * kSize, data[t]);
    }
  }

  // Steps t - HP .. t + V - 1 of the tile, t being the lane's first, where the row is misaligned by
  // shift. All lanes must have waited for the tile.
  static __device__ __forceinline__ Pack<T, HP + V> read(uint32_t own, int shift) {
    uint32_t w[kRaw];
    words<0, kHalo>(w, own - HP * kSize);
    words<kHalo, kWords - kHalo>(w, own);
    if (ACCESS == Access::kUnit && shift != 0) {
      words<kWords, kRaw - kWords>(w, own + V * kSize);
      drop_elements<T>(w, shift);
    }
    Pack<T, HP + V> p;
#pragma unroll
    for (int i = 0; i < kWords; ++i) p.w[i] = w[i];
    return p;
  }

 private:
  // With kStrided, the steps at place i of the tile at base.
  __device__ __forceinline__ void granule(uint32_t to, int base, int i, uint32_t span) const {
    Pack<T, G> p;
#pragma unroll
    for (int j = 0; j < G; ++j) {
      const uint32_t from_lo = base + place_ + (i - lane_ * V) + j - (G - 1);
      if (from_lo >= span - (G - 1)) continue;
      p.set_element(j, mine_[(base + i + j) * stride_]);
    }
    store_shared(to, p);
  }

  template <int FIRST, int COUNT>
  static __device__ __forceinline__ void words(uint32_t (&w)[kRaw], uint32_t from) {
    if constexpr (COUNT > 0) {
      const auto p = load_shared<T, COUNT * 4 / kSize>(from);
#pragma unroll
      for (int i = 0; i < COUNT; ++i) w[FIRST + i] = p.w[i];
    }
  }

  const T* mine_;
  int64_t stride_;
  int place_, lane_;  // place_: of the lane's granule in a tile at 0, from the row's first on
  bool shifted_ = false;
  uint32_t line_ = 0;
};

// Writes steps [lo, hi) of a row.
template <typename T, int V, Access ACCESS>
class RowWriter {
  static constexpr int kWords = Pack<T, V>::kWords, kBytes = kWords * 4, G = kGranule<T>;

 public:
  __device__ __forceinline__ RowWriter(T* data, int64_t stride, int lo, int hi, int lane)
      : own_(ACCESS == Access::kStrided ? data : data + lane * V),
        stride_(stride),
        lo_(lo),
        hi_(hi),
        lane_(lane) {
    if (ACCESS == Access::kUnit) shift_ = misalignment(data);
    asm volatile("" : "+l"(own_));
  }

  // Takes the row so many elements after this one.
  __device__ __forceinline__ void row(int64_t after, int lo, int hi) {
    own_ += after;
    lo_ = lo;
    hi_ = hi;
    if (ACCESS == Access::kUnit) shift_ = uniform(misalignment(own_));
    keep(own_);
  }

  // The lane's steps of a tile at base, where the row begins and ends with the granules.
  __device__ __forceinline__ void write_granules(int base, const Pack<T, V>& v) const {
#pragma unroll
    for (int i = 0; i < V / G; ++i) {
      if (base + lane_ * V + i * G < hi_) v.template part<G>(i).store(own_ + base + i * G);
    }
  }

  // The lane's V steps of a tile at base. Their place is aligned, but for kStrided.
  __device__ __forceinline__ void write(int base, const Pack<T, V>& v) const {
    const int t = base + lane_ * V;
    if (ACCESS != Access::kStrided && t >= lo_ && t + V <= hi_) {
      v.store(own_ + base);
      return;
    }
#pragma unroll
    for (int i = 0; i < V; ++i) {
      if (t + i < lo_ || t + i >= hi_) continue;
      if constexpr (ACCESS == Access::kStrided) {
        own_[(t + i) * stride_] = v.element(i);
      } else {
        own_[base + i] = v.element(i);
      }
    }
  }

  // The step that the lane stores for store(), of those of the first and the last vector if these
  // are inside in part; or kNowhere.
  __device__ __forceinline__ int edge_step() const {
    const bool last = (lane_ & V) != 0;
    const int from = shift_ == 0 ? 0 : G - shift_;  // where vectors begin
    const int edge = (last ? hi_ : lo_) - from, step = (edge & -V) + lane_ % V + from;
    const bool takes = lane_ < 2 * V && edge % V != 0 && step >= lo_ && step < hi_;
    return takes ? step : kNowhere;
  }

  // A tile, all of it inside or not, in descending order of tiles. If the row is not
  // aligned as the tiles are, a lane's vector takes its beginning from the next lane, lane 31's
  // from lane 0 of the tile before. room and head are in shared memory, for a tile and for a
  // granule that is left there for the next tile. step is edge_step().
  __device__ __forceinline__ void store(bool inside, int base, const Pack<T, V>& tile,
                                        uint32_t room, uint32_t head, int step) const {
    if (ACCESS == Access::kUnit && shift_ != 0) {
      const uint32_t own = room + lane_ * kBytes;
      __syncwarp();
      store_shared(own, tile);
      __syncwarp();
      const Pack<T, G> next = load_shared<T, G>(lane_ == 31 ? head : own + kBytes);
      __syncwarp();
      if (lane_ == 0) store_shared(head, tile.template part<G>(0));
      uint32_t c[kWords + 4];
#pragma unroll
      for (int i = 0; i < kWords + 4; ++i) c[i] = i < kWords ? tile.w[i] : next.w[i - kWords];
      drop_elements<T>(c, G - shift_);
      Pack<T, V> v;
#pragma unroll
      for (int i = 0; i < kWords; ++i) v.w[i] = c[i];
      const int begin = base + G - shift_;
      store_aligned(begin >= lo_ && begin + 32 * V <= hi_, begin, v, room, step);
    } else {
      store_aligned(inside, base, tile, room, step);
    }
  }

  // After the last tile, at 0: what is left at head.
  __device__ __forceinline__ void flush(uint32_t head) const {
    if (ACCESS != Access::kUnit || shift_ == 0) return;
    __syncwarp();
    if (lane_ < G - shift_ && lane_ >= lo_ && lane_ < hi_) {
      own_[lane_ - lane_ * V] = load_shared<T>(head + lane_ * int(sizeof(T)));
    }
  }

 private:
  __device__ __forceinline__ void store_aligned(bool inside, int base, const Pack<T, V>& v,
                                                uint32_t room, int step) const {
    if (ACCESS == Access::kStrided) return write(base, v);
    if (inside) {
      v.store(own_ + base);
      return;
    }
    const int t = base + lane_ * V;
    if (t >= lo_ && t + V <= hi_) v.store(own_ + base);
    __syncwarp();
    store_shared(room + lane_ * kBytes, v);
    __syncwarp();
    const int i = step - base;
    if (i >= 0 && i < 32 * V) own_[step - lane_ * V] = load_shared<T>(room + i * int(sizeof(T)));
  }

  T* own_;  // the lane's, or with kStrided the row's
  int64_t stride_;
  int lo_, hi_, lane_, shift_ = 0;
};

// A warp's part of a row: steps [origin, origin + chunk) of it, in local time from 0.
// offset: how far before the row's first step the first part begins.
struct Segment {
  int64_t origin;
  int lo, hi;  // the row
  int end;     // of the part: the chunk's, or the row's

  __device__ __forceinline__ Segment(int64_t index, int64_t chunk, int offset, int64_t seqlen)
      : origin(index * chunk - offset), chunk_(static_cast<int>(chunk)) {
    lo = static_cast<int>(max(-origin, int64_t(-kFar)));
    hi = static_cast<int>(min(seqlen - origin, int64_t(kFar)));
    end = min(chunk_, hi);
  }

  // The same with another offset, this one's being 0.
  __device__ __forceinline__ Segment with(int offset) const {
    Segment s = *this;
    s.origin -= offset;
    s.lo += offset;
    s.hi += offset;
    s.end = min(chunk_, s.hi);
    return s;
  }

 private:
  int chunk_;
};

// The ids of N steps from t on; ids.data is at t = 0. As for x~, steps before the row have the id
// of its first; those after it have -1.
template <int N>
__device__ __forceinline__ void load_ids(const SeqIdx& ids, int t, int lo, int hi, int (&id)[N]) {
  if (t >= lo && t + N <= hi && ids.time == 1) {
    const int32_t* p = ids.data + t;
#pragma unroll
    for (int i = 0; i < N; ++i) id[i] = p[i];
    return;
  }
#pragma unroll
  for (int i = 0; i < N; ++i) id[i] = t + i < hi ? ids.at(0, max(t + i, lo)) : -1;
}

// Whether steps from first to last - 1 have one id, and not that of padding. ids.data is at 0. The
// warp's first lanes, as many as given, share the work.
__device__ __forceinline__ bool one_id(const SeqIdx& ids, int first, int last, int lanes) {
  const int any = ids.at(0, first);
  bool same = any >= 0;
#pragma unroll 4
  for (int t = first + static_cast<int>(threadIdx.x) % 32; t < last; t += lanes) {
    same &= ids.at(0, t) == any;
  }
  return __all_sync(lanes == 32 ? 0xffffffff : (1u << lanes) - 1, same);
}

// For groups of U rows, of rows 0 to count - 1: a bit each, set if the ids of a group and of the
// U - 1 rows before it are not one, or that of padding. There are at most 64; ids.data is at 0, and
// rows outside [first, last) count as the nearest inside. All lanes must call it.
template <int U>
__device__ __forceinline__ uint64_t mixed_groups(const SeqIdx& ids, int first, int last,
                                                 int count) {
  uint64_t mixed = 0;
#pragma unroll 1
  for (int group = 0; group * U < count; group += 32) {
    const int row = (group + static_cast<int>(threadIdx.x) % 32) * U;
    const int id = ids.at(0, min(row + U, last) - 1);
    bool one = id >= 0;
#pragma unroll
    for (int j = 1 - U; j < U - 1; ++j) one &= ids.at(0, max(min(row + j, last - 1), first)) == id;
    mixed |= uint64_t(__ballot_sync(0xffffffff, !one)) << group;
  }
  return mixed;
}

// The ids of N steps from base on, for the same question about them, answered once they have come.
// Steps outside [lo, hi) count as the nearest inside.
template <int N>
class IdWindow {
  static constexpr int kEach = (N + 31) / 32;

 public:
  __device__ __forceinline__ void load(const SeqIdx& ids, int base, int lo, int hi, int lane) {
    if (base >= lo && base + N <= hi && ids.time == 1) {
      const int32_t* p = ids.data + base + lane;
#pragma unroll
      for (int i = 0; i < kEach - 1; ++i) id_[i] = p[i * 32];
      id_[kEach - 1] = ids.data[base + min(lane + (kEach - 1) * 32, N - 1)];
      return;
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int t = base + min(i * 32 + lane, N - 1);
      id_[i] = ids.at(0, max(min(t, hi - 1), lo));
    }
  }
  __device__ __forceinline__ bool one() const {
    const int any = __shfl_sync(0xffffffff, id_[0], 0);
    bool same = any >= 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) same &= id_[i] == any;
    return __all_sync(0xffffffff, same);
  }

 private:
  int id_[kEach] = {};
};

// What mixed tiles ask of seq_idx, for V + H steps: a byte each, whose bit k < H tells whether the
// input H - k steps back has the step's id; kPadding if that is negative. Rows of such bytes are
// prepared for all channels by a kernel of their own, find_matches.
template <int V, int H>
class Matches {
  static constexpr int kSteps = V + H, kWords = (kSteps + 3) / 4;

 public:
  static constexpr uint32_t kPadding = 0x80, kAll = (1u << H) - 1;
  // In a row, before its first step, and after its tiles; more than are read, so that blocks of
  // find_matches begin where tiles do.
  static constexpr int kBefore = 2 * kThreads, kAfter = 2 * kThreads;

  // Loads those of the steps from the one at row on, which has any alignment.
  __device__ __forceinline__ void load(const uint8_t* row) {
    const int offset = static_cast<int>(reinterpret_cast<uintptr_t>(row) % 4);
    const uint32_t* words = reinterpret_cast<const uint32_t*>(row - offset);
    uint32_t next = words[0];
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const uint32_t own = next;
      next = words[i + 1];
      of_[i] = __funnelshift_r(own, next, 8 * offset);
    }
  }
  // The same of the ids of those steps, for inputs that are among them.
  __device__ __forceinline__ void compare(const int (&id)[kSteps]) {
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      uint32_t match = id[i] < 0 ? kPadding : 0;
#pragma unroll
      for (int k = i < H ? H - i : 0; k < H; ++k) match |= (id[i - H + k] == id[i]) << k;
      of_[i / 4] |= match << i % 4 * 8;
    }
  }
  // Whether the input of tap k, 0 <= k <= H, counts for step i.
  __device__ __forceinline__ bool at(int i, int k) const {
    return k == H || (of_[i / 4] & 1u << (i % 4 * 8 + k)) != 0;
  }
  __device__ __forceinline__ bool is_padding(int i) const {
    return (of_[i / 4] & kPadding << i % 4 * 8) != 0;
  }

 private:
  uint32_t of_[kWords] = {};
};

// The same for N steps of a whole row, from t on.
template <int N>
__device__ __forceinline__ void load_ids(const SeqIdx& row, int64_t t, int64_t seqlen,
                                         int (&id)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) id[i] = t + i < seqlen ? row.at(0, max(t + i, int64_t(0))) : -1;
}

// lane's v of lane from, or 0 if that is not one of the first 8. All lanes must call it.
__device__ __forceinline__ float from_lane(float v, int from) {
  const float r = __shfl_sync(0xffffffff, v, from & 31);
  return from >= 0 && from < 8 ? r : 0.0f;
}

// Column j of (b, d), or the nearest of the count > 0 that there are: a load by some lanes alone
// would make the compiler prepare all loops around it for lanes to part.
__device__ __forceinline__ float load_nearest(const AnyView<float>& states, int64_t b, int64_t d,
                                              int j, int count) {
  return states.load(b, d, max(min(j, count - 1), 0));
}

// Puts the initial_states of (b, d) into a lane's inputs h at t - H, t - H + 1, ... of the row that
// begins at lo. first is H + 1 - W. All lanes must call it.
template <int H, typename Args, int N>
__device__ __forceinline__ void take_states(const Args& p, int64_t b, int64_t d, int lane,
                                            int first, int t, int lo, float (&h)[N]) {
  // Lane j's is x~ at lo - H + j.
  const float state = load_nearest(p.initial_states, b, d, lane - first, p.width - 1);
  const float mine = lane < first ? 0.0f : state;
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const int from = t + j - lo;
    const float before = from_lane(mine, from);
    if (from < H) h[j] = before;
  }
}

// The weights of channel d as taps WMAX - W .. WMAX - 1, and its bias or 0, all lanes alike: each
// lane fetches one weight, and all the bias. The constructor starts to load them and get()
// converts. EXACT: W is WMAX.
template <int WMAX, bool EXACT>
class WarpParameters {
 public:
  template <typename Args>
  __device__ __forceinline__ WarpParameters(const Args& p, int64_t d, int lane) {
    if (lane < (EXACT ? WMAX : p.width)) weight_ = p.weight.bits(d, lane);
    if (p.bias.given()) bias_ = p.bias.bits(d);
  }

  template <typename Args>
  __device__ __forceinline__ void get(const Args& p, float (&w)[WMAX], float& bias) const {
    const int width = EXACT ? WMAX : p.width;
    const float mine = AnyView<float>::convert(weight_, p.weight.dtype) * p.scale;
#pragma unroll
    for (int k = 0; k < WMAX; ++k) {
      const int from = k - (WMAX - width);
      w[k] = __shfl_sync(0xffffffff, mine, max(from, 0));
      if (from < 0) w[k] = 0.0f;
    }
    bias = AnyView<float>::convert(bias_, p.bias.dtype) * p.scale;
  }

 private:
  uint32_t weight_ = 0, bias_ = 0;
};

// What all rows of the tensors allow.
inline Access common_access(std::initializer_list<const Tensor*> tensors, int size) {
  const int G = 16 / size;
  bool aligned = true, dense = true;
  for (const Tensor* t : tensors) {
    const int64_t dim = t->sizes[1], seqlen = t->sizes[2];
    const int width = vector_width(*t, 2, G, size);
    if (width == 0) return Access::kStrided;
    // What follows the last granule's steps in memory may be another's.
    aligned = aligned && width == G && seqlen % G == 0;
    dense = dense && reinterpret_cast<uintptr_t>(t->data) % 16 == 0 &&
            (dim <= 1 || (t->strides[1] - seqlen) % G == 0) &&
            (t->sizes[0] <= 1 || (t->strides[0] - dim * seqlen) % G == 0);
  }
  return aligned ? Access::kAligned : (dense ? Access::kDense : Access::kUnit);
}

constexpr int64_t kMostParts = 0x7ffffff0;  // that a Divisor can number, and a block more

// Splits n = outer * count + i < 2^31 into its parts by a multiplication, since a thread waits for
// it before its first load.
struct Divisor {
  uint32_t count = 1, multiplier = 0, shift = 0;

  Divisor() = default;
  explicit Divisor(int64_t n) {
    if (n <= 1 || n > kMostParts) return;  // if it is more, no kernel is started that splits by it
    count = static_cast<uint32_t>(n);
    while ((int64_t(1) << shift) < n) ++shift;  // 2^shift >= n > 2^(shift-1)
    // Rounded up; 2^(31+shift) / n < 2^32.
    multiplier = static_cast<uint32_t>(((uint64_t(1) << (31 + shift)) + count - 1) / count);
  }
  __device__ __forceinline__ uint32_t split(uint32_t n, uint32_t* i) const {
    const uint32_t q =
        multiplier == 0 ? n : static_cast<uint32_t>(uint64_t(n) * multiplier >> 31 >> shift);
    *i = n - q * count;
    return q;
  }
};

// How channel-last kernels divide the (chunk, column) plane, a column being a thread's C channels:
// a block is as many columns wide as there are, a power of two up to a warp, and kThreads / that
// many chunks high.
struct Columns {
  int64_t count = 0, chunks = 0;
  int bits = 0;
  Divisor across, down;  // blocks

  Columns() = default;
  // bits: of the columns a block is wide, or -1 for what suits.
  Columns(int64_t columns, int64_t chunks, int bits) : count(columns), chunks(chunks), bits(bits) {
    if (bits < 0) {
      this->bits = 0;
      while (this->bits < 5 && int64_t(1) << this->bits < columns) ++this->bits;
    }
    const int64_t width = int64_t(1) << this->bits;
    across = Divisor(ceil_div(columns, width));
    down = Divisor(ceil_div(chunks, kThreads / width));
  }
  int64_t threads(int64_t batch) const { return batch * down.count * across.count * kThreads; }
};

// The calling thread's place in that plane.
struct ColumnChunk {
  uint32_t b, chunk, column, part;  // part: which block of chunks
  bool inside;                      // of the plane of batch entry b

  __device__ __forceinline__ explicit ColumnChunk(const Columns& columns) {
    uint32_t across;
    b = columns.down.split(columns.across.split(blockIdx.x, &across), &part);
    column = (across << columns.bits) + (threadIdx.x & ((1 << columns.bits) - 1));
    chunk = part * (kThreads >> columns.bits) + (threadIdx.x >> columns.bits);
    inside = column < columns.count && chunk < columns.chunks;
  }
};

}  // namespace causal_conv1d::gpu
