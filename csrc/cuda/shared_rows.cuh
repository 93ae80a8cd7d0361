// Batch entries of an update that share a row of the state: see update.cuh.
#pragma once

#include "update.cuh"

namespace causal_conv1d::gpu {

struct NoSharedRows {
  template <typename Args>
  __device__ __forceinline__ explicit NoSharedRows(const Args&) {}
};

// A warp's look at all indices, for other batch entries with the rows of its own, which are N or,
// if that is 2, p.entries from b on. It compares 31 bits: what is no row may be taken for one,
// which costs time and nothing else.
template <int N>
class SharedRows {
  static constexpr int kPacks = 2, kStep = 4 * 32;  // of four indices per lane

 public:
  // Starts to load the first of them.
  template <typename Args>
  __device__ __forceinline__ explicit SharedRows(const Args& p) {
    if (!p.index_packs) return;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) packs_[i] = load(p, lane() * 4 + i * kStep);
  }

  // Whether there is one; rows: < 0 if b has none. It waits for all loads in flight, so that others
  // should start later.
  template <typename Args>
  __device__ __forceinline__ bool seen(const Args& p, int64_t b, const int (&rows)[N]) const {
    bool found = N > 1 && rows[0] == rows[N - 1];
    auto look = [&](int64_t at, int row) {
      const bool own = N == 1 ? at == b : static_cast<uint64_t>(at - b) < uint64_t(p.entries);
#pragma unroll
      for (int n = 0; n < N; ++n) found |= (row & 0x7fffffff) == rows[n] && !own;
    };
    auto look_at_pack = [&](int64_t at, const int4& pack) {
      look(at, pack.x);
      look(at + 1, pack.y);
      look(at + 2, pack.z);
      look(at + 3, pack.w);
    };
    if (p.index_packs) {
#pragma unroll
      for (int i = 0; i < kPacks; ++i) look_at_pack(lane() * 4 + i * kStep, packs_[i]);
#pragma unroll 1
      for (int64_t at = lane() * 4 + kPacks * kStep; at < p.batch; at += kStep) {
        look_at_pack(at, load(p, at));
      }
    } else {
#pragma unroll 1
      for (int64_t at = lane(); at < p.batch; at += 32) look(at, p.conv_state_indices.low(at));
    }
    return __any_sync(0xffffffff, found);
  }

 private:
  static __device__ __forceinline__ int lane() { return threadIdx.x % 32; }

  // -1 past the last; p.batch is a multiple of four.
  template <typename Args>
  static __device__ __forceinline__ int4 load(const Args& p, int64_t at) {
    if (at >= p.batch) return make_int4(-1, -1, -1, -1);
    return *reinterpret_cast<const int4*>(p.conv_state_indices.data + at);
  }

  int4 packs_[kPacks];
};

}  // namespace causal_conv1d::gpu
