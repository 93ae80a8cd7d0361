// The update for the types and strides that models use: it keeps up with memory. A lane has PIECES
// times 16 bytes of a channel's states, of ENTRIES batch entries, and starts all its loads before
// it waits for one. What is done once for a channel and entry, a lane does for some of the entries
// and hands to the others.
#pragma once

#include "scan_update.cuh"
#include "schedule.cuh"

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
  int lane_bits;        // of a channel
  bool tied, softplus;  // tied: one A a channel
};

template <int32_t DTYPE>
constexpr int kBytes = DTYPE == CAUSAL_CONV1D_FLOAT32 ? 4 : 2;

// Types of the state, and of x, dt, z, B, C and out; those of A, D and dt_bias are fp32.
template <int32_t STATE_, int32_t X_, int ENTRIES, int PIECES>
struct UpdateForm {
  static constexpr int32_t STATE = STATE_, X = X_;
  static constexpr int E = ENTRIES, P = PIECES, V = 16 / kBytes<STATE>;  // V: states of a piece
  // This many lanes, one after another, share what is done once, an entry each, in rounds. There
  // are as many lanes from 16 states on.
  static constexpr int kSharing = E == 1 ? 1 : 16 / V, kRounds = E / kSharing;
  // A multiprocessor's. With more, loads come late or registers spill.
  static constexpr int kBlocks = E == 1 ? 9 : V == 8 || X == CAUSAL_CONV1D_FLOAT32 ? 5 : 7;
};

// V adjacent elements as they lie in memory.
template <int32_t DTYPE, int V>
struct Elements {
  static constexpr int kWords = V * kBytes<DTYPE> / 4;
  uint32_t w[kWords];

  __device__ __forceinline__ void load(const char* from) { load_words<2 * kWords>(from, w); }
  __device__ __forceinline__ void get(float (&x)[V]) const {
    if constexpr (kWords == V) {
#pragma unroll
      for (int i = 0; i < V; ++i) x[i] = __uint_as_float(w[i]);
    } else {
      unpack<V>(w, DTYPE == CAUSAL_CONV1D_BFLOAT16, x);
    }
  }
  __device__ __forceinline__ void set(const float (&x)[V]) {
    if constexpr (kWords == V) {
#pragma unroll
      for (int i = 0; i < V; ++i) w[i] = __float_as_uint(x[i]);
    } else {
      pack<V>(x, DTYPE == CAUSAL_CONV1D_BFLOAT16, w);
    }
  }
  __device__ __forceinline__ void store(char* to) const { store_words<2 * kWords>(w, to); }
};

__device__ __forceinline__ float load_or_0(const FastView& v, uint32_t h, uint32_t d) {
  return v.given() ? *reinterpret_cast<const float*>(v.at(h, d)) : 0.f;
}

// Sums y over the lanes of a channel; lane i of each COUNT has that of y[i].
template <int COUNT>
__device__ __forceinline__ float sum_entries(float* y, uint32_t lanes) {
#pragma unroll
  for (int n = COUNT / 2; n > 0; n /= 2) {
    const bool upper = (threadIdx.x & n) != 0;
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const float give = upper ? y[i] : y[i + n];
      y[i] = (upper ? y[i + n] : y[i]) + __shfl_xor_sync(~0u, give, n);
    }
  }
  float sum = y[0];
#pragma unroll 1
  for (uint32_t mask = COUNT; mask < lanes; mask *= 2) sum += __shfl_xor_sync(~0u, sum, mask);
  return sum;
}

// An entry of the batch, for a lane that has its share of the work.
struct UpdateShare {
  uint32_t entry;
  bool there;
  int64_t row;
  float dt, x, z;
};

template <typename K>
__global__ void __launch_bounds__(kUpdateThreads, kAtMost<K::kBlocks>)
    update_fast(const FastUpdateArgs p) {
  constexpr int E = K::E, P = K::P, V = K::V, SHARING = K::kSharing, ROUNDS = K::kRounds;
  constexpr int state_bytes = kBytes<K::STATE>, x_bytes = kBytes<K::X>;
  const uint32_t lanes = 1u << p.lane_bits, lane = threadIdx.x & (lanes - 1), piece = lanes * V;
  const uint32_t own = (blockIdx.x * kUpdateThreads + threadIdx.x) >> p.lane_bits;
  const uint32_t entry = blockIdx.y * E, more = p.batch - 1 - entry;  // entries after the first
  const uint32_t channel = min(own, p.heads * p.dim - 1);
  const uint32_t h = p.heads > 1 ? channel / p.dim : 0, d = channel - h * p.dim;
  const uint32_t group = p.heads > 1 ? h / p.heads_a_group : 0;

  // Where a row is not to be touched, the first one is read instead.
  UpdateShare share[ROUNDS];
  int64_t where[ROUNDS];
  uint32_t stored[ROUNDS];
#pragma unroll
  for (int r = 0; r < ROUNDS; ++r) {
    const uint32_t mine = (threadIdx.x & (SHARING - 1)) + r * SHARING;
    share[r].entry = entry + min(mine, more);
    share[r].there = mine <= more && own == channel;
    share[r].row = p.rows.of(share[r].entry);
    const bool used = share[r].row >= 0 && share[r].row < p.rows.count;
    where[r] = used ? share[r].row * p.state_stride : 0;
    stored[r] = __ballot_sync(~0u, share[r].there && used) >> (threadIdx.x & 31 & ~(SHARING - 1));
  }
  char* const first = p.state.at(0, h, d) + lane * V * state_bytes;
  char* place[E];
  Elements<K::STATE, V> state[E][P];
#pragma unroll
  for (int e = 0; e < E; ++e) {
    const int64_t at = where[e / SHARING];
    place[e] = first + (E == 1 ? at : __shfl_sync(~0u, at, e % SHARING, SHARING));
#pragma unroll
    for (int i = 0; i < P; ++i) state[e][i].load(place[e] + i * piece * state_bytes);
  }
#pragma unroll
  for (int r = 0; r < ROUNDS; ++r) {
    const uint32_t b = share[r].entry;
    share[r].dt = load_number<float>(p.dt.at(b, h, d), K::X);
    share[r].x = load_number<float>(p.x.at(b, h, d), K::X);
    share[r].z = p.z.given() ? load_number<float>(p.z.at(b, h, d), K::X) : 0.f;
  }
  const float bias = load_or_0(p.dt_bias, h, d), skip = load_or_0(p.D, h, d);
  float A[P][V];
#pragma unroll
  for (int i = 0; i < P; ++i) {
    const float* const from = reinterpret_cast<const float*>(p.A.at(h, d));
    if (p.tied) {
#pragma unroll
      for (int k = 0; k < V; ++k) A[i][k] = *from;
    } else {
      load_vector(from + i * piece + lane * V, A[i]);
    }
  }
  Elements<K::X, V> raw_B[E][P], raw_C[E][P];
  const char* const from_B = p.B.at(entry, group) + lane * V * x_bytes;
  const char* const from_C = p.C.at(entry, group) + lane * V * x_bytes;
#pragma unroll
  for (int e = 0; e < E; ++e) {
    const uint32_t after = min(static_cast<uint32_t>(e), more);
#pragma unroll
    for (int i = 0; i < P; ++i) {
      raw_B[e][i].load(from_B + (after * p.B.strides[0] + i * piece * x_bytes));
      raw_C[e][i].load(from_C + (after * p.C.strides[0] + i * piece * x_bytes));
    }
  }

  float log_decay[ROUNDS], input[ROUNDS], y[E];
#pragma unroll
  for (int r = 0; r < ROUNDS; ++r) {
    const float delta = share[r].dt + bias, dt = p.softplus ? softplus(delta) : delta;
    log_decay[r] = dt * static_cast<float>(kLog2e);
    input[r] = dt * share[r].x;
  }
#pragma unroll
  for (int e = 0; e < E; ++e) {
    const float own_rate = log_decay[e / SHARING], own_input = input[e / SHARING];
    const float rate = E == 1 ? own_rate : __shfl_sync(~0u, own_rate, e % SHARING, SHARING);
    const float dtx = E == 1 ? own_input : __shfl_sync(~0u, own_input, e % SHARING, SHARING);
    y[e] = 0;
#pragma unroll
    for (int i = 0; i < P; ++i) {
      float B[V], C[V], s[V];
      raw_B[e][i].get(B);
      raw_C[e][i].get(C);
      state[e][i].get(s);
#pragma unroll
      for (int k = 0; k < V; ++k) {
        s[k] = fmaf(exp2_of(rate * A[i][k]), s[k], dtx * B[k]);
        y[e] = fmaf(C[k], s[k], y[e]);
      }
      state[e][i].set(s);
      if (stored[e / SHARING] >> e % SHARING & 1) {
        state[e][i].store(place[e] + i * piece * state_bytes);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < ROUNDS; ++r) {
    const UpdateShare& own_share = share[r];
    float sum = fmaf(skip, own_share.x, sum_entries<SHARING>(y + r * SHARING, lanes));
    if (p.z.given()) sum *= own_share.z * sigmoid(own_share.z);
    if (own_share.row < 0) sum = 0;
    if (own_share.row >= p.rows.count) sum = NAN;
    if (own_share.there && lane < SHARING) store(p.out.at(own_share.entry, h, d), K::X, sum);
  }
}

}  // namespace causal_conv1d::gpu::scan
