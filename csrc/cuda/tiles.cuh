// How the fast kernels read and write rows: tiles of adjacent time steps (channel-first) or rows of
// adjacent channels (channel-last).
#pragma once

#include <cuda_pipeline.h>

#include <initializer_list>

#include "common.cuh"

namespace causal_conv1d::gpu {

constexpr int kThreads = 128;  // a block, in all fast kernels

// seq_idx, (batch, seqlen); without one every position has id 0.
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
};

inline SeqIdx seq_idx_view(const Tensor& t) {
  if (!given(t)) return {nullptr, 0, 0};
  return {static_cast<const int32_t*>(t.data), t.strides[0], t.strides[1]};
}

// Rows of C adjacent channels from data on, one every stride elements, U at a time; those from
// count on read as zero. They come by cp.async through a ring of STAGES rows in shared memory, of
// which STAGES - U are in flight while U are used. A thread reads back only what it copied itself,
// so there is no barrier. With C == 1 there is no such copy for 2 bytes, so they are loaded as they
// are used.
template <typename T, int C, int U, int STAGES>
class Rows {
 public:
  static_assert(STAGES % U == 0, "a ring holds whole groups");
  struct alignas(Pack<T, C>::kBytes) Row {  // in shared memory
    char bytes[Pack<T, C>::kBytes] = {};
  };
  static constexpr int kSharedRows = STAGES * kThreads;

  __device__ __forceinline__ Rows(Row* shared, const T* data, int64_t stride, int count)
      : ring_(shared + threadIdx.x), next_(data), stride_(stride), left_(count) {}

  // Starts group 0, 1, .. STAGES / U - 1. What is started takes effect with __pipeline_commit().
  __device__ __forceinline__ void prefetch(int group) {
#pragma unroll
    for (int u = 0; u < U; ++u) copy((group * U + u) * kThreads);
  }

  __device__ __forceinline__ void fetch(Pack<T, C> (&rows)[U]) {
#pragma unroll
    for (int u = 0; u < U; ++u) rows[u] = Pack<T, C>::load(ring_ + slot_ + u * kThreads);
    if (left_ >= U) {
#pragma unroll
      for (int u = 0; u < U; ++u) {
        __pipeline_memcpy_async(ring_ + slot_ + u * kThreads, next_, sizeof(Row));
        next_ += stride_;
      }
      left_ -= U;
    } else {
#pragma unroll
      for (int u = 0; u < U; ++u) copy(slot_ + u * kThreads);
    }
    slot_ = slot_ + U * kThreads == kSharedRows ? 0 : slot_ + U * kThreads;
  }

 private:
  __device__ __forceinline__ void copy(int slot) {
    if (left_ > 0) {
      __pipeline_memcpy_async(ring_ + slot, next_, sizeof(Row));
    } else {
      ring_[slot] = Row{};
    }
    next_ += stride_;
    --left_;
  }

  Row* ring_;
  const T* next_;
  int64_t stride_;
  int left_;
  int slot_ = 0;
};

template <typename T, int U, int STAGES>
class Rows<T, 1, U, STAGES> {
 public:
  struct Row {};
  static constexpr int kSharedRows = 1;

  __device__ __forceinline__ Rows(Row*, const T* data, int64_t stride, int count)
      : next_(data), stride_(stride), left_(count) {}

  __device__ __forceinline__ void prefetch(int) {}

  __device__ __forceinline__ void fetch(Pack<T, 1> (&rows)[U]) {
#pragma unroll
    for (int u = 0; u < U; ++u) {
      rows[u] = left_ > u ? Pack<T, 1>::load(next_ + u * stride_) : Pack<T, 1>{};
    }
    next_ += U * stride_;
    left_ -= U;
  }

 private:
  const T* next_;
  int64_t stride_;
  int left_;
};

// Keeps the compiler from computing v anew wherever it is used.
template <typename T>
__device__ __forceinline__ void keep(T*& v) {
  asm volatile("" : "+l"(v));
}

// How a channel-first kernel may access the rows of its tensors: they begin 16-byte aligned; they
// have unit stride over time, but any alignment; or any stride.
enum class Access { kAligned, kUnit, kStrided };

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
  static constexpr int kBeyond = ACCESS == Access::kUnit ? G : 0;  // steps read beyond a tile
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
    keep(own_);
  }

  // Whether what own() gives of steps before the row is anything; else it is zero.
  __device__ __forceinline__ bool shifted() const { return shift_ != 0; }

  // load(base) where the tile and kBeyond steps after it are steps of the row.
  __device__ __forceinline__ Raw load_inside(int base) const {
    if (ACCESS == Access::kStrided) return load(base);
    Raw r;
    const T* p = own_ + (base - HP);
    if (HP > 0 && base + lane_ * V - shift_ > lo_) words<0, kHalo>(r, p);
    words<kHalo, 4>(r, p + HP);
    if (V > G) words<kWords - 4, 4>(r, p + HP + G);
    if (ACCESS == Access::kUnit && shift_ != 0) words<kWords, kRaw - kWords>(r, p + HP + V);
    return r;
  }

  // Starts to load what own() makes steps t - HP .. t + V - 1 of, t being the lane's first in the
  // tile at base.
  __device__ __forceinline__ Raw load(int base) const {
    Raw r;
    const int t = base + lane_ * V;
    if (t >= hi_) return r;
    const int begin = t - shift_ - HP;
    if (ACCESS != Access::kStrided && t <= whole_) {
      const T* p = data_ + begin;
      // Its nearest granule alone, if the row begins in there.
      if (HP > G && begin + HP > lo_ && begin + HP - G <= lo_) {
        words<kHalo - 4, 4>(r, p + HP - G);
      } else if (HP > 0 && begin + HP > lo_) {
        words<0, kHalo>(r, p);
      }
#pragma unroll
      for (int i = 0; i < V; i += G) {
        if (ACCESS != Access::kUnit || begin + HP + i + G > lo_) {
          if (i == 0) words<kHalo, 4>(r, p + HP);
          if (i == G) words<kWords - 4, 4>(r, p + HP + G);
        }
      }
      if (ACCESS == Access::kUnit && shift_ != 0) words<kWords, kRaw - kWords>(r, p + HP + V);
      return r;
    }
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
  template <int FIRST, int COUNT>
  static __device__ __forceinline__ void words(Raw& r, const T* from) {
    constexpr int N = COUNT * 4 / static_cast<int>(sizeof(T));
    if constexpr (COUNT > 0 && FIRST >= 0) {
      const auto p = Pack<T, N>::load(from);
#pragma unroll
      for (int i = 0; i < COUNT; ++i) r.w[FIRST + i] = p.w[i];
    }
  }

  const T* data_;
  int64_t stride_;
  const T* own_;
  int lo_, hi_, lane_, whole_, shift_ = 0;
};

// Reads a row in the same tiles, in descending order, through a ring of tiles in shared memory that
// each warp has for itself: two of them are on their way by cp.async while one is used. Of the
// tile below it needs the end, and of the tile above, if the row is not aligned as the tiles are,
// the beginning.
template <typename T, int V, int HP, Access ACCESS>
class RowRing {
  static constexpr int kWords = Pack<T, HP + V>::kWords, kHalo = kWords - Pack<T, V>::kWords;
  static constexpr int kRaw = kWords + (ACCESS == Access::kUnit ? 4 : 0);
  static constexpr int G = kGranule<T>, TILE = 32 * V, kStages = 4;
  static constexpr int kTileBytes = TILE * static_cast<int>(sizeof(T));

 public:
  struct alignas(16) Shared {
    char bytes[kStages * kTileBytes];
  };

  __device__ __forceinline__ RowRing(Shared* shared, const T* data, int64_t stride, const T* end,
                                     int lo, int hi, int lane)
      : ring_(shared->bytes), data_(data), stride_(stride), lo_(lo), hi_(hi), lane_(lane) {
    if (ACCESS == Access::kUnit) shift_ = misalignment(data);
    whole_ = static_cast<int>(min(end - data - G, int64_t(1) << 30));
    own_ = data + (lane * V - shift_);
    keep(own_);
  }

  // Starts to read the tiles that the first step, at top, and the next one need.
  __device__ __forceinline__ void begin(int top) {
    __syncwarp();  // the row before is read
    if (ACCESS == Access::kUnit && shift_ != 0 && lane_ == 0) start(top + TILE);
    start(top);
    start(top - TILE);
  }
  // Starts to read the tile at base; those below -TILE do not exist. begin() and start() take
  // effect with __pipeline_commit().
  __device__ __forceinline__ void start(int base) {
    if (base < -TILE || (base < 0 && lane_ != 31)) return;
    char* to = ring_ + slot(base) + lane_ * V * static_cast<int>(sizeof(T));
    const bool inside = base - shift_ >= lo_ && base + TILE <= hi_;
#pragma unroll
    for (int i = 0; i < V; i += G) {
      if (ACCESS != Access::kStrided && inside) {
        __pipeline_memcpy_async(to + i * sizeof(T), own_ + base + i, 16);
      } else {
        copy(to + i * sizeof(T), base + lane_ * V - shift_ + i);
      }
    }
  }

  // Steps t - HP .. t + V - 1, t being the lane's first in the tile at base. Elsewhere than in
  // [lo, hi) they are anything, but zero if the row is aligned as the tiles are. All lanes must
  // have waited for this tile and the one below.
  __device__ __forceinline__ Pack<T, HP + V> read(int base) const {
    constexpr int size = sizeof(T);
    uint32_t w[kRaw];
    const char* own = ring_ + slot(base) + lane_ * V * size;
    if (HP > 0) {
      const char* halo = lane_ == 0 ? ring_ + slot(base - TILE) + kTileBytes : own;
      words<0, kHalo>(w, halo - HP * size);
    }
    words<kHalo, kWords - kHalo>(w, own);
    if (ACCESS == Access::kUnit && shift_ != 0) {
      words<kWords, kRaw - kWords>(w, lane_ == 31 ? ring_ + slot(base + TILE) : own + V * size);
      drop_elements<T>(w, shift_);
    }
    Pack<T, HP + V> p;
#pragma unroll
    for (int i = 0; i < kWords; ++i) p.w[i] = w[i];
    return p;
  }

  __device__ __forceinline__ bool shifted() const { return shift_ != 0; }

 private:
  static __device__ __forceinline__ int slot(int base) {
    return (base / TILE & (kStages - 1)) * kTileBytes;
  }

  // The granule from step t on, zero outside the row.
  __device__ __forceinline__ void copy(char* to, int t) const {
    if (ACCESS != Access::kStrided && t + G > lo_ && t < hi_ && t <= whole_) {
      __pipeline_memcpy_async(to, data_ + t, 16);
      return;
    }
    *reinterpret_cast<uint4*>(to) = uint4{0, 0, 0, 0};
    if (t + G <= lo_ || t >= hi_) return;
    constexpr int kUnroll = ACCESS == Access::kStrided ? G : 1;
#pragma unroll kUnroll
    for (int i = 0; i < G; ++i) {
      if (t + i < lo_ || t + i >= hi_) continue;
      reinterpret_cast<T*>(to)[i] = data_[(t + i) * (ACCESS == Access::kStrided ? stride_ : 1)];
    }
  }

  template <int FIRST, int COUNT>
  static __device__ __forceinline__ void words(uint32_t (&w)[kRaw], const char* from) {
    if constexpr (COUNT > 0) {
      constexpr int N = COUNT * 4 / static_cast<int>(sizeof(T));
      const auto p = Pack<T, N>::load(from);
#pragma unroll
      for (int i = 0; i < COUNT; ++i) w[FIRST + i] = p.w[i];
    }
  }

  char* ring_;
  const T* data_;
  const T* own_;
  int64_t stride_;
  int lo_, hi_, lane_, whole_, shift_ = 0;
};

// Writes steps [lo, hi) of a row.
template <typename T, int V, Access ACCESS>
class RowWriter {
  static constexpr int kWords = Pack<T, V>::kWords, G = kGranule<T>;

 public:
  __device__ __forceinline__ RowWriter(T* data, int64_t stride, int lo, int hi, int lane)
      : data_(data), own_(data + lane * V), stride_(stride), lo_(lo), hi_(hi), lane_(lane) {
    if (ACCESS == Access::kUnit) shift_ = misalignment(data);
    keep(own_);
  }

  // The lane's V steps of a tile at base that is inside and aligned.
  __device__ __forceinline__ void write_inside(int base, const Pack<T, V>& v) const {
    if (ACCESS == Access::kStrided) return write(base + lane_ * V, v);
    v.store(own_ + base);
  }

  // V steps from t on; data + t is aligned, but for kStrided.
  __device__ __forceinline__ void write(int t, const Pack<T, V>& v) const {
    if (ACCESS != Access::kStrided && t >= lo_ && t + V <= hi_) {
      v.store(data_ + t);
      return;
    }
#pragma unroll
    for (int i = 0; i < V; ++i) {
      if (t + i >= lo_ && t + i < hi_) {
        data_[(t + i) * (ACCESS == Access::kStrided ? stride_ : 1)] = v.element(i);
      }
    }
  }

  // A tile, each lane with its steps from t on, in descending order of tiles. If the row is not
  // aligned as the tiles are, a lane's vector takes its beginning from the next lane, lane 31's
  // from lane 0 of the tile before.
  template <bool EDGE>
  __device__ __forceinline__ void store(int base, const Pack<T, V>& tile) {
    const int t = base + lane_ * V;
    if (ACCESS != Access::kUnit || shift_ == 0) {
      if (EDGE) {
        write(t, tile);
      } else {
        write_inside(base, tile);
      }
    } else {
      uint32_t c[kWords + 4];
#pragma unroll
      for (int i = 0; i < kWords; ++i) c[i] = tile.w[i];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        c[kWords + i] = __shfl_sync(0xffffffff, lane_ == 0 ? head_[i] : c[i], (lane_ + 1) % 32);
        head_[i] = tile.w[i];
      }
      drop_elements<T>(c, G - shift_);
      Pack<T, V> v;
#pragma unroll
      for (int i = 0; i < kWords; ++i) v.w[i] = c[i];
      write(t + G - shift_, v);
    }
  }

  // After the last tile, at 0: what its lane 0 still holds.
  __device__ __forceinline__ void flush() const {
    if (ACCESS != Access::kUnit || shift_ == 0 || lane_ != 0) return;
    Pack<T, G> head;
#pragma unroll
    for (int i = 0; i < 4; ++i) head.w[i] = head_[i];
#pragma unroll
    for (int i = 0; i < G - 1; ++i) {
      if (i < G - shift_ && i >= lo_ && i < hi_) data_[i] = head.element(i);
    }
  }

 private:
  T *data_, *own_;
  int64_t stride_;
  int lo_, hi_, lane_, shift_ = 0;
  uint32_t head_[4] = {};
};

// A warp's part of row (b, d): steps [origin, origin + chunk) of it, in local time from 0.
// offset: how far before the row's first step the first part begins.
struct Segment {
  int64_t origin;
  int lo, hi;  // the row
  int end;     // of the part: the chunk's, or the row's

  __device__ __forceinline__ Segment(int64_t index, int64_t chunk, int offset, int64_t seqlen)
      : origin(index * chunk - offset) {
    constexpr int64_t kFar = 1 << 30;
    lo = static_cast<int>(max(-origin, -kFar));
    hi = static_cast<int>(min(seqlen - origin, kFar));
    end = min(static_cast<int>(chunk), hi);
  }
};

// The ids of N steps from t on; ids.data is at t = 0. As for x~, steps before the row have the id
// of its first; those after it have -1.
template <int N>
__device__ __forceinline__ void load_ids(const SeqIdx& ids, int t, int lo, int hi, int (&id)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) id[i] = t + i < hi ? ids.at(0, max(t + i, lo)) : -1;
}

// Which of the H inputs before each of N steps have its id, a bit each: fewer registers than ids.
template <int N, int H>
struct Matches {
  uint32_t bits[(N * H + 31) / 32] = {};

  // id: of the H steps before, then of the N.
  __device__ __forceinline__ void set(const int* id) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
#pragma unroll
      for (int k = 0; k < H; ++k) {
        if (id[i + k] == id[i + H] && id[i + H] >= 0)
          bits[(i * H + k) / 32] |= 1u << (i * H + k) % 32;
      }
    }
  }
  // Whether step i and the one H - k before it have one id, not of padding; k = H is the step
  // itself.
  __device__ __forceinline__ bool at(int i, int k) const {
    return k == H || (bits[(i * H + k) / 32] >> (i * H + k) % 32 & 1) != 0;
  }
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

// The weights of channel d as taps WMAX - W .. WMAX - 1, all lanes alike: each lane fetches one.
template <int WMAX, typename Args>
__device__ __forceinline__ void load_warp_weights(const Args& p, int64_t d, int lane,
                                                  float (&w)[WMAX]) {
  const float mine = lane < p.width ? p.weight.load(d, lane) * p.scale : 0.0f;
#pragma unroll
  for (int k = 0; k < WMAX; ++k) w[k] = from_lane(mine, k - (WMAX - p.width));
}

// What all rows of the tensors allow.
inline Access common_access(std::initializer_list<const Tensor*> tensors, int size) {
  Access access = Access::kAligned;
  for (const Tensor* t : tensors) {
    const int width = vector_width(*t, 2, 16 / size, size);
    if (width == 0) return Access::kStrided;
    if (width < 16 / size) access = Access::kUnit;
  }
  return access;
}

// Splits n = outer * count + i into its parts: by a multiplication if both are below 2^31, since a
// thread waits for it before its first load.
struct Divisor {
  int64_t count = 1;
  uint32_t multiplier = 0, shift = 0;

  Divisor() = default;
  explicit Divisor(int64_t n) : count(n < 1 ? 1 : n) {
    if (count == 1 || count > 0x7fffffff) return;
    while ((int64_t(1) << shift) < count) ++shift;  // 2^shift >= count > 2^(shift-1)
    // Rounded up; 2^(31+shift) / count < 2^32.
    multiplier = static_cast<uint32_t>(((uint64_t(1) << (31 + shift)) + count - 1) / count);
  }
  __device__ __forceinline__ int64_t split(int64_t n, int64_t* i) const {
    int64_t q = n;
    if (multiplier != 0 && n <= 0x7fffffff) {
      q = static_cast<uint32_t>(uint64_t(static_cast<uint32_t>(n)) * multiplier >> 31 >> shift);
    } else if (count > 1) {
      q = n / count;
    }
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
  int64_t b, chunk, column, part;  // part: which block of chunks
  bool inside;                     // of the plane of batch entry b

  __device__ __forceinline__ explicit ColumnChunk(const Columns& columns) {
    int64_t across;
    b = columns.down.split(columns.across.split(blockIdx.x, &across), &part);
    column = (across << columns.bits) + (threadIdx.x & ((1 << columns.bits) - 1));
    chunk = part * (kThreads >> columns.bits) + (threadIdx.x >> columns.bits);
    inside = column < columns.count && chunk < columns.chunks;
  }
};

}  // namespace causal_conv1d::gpu
