// The backward's third step: gradients within a chunk, whose states before and after are known.
#pragma once

#include "scan_backward.cuh"

namespace causal_conv1d::gpu::scan {

constexpr int kGradientStates = 8;  // of a tile

// dB and dC are sums over channels. A warp adds those of its channels and each lane keeps
// kKept steps; then the block adds its warps' in order.
template <typename F>
constexpr int kKept = kItems<F> * kLanes / 32;

template <typename F>
struct GradientShared {
  static constexpr int kRow = kSteps<F, kLanes>, kTile = kGradientStates * kRow;
  struct alignas(16) Row {
    F B[kRow], C[kRow];
    F A[kLaneChannels];  // times log2(e)
    F h[kLaneChannels];  // before the chunk; then dA
    F g[kLaneChannels];  // after it, times the decay between
  };
  static constexpr int kPitch = sizeof(Row) / sizeof(F);
  Row rows[kGradientStates];
  Chunk chunk;  // here, to leave the registers to the loop over states
  alignas(16) F dB[kWarps * kTile], dC[kWarps * kTile];
};

// What a tile needs: B, C, A, and the states before and after the chunk.
template <typename F, bool FAST>
struct GradientTileLoads {
  TileLoads<F, kGradientStates, FAST> tiles;
  PendingChannels<F, kGradientStates, kLaneChannels> h, g;

  __device__ __forceinline__ void start(const BackwardArgs& p, const BlockChannels& channels,
                                        const Chunk& chunk, int n0, const F* from_h,
                                        const F* from_g) {
    const int dstate = static_cast<int>(p.dstate), many = min(kGradientStates, dstate - n0);
    tiles.start(p, channels, chunk, n0, many);
    h.load(many, channels.count, [&](int channel, int n, bool there) {
      return there ? from_h[channel * dstate + n0 + n] : F(0);
    });
    g.load(many, channels.count, [&](int channel, int n, bool there) {
      return there ? from_g[channel * dstate + n0 + n] : F(0);
    });
  }
  __device__ __forceinline__ void end(const BackwardArgs& p, const BlockChannels& channels,
                                      const Chunk& chunk, int n0,
                                      typename GradientShared<F>::Row& row) const {
    constexpr int pitch = GradientShared<F>::kPitch;
    const int many = min(kGradientStates, static_cast<int>(p.dstate) - n0);
    tiles.end(p, channels, chunk, n0, many, row.B, row.C, row.A, pitch);
    h.store(many, [&](int channel, int n, F x) { row.h[n * pitch + channel] = x; });
    g.store(many, [&](int channel, int n, F x) { row.g[n * pitch + channel] = x; });
  }
};

// Sums over the warp's channels of x, a number for each of a lane's steps: halves of the numbers
// and of the lanes' pairs at a time. The first kKept of x are this lane's, of steps kKept c ..
template <typename F>
__device__ __forceinline__ void sum_channels(F (&x)[kItems<F>]) {
  int n = kItems<F>;
#pragma unroll
  for (int mask = 16; mask >= kLanes; mask /= 2) {
    n /= 2;
    const bool upper = (threadIdx.x & mask) != 0;
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const F give = upper ? x[i] : x[i + n];
      x[i] = (upper ? x[i + n] : x[i]) + __shfl_xor_sync(~0u, give, mask);
    }
  }
}

template <typename F>
__device__ __forceinline__ F sum_lanes(F x) {
#pragma unroll
  for (int mask = 1; mask < kLanes; mask *= 2) x += __shfl_xor_sync(~0u, x, mask);
  return x;
}

template <typename F>
__device__ __forceinline__ void keep(const F (&x)[kItems<F>], F* row) {
  const int lane = threadIdx.x % 32;
  if constexpr (kKept<F> == 2) {
    *reinterpret_cast<float2*>(row + 2 * lane) = make_float2(x[0], x[1]);
  } else {
    row[lane] = x[0];
  }
}
// The step of a chunk that lies at a place of such a row.
template <typename F>
__device__ __forceinline__ int step_at(int place) {
  const int lane = place / kKept<F>;
  return lane % kLanes * kItems<F> + lane / kLanes * kKept<F> + place % kKept<F>;
}

// What a lane knows of its steps, and sums over the states.
template <typename F>
struct StepGradients {
  F dt[kItems<F>], dtu[kItems<F>], dy[kItems<F>], sum;
  F gB[kItems<F>];   // g B
  F gaA[kItems<F>];  // g a h_before A log2(e)
  F y[kItems<F>];    // C h
};

// One state: decays a from its rate, and the gradients of B and C by this channel, with b those of
// the lane's steps and read_C(c) to get the others when registers are free. h and g: before and
// after the chunk. Returns the lane's part of dA.
template <typename F, bool Y, typename ReadC>
__device__ __forceinline__ F add_state(StepGradients<F>& s, F rate, F h, F g, int lane,
                                       const F (&b)[kItems<F>], ReadC&& read_C, F (&dB)[kItems<F>],
                                       F (&dC)[kItems<F>]) {
  constexpr int N = kItems<F>;
  F a[N], ah[N], c[N];
#pragma unroll
  for (int i = 0; i < N; ++i) a[i] = exp2_of(s.dt[i] * rate);
  F end = b[0] * s.dtu[0];
#pragma unroll
  for (int i = 1; i < N; ++i) end = fma(a[i], end, b[i] * s.dtu[i]);
  const F decay = exp2_of(s.sum * rate);
  h = scan_forward<kLanes>(decay, end, h, lane == 0);
  if (Y) read_C(c);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    ah[i] = a[i] * h;
    h = fma(b[i], s.dtu[i], ah[i]);
    dC[i] = s.dy[i] * h;
    if (Y) s.y[i] = fma(c[i], h, s.y[i]);
  }
  if (!Y) read_C(c);
  F cd[N];
#pragma unroll
  for (int i = 0; i < N; ++i) cd[i] = c[i] * s.dy[i];
  F start = cd[N - 1];
#pragma unroll
  for (int i = N - 2; i >= 0; --i) start = fma(a[i + 1], start, cd[i]);
  g = scan_backward<kLanes>(decay, a[0] * start, g, lane == kLanes - 1);
  F dA = 0;
#pragma unroll
  for (int i = N - 1; i >= 0; --i) {
    g += cd[i];
    dB[i] = g * s.dtu[i];
    s.gB[i] = fma(g, b[i], s.gB[i]);
    const F x = g * ah[i];
    s.gaA[i] = fma(rate, x, s.gaA[i]);
    dA = fma(s.dt[i], x, dA);
    g *= a[i];
  }
  return dA;
}

// Writes what belongs to a thread's steps: du, ddelta, dz, out, and sums over the chunk.
template <typename F, bool FAST, bool Y>
__device__ __forceinline__ void finish_steps(const BackwardArgs& p, StepGradients<F>& s,
                                             const Row& at, int64_t index) {
  constexpr int N = kItems<F>;
  RawNumber<F> raw_skip, raw_bias;
  raw_skip.load(p.D, p.D.at(at.d), at.active && p.D.given());
  raw_bias.load(p.delta_bias, p.delta_bias.at(at.d), at.active && p.delta_bias.given());
  RowLoad<F, FAST> u_load, delta_load, z_load, dout_load;
  u_load.start(p.u, at);
  delta_load.start(p.delta, at);
  if (Y) {
    z_load.start(p.z, at);
    dout_load.start(p.dout, at);
  }
  const F skip = raw_skip.get(p.D), bias = raw_bias.get(p.delta_bias);
  F u[N], ddelta[N], dD = 0, dbias = 0;
  u_load.end(p.u, at, u);
  delta_load.end(p.delta, at, ddelta);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const F slope = p.softplus ? sigmoid(ddelta[i] + bias) : F(1);
    ddelta[i] = fma(s.gaA[i], F(kLn2), u[i] * s.gB[i]) * slope;
    dD = fma(s.dy[i], u[i], dD);
    s.gB[i] = fma(s.gB[i], s.dt[i], skip * s.dy[i]);
    if (Y) s.y[i] = fma(skip, u[i], s.y[i]);
  }
#pragma unroll
  for (int i = 0; i < N; ++i) dbias += at.part.has(i) ? ddelta[i] : F(0);
  store_row(p.du, at, s.gB);
  store_row(p.ddelta, at, ddelta);
  dD = sum_lanes(dD);
  dbias = sum_lanes(dbias);
  if (at.active && at.lane == 0) {
    static_cast<F*>(p.sum_D)[index * p.dim + at.d] = dD;
    static_cast<F*>(p.sum_bias)[index * p.dim + at.d] = dbias;
  }
  if (!Y) return;
  if (p.z.given()) {
    F z[N], dz[N];
    z_load.end(p.z, at, z);
    dout_load.end(p.dout, at, dz);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const F r = sigmoid(z[i]);
      dz[i] *= s.y[i] * r * fma(z[i], F(1) - r, F(1));
      s.y[i] *= z[i] * r;
    }
    store_row(p.dz, at, dz);
  }
  store_row(p.out, at, s.y);
}

// Adds the warps' rows of a tile to the block's place in the workspace.
template <typename F>
__device__ __forceinline__ void add_warps(const F* rows, int many, bool first, F* to) {
  constexpr int vector = 16 / sizeof(F), tile = GradientShared<F>::kTile;
  for (int i = threadIdx.x * vector; i < many * GradientShared<F>::kRow; i += kThreads * vector) {
    F sum[vector], x[vector];
    load_vector(rows + i, sum);
#pragma unroll
    for (int w = 1; w < kWarps; ++w) {
      load_vector(rows + w * tile + i, x);
#pragma unroll
      for (int k = 0; k < vector; ++k) sum[k] += x[k];
    }
    if (!first) {
      load_vector(to + i, x);
#pragma unroll
      for (int k = 0; k < vector; ++k) sum[k] += x[k];
    }
    store_vector(to + i, sum);
  }
}

template <typename F>
__device__ __forceinline__ F sum_all(const F (&x)[kItems<F>]) {
  F sum = 0;
#pragma unroll
  for (int i = 0; i < kItems<F>; ++i) sum += x[i];
  return sum_lanes(sum);
}

// The states of a tile, whose first is n0, of the index-th chunk.
template <typename F, bool FAST, bool Y>
__device__ __forceinline__ void add_states(const BackwardArgs& p, GradientShared<F>& shared,
                                           const BlockChannels& channels, int64_t index, int n0,
                                           int many, StepGradients<F>& steps) {
  using Shared = GradientShared<F>;
  constexpr int N = kItems<F>;
  const Place at(channels);
  const F* row = shared.rows[0].B + at.lane * (16 / sizeof(F));
  F* own = shared.rows[0].A + at.channel;
  F* dB_row = shared.dB + threadIdx.x / 32 * Shared::kTile;
  F* dC_row = shared.dC + threadIdx.x / 32 * Shared::kTile;
#pragma unroll 1
  for (int n = 0; n < many; ++n) {
    F b[N], dB[N], dC[N];
    read_projection<F, FAST>(p.B, p.B_constant, row, at, n0 + n, b);
    const auto read_C = [&](F(&c)[N]) {
      read_projection<F, FAST>(p.C, p.C_constant, row + Shared::kRow, at, n0 + n, c);
    };
    // The first lane alone reads h, as it writes dA there.
    const F h = at.lane == 0 ? own[kLaneChannels] : F(0);
    const F dA = sum_lanes(
        add_state<F, Y>(steps, own[0], h, own[2 * kLaneChannels], at.lane, b, read_C, dB, dC));
    if (at.lane == 0) own[kLaneChannels] = dA;
    const auto put = [&](F(&x)[N], bool constant, F* warp_row, void* totals) {
      if (!FAST && constant) {
        const F total = sum_all(x);
        const int64_t place = (index * p.dim + at.d) * p.dstate + n0 + n;
        if (at.active && at.lane == 0) static_cast<F*>(totals)[place] = total;
      } else {
        sum_channels(x);
        keep(x, warp_row);
      }
    };
    put(dB, p.B_constant, dB_row, p.dB_constant);
    put(dC, p.C_constant, dC_row, p.dC_constant);
    row += Shared::kPitch;
    own += Shared::kPitch;
    dB_row += Shared::kRow;
    dC_row += Shared::kRow;
  }
}

template <typename F, bool FAST, bool Y>
__global__ void __launch_bounds__(kThreads, sizeof(F) == 8 ? 1 : 2)
    gradients(const BackwardArgs p) {
  using Shared = GradientShared<F>;
  constexpr int N = kItems<F>, row = Shared::kRow;
  __shared__ Shared shared;
  const uint32_t parts = static_cast<uint32_t>(p.parts), groups = static_cast<uint32_t>(p.groups);
  const uint32_t row_of_blocks = blockIdx.x / parts, group = row_of_blocks % groups;
  const uint32_t index = row_of_blocks / groups, part = blockIdx.x % parts;
  if (threadIdx.x == 0) shared.chunk = find_chunk<row>(p, index);
  __syncthreads();
  const Chunk& chunk = shared.chunk;
  if (!chunk.exists) return;
  const int dstate = static_cast<int>(p.dstate);
  const uint32_t passes = static_cast<uint32_t>(p.passes), begin = part * passes;
  const uint32_t blocks = static_cast<uint32_t>(p.blocks_a_group(kLaneChannels));
  const int64_t sums = ((part * p.chunks + index) * groups + group) * dstate * row;
#pragma unroll 1
  for (uint32_t block = begin; block < min(blocks, begin + passes); ++block) {
    const BlockChannels channels(p, group, block);
    F* const states_h = static_cast<F*>(p.h) + (index * p.dim + channels.first) * dstate;
    F* const states_g = static_cast<F*>(p.g) + (index * p.dim + channels.first) * dstate;
    StepGradients<F> steps{};
    GradientTileLoads<F, FAST> tiles;
    {
      const Row at(channels, chunk, N);
      StepLoads<F, FAST> loads;
      loads.start(p, at);
      tiles.start(p, channels, chunk, 0, states_h, states_g);
      loads.end(p, at, steps.dt, steps.dtu, steps.dy);
    }
#pragma unroll
    for (int i = 0; i < N; ++i) steps.sum += steps.dt[i];
#pragma unroll 1
    for (int n0 = 0; n0 < dstate; n0 += kGradientStates) {
      const int many = min(kGradientStates, dstate - n0);
      __syncthreads();
      tiles.end(p, channels, chunk, n0, shared.rows[0]);
      __syncthreads();
      add_states<F, FAST, Y>(p, shared, channels, index, n0, many, steps);
      if (n0 + many < dstate) {
        tiles.start(p, channels, chunk, n0 + many, states_h, states_g);
      }
      __syncthreads();
      if (FAST || !p.B_constant) {
        add_warps(shared.dB, many, block == begin, static_cast<F*>(p.part_B) + sums + n0 * row);
      }
      if (FAST || !p.C_constant) {
        add_warps(shared.dC, many, block == begin, static_cast<F*>(p.part_C) + sums + n0 * row);
      }
      static_assert(kGradientStates * kLaneChannels == kThreads, "one dA a thread");
      const int n = threadIdx.x % kGradientStates, channel = threadIdx.x / kGradientStates;
      if (n < many && channel < channels.count) {
        states_h[channel * dstate + n0 + n] = shared.rows[n].h[channel];
      }
    }
    finish_steps<F, FAST, Y>(p, steps, Row(channels, chunk, N), index);
  }
}

}  // namespace causal_conv1d::gpu::scan
