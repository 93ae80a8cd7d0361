// seq_idx: an input counts for a step if both have one id; a step whose id is negative is padding.
//
// Most tiles have one id and need no more care than without seq_idx: one_id(), mixed_groups() and
// IdWindow tell which. The others are "mixed", and ask for each tap of each step: takes() and
// is_padding() of IdMatches, which holds ids, or of Matches, which holds a byte per step.
#pragma once

#include "ptx.cuh"
#include "schedule.cuh"
#include "views.cuh"

namespace causal_conv1d::gpu {

// seq_idx, (batch, seqlen); without one every step has id 0. Of 64-bit ids the lower half is read:
// equal halves are equal ids of one sign, as ids fit int32.
struct SeqIdx {
  const int32_t* data;
  int64_t batch, time;

  __device__ __forceinline__ int at(int64_t b, int64_t t) const {
    return data == nullptr ? 0 : data[b * batch + t * time];
  }
  // Whether x~ at s, before the row the state, counts for a step with that id.
  __device__ __forceinline__ bool takes(int64_t b, int64_t s, int id) const {
    return at(b, max(s, int64_t(0))) == id;
  }
  // The same with its origin at (b, t).
  __device__ __forceinline__ SeqIdx from(int64_t b, int64_t t) const {
    return {data == nullptr ? nullptr : data + b * batch + t * time, 0, time};
  }

  // One past the last step of row b that is not padding, or 0. All lanes of a warp must call it:
  // together they look at 32 * kEach steps at a time, from the row's end on.
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
  const int words = t.dtype == CAUSAL_CONV1D_INT64 ? 2 : 1;  // per id, the lower one first
  return {static_cast<const int32_t*>(t.data), t.strides[0] * words, t.strides[1] * words};
}

// The ids of N steps from t on of the row [lo, hi), ids.data being at t = 0. As for x~, steps
// before the row have the id of its first; those after it have -1.
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

// The same of the row [0, seqlen).
template <int N>
__device__ __forceinline__ void load_ids(const SeqIdx& ids, int64_t t, int64_t seqlen,
                                         int (&id)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) id[i] = t + i < seqlen ? ids.at(0, max(t + i, int64_t(0))) : -1;
}

// Whether the steps [first, last) have one id, and that is not negative. The first `lanes` lanes of
// the warp share the work. ids.data is at 0.
__device__ __forceinline__ bool one_id(const SeqIdx& ids, int first, int last, int lanes) {
  const int any = ids.at(0, first);
  bool same = any >= 0;
#pragma unroll 4
  for (int t = first + static_cast<int>(threadIdx.x) % 32; t < last; t += lanes) {
    same &= ids.at(0, t) == any;
  }
  return __all_sync(lanes == 32 ? 0xffffffff : (1u << lanes) - 1, same);
}

// A bit for each group of U of the rows [0, count), up to 64 groups: not set if the group and the
// U - 1 rows before it have one id, and that is not negative. Rows outside [first, last) count as
// the nearest inside. ids.data is at 0. All lanes must call it.
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

// Whether N steps from base on have one id, and that is not negative: load() starts to load them,
// one() answers. Steps outside [lo, hi) count as the nearest inside.
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

// For N steps and the H before each: the ids.
template <int N, int H>
struct IdMatches {
  int id[H + N];  // from H steps before the first on

  // Whether the input of tap k, 0 <= k <= H, counts for step i.
  __device__ __forceinline__ bool takes(int i, int k) const { return id[i + k] == id[H + i]; }
  __device__ __forceinline__ bool is_padding(int i) const { return id[H + i] < 0; }
};

// A byte: bit k < H tells whether the input H - k steps back counts; kPadding alone is padding.
constexpr uint32_t kPadding = 0x80;
template <int H>
constexpr uint32_t kAllMatch = (1u << H) - 1;

// That of a step of id[H], the ids before it being id[0], ... id[H - 1].
template <int H>
__device__ __forceinline__ uint32_t match_byte(const int (&id)[H + 1]) {
  uint32_t match = 0;
#pragma unroll
  for (int k = 0; k < H; ++k) match |= id[k] == id[H] ? 1u << k : 0;
  return id[H] < 0 ? kPadding : match;
}

// For N steps: those bytes.
template <int N, int H>
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
  // Makes them of the steps' ids; inputs before the first step do not count.
  __device__ __forceinline__ void compare(const int (&id)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      uint32_t match = id[i] < 0 ? kPadding : 0;
#pragma unroll
      for (int k = i < H ? H - i : 0; k < H; ++k) match |= (id[i - H + k] == id[i]) << k;
      of_[i / 4] |= match << i % 4 * 8;
    }
  }
  // As of IdMatches.
  __device__ __forceinline__ bool takes(int i, int k) const {
    return k == H || (of_[i / 4] & 1u << (i % 4 * 8 + k)) != 0;
  }
  __device__ __forceinline__ bool is_padding(int i) const {
    return (of_[i / 4] & kPadding << i % 4 * 8) != 0;
  }

 private:
  uint32_t of_[kWords] = {};
};

// The bytes of TILES tiles in shared memory, for a block whose warps have the same steps of several
// channels. The tiles of a row may begin up to EARLY steps before those of the chunk, which begins
// at step 0 here.
template <int TILES, int TILE, int V, int H, int EARLY>
class ChunkMatches {
  enum : int { kAll = 2, kSteps = TILES * TILE + EARLY };
  static_assert(TILES == kWarps, "each warp looks at the ids of one tile");

 public:
  struct alignas(8) Shared {
    uint8_t matches[(kSteps + 3) / 4 * 4 + 4];  // load_shared() reads a word more
    uint8_t mixed[TILES];                       // per tile; kAll: all tiles are to count as mixed
  };

  __device__ __forceinline__ explicit ChunkMatches(Shared* shared) : shared_(shared) {}

  // Finds which tiles are mixed, a bit each, and their bytes. With `all`, of any warp, every tile
  // counts as mixed. All threads of the block must call it, maybe in different places. ids.data is
  // at step 0, the row is [lo, hi).
  __device__ __forceinline__ uint32_t find_mixed(const SeqIdx& ids, int lo, int hi,
                                                 bool all) const {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    constexpr int kBefore = EARLY + H;
    IdWindow<TILE + kBefore> window;  // a tile per warp
    window.load(ids, warp * TILE - kBefore, lo, hi, lane);
    const bool several = !window.one();
    if (lane == 0) shared_->mixed[warp] = static_cast<uint8_t>(all ? int(kAll) : several);
    synchronize_warps();
    uint32_t mixed = 0;
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
      mixed |= shared_->mixed[i] == kAll ? (1u << TILES) - 1 : uint32_t(shared_->mixed[i]) << i;
    }
    if (mixed == 0) return 0;
#pragma unroll 1
    for (int i = 0; i < TILES; ++i) {
      if ((mixed >> i & 1) == 0) continue;
      for (int n = threadIdx.x; n < TILE + EARLY; n += kThreads) {
        const int t = i * TILE - EARLY + n;
        int id[H + 1];
        load_ids(ids, t - H, lo, hi, id);
        shared_->matches[t + EARLY] = static_cast<uint8_t>(match_byte<H>(id));
      }
    }
    synchronize_warps();
    return mixed;
  }

  // Those of the V steps from t on, which are in a mixed tile.
  __device__ __forceinline__ Matches<V, H> load(int t) const {
    Matches<V, H> matches;
    matches.template load_shared<EARLY == 0>(shared_->matches, t + EARLY);
    return matches;
  }

 private:
  Shared* shared_;
};

}  // namespace causal_conv1d::gpu
