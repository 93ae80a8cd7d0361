// Rows of channel-first tensors, read by tiles through shared memory.
#pragma once

#include "rows.cuh"

namespace causal_conv1d::gpu {

// Reads rows by the tiles of RowReader, through cp.async to shared memory of the warp's own. A tile
// comes with the vectors before and after it that its lanes need. Whole vectors are read: those
// without a step of the row read as zeros, and the places that outside() tells are to be made zero
// when the tile has come.
template <typename T, int V, int HP, Access ACCESS>
class TileReader {
  static constexpr int kWords = Pack<T, HP + V>::kWords, kHalo = kWords - Pack<T, V>::kWords;
  static constexpr int kRaw = kWords + (ACCESS == Access::kUnit ? 4 : 0);
  static constexpr int G = kPerVector<T>, TILE = 32 * V, kSize = static_cast<int>(sizeof(T));
  static constexpr int kBefore = (kHalo + 3) / 4, kAfter = ACCESS == Access::kUnit ? 1 : 0;

 public:
  // Whether a tile begins as far from a multiple of 128 bytes in shared memory as in global.
  static constexpr bool kPlaced = ACCESS == Access::kDense;
  // What is written in shared memory before and after a tile.
  static constexpr int kBytesBefore = kBefore * 16, kBytesAfter = kAfter * 16;

  __device__ __forceinline__ explicit TileReader(int lane) : lane_(lane) {}

  // Comes before the first row(). data is step 0 of a row whose tiles begin there, and which itself
  // begins at step lo.
  __device__ __forceinline__ void begin(const T* data, int64_t stride, int lo) {
    mine_ = ACCESS == Access::kStrided ? data : data + lane_ * V;
    stride_ = stride;
    place_ = lane_ * V - (lo - (G - 1));
  }
  // From now on start() reads the row that begins `after` elements after the last one, by tiles
  // that begin `offset` steps earlier than those of begin(). lo is begin()'s.
  __device__ __forceinline__ void row(int64_t after, int offset, int lo) {
    const int before = lane_ * V + (G - 1) - place_ - lo;  // steps that mine_ was moved back by
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

  // A vector has a step of the row [lo, hi) if it begins less than this after lo - (G - 1).
  static __device__ __forceinline__ uint32_t span(int lo, int hi) {
    return static_cast<uint32_t>(hi) - static_cast<uint32_t>(lo) + (G - 1);
  }

  // A tile on its way.
  struct Tile {
    InFlight<16> own[V / G], before, after;
  };

  // Starts to read the tile at base to where `to` is the place of the lane's own steps, until
  // commit_copies().
  __device__ __forceinline__ void start(uint32_t to, int base, uint32_t span, Tile& tile) const {
    if (kPlaced) to += line_;
    const int place = base + place_;
    if constexpr (ACCESS == Access::kStrided) {
#pragma unroll
      for (int i = 0; i < V; i += G) gather(to + i * kSize, base, lane_ * V + i, span);
      const int i = (lane_ - kBefore) * G - lane_ * V;
      if (lane_ < kBefore) gather(to + i * kSize, base, lane_ * V + i, span);
    } else {
      const T* from = mine_ + base;
#pragma unroll
      for (int i = 0; i < V; i += G) {
        tile.own[i / G].start(static_cast<uint32_t>(place + i) < span, to + i * kSize, from + i);
      }
      if (kBefore > 0 && lane_ < kBefore) {
        const int i = (lane_ - kBefore) * G - lane_ * V;
        tile.before.start(static_cast<uint32_t>(place + i) < span, to + i * kSize, from + i);
      }
    }
  }

  // Whether start_after() is needed: the row is misaligned.
  __device__ __forceinline__ bool is_shifted() const { return kAfter > 0 && shifted_; }
  // Starts to read the vector after that tile.
  __device__ __forceinline__ void start_after(uint32_t to, int base, uint32_t span,
                                              Tile& tile) const {
    const bool inside = static_cast<uint32_t>(base + place_ + V) < span;
    if (lane_ == 31) tile.after.start(inside, to + V * kSize, mine_ + base + V);
  }
  // Where there is no cp.async: the tile comes to its place, which both of these were given, before
  // the next row().
  __device__ __forceinline__ void land(uint32_t to, const Tile& tile) const {
    if constexpr (ACCESS == Access::kStrided) return;
    if (kPlaced) to += line_;
#pragma unroll
    for (int i = 0; i < V; i += G) tile.own[i / G].land(to + i * kSize);
    if (kBefore > 0 && lane_ < kBefore) {
      tile.before.land(to + ((lane_ - kBefore) * G - lane_ * V) * kSize);
    }
    if (is_shifted() && lane_ == 31) tile.after.land(to + V * kSize);
  }

  // The first and the last vector of a row [lo, hi), misaligned by shift, may have steps of other
  // rows: the place of one, counted from the tile at 0, for each of 2 * G lanes; or kNowhere.
  static __device__ __forceinline__ int outside(int lo, int hi, int shift, int lane) {
    const bool last = (lane & G) != 0;
    const int edge = (last ? hi : lo) + shift, place = (edge & -G) + lane % G;
    return (last ? place >= edge : place < edge) ? place : kNowhere;
  }
  // Where the tile's place 0 is, own being that of the lane's own steps.
  __device__ __forceinline__ uint32_t tile(uint32_t own) const { return own - lane_ * V * kSize; }
  // Places of a tile and the vector after it.
  static constexpr int kPlaces = TILE + kAfter * G;

  // Loads those of the last G steps of a row that are in the tile at base, to it. The row is [lo,
  // hi), misaligned by shift, and its step 0 is at data.
  __device__ __forceinline__ void load_end(uint32_t own, int base, int lo, int hi, int shift,
                                           const T* data) const {
    const int t = hi - 1 - lane_, i = t + shift - base;
    if (lane_ < G && t >= lo && i >= -kBefore * G && i < kPlaces) {
      store_shared(tile(own) + i * kSize, data[t]);
    }
  }

  // Steps t - HP .. t + V - 1, t being the lane's first in the tile, of a row misaligned by shift.
  // All lanes must have waited for the tile.
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
  // With kStrided, the vector at place i of the tile at base.
  __device__ __forceinline__ void gather(uint32_t to, int base, int i, uint32_t span) const {
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
  int place_, lane_;  // place_: of the lane's first vector in a tile at 0, from lo - (G - 1) on
  bool shifted_ = false;
  uint32_t line_ = 0;
};

}  // namespace causal_conv1d::gpu
