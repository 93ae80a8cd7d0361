// The ids of a tile's steps, see seq_idx.cuh.
//
// Most tiles have one id and need no more care than without seq_idx: OneId, mixed_groups() and
// ChunkMatches tell which. The others are "mixed", and ask for each tap of each step: takes() and
// is_padding() of IdMatches, which holds ids, of Matches, which holds a byte per step, or of
// WarpMatches, which holds a word per tap. IdCuts tells where ids begin instead.
#pragma once

#include "pack.cuh"
#include "ptx.cuh"
#include "schedule.cuh"
#include "seq_idx.cuh"

namespace causal_conv1d::gpu {

// The ids of N steps from t on of the row [0, seqlen). As for x~, steps before the row have the id
// of its first; those after it have -1.
template <int N>
__device__ __forceinline__ void load_ids(const SeqIdx& ids, int64_t t, int64_t seqlen,
                                         int (&id)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) id[i] = t + i < seqlen ? ids.at(0, max(t + i, int64_t(0))) : -1;
}

// Whether N steps have one id, and that is not negative: load() starts to load them, one() answers.
// All lanes of a warp must call both.
template <int N>
class OneId {
 public:
  // The steps before `last`; those before `first` count as that one. ids.data is at 0.
  __device__ __forceinline__ void load(const SeqIdx& ids, int first, int last) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int step = min(static_cast<int>(threadIdx.x) % 32 + i * 32, N - 1);
      id_[i] = ids.at(0, max(last - N + step, first));
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
  static constexpr int kEach = (N + 31) / 32;
  int id_[kEach] = {};
};

// A bit for each group of U of the rows [0, count), up to as many groups as Groups has bits: not
// set if the group and the U - 1 rows before it have one id, and that is not negative. Rows outside
// [first, last) count as the nearest inside. ids.data is at 0. All lanes must call it.
template <int U, typename Groups>
__device__ __forceinline__ Groups mixed_groups(const SeqIdx& ids, int first, int last, int count) {
  Groups mixed = 0;
#pragma unroll 1
  for (int group = 0; group * U < count; group += 32) {
    const int row = (group + static_cast<int>(threadIdx.x) % 32) * U;
    const int id = ids.at(0, min(row + U, last) - 1);
    bool one = id >= 0;
#pragma unroll
    for (int j = 1 - U; j < U - 1; ++j) one &= ids.at(0, max(min(row + j, last - 1), first)) == id;
    mixed |= Groups(__ballot_sync(0xffffffff, !one)) << group;
  }
  return mixed;
}

// For N steps and the H before each: the ids.
template <int N, int H>
struct IdMatches {
  int id[H + N];  // from H steps before the first on

  // Whether the input of tap k, 0 <= k <= H, counts for step i.
  __device__ __forceinline__ bool takes(int i, int k) const { return id[i + k] == id[H + i]; }
  __device__ __forceinline__ bool is_padding(int i) const { return id[H + i] < 0; }
};

// For N steps that a warp's lanes all have: the steps at which another id begins than that of the
// step before. Between two of these all inputs count, if no id comes back within H steps.
template <int N, int H>
class IdCuts {
  static_assert(H + N <= 32, "a step per lane");

 public:
  // For the steps from t on of the row [0, seqlen); those outside have the id of the nearest
  // inside. ids.data is at step 0. False if an id comes back, then this is of no use.
  __device__ __forceinline__ bool find(const SeqIdx& ids, int64_t t, int64_t seqlen) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int step = min(lane, H + N - 1) - H;
    const int id = ids.at(0, max(min(t + step, seqlen - 1), int64_t(0)));
    bool one = true, back = false;  // of this step and those before
#pragma unroll
    for (int k = 1; k <= H; ++k) {
      const bool same = __shfl_up_sync(0xffffffff, id, k) == id;
      if (k == 1) begins_ = __ballot_sync(0xffffffff, !same && lane > 0 && lane < H + N);
      back |= same && !one;
      one &= same;
    }
    padding_ = __ballot_sync(0xffffffff, id < 0) >> H;
    return !__any_sync(0xffffffff, back && lane >= H && id >= 0);
  }

  // Whether another id begins with step i.
  __device__ __forceinline__ bool begins(int i) const { return (begins_ & 1u << (H + i)) != 0; }
  // Whether one begins after the step H - j before the first, and before that.
  __device__ __forceinline__ bool begins_after(int j) const {
    return (begins_ & ((1u << H) - (2u << j))) != 0;
  }
  __device__ __forceinline__ bool is_padding(int i) const { return (padding_ & 1u << i) != 0; }

 private:
  uint32_t begins_ = 0, padding_ = 0;
};

// For N steps that a warp's lanes all have, and the H before each.
template <int N, int H>
class WarpMatches {
  static_assert(H + N <= 32, "a step per lane");

 public:
  // Of the steps from t on of the row [0, seqlen); those outside have the id of the nearest inside.
  // ids.data is at step 0. All lanes must call it.
  __device__ __forceinline__ void find(const SeqIdx& ids, int64_t t, int64_t seqlen) {
    const int step = min(static_cast<int>(threadIdx.x) % 32, H + N - 1) - H;
    const int id = ids.at(0, max(min(t + step, seqlen - 1), int64_t(0)));
#pragma unroll
    for (int n = 1; n <= H; ++n) {
      match_[n] = __ballot_sync(0xffffffff, __shfl_up_sync(0xffffffff, id, n) == id);
    }
    match_[0] = __ballot_sync(0xffffffff, id < 0);
  }

  // Whether the input n steps before step i counts for it, 0 <= n <= H, i - n >= -H.
  __device__ __forceinline__ bool takes(int i, int n) const {
    return n == 0 || (match_[n] & 1u << (H + i)) != 0;
  }
  __device__ __forceinline__ bool is_padding(int i) const {
    return (match_[0] & 1u << (H + i)) != 0;
  }

 private:
  uint32_t match_[H + 1] = {};  // of n, a bit per step; of 0: is it padding
};

// A byte: bit k < H tells whether the input H - k steps back counts; kPadding alone is padding.
constexpr uint32_t kPadding = 0x80;
template <int H>
constexpr uint32_t kAllMatch = (1u << H) - 1;

// That of a step of id[H], the ids before it being id[0], ... id[H - 1]. Taps before `first` do not
// count: see has_tap().
template <int H>
__device__ __forceinline__ uint32_t match_byte(const int* id, int first = 0) {
  uint32_t match = 0;
#pragma unroll
  for (int k = 0; k < H; ++k) match |= k >= first && id[k] == id[H] ? 1u << k : 0;
  return id[H] < 0 ? kPadding : match;
}

// With H = 3, the byte of a pair of steps: bits 1 to 3 are of the first, 4 to 6 of the second. One
// instruction makes six predicates of them.
__device__ __forceinline__ uint32_t pair_byte(uint32_t match, uint32_t next) {
  return (match & kPadding) | (match & kAllMatch<3>) << 1 | (next & kAllMatch<3>) << 4;
}

// For N steps: those bytes. PAIRS: those of pairs, of which the even ones are used.
template <int N, int H, bool PAIRS = false>
class Matches {
  static constexpr int kWords = (N + 3) / 4;

 public:
  // Loads them from bytes in global memory, of any alignment.
  __device__ __forceinline__ void load(const uint8_t* bytes) {
    const int offset = static_cast<int>(reinterpret_cast<uintptr_t>(bytes) % 4);
    const uint32_t* words = reinterpret_cast<const uint32_t*>(bytes - offset);
    uint32_t next = words[0];
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const uint32_t own = next;
      next = words[i + 1];
      of_[i] = __funnelshift_r(own, next, 8 * offset);
    }
  }
  // The same from an address that is a multiple of 8, if N is more than 4. It may read more bytes,
  // up to a multiple of 8. The compiler takes what two calls load for different values.
  __device__ __forceinline__ void load_aligned(const uint8_t* bytes) {
    constexpr int kLoads = (kWords + 1) / 2;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const auto two = Pack<uint32_t, 2>::load(bytes + 8 * i);
      of_[2 * i] = two.w[0];
      if (2 * i + 1 < kWords) of_[2 * i + 1] = two.w[1];
    }
  }
  // Loads them from shared memory, from byte `at` on; N is a multiple of 4.
  template <bool ALIGNED>
  __device__ __forceinline__ void load_shared(const uint8_t* bytes, int at) {
    const uint32_t* words = reinterpret_cast<const uint32_t*>(bytes) + at / 4;
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const uint32_t next = ALIGNED ? 0 : words[i + 1];
      of_[i] = ALIGNED ? words[i] : __funnelshift_r(words[i], next, at % 4 * 8);
    }
  }
  // As of IdMatches.
  __device__ __forceinline__ bool takes(int i, int k) const {
    return k == H || (of_[i / 4] & 1u << (first_bit(i) + k)) != 0;
  }
  __device__ __forceinline__ bool is_padding(int i) const {
    return (of_[i / 4] & kPadding << i % 4 * 8) != 0;
  }
  // Whether any step is padding. N is a multiple of 4.
  __device__ __forceinline__ bool has_padding() const {
    uint32_t any = 0;
#pragma unroll
    for (int i = 0; i < kWords; ++i) any |= of_[i];
    return (any & kPadding * 0x01010101u) != 0;
  }
  // Makes padding of step i.
  __device__ __forceinline__ void set_padding(int i) {
    of_[i / 4] = (of_[i / 4] & ~(kAllMatch<H> << first_bit(i))) | kPadding << i % 4 * 8;
  }

 private:
  static __device__ __forceinline__ constexpr int first_bit(int i) {
    return PAIRS ? i % 4 / 2 * 16 + i % 2 * H + 1 : i % 4 * 8;
  }

  uint32_t of_[kWords];
};

// The bytes of a block's chunk in shared memory, for a block whose warps have the same steps of
// several channels: a tile of 32 * V steps for each warp. The tiles of a row may begin up to EARLY
// steps before those of the chunk, which begins at step 0 here.
template <int V, int H, int EARLY>
class ChunkMatches {
  static constexpr int TILE = 32 * V, kBefore = H <= 4 ? 4 : 8, kEarly = (EARLY + 7) / 8 * 8;

 public:
  struct alignas(16) Shared {
    uint8_t matches[kEarly + kWarps * TILE + (EARLY > 0 ? 4 : 0)];  // load() reads a word more
    bool mixed[kWarps];
  };

  __device__ __forceinline__ explicit ChunkMatches(Shared* shared) : shared_(shared) {}

  // Finds which tiles have several ids or padding, a bit each; each warp looks at one. All threads
  // of the block must call it, maybe in different places. ids.data is at step 0; steps outside [lo,
  // hi) have the id of the nearest inside. first: see match_byte().
  __device__ __forceinline__ uint32_t find_mixed(const SeqIdx& ids, int lo, int hi,
                                                 int first) const {
    const int warp = threadIdx.x / 32, t = threadIdx.x * V;
    int id[kBefore + V];  // of the lane's V steps, and those before
    load(ids, t - kBefore, lo, hi, id);
    bool one = id[kBefore] >= 0;
#pragma unroll
    for (int i = kBefore - H; i < kBefore + V; ++i) one &= id[i] == id[kBefore];
    const bool mixed = !__all_sync(0xffffffff, one);  // the steps of two lanes overlap
    if (mixed || EARLY > 0) {
      uint32_t words[V / 4] = {};
#pragma unroll
      for (int i = 0; i < V; ++i) {
        words[i / 4] |= match_byte<H>(&id[kBefore - H + i], first) << i % 4 * 8;
      }
#pragma unroll
      for (int i = 0; i < V / 4; ++i) {
        reinterpret_cast<uint32_t*>(shared_->matches + kEarly + t)[i] = words[i];
      }
    }
    bool early = false;  // in warp 0: whether those before the chunk are mixed
    if (EARLY > 0 && warp == 0) {
      const int lane = min(static_cast<int>(threadIdx.x), EARLY - 1);
      int before[H + 1];
      load(ids, -1 - lane - H, lo, hi, before);
      const uint32_t match = match_byte<H>(before, first);
      shared_->matches[kEarly - 1 - lane] = static_cast<uint8_t>(match);
      early = __any_sync(0xffffffff, match != (kAllMatch<H> & ~0u << first));
    }
    if (threadIdx.x % 32 == 0) shared_->mixed[warp] = mixed || early;
    synchronize_warps();
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) bits |= uint32_t(shared_->mixed[i]) << i;
    return EARLY > 0 ? bits | bits << 1 : bits;
  }

  // Those of the V steps from t on, which are in a mixed tile, or EARLY > 0.
  __device__ __forceinline__ Matches<V, H> load(int t) const {
    Matches<V, H> matches;
    matches.template load_shared<EARLY == 0>(shared_->matches, t + kEarly);
    return matches;
  }

 private:
  template <int N>
  static __device__ __forceinline__ void load(const SeqIdx& ids, int t, int lo, int hi,
                                              int (&id)[N]) {
    const int32_t* p = ids.data + t;
    if (N % 4 == 0 && ids.data != nullptr && ids.time == 1 && t >= lo && t + N <= hi &&
        reinterpret_cast<uintptr_t>(p) % 16 == 0) {
#pragma unroll
      for (int i = 0; i < N / 4; ++i) {
        const int4 four = reinterpret_cast<const int4*>(p)[i];
        id[4 * i] = four.x;
        id[4 * i + 1] = four.y;
        id[4 * i + 2] = four.z;
        id[4 * i + 3] = four.w;
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < N; ++i) id[i] = ids.at(0, max(min(t + i, hi - 1), lo));
  }

  Shared* shared_;
};

}  // namespace causal_conv1d::gpu
