// How the fast kernels read x, dout and seq_idx: rows of adjacent channels (channel-last) or tiles
// of adjacent time steps (channel-first).
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
// count on read as zero. ASYNC: by cp.async through a ring of STAGES rows in shared memory, STAGES
// - U of them in flight while U are used. A thread reads back only what it copied itself, so there
// is no barrier. The other form has C == 1 and suits any stride.
template <typename T, int C, int U, int STAGES, bool ASYNC>
class Rows;

template <typename T, int C, int U, int STAGES>
class Rows<T, C, U, STAGES, true> {
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
class Rows<T, 1, U, STAGES, false> {
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

// How a kernel may access the rows of its tensors: they begin 16-byte aligned; they have unit
// stride over time, but any alignment; or any stride.
enum class Access { kAligned, kUnit, kStrided };

template <typename T>
__device__ __forceinline__ int row_misalignment(const T* row) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(row) / sizeof(T) % (16 / sizeof(T)));
}

// The words of a Pack<T, V> from element `offset` of c on, 0 <= offset < 16 / sizeof(T).
template <typename T, int V>
__device__ __forceinline__ Pack<T, V> extract(uint32_t (&c)[Pack<T, V>::kWords + 4], int offset) {
  constexpr int kWords = Pack<T, V>::kWords;
  const int word = offset * static_cast<int>(sizeof(T)) / 4;
  if (word & 2) {
#pragma unroll
    for (int i = 0; i < kWords + 2; ++i) c[i] = c[i + 2];
  }
  if (word & 1) {
#pragma unroll
    for (int i = 0; i < kWords + 1; ++i) c[i] = c[i + 1];
  }
  if (sizeof(T) == 2 && (offset & 1)) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) c[i] = __funnelshift_r(c[i], c[i + 1], 16);
  }
  Pack<T, V> r;
#pragma unroll
  for (int i = 0; i < kWords; ++i) r.w[i] = c[i];
  return r;
}

// A warp's tiles of one row: 32 lanes with V adjacent time steps each. With unit stride, memory is
// accessed in aligned 16-byte vectors even if the row is not aligned: then the vectors begin
// `misalignment` elements before the lanes' own, and lanes exchange words. So what a lane computes
// does not depend on alignment.
//
// Indices t are relative to `data`, the first element of the warp's part of a row. Elements up to
// count may be read; those from there on are zero.
template <typename T, int V, Access ACCESS>
class TileReader {
 public:
  __device__ __forceinline__ TileReader(const T* data, int64_t stride, int count, int lane)
      : data_(data), stride_(stride), count_(count), lane_(lane) {
    misalignment_ = ACCESS == Access::kUnit ? row_misalignment(data) : 0;
  }

  // Loads the vector of the lane whose own elements begin at t; without EDGE it ends inside. It may
  // begin before data: in the 16 bytes of data[0], which are memory of the same allocation.
  template <bool EDGE>
  __device__ __forceinline__ Pack<T, V> load(int t) const {
    t -= misalignment_;
    if (ACCESS != Access::kStrided && (!EDGE || t + V <= count_)) {
      return Pack<T, V>::load(data_ + t);
    }
    Pack<T, V> r;
    if (t >= count_) return r;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const bool inside = (ACCESS != Access::kUnit || t + i >= 0) && t + i < count_;
      if (inside) r.set_element(i, data_[(t + i) * (ACCESS == Access::kStrided ? stride_ : 1)]);
    }
    return r;
  }

  // The lane's own elements, from what load() gave for this tile and for the next.
  __device__ __forceinline__ Pack<T, V> own(const Pack<T, V>& tile, const Pack<T, V>& next) const {
    if (ACCESS != Access::kUnit || misalignment_ == 0) return tile;
    constexpr int kWords = Pack<T, V>::kWords;
    uint32_t c[kWords + 4];
#pragma unroll
    for (int i = 0; i < kWords; ++i) c[i] = tile.w[i];
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // of the next lane; for lane 31 of the next tile's lane 0
      const uint32_t head = lane_ == 0 ? next.w[i] : tile.w[i];
      c[kWords + i] = __shfl_sync(0xffffffff, head, (lane_ + 1) % 32);
    }
    return extract<T, V>(c, misalignment_);
  }

 private:
  const T* data_;
  int64_t stride_;
  int count_, lane_, misalignment_;
};

// Writes elements 0 to count of a warp's part of a row, tile after tile.
template <typename T, int V, Access ACCESS>
class TileWriter {
 public:
  __device__ __forceinline__ TileWriter(T* data, int64_t stride, int count, int lane)
      : data_(data), stride_(stride), count_(count), lane_(lane) {
    misalignment_ = ACCESS == Access::kUnit ? row_misalignment(data) : 0;
  }

  // The lane's own elements from t on; without EDGE they are inside.
  template <bool EDGE>
  __device__ __forceinline__ void store(int t, const Pack<T, V>& tile) {
    if (ACCESS == Access::kAligned && !EDGE) {
      tile.store(data_ + t);
    } else if (ACCESS != Access::kUnit || misalignment_ == 0) {
      write(t, tile);
    } else {
      constexpr int kWords = Pack<T, V>::kWords;
      uint32_t c[kWords + 4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // of the lane before; for lane 0 of the last tile's lane 31
        const uint32_t tail = tile.w[kWords - 4 + i];
        c[i] = __shfl_sync(0xffffffff, lane_ == 31 ? tail_[i] : tail, (lane_ + 31) % 32);
        tail_[i] = tail;
      }
#pragma unroll
      for (int i = 0; i < kWords; ++i) c[4 + i] = tile.w[i];
      write(t - misalignment_, extract<T, V>(c, 16 / static_cast<int>(sizeof(T)) - misalignment_));
    }
  }

  // After the last tile: what its lane 31 still holds; t is the lane's own in the tile that
  // follows.
  __device__ __forceinline__ void flush(int t) {
    if (ACCESS == Access::kUnit && misalignment_ != 0) store<true>(t, Pack<T, V>{});
  }

 private:
  __device__ __forceinline__ void write(int t, const Pack<T, V>& v) const {
    if (ACCESS != Access::kStrided && (ACCESS == Access::kAligned || t >= 0) && t + V <= count_) {
      v.store(data_ + t);
      return;
    }
    if (t >= count_) return;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      if ((ACCESS != Access::kUnit || t + i >= 0) && t + i < count_) {
        data_[(t + i) * (ACCESS == Access::kStrided ? stride_ : 1)] = v.element(i);
      }
    }
  }

  T* data_;
  int64_t stride_;
  int count_, lane_, misalignment_;
  uint32_t tail_[4] = {};
};

// The ids of V time steps from t on, a multiple of V; -1 from count on. ids.data is at t = 0.
template <int V>
__device__ __forceinline__ void load_ids(const SeqIdx& ids, int t, int count, int* id) {
  const int32_t* row = ids.data + t * ids.time;
  const bool aligned = reinterpret_cast<uintptr_t>(row) % 16 == 0;
  if (ids.data != nullptr && ids.time == 1 && aligned && t + V <= count) {
#pragma unroll
    for (int i = 0; i < V; i += 4) {
      const int4 four = *reinterpret_cast<const int4*>(row + i);
      id[i] = four.x;
      id[i + 1] = four.y;
      id[i + 2] = four.z;
      id[i + 3] = four.w;
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < V; ++i) id[i] = t + i < count ? ids.at(0, t + i) : -1;
}

// Which of the H inputs before each of V positions have its id, a bit each: fewer registers than
// ids.
template <int V, int H>
struct Matches {
  uint32_t bits[(V * H + 31) / 32] = {};

  // id: of the H positions before, then of the V.
  __device__ __forceinline__ void set(const int (&id)[H + V]) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
#pragma unroll
      for (int k = 0; k < H; ++k) {
        if (id[i + k] == id[i + H] && id[i + H] >= 0)
          bits[(i * H + k) / 32] |= 1u << (i * H + k) % 32;
      }
    }
  }
  // Whether position i and the one H - k before it have one id, not of padding; k = H is the
  // position itself.
  __device__ __forceinline__ bool at(int i, int k) const {
    return k == H || (bits[(i * H + k) / 32] >> (i * H + k) % 32 & 1) != 0;
  }
};

// The few values that all lanes of a warp on row (b, d) need: each lane fetches one of each kind,
// and shuffles hand them round. All lanes must call the members together.
template <typename T>
struct WarpValues {
  float lane_weight = 0, lane_before = 0, bias = 0;

  // p: weight, bias, width, and input(b, d, s) for x~. from: where before() begins.
  template <typename Args>
  __device__ __forceinline__ WarpValues(const Args& p, int64_t b, int64_t d, int64_t from,
                                        int lane) {
    if (lane < p.width) lane_weight = p.weight.load(d, lane);
    if (lane < 8 && from + lane < p.seqlen) lane_before = p.input(b, d, from + lane);
    if (p.bias.given()) bias = p.bias.load(d);
  }
  // weight[d, k], or 0 for k < 0
  __device__ __forceinline__ float weight(int k) const { return pick(lane_weight, k); }
  // x~ at from + j, j < 8
  __device__ __forceinline__ float before(int j) const { return pick(lane_before, j); }

  // lane's v of lane from, or 0 if that is not one of the first 8
  static __device__ __forceinline__ float pick(float v, int from) {
    const float r = __shfl_sync(0xffffffff, v, from & 31);
    return from >= 0 && from < 8 ? r : 0.0f;
  }
};

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

// Splits n = (outer * count + i) into its parts; 32-bit where it can.
__device__ __forceinline__ int64_t split(int64_t n, int64_t count, int64_t* i) {
  if (n >= 0 && n <= 0xffffffffll && count <= 0xffffffffll) {
    const uint32_t q = static_cast<uint32_t>(n) / static_cast<uint32_t>(count);
    *i = static_cast<uint32_t>(n) - q * static_cast<uint32_t>(count);
    return q;
  }
  *i = n % count;
  return n / count;
}

}  // namespace causal_conv1d::gpu
