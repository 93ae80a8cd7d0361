// How lanes of the channel-first backward get the dz after their own.
#pragma once

#include "pack.cuh"

namespace causal_conv1d::gpu {

// Gives each lane of a warp the first H dz of the next lane, for tiles in descending order: lane 31
// gets those of lane 0 of the tile before. By shared memory, since shuffles would be up to three
// times as many instructions, with those that keep the dz of the tile before.
template <int H>
class DzExchange {
  // A tile's first packs of all lanes, then those of the tile before; then the second packs.
  static constexpr int kPacks = (H + 3) / 4, kBytes = 32 * 16, kPackBytes = 2 * kBytes;

 public:
  struct alignas(kPackBytes) Shared {
    char bytes[kPacks * kPackBytes];
  };

  __device__ __forceinline__ DzExchange(Shared* shared, int lane) : lane_(lane) {
    to_ = shared_address(shared) + lane * 16;
    from_ = lane < 31 ? to_ + 16 : shared_address(shared) + kBytes;
  }

  // Before the first tile of a row: dz of lane j, j < H, is that of the j-th step after the tile.
  __device__ __forceinline__ void begin(float dz) const {
    const uint32_t before = (to_ ^ kBytes) - lane_ * 16;
    if (lane_ < H) store_shared(before + lane_ / 4 * kPackBytes + lane_ % 4 * 4, dz);
  }

  // Of a tile, dz being the lane's own V and those after them. All lanes must have been together
  // since the exchange before.
  template <int V>
  __device__ __forceinline__ void exchange(float (&dz)[V + H]) {
    static_assert(4 * kPacks <= V, "whole packs of own dz");
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      Pack<float, 4> own;
#pragma unroll
      for (int j = 0; j < 4; ++j) own.w[j] = __float_as_uint(dz[4 * i + j]);
      store_shared(to_ + i * kPackBytes, own);
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const auto next = load_shared<float, 4>(from_ + i * kPackBytes);
#pragma unroll
      for (int j = 0; j < 4 && 4 * i + j < H; ++j) dz[V + 4 * i + j] = next.get(j);
    }
    to_ ^= kBytes;
    from_ ^= kBytes;
  }

 private:
  uint32_t to_, from_;
  const int lane_;
};

}  // namespace causal_conv1d::gpu
