// Rows of channel-first tensors, read and written by tiles.
#pragma once

#include "access.h"
#include "pack.cuh"
#include "schedule.cuh"

namespace causal_conv1d::gpu {

// Reads a row by tiles: each lane of a warp V adjacent steps, and the HP steps before them. Steps
// count from `data`. The row is [lo, hi); outside it a lane gets anything. With unit stride whole
// vectors are read, also those that the row shares with its neighbours; but none at or after `end`,
// the tensor's.
template <typename T, int V, int HP, Access ACCESS>
class RowReader {
  static constexpr int kWords = Pack<T, HP + V>::kWords, kHalo = kWords - Pack<T, V>::kWords;
  static constexpr int kRaw = kWords + (ACCESS == Access::kUnit ? 4 : 0);
  static constexpr int G = kPerVector<T>;

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

  // Whether vectors() may read the tiles up to end.
  __device__ __forceinline__ bool whole(int end) const {
    // Aligned rows end with a vector, as does the tensor.
    if (ACCESS == Access::kAligned && V == G) return true;
    return ACCESS != Access::kStrided && (end - 1) / V * V <= whole_;
  }

  // Starts to load the tile at base by whole vectors; own() gives the lane's steps of it.
  __device__ __forceinline__ Raw vectors(int base) const {
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
    if constexpr (kHalo > 4) {  // two vectors
      load_words_if<4>(inside && begin - G > lo_, p - 2 * G, &r.w[0]);
      load_words_if<4>(inside && begin > lo_, p - G, &r.w[4]);
    } else if constexpr (kHalo > 0) {
      load_words_if<kHalo>(inside && begin > lo_, p - HP, &r.w[0]);
    }
    return r;
  }

  // The same for any tile.
  __device__ __forceinline__ Raw load(int base) const {
    if (whole(base + lane_ * V + V)) return vectors(base);
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

  // Steps t - HP .. t + V - 1, t being the lane's first in the tile.
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

// Writes steps [lo, hi) of a row by the same tiles.
template <typename T, int V, Access ACCESS>
class RowWriter {
  static constexpr int kWords = Pack<T, V>::kWords, kBytes = kWords * 4, G = kPerVector<T>;

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

  // Goes on to the row that begins `after` elements after this one.
  __device__ __forceinline__ void row(int64_t after, int lo, int hi) {
    own_ += after;
    lo_ = lo;
    hi_ = hi;
    if (ACCESS == Access::kUnit) shift_ = uniform(misalignment(own_));
    keep(own_);
  }

  // A tile of a row that is aligned.
  __device__ __forceinline__ void write_vectors(int base, const Pack<T, V>& v) const {
#pragma unroll
    for (int i = 0; i < V / G; ++i) {
      if (base + lane_ * V + i * G < hi_) v.template part<G>(i).store(own_ + base + i * G);
    }
  }

  // Any tile. Its place is aligned, but with kStrided.
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

  // Where the row's first or last V steps are in it only in part, store() writes them one per lane:
  // this lane's, or kNowhere.
  __device__ __forceinline__ int edge_step() const {
    const bool last = (lane_ & V) != 0;
    const int from = shift_ == 0 ? 0 : G - shift_;  // where vectors begin
    const int edge = (last ? hi_ : lo_) - from, step = (edge & -V) + lane_ % V + from;
    const bool takes = lane_ < 2 * V && edge % V != 0 && step >= lo_ && step < hi_;
    return takes ? step : kNowhere;
  }

  // The tile at base, for tiles in descending order. inside: all of it is in the row. Where the row
  // is not aligned as tiles are, vectors straddle two lanes: each lane stores its last steps with
  // the first ones of the next lane, which lane 31 finds at `head`, where lane 0 of the tile before
  // has left its own. head, of one vector, and room, of a tile, are shared memory of the warp's;
  // step is edge_step().
  __device__ __forceinline__ void store(bool inside, int base, const Pack<T, V>& tile,
                                        uint32_t room, uint32_t head, int step) const {
    if (ACCESS == Access::kAligned) return write_vectors(base, tile);
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

  // After the last tile, which is at 0: what is left at head.
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

  T* own_;  // step 0 of the lane's, or with kStrided of the row's
  int64_t stride_;
  int lo_, hi_, lane_, shift_ = 0;
};

}  // namespace causal_conv1d::gpu
