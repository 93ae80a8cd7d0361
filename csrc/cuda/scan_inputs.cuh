// What forward and backward read, and how a block's threads share it.
//
// A channel is TL lanes in time; a lane has kItems consecutive steps in registers, and the block's
// channels, of one group, share tiles of B and C in shared memory. States are taken one after
// another: with h = P h_before + H over a lane's steps, the lanes find what comes before each by a
// scan over P and H, and go over their steps again. So there is one exponential for a state and
// step, no sum over states between lanes, and time is in parallel.
#pragma once

#include "scan_math.cuh"
#include "scan_segments.cuh"

namespace causal_conv1d::gpu::scan {

constexpr int kWarps = 8, kThreads = 32 * kWarps;

template <typename F, int TL>
constexpr int kSteps = TL * kItems<F>;  // a chunk: the steps that a block has at a time

struct Inputs {
  View u, delta, A, B, C, D, z, delta_bias, initial_states;
  Sequences sequences;
  int64_t dim, group_dim, groups, dstate;
  bool softplus, B_constant, C_constant;

  __host__ __device__ __forceinline__ int64_t blocks_a_group(int channels) const {
    return (group_dim + channels - 1) / channels;
  }
};

// Whether all rows are read by vectors, to their ends, and B and C change in time.
inline bool suits_vectors(const Inputs& p) {
  if (p.B_constant || p.C_constant || p.sequences.seqlen % kItems<float> != 0) return false;
  return p.u.vectors && p.delta.vectors && p.B.vectors && p.C.vectors &&
         (!p.z.given() || p.z.vectors);
}

inline Inputs make_inputs(const ScanInputs& in) {
  Inputs p{};
  p.u = view(in.u);
  p.delta = view(in.delta);
  p.A = view(in.A);
  p.B = view(in.B);
  p.C = view(in.C);
  p.D = view(in.D);
  p.z = view(in.z);
  p.delta_bias = view(in.delta_bias);
  p.initial_states = view(in.initial_states);
  p.sequences = sequences(in);
  p.dim = in.u.sizes[1];
  p.groups = groups_of(in);
  p.group_dim = p.dim / p.groups;
  p.dstate = in.A.sizes[1];
  p.softplus = in.delta_softplus != 0;
  p.B_constant = is_constant(in.B);
  p.C_constant = is_constant(in.C);
  return p;
}

// The CHANNELS channels of a block, of one group; count of them there are.
template <int CHANNELS>
struct Channels {
  int64_t group, first;
  int count;

  __device__ __forceinline__ Channels() {}
  // The block-th of group's blocks.
  __device__ __forceinline__ Channels(const Inputs& p, uint32_t of_group, uint32_t block) {
    group = of_group;
    first = group * p.group_dim + static_cast<int64_t>(block) * CHANNELS;
    const int64_t left = (group + 1) * p.group_dim - first;
    count = left < CHANNELS ? static_cast<int>(left) : CHANNELS;
  }
};

// A row of a tile holds a state's numbers of a chunk, N of each lane, so that lanes which read 16
// bytes each meet no bank twice: first 16 bytes of every lane, then the next.
template <typename F, int TL, int N, int THREADS = kThreads>
struct TileRow {
  static constexpr int kVector = 16 / sizeof(F), kSize = TL * N;
  static constexpr int kVectors = kSize / kVector, kOfLane = N / kVector;
  static constexpr int kTogether = THREADS / kVectors;  // rows that the block fills at a time

  static __device__ __forceinline__ int place(int vector) {
    return (vector % kOfLane * TL + vector / kOfLane) * kVector;
  }

  // Rows of states n0 .. n0 + count - 1 of B or C, up to STATES, to rows of shared memory pitch
  // apart: load() starts the loads, store() ends them. For a chunk that has all its steps.
  template <int STATES>
  struct Pending {
    static constexpr int kRounds = (STATES + kTogether - 1) / kTogether;
    Raw<F, kVector> raw[kRounds];

    __device__ __forceinline__ void load(const View& v, const Segment& s, int64_t group, int n0,
                                         int count, int64_t t0) {
      const int q = threadIdx.x % kVectors, first = threadIdx.x / kVectors;
      const char* const from = v.at(s.batch, group, n0) + (t0 + q * kVector) * v.step;
#pragma unroll
      for (int i = 0; i < kRounds; ++i) {
        const int n = min(first + i * kTogether, count - 1);
        raw[i].load_adjacent(from + n * v.strides[2], v.dtype, true);
      }
    }
    __device__ __forceinline__ void store(const View& v, int count, F* to, int pitch) const {
      const int q = threadIdx.x % kVectors, first = threadIdx.x / kVectors;
      to += first * pitch + place(q);
#pragma unroll
      for (int i = 0; i < kRounds; ++i) {
        F x[kVector];
        raw[i].get(v.dtype, x);
        if (first + i * kTogether < count) store_vector(to + i * kTogether * pitch, x);
      }
    }
  };

  // The same at once, for any chunk and strides.
  static __device__ __forceinline__ void fill_any(const View& v, const Segment& s, int64_t group,
                                                  int n0, int count, int64_t t0, F* to, int pitch) {
    const bool states_adjacent = v.strides[2] < v.step;
#pragma unroll 1
    for (int i = threadIdx.x; i < count * kVectors; i += THREADS) {
      const int n = states_adjacent ? i % count : i / kVectors;
      const int q = states_adjacent ? i / count : i % kVectors;
      F x[kVector];
      const int64_t t = t0 + q * kVector;
      load_part(v, v.at(s.batch, group, n0 + n) + t * v.step, Part::of(t, s.begin, s.end), x);
      store_vector(to + n * pitch + place(q), x);
    }
  }

  // A lane's steps; row points at its first 16 bytes.
  static __device__ __forceinline__ void read(const F* row, F (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; i += kVector) {
      F v[kVector];
      load_vector(row + i * TL, v);
#pragma unroll
      for (int j = 0; j < kVector; ++j) x[i + j] = v[j];
    }
  }
};

// What a thread loads for up to STATES states of CHANNELS channels: load() calls f(channel, state,
// whether there is such a one), store() calls f(channel, state, what came) for the states there
// are.
template <typename T, int STATES, int CHANNELS, int THREADS = kThreads>
struct PendingChannels {
  static constexpr int kAll = STATES * CHANNELS, kRounds = (kAll + THREADS - 1) / THREADS;
  static_assert(THREADS % STATES == 0, "a thread has one state");
  T x[kRounds];

  template <typename Function>
  __device__ __forceinline__ void load(int states, int count, Function&& f) {
    const int n = threadIdx.x % STATES, first = threadIdx.x / STATES;
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      const int channel = first + i * (THREADS / STATES);
      x[i] = f(channel, n, n < states && channel < count);
    }
  }
  template <typename Function>
  __device__ __forceinline__ void store(int states, Function&& f) const {
    const int n = threadIdx.x % STATES, first = threadIdx.x / STATES;
    if (n >= states || (kAll < THREADS && threadIdx.x >= kAll)) return;
#pragma unroll
    for (int i = 0; i < kRounds; ++i) f(first + i * (THREADS / STATES), n, x[i]);
  }
};

// Delta of steps to dt; 0 for what is not part's, where a step changes nothing.
template <typename F, int N>
__device__ __forceinline__ void to_dt(const Inputs& p, F bias, Part part, F (&dt)[N]) {
  if (p.softplus) {
#pragma unroll
    for (int i = 0; i < N; ++i) dt[i] = softplus(dt[i] + bias);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) dt[i] += bias;
  }
  keep_part(part, dt);
}

// A times log2(e) likewise.
template <typename F, int STATES, int CHANNELS, int THREADS = kThreads>
struct PendingRates {
  PendingChannels<RawNumber<F>, STATES, CHANNELS, THREADS> raw;

  __device__ __forceinline__ void load(const Inputs& p, int64_t first, int n0, int states,
                                       int count) {
    raw.load(states, count, [&](int channel, int n, bool there) {
      RawNumber<F> x;
      x.load(p.A, p.A.at(first, n0) + channel * p.A.strides[0] + n * p.A.step, there);
      return x;
    });
  }
  __device__ __forceinline__ void store(const Inputs& p, int states, F* to, int pitch) const {
    raw.store(states, [&](int channel, int n, const RawNumber<F>& x) {
      to[n * pitch + channel] = x.get(p.A) * F(kLog2e);
    });
  }
};

// B and C of the states from n0 on to two tiles; load() starts as much as registers allow.
template <typename F, int TL, int N, int STATES, bool FAST, int THREADS = kThreads>
struct Projections {
  using Tile = TileRow<F, TL, N, THREADS>;
  typename Tile::template Pending<STATES> B, C;

  static __device__ __forceinline__ bool whole(const Segment& s, int64_t t0) {
    return FAST && t0 >= s.begin && t0 + Tile::kSize <= s.end;
  }
  __device__ __forceinline__ void load(const Inputs& p, const Segment& s, int64_t group, int n0,
                                       int count, int64_t t0) {
    if (!whole(s, t0)) return;
    B.load(p.B, s, group, n0, count, t0);
    C.load(p.C, s, group, n0, count, t0);
  }
  __device__ __forceinline__ void store(const Inputs& p, const Segment& s, int64_t group, int n0,
                                        int count, int64_t t0, F* to_B, F* to_C, int pitch) const {
    if (whole(s, t0)) {
      B.store(p.B, count, to_B, pitch);
      C.store(p.C, count, to_C, pitch);
      return;
    }
    if (!p.B_constant) Tile::fill_any(p.B, s, group, n0, count, t0, to_B, pitch);
    if (!p.C_constant) Tile::fill_any(p.C, s, group, n0, count, t0, to_C, pitch);
  }
};

// One step of a scan over (P, H): lanes that have one OFFSET before them take it in.
template <int TL, int OFFSET>
__device__ __forceinline__ void take_before(float& P, float& H) {
  constexpr int c = (32 - TL) << 8;
  if constexpr (2 * OFFSET < TL) {
    asm volatile(
        "{ .reg .f32 h, q; .reg .pred p;\n"
        "shfl.sync.up.b32 h|p, %0, %2, %3, -1;\n"
        "shfl.sync.up.b32 q, %1, %2, %3, -1;\n"
        "@p fma.rn.f32 %0, %1, h, %0;\n"
        "@p mul.f32 %1, %1, q; }"
        : "+f"(H), "+f"(P)
        : "n"(OFFSET), "n"(c));
  } else {
    asm volatile(
        "{ .reg .f32 h; .reg .pred p;\n"
        "shfl.sync.up.b32 h|p, %0, %2, %3, -1;\n"
        "@p fma.rn.f32 %0, %1, h, %0; }"
        : "+f"(H)
        : "f"(P), "n"(OFFSET), "n"(c));
  }
}
template <int TL, int OFFSET>
__device__ __forceinline__ void take_after(float& P, float& H) {
  constexpr int c = (32 - TL) << 8 | 31;
  if constexpr (2 * OFFSET < TL) {
    asm volatile(
        "{ .reg .f32 h, q; .reg .pred p;\n"
        "shfl.sync.down.b32 h|p, %0, %2, %3, -1;\n"
        "shfl.sync.down.b32 q, %1, %2, %3, -1;\n"
        "@p fma.rn.f32 %0, %1, h, %0;\n"
        "@p mul.f32 %1, %1, q; }"
        : "+f"(H), "+f"(P)
        : "n"(OFFSET), "n"(c));
  } else {
    asm volatile(
        "{ .reg .f32 h; .reg .pred p;\n"
        "shfl.sync.down.b32 h|p, %0, %2, %3, -1;\n"
        "@p fma.rn.f32 %0, %1, h, %0; }"
        : "+f"(H)
        : "f"(P), "n"(OFFSET), "n"(c));
  }
}
template <int TL, int OFFSET>
__device__ __forceinline__ void take_before(double& P, double& H) {
  const double h = __shfl_up_sync(~0u, H, OFFSET, TL), q = __shfl_up_sync(~0u, P, OFFSET, TL);
  if (static_cast<int>(threadIdx.x % TL) >= OFFSET) {
    H = fma(P, h, H);
    P *= q;
  }
}
template <int TL, int OFFSET>
__device__ __forceinline__ void take_after(double& P, double& H) {
  const double h = __shfl_down_sync(~0u, H, OFFSET, TL), q = __shfl_down_sync(~0u, P, OFFSET, TL);
  if (static_cast<int>(threadIdx.x % TL) + OFFSET < TL) {
    H = fma(P, h, H);
    P *= q;
  }
}

// The state before a lane's steps. H and P: the lane's end from 0 and its decay; carry: the state
// before the first lane; on return H is the state after the lane's steps.
template <int TL, typename F>
__device__ __forceinline__ F scan_forward(F P, F& H, F carry, bool first) {
  if (first) H = fma(P, carry, H);
  take_before<TL, 1>(P, H);
  if constexpr (TL > 2) take_before<TL, 2>(P, H);
  if constexpr (TL > 4) take_before<TL, 4>(P, H);
  if constexpr (TL > 8) take_before<TL, 8>(P, H);
  if constexpr (TL > 16) take_before<TL, 16>(P, H);
  const F before = __shfl_up_sync(~0u, H, 1, TL);
  return first ? carry : before;
}

// The same in reverse, for gradients; carry comes after the last lane.
template <int TL, typename F>
__device__ __forceinline__ F scan_backward(F P, F G, F carry, bool last) {
  if (last) G = fma(P, carry, G);
  take_after<TL, 1>(P, G);
  if constexpr (TL > 2) take_after<TL, 2>(P, G);
  if constexpr (TL > 4) take_after<TL, 4>(P, G);
  if constexpr (TL > 8) take_after<TL, 8>(P, G);
  if constexpr (TL > 16) take_after<TL, 16>(P, G);
  const F after = __shfl_down_sync(~0u, G, 1, TL);
  return last ? carry : after;
}

}  // namespace causal_conv1d::gpu::scan
