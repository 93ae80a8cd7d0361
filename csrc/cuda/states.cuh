// x~ before the steps of a thread: earlier steps of x, and initial_states before the row.
#pragma once

#include "pack.cuh"
#include "views.cuh"

namespace causal_conv1d::gpu {

// x~ at the H steps before t of C adjacent channels from d on: near the beginning of a row by
// load_first(), else the constructor starts to load them and get() converts. FUSED: of x' =
// pre_gate * x.
template <typename T, int H, int C, bool FUSED = false>
class History {
 public:
  template <typename Args>
  __device__ __forceinline__ History(const Args& p, int64_t b, int64_t d, int64_t t) {
    if (t < H) return;
    load(p.x, b, d, t, x_);
    if (FUSED && p.pre_gate.given()) load(p.pre_gate, b, d, t, gate_);
  }

  template <typename Args>
  __device__ __forceinline__ void get(const Args& p, int64_t t, float (&h)[H][C]) const {
    if (t < H) return;
    const bool gated = FUSED && p.pre_gate.given();
#pragma unroll
    for (int j = 0; j < H; ++j) {
      const Pack<T, C> row = gated ? product(x_[j], gate_[FUSED ? j : 0]) : x_[j];
#pragma unroll
      for (int c = 0; c < C; ++c) h[j][c] = row.get(c);
    }
  }

  // A loop, as a row begins once and this code would be long.
  template <typename Args>
  static __device__ __forceinline__ void load_first(const Args& p, int64_t b, int64_t d, int64_t t,
                                                    float (&h)[H][C]) {
    if (t >= H) return;
    const bool gated = FUSED && p.pre_gate.given();
#pragma unroll 1
    for (int64_t s = t - H; s < t; ++s) {
#pragma unroll
      for (int c = 0; c < C; ++c) {
#pragma unroll
        for (int j = 0; j + 1 < H; ++j) h[j][c] = h[j + 1][c];
        h[H - 1][c] = p.input(b, d + c, s);
        if (gated && s >= 0) {
          h[H - 1][c] = round_to<T>(h[H - 1][c] * to_compute(*p.pre_gate.at(b, d + c, s)));
        }
      }
    }
  }

 private:
  static __device__ __forceinline__ void load(const View<T>& view, int64_t b, int64_t d, int64_t t,
                                              Pack<T, C>* rows) {
    const T* row = view.at(b, d, t - H);
#pragma unroll
    for (int j = 0; j < H; ++j) {
      rows[j] = Pack<T, C>::load(row);
      row += view.time;
    }
  }

  Pack<T, C> x_[H], gate_[FUSED ? H : 1];
};

// v of lane `from`, or 0 if that is not one of the first 8. All lanes must call it.
__device__ __forceinline__ float from_lane(float v, int from) {
  const float r = __shfl_sync(0xffffffff, v, from & 31);
  return from >= 0 && from < 8 ? r : 0.0f;
}

// states[b, d, j], or for j outside [0, count) the nearest: a load by some lanes alone would make
// the compiler prepare the loops around it for lanes to diverge.
__device__ __forceinline__ float load_nearest(const AnyView<float>& states, int64_t b, int64_t d,
                                              int j, int count) {
  return states.load(b, d, max(min(j, count - 1), 0));
}

// Puts the initial_states of (b, d) into h, a lane's inputs at t - H, t - H + 1, ..., of the row
// that begins at lo. first is H + 1 - W. All lanes must call it.
template <int H, typename Args, int N>
__device__ __forceinline__ void take_states(const Args& p, int64_t b, int64_t d, int lane,
                                            int first, int t, int lo, float (&h)[N]) {
  // Of lane j: x~ at lo - H + j.
  const float state = load_nearest(p.initial_states, b, d, lane - first, p.width - 1);
  const float mine = lane < first ? 0.0f : state;
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const int from = t + j - lo;
    const float before = from_lane(mine, from);
    if (from < H) h[j] = before;
  }
}

}  // namespace causal_conv1d::gpu
