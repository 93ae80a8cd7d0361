// The backward's third step: gradients within a chunk, whose states before and after are known.
#pragma once

#include "scan_backward.cuh"

namespace causal_conv1d::gpu::scan {

constexpr int kGradientStates = 8;  // of a tile

// dB and dC are sums over channels. A warp adds those of its channels and each lane keeps
// kKept steps; then the block adds its warps' in order.
template <typename F>
constexpr int kKept = kItems<F>* kLanes / 32;

template <typename F>
struct GradientShared {
  static constexpr int kRow = kSteps<F, kLanes>, kTile = kGradientStates * kRow;
  alignas(16) F B[kTile], C[kTile];
  alignas(16) F dB[kWarps * kTile], dC[kWarps * kTile];
  F A[kGradientStates * kChannels<kLanes>];  // times log2(e)
  F h[kGradientStates * kChannels<kLanes>];  // before the chunk; then dA
  F g[kGradientStates * kChannels<kLanes>];  // after it, times the decay between
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

// One state. b and c: B and C of the lane's steps. dB and dC: their gradients by this channel.
// Returns the lane's part of dA.
template <typename F, bool Y>
__device__ __forceinline__ F add_state(StepGradients<F>& s, F rate, F h, F g, int lane,
                                       const F (&b)[kItems<F>], const F (&c)[kItems<F>],
                                       F (&dB)[kItems<F>], F (&dC)[kItems<F>]) {
  constexpr int N = kItems<F>;
  F a[N], ah[N], end = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    a[i] = exp2_of(s.dt[i] * rate);
    end = fma(a[i], end, b[i] * s.dtu[i]);
  }
  const F decay = exp2_of(s.sum * rate);
  F last;
  h = scan_forward<kLanes>(decay, end, h, lane, &last);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    ah[i] = a[i] * h;
    h = fma(b[i], s.dtu[i], ah[i]);
    dC[i] = s.dy[i] * h;
    if (Y) s.y[i] = fma(c[i], h, s.y[i]);
  }
  F cd[N], start = 0;
#pragma unroll
  for (int i = N - 1; i >= 0; --i) {
    cd[i] = c[i] * s.dy[i];
    start = a[i] * (cd[i] + start);
  }
  g = scan_backward<kLanes>(decay, start, g, lane);
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
template <typename F, bool Y>
__device__ __forceinline__ void finish_steps(const BackwardArgs& p, StepGradients<F>& s,
                                             const Segment& segment, const Place<kLanes>& at,
                                             int64_t index, int64_t t) {
  constexpr int N = kItems<F>;
  const int64_t begin = segment.begin, end = at.active ? segment.end : begin;
  const int64_t b = segment.batch;
  const F skip = at.active ? load_or(p.D, F(0), at.d) : F(0);
  const F bias = at.active ? load_or(p.delta_bias, F(0), at.d) : F(0);
  F u[N], ddelta[N], dD = 0, dbias = 0;
  load_times(p.u, p.u.at(b, at.d), t, begin, end, u);
  load_times(p.delta, p.delta.at(b, at.d), t, begin, end, ddelta);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const F slope = p.softplus ? sigmoid(ddelta[i] + bias) : F(1);
    ddelta[i] = fma(s.gaA[i], F(kLn2), u[i] * s.gB[i]) * slope;
    dbias += t + i >= begin && t + i < end ? ddelta[i] : F(0);
    dD = fma(s.dy[i], u[i], dD);
    s.gB[i] = fma(s.gB[i], s.dt[i], skip * s.dy[i]);
    if (Y) s.y[i] = fma(skip, u[i], s.y[i]);
  }
  if (p.du.given()) store_times(p.du, p.du.at(b, at.d), t, begin, end, s.gB);
  if (p.ddelta.given()) store_times(p.ddelta, p.ddelta.at(b, at.d), t, begin, end, ddelta);
  dD = sum_lanes(dD);
  dbias = sum_lanes(dbias);
  if (at.active && at.lane == 0) {
    static_cast<F*>(p.sum_D)[index * p.dim + at.d] = dD;
    static_cast<F*>(p.sum_bias)[index * p.dim + at.d] = dbias;
  }
  if (!Y) return;
  if (p.z.given()) {
    F z[N], dz[N];
    load_times(p.z, p.z.at(b, at.d), t, begin, end, z);
    load_times(p.dout, p.dout.at(b, at.d), t, begin, end, dz);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const F r = sigmoid(z[i]);
      dz[i] *= s.y[i] * r * fma(z[i], F(1) - r, F(1));
      s.y[i] *= z[i] * r;
    }
    if (p.dz.given()) store_times(p.dz, p.dz.at(b, at.d), t, begin, end, dz);
  }
  if (p.out.given()) store_times(p.out, p.out.at(b, at.d), t, begin, end, s.y);
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

template <typename F, bool CONSTANTS, bool Y>
__global__ void __launch_bounds__(kThreads, sizeof(F) == 8 ? 1 : 2)
    gradients(const BackwardArgs p) {
  using Shared = GradientShared<F>;
  constexpr int N = kItems<F>, channels = kChannels<kLanes>, row = Shared::kRow;
  __shared__ Shared shared;
  const int64_t index = blockIdx.x / (p.groups * p.parts);
  const int64_t group = blockIdx.x / p.parts % p.groups, part = blockIdx.x % p.parts;
  const Chunk chunk = find_chunk<row>(p, index);
  if (!chunk.exists) return;
  const Segment s = chunk.segment;
  const int dstate = static_cast<int>(p.dstate), warp = threadIdx.x / 32;
  const int64_t blocks = p.blocks_a_group(channels), begin = part * p.passes;
  const int64_t sums = ((part * p.chunks + index) * p.groups + group) * dstate * row;
  for (int64_t block = begin; block < min(blocks, begin + p.passes); ++block) {
    const Place<kLanes> at(p, group * blocks + block);
    const int64_t end = at.active ? s.end : s.begin, t = chunk.t0 + at.lane * N;
    const int count = at.count(p);
    const int64_t states = (index * p.dim + at.first) * dstate;  // in (chunks, dim, dstate)
    StepGradients<F> steps{};
    load_dt(p, p.delta.at(s.batch, at.d), at.active ? load_or(p.delta_bias, F(0), at.d) : F(0), t,
            s.begin, end, steps.dt);
    load_times(p.u, p.u.at(s.batch, at.d), t, s.begin, end, steps.dtu);
    load_dy(p, s, at.d, t, end, steps.dy);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      steps.dtu[i] *= steps.dt[i];
      steps.sum += steps.dt[i];
    }
    for (int n0 = 0; n0 < dstate; n0 += kGradientStates) {
      const int many = min(kGradientStates, dstate - n0);
      const auto state_at = [&](int channel, int n) { return states + channel * dstate + n0 + n; };
      __syncthreads();
      if (!p.B_constant) {
        Tile<F, kLanes>::fill(p.B, s, group, n0, many, dstate, chunk.t0, shared.B);
      }
      if (!p.C_constant) {
        Tile<F, kLanes>::fill(p.C, s, group, n0, many, dstate, chunk.t0, shared.C);
      }
      fill_channels<kLanes>(many, count, shared.A, [&](int channel, int n) {
        return load<F>(p.A.at(at.first + channel, n0 + n), p.A.dtype) * F(kLog2e);
      });
      fill_channels<kLanes>(many, count, shared.h, [&](int channel, int n) {
        return static_cast<const F*>(p.h)[state_at(channel, n)];
      });
      fill_channels<kLanes>(many, count, shared.g, [&](int channel, int n) {
        return static_cast<const F*>(p.g)[state_at(channel, n)];
      });
      __syncthreads();
#pragma unroll 1
      for (int n = 0; n < many; ++n) {
        const int place = n * channels + at.channel;
        F b[N], c[N], dB[N], dC[N];
        read_projection<F, CONSTANTS>(p.B, p.B_constant, shared.B + n * row, at, n0 + n, b);
        read_projection<F, CONSTANTS>(p.C, p.C_constant, shared.C + n * row, at, n0 + n, c);
        const F dA = sum_lanes(add_state<F, Y>(steps, shared.A[place], shared.h[place],
                                               shared.g[place], at.lane, b, c, dB, dC));
        if (at.lane == 0) shared.h[place] = dA;
        const auto put = [&](F(&x)[N], bool constant, void* sum, F* rows) {
          if (CONSTANTS && constant) {
            F all = 0;
            for (int i = 0; i < N; ++i) all += x[i];
            all = sum_lanes(all);
            if (at.active && at.lane == 0) {
              static_cast<F*>(sum)[state_at(at.channel, n)] = all;
            }
          } else {
            sum_channels(x);
            keep(x, rows + (warp * kGradientStates + n) * row);
          }
        };
        put(dB, p.B_constant, p.dB_constant, shared.dB);
        put(dC, p.C_constant, p.dC_constant, shared.dC);
      }
      __syncthreads();
      if (!p.B_constant) {
        add_warps(shared.dB, many, block == begin, static_cast<F*>(p.part_B) + sums + n0 * row);
      }
      if (!p.C_constant) {
        add_warps(shared.dC, many, block == begin, static_cast<F*>(p.part_C) + sums + n0 * row);
      }
      for (int i = threadIdx.x; i < count * many; i += kThreads) {
        const int n = i % many, channel = i / many;
        static_cast<F*>(p.h)[state_at(channel, n)] = shared.h[n * channels + channel];
      }
    }
    finish_steps<F, Y>(p, steps, s, at, index, t);
  }
}

}  // namespace causal_conv1d::gpu::scan
