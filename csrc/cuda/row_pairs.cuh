// Rows of channel-last tensors, read through shared memory.
#pragma once

#include "pack.cuh"
#include "schedule.h"

namespace causal_conv1d::gpu {

// Reads rows of two tensors, x and g, U at a time: a group, from `count` on of zeros. Each lane of
// a warp reads its own column, of C adjacent channels; lanes past the last column read that one.
// Groups come by cp.async through a ring in shared memory: one is read while the others are in
// flight.
//
// wide: rows begin and end 16-byte aligned. Lanes then copy 16 bytes each, of several rows at a
// time: fewer instructions than one copy per lane and row. For 16-bit elements.
template <typename T, int C, int U, int GROUPS>
class RowPairs {
  static constexpr int kBytes = Pack<T, C>::kBytes, kPitch = kThreads * kBytes;
  static constexpr int kGroup = 2 * U * kPitch;
  // Columns per lane, and rows per warp, of a copy of 16 bytes.
  static constexpr int kWide = sizeof(T) == 2 ? 16 / kBytes : 1;
  static_assert(U % kWide == 0, "a group is whole copies");

 public:
  struct alignas(128) Shared {
    char bytes[GROUPS * kGroup];
  };

  // x, g: the lane's column of the first row.
  __device__ __forceinline__ RowPairs(Shared* shared, const T* x, const T* g, int64_t x_row,
                                      int64_t g_row, int columns, int count, bool wide)
      : left_(count) {
    const int n = wide ? kWide : 1;
    const int lane = threadIdx.x % 32, own = min(lane, columns - 1);
    const int row = lane * n / 32, column = lane * n % 32;
    const int from = (min(column, columns - n) - own) * C;
    const uint32_t warp = shared_address(shared) + (threadIdx.x - lane) * kBytes;
    from_ = warp + own * kBytes;
    to_ = warp + 2 * row * kPitch + column * kBytes;
    left_ -= row;
    next_x_ = reinterpret_cast<const char*>(x + from) + row * x_row;
    next_g_ = reinterpret_cast<const char*>(g + from) + row * g_row;
  }

  // Starts to copy the next group, until commit_copies(): GROUPS times before the first read, then
  // once after the last read of each group. All lanes must call it. x_row and g_row, the bytes from
  // a row to the next, wide, and whether the tensors are given (else they count as zeros) are
  // parameters of the kernel, which cost no registers.
  __device__ __forceinline__ void start(const int64_t& x_row, const int64_t& g_row,
                                        const bool& wide, bool has_x = true, bool has_g = true) {
    const uint32_t to = to_ + slot_;
    if (kWide > 1 && !wide) {
#pragma unroll 1
      for (int u = 0; u < U; ++u) {
        Rows<1> rows;
        copy(rows, u, to, x_row, g_row, has_x, has_g);
        land(rows, u, to);
      }
    } else {
      Rows<kWide> rows[U / kWide];
#pragma unroll
      for (int u = 0; u < U; u += kWide) {
        copy(rows[u / kWide], u, to, x_row, g_row, has_x, has_g);
      }
#pragma unroll
      for (int u = 0; u < U; u += kWide) land(rows[u / kWide], u, to);
    }
    left_ -= U;
    slot_ = slot_ + kGroup == GROUPS * kGroup ? 0 : slot_ + kGroup;
  }

  // Row u of the oldest group, for which all lanes must have waited.
  __device__ __forceinline__ Pack<T, C> read_x(int u) const {
    return load_shared<T, C>(from_ + slot_ + 2 * u * kPitch);
  }
  __device__ __forceinline__ Pack<T, C> read_g(int u) const {
    return load_shared<T, C>(from_ + slot_ + (2 * u + 1) * kPitch);
  }

 private:
  // The lane's part of N rows.
  template <int N>
  struct Rows {
    InFlight<N * kBytes> x, g;
  };

  // That of the rows from u on, or zeros.
  template <int N>
  __device__ __forceinline__ void copy(Rows<N>& rows, int u, uint32_t to, const int64_t& x_row,
                                       const int64_t& g_row, bool has_x, bool has_g) {
    rows.x.start(has_x && u < left_, to + 2 * u * kPitch, next_x_);
    rows.g.start(has_g && u < left_, to + (2 * u + 1) * kPitch, next_g_);
    next_x_ += N * x_row;
    next_g_ += N * g_row;
  }
  template <int N>
  __device__ __forceinline__ void land(const Rows<N>& rows, int u, uint32_t to) const {
    rows.x.land(to + 2 * u * kPitch);
    rows.g.land(to + (2 * u + 1) * kPitch);
  }

  uint32_t from_, to_;  // where the lane reads, and copies to
  const char *next_x_, *next_g_;
  int left_;  // rows, from the lane's on
  int slot_ = 0;
};

// There is no such copy of 2 bytes: single channels are loaded as they are used.
template <typename T, int U, int GROUPS>
class RowPairs<T, 1, U, GROUPS> {
 public:
  struct Shared {};

  __device__ __forceinline__ RowPairs(Shared*, const T* x, const T* g, int64_t, int64_t, int,
                                      int count, bool)
      : next_x_(reinterpret_cast<const char*>(x)),
        next_g_(reinterpret_cast<const char*>(g)),
        left_(count) {}

  __device__ __forceinline__ void start(const int64_t& x_row, const int64_t& g_row, bool) {
    if (++groups_ > GROUPS) {
      next_x_ += U * x_row;
      next_g_ += U * g_row;
      left_ -= U;
    }
    x_row_ = x_row;
    g_row_ = g_row;
  }

  __device__ __forceinline__ Pack<T, 1> read_x(int u) const {
    return left_ > u ? Pack<T, 1>::load(next_x_ + u * x_row_) : Pack<T, 1>{};
  }
  __device__ __forceinline__ Pack<T, 1> read_g(int u) const {
    return left_ > u ? Pack<T, 1>::load(next_g_ + u * g_row_) : Pack<T, 1>{};
  }

 private:
  const char *next_x_, *next_g_;
  int64_t x_row_ = 0, g_row_ = 0;
  int left_, groups_ = 0;
};

}  // namespace causal_conv1d::gpu
