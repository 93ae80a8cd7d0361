// What the backward of channel-first tensors knows of seq_idx, prepared for all channels.
#pragma once

#include "backward.cuh"
#include "ptx.cuh"
#include "seq_ids.cuh"

namespace causal_conv1d::gpu {

// The bytes of Matches (with H = 3 of pairs), one per thread, and for each block whether those from
// 8 before it to 8 after it are not all matches; of the taps from `first` on, as match_byte() takes
// it. Steps outside the row have the id of the nearest inside, so that no tile is mixed for their
// sake. The dz of one after the row is then 0, or NaN where the row's last step has NaN too.
template <int H>
__global__ void __launch_bounds__(kThreads)
    find_matches(const SeqIdx seq_idx, int64_t seqlen, int64_t pitch, int first, uint8_t* matches,
                 uint8_t* mismatches) {
  const uint32_t all = kAllMatch<H> & ~0u << first;
  int64_t i;
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t b = split(n, pitch, &i);
  auto id_of = [&](int64_t t) { return seq_idx.at(b, max(min(t, seqlen - 1), int64_t(0))); };
  auto match_of = [&](int64_t t) {
    int id[H + 1];
#pragma unroll
    for (int k = 0; k <= H; ++k) id[k] = id_of(t - H + k);
    return match_byte<H>(id, first);
  };
  pdl_wait();
  pdl_launch();
  const int64_t t = i - kMatchesBefore;
  const uint32_t match = match_of(t);
  matches[n] = static_cast<uint8_t>(H == 3 ? pair_byte(match, match_of(t + 1)) : match);
  bool differs = match != all;
  if (threadIdx.x < 8) {
    differs |= match_of(t - 8) != all || match_of(t + kThreads) != all;
  }
  differs = __syncthreads_or(differs) != 0;
  if (threadIdx.x == 0) mismatches[blockIdx.x] = differs;
}

// Which tiles of a warp's part of a row are mixed, up to 64.
template <typename K>
class MixedTiles {
  using Blocks = std::conditional_t<K::TILE == 2 * kThreads, uint16_t, uint8_t>;
  static_assert(sizeof(Blocks) * kThreads == K::TILE, "a tile is blocks of find_matches");

 public:
  // Starts to load the answer for row b: tiles lane and lane + 32 of those up to the one at `last`.
  // origin: the part's first step.
  template <typename Args>
  __device__ __forceinline__ void load(const Args& p, int64_t b, int64_t origin, int last,
                                       int lane) {
    const int64_t first = b * p.matches_pitch + kMatchesBefore + origin;
    const Blocks* from = reinterpret_cast<const Blocks*>(p.mismatches + first / kThreads);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int tile = lane + i * 32;
      if (tile * K::TILE <= last) mismatches_[i] = from[tile];
    }
  }
  // A bit each, the highest for the tile at `last`.
  __device__ __forceinline__ uint64_t get(int last) const {
    uint64_t mixed = 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      mixed |= uint64_t(__ballot_sync(0xffffffff, mismatches_[i] != 0)) << 32 * i;
    }
    return mixed << (63 - last / K::TILE);
  }

 private:
  Blocks mismatches_[2] = {};
};

}  // namespace causal_conv1d::gpu
