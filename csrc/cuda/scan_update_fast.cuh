// The update for the types and strides that models use: it keeps up with memory. A lane has PIECES
// times four states of a channel, of ENTRIES batch entries, and starts all its loads before it waits
// for one. What is done once for a channel and entry, a lane does for one of the entries and hands
// to the others.
#pragma once

#include "scan_update.cuh"

namespace causal_conv1d::gpu::scan {

// Strides are in bytes; of 32 bits, but of the state's rows.
struct FastView {
  char* data;
  uint32_t strides[3];

  __device__ __forceinline__ bool given() const { return data != nullptr; }
  __device__ __forceinline__ char* at(uint32_t i, uint32_t j, uint32_t k = 0) const {
    const auto times = [](uint32_t x, uint32_t y) { return static_cast<uint64_t>(x) * y; };
    return data + (times(i, strides[0]) + times(j, strides[1]) + times(k, strides[2]));
  }
};

struct FastUpdateArgs {
  FastView state, x, dt, A, B, C, D, z, dt_bias, out;
  StateRows rows;
  int64_t state_stride;
  uint32_t batch, heads, dim, heads_a_group;
  int lane_bits;  // of a channel
  bool tied, softplus;  // tied: one A a channel
};

// Types of the state, and of x, dt, z, B, C and out; those of A, D and dt_bias are fp32.
template <int32_t STATE_, int32_t X_, int ENTRIES, int PIECES>
struct UpdateForm {
  static constexpr int32_t STATE = STATE_, X = X_;
  static constexpr int E = ENTRIES, P = PIECES;
  // A multiprocessor's. With more, loads come late or registers spill.
  static constexpr int kBlocks = E == 1 ? 10 : X == CAUSAL_CONV1D_FLOAT32 ? 5 : 7;
};

template <int32_t DTYPE>
constexpr int kBytes = DTYPE == CAUSAL_CONV1D_FLOAT32 ? 4 : 2;

// Four adjacent elements as they lie in memory.
template <int32_t DTYPE>
struct Four {
  static constexpr int kWords = kBytes<DTYPE>;
  uint32_t w[kWords];

  __device__ __forceinline__ void load(const char* from) { load_words<2 * kWords>(from, w); }
  __device__ __forceinline__ void get(float (&x)[4]) const {
    if constexpr (kWords == 4) {
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = __uint_as_float(w[i]);
    } else {
      unpack<4>(w, DTYPE == CAUSAL_CONV1D_BFLOAT16, x);
    }
  }
  __device__ __forceinline__ void set(const float (&x)[4]) {
    if constexpr (kWords == 4) {
#pragma unroll
      for (int i = 0; i < 4; ++i) w[i] = __float_as_uint(x[i]);
    } else {
      pack<4>(x, DTYPE == CAUSAL_CONV1D_BFLOAT16, w);
    }
  }
  __device__ __forceinline__ void store(char* to) const { store_words<2 * kWords>(w, to); }
};

__device__ __forceinline__ float load_or_0(const FastView& v, uint32_t h, uint32_t d) {
  return v.given() ? *reinterpret_cast<const float*>(v.at(h, d)) : 0.f;
}

// Sums y over the lanes of a channel; lane e of each E has that of entry e.
template <int E>
__device__ __forceinline__ float sum_entries(float (&y)[E], uint32_t lanes) {
#pragma unroll
  for (int n = E / 2; n > 0; n /= 2) {
    const bool upper = (threadIdx.x & n) != 0;
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const float give = upper ? y[i] : y[i + n];
      y[i] = (upper ? y[i + n] : y[i]) + __shfl_xor_sync(~0u, give, n);
    }
  }
  float sum = y[0];
#pragma unroll 1
  for (uint32_t mask = E; mask < lanes; mask *= 2) sum += __shfl_xor_sync(~0u, sum, mask);
  return sum;
}

template <typename K>
__global__ void __launch_bounds__(kUpdateThreads, K::kBlocks) update_fast(const FastUpdateArgs p) {
  constexpr int E = K::E, P = K::P, state_bytes = kBytes<K::STATE>, x_bytes = kBytes<K::X>;
  const uint32_t lanes = 1u << p.lane_bits, lane = threadIdx.x & (lanes - 1), piece = lanes * 4;
  const uint32_t own = (blockIdx.x * kUpdateThreads + threadIdx.x) >> p.lane_bits;
  const uint32_t entry = blockIdx.y * E, more = p.batch - 1 - entry;  // entries after the first
  const uint32_t channel = min(own, p.heads * p.dim - 1);
  const uint32_t h = p.heads > 1 ? channel / p.dim : 0, d = channel - h * p.dim;
  const uint32_t group = p.heads > 1 ? h / p.heads_a_group : 0;

  // This lane's entry. Where a row is not to be touched, the first one is read instead.
  const uint32_t mine = threadIdx.x & (E - 1), b = entry + min(mine, more);
  const bool there = mine <= more && own == channel;
  const int64_t row = p.rows.of(b);
  const bool used = row >= 0 && row < p.rows.count;
  const int64_t where = used ? row * p.state_stride : 0;
  const uint32_t stored = __ballot_sync(~0u, there && used) >> (threadIdx.x & 31 & ~(E - 1));

  char* const first = p.state.at(0, h, d) + lane * 4 * state_bytes;
  char* place[E];
  Four<K::STATE> state[E][P];
#pragma unroll
  for (int e = 0; e < E; ++e) {
    place[e] = first + (E == 1 ? where : __shfl_sync(~0u, where, e, E));
#pragma unroll
    for (int i = 0; i < P; ++i) state[e][i].load(place[e] + i * piece * state_bytes);
  }
  const float raw_dt = load_number<float>(p.dt.at(b, h, d), K::X);
  const float x = load_number<float>(p.x.at(b, h, d), K::X);
  const float z = p.z.given() ? load_number<float>(p.z.at(b, h, d), K::X) : 0.f;
  const float bias = load_or_0(p.dt_bias, h, d), skip = load_or_0(p.D, h, d);
  Four<CAUSAL_CONV1D_FLOAT32> rates[P];
#pragma unroll
  for (int i = 0; i < P; ++i) {
    const char* const from = p.A.at(h, d);
    if (p.tied) {
      rates[i].w[0] = *reinterpret_cast<const uint32_t*>(from);
      rates[i].w[1] = rates[i].w[2] = rates[i].w[3] = rates[i].w[0];
    } else {
      rates[i].load(from + (i * piece + lane * 4) * 4);
    }
  }
  Four<K::X> raw_B[E][P], raw_C[E][P];
  const char* const from_B = p.B.at(entry, group) + lane * 4 * x_bytes;
  const char* const from_C = p.C.at(entry, group) + lane * 4 * x_bytes;
#pragma unroll
  for (int e = 0; e < E; ++e) {
    const uint32_t after = min(static_cast<uint32_t>(e), more);
#pragma unroll
    for (int i = 0; i < P; ++i) {
      raw_B[e][i].load(from_B + (after * p.B.strides[0] + i * piece * x_bytes));
      raw_C[e][i].load(from_C + (after * p.C.strides[0] + i * piece * x_bytes));
    }
  }

  const float dt = p.softplus ? softplus(raw_dt + bias) : raw_dt + bias;
  const float dtx = dt * x, log_decay = dt * static_cast<float>(kLog2e);
  float y[E];
#pragma unroll
  for (int e = 0; e < E; ++e) {
    const float rate = E == 1 ? log_decay : __shfl_sync(~0u, log_decay, e, E);
    const float input = E == 1 ? dtx : __shfl_sync(~0u, dtx, e, E);
    y[e] = 0;
#pragma unroll
    for (int i = 0; i < P; ++i) {
      float A[4], B[4], C[4], s[4];
      rates[i].get(A);
      raw_B[e][i].get(B);
      raw_C[e][i].get(C);
      state[e][i].get(s);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        s[k] = fmaf(exp2_of(rate * A[k]), s[k], input * B[k]);
        y[e] = fmaf(C[k], s[k], y[e]);
      }
      state[e][i].set(s);
      if (stored >> e & 1) state[e][i].store(place[e] + i * piece * state_bytes);
    }
  }
  float sum = fmaf(skip, x, sum_entries(y, lanes));
  if (p.z.given()) sum *= z * sigmoid(z);
  if (!used) sum = row < 0 ? 0.f : NAN;
  if (there && lane < E) store(p.out.at(b, h, d), K::X, sum);
}

}  // namespace causal_conv1d::gpu::scan
