// Batch entries of an update that share a row of the state: see update.cuh.
#pragma once

#include <type_traits>

#include "update.cuh"

namespace causal_conv1d::gpu {

// A block's look at all indices, for other batch entries with the rows of its own, at most N. The
// constructor starts to load the first of them. It compares 31 bits: what is no row may be taken
// for one, which costs time and nothing else. The arguments are UpdateArgs or DecodeArgs, and
// entries are counted by numbers of their batch's type.
template <int N>
class SharedRows {
  static constexpr int kAhead = 2;  // indices per thread, so that 256 are there at once

 public:
  template <typename Args>
  __device__ __forceinline__ explicit SharedRows(const Args& p) {
    if (!p.may_share) return;
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const decltype(p.batch) at = threadIdx.x + i * kThreads;
      if (at < p.batch) first_[i] = p.conv_state_indices.low(at);
    }
  }

  // Whether there is one. The block's own are `count` from b on; rows: < 0 if there is none, and
  // then different ones. All threads of the block must call it.
  template <typename Args>
  __device__ __forceinline__ bool seen(const Args& p, decltype(p.batch) b, int count,
                                       const int (&rows)[N]) const {
    using At = decltype(p.batch);
    using Distance = std::make_unsigned_t<At>;
    if (!p.may_share) return false;
    bool found = N > 1 && rows[0] == rows[N - 1];
    const auto look = [&](At at, int row) {
      const bool own = static_cast<Distance>(at - b) < static_cast<Distance>(count);
#pragma unroll
      for (int n = 0; n < N; ++n) found |= (row & 0x7fffffff) == rows[n] && !own;
    };
#pragma unroll
    for (int i = 0; i < kAhead; ++i) look(threadIdx.x + i * kThreads, first_[i]);
#pragma unroll 1
    for (At at = threadIdx.x + kAhead * kThreads; at < p.batch; at += kThreads) {
      look(at, p.conv_state_indices.low(at));
    }
    return __syncthreads_or(found) != 0;
  }

 private:
  int first_[kAhead] = {-1, -1};
};

}  // namespace causal_conv1d::gpu
