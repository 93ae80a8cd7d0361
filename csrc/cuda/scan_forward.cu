// Forward of the selective scan. A block takes its channels of a sequence from the first chunk of
// steps to the last; states go from chunk to chunk in shared memory.
#include "scan_inputs.cuh"
#include "scan_launch.cuh"

namespace causal_conv1d::gpu::scan {
namespace {

constexpr int kStates = 16;  // of a tile

struct ForwardArgs : Inputs {
  View out, ungated, last_states;
};

// Behind it lie the states, dstate * kChannels. What is needed once a chunk is kept here too, to
// leave the registers to the loop over states.
template <typename F, int TL>
struct ForwardShared {
  alignas(16) F B[kStates * kSteps<F, TL>], C[kStates * kSteps<F, TL>];
  F A[kStates * kChannels<TL>];  // times log2(e)
  F bias[kChannels<TL>], skip[kChannels<TL>];
  Segment segment;
  int64_t sequence, group, first;  // the first channel
  int channels;
};

// What a lane keeps of a chunk.
template <typename F>
struct Steps {
  F dt[kItems<F>], dtu[kItems<F>], y[kItems<F>], sum;
};

// Adds the part of NS states to y. b and c are the rows of B and C, or null where B or C is
// constant in time; then b_constant and c_constant are the numbers.
template <int TL, int NS, typename F>
__device__ __forceinline__ void add_states(Steps<F>& s, const F* A, const F* b, const F* c,
                                           const F (&b_constant)[NS], const F (&c_constant)[NS],
                                           F* states, int lane) {
  constexpr int N = kItems<F>;
  F a[NS][N], x[NS][N], h[NS];
#pragma unroll
  for (int j = 0; j < NS; ++j) {
    const F rate = A[j * kChannels<TL>];
    if (b != nullptr) {
      Tile<F, TL>::read(b + j * kSteps<F, TL>, lane, x[j]);
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) x[j][i] = b_constant[j];
    }
    F end = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      a[j][i] = exp2_of(s.dt[i] * rate);
      x[j][i] *= s.dtu[i];
      end = fma(a[j][i], end, x[j][i]);
    }
    F* const state = states + j * kChannels<TL>;
    const F carry = lane == 0 ? *state : F(0);
    F last;
    h[j] = scan_forward<TL>(exp2_of(s.sum * rate), end, carry, lane, &last);
    if (lane == TL - 1) *state = last;
  }
#pragma unroll
  for (int j = 0; j < NS; ++j) {
    F w[N];
    if (c != nullptr) {
      Tile<F, TL>::read(c + j * kSteps<F, TL>, lane, w);
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) w[i] = c_constant[j];
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
      h[j] = fma(a[j][i], h[j], x[j][i]);
      s.y[i] = fma(w[i], h[j], s.y[i]);
    }
  }
}

template <typename F, int TL>
__device__ __forceinline__ void begin_block(const ForwardArgs& p, ForwardShared<F, TL>& shared,
                                            F* states) {
  constexpr int channels = kChannels<TL>;
  const int64_t blocks = p.groups * p.blocks_a_group(channels), sequence = blockIdx.x / blocks;
  const Place<TL> at(p, blockIdx.x % blocks);
  if (threadIdx.x == 0) {
    shared.segment = p.sequences.segment(sequence);
    shared.sequence = sequence;
    shared.group = at.group;
    shared.first = at.first;
    shared.channels = at.count(p);
  }
  if (at.lane == 0) {
    shared.bias[at.channel] = at.active ? load_or(p.delta_bias, F(0), at.d) : F(0);
    shared.skip[at.channel] = at.active ? load_or(p.D, F(0), at.d) : F(0);
  }
  const int dstate = static_cast<int>(p.dstate);
  fill_channels<TL>(dstate, at.count(p), states, [&](int channel, int n) {
    return load_or(p.initial_states, F(0), sequence, at.first + channel, n);
  });
  __syncthreads();
}

// Tiles of the states from n0 on.
template <typename F, int TL, bool CONSTANTS>
__device__ __forceinline__ void fill_tiles(const ForwardArgs& p, ForwardShared<F, TL>& shared,
                                           int n0, int many, int64_t t0) {
  const Segment s = shared.segment;
  const int dstate = static_cast<int>(p.dstate);
  if (!CONSTANTS || !p.B_constant) {
    Tile<F, TL>::fill(p.B, s, shared.group, n0, many, dstate, t0, shared.B);
  }
  if (!CONSTANTS || !p.C_constant) {
    Tile<F, TL>::fill(p.C, s, shared.group, n0, many, dstate, t0, shared.C);
  }
  const int64_t first = shared.first;
  fill_channels<TL>(many, shared.channels, shared.A, [&](int channel, int n) {
    return load<F>(p.A.at(first + channel, n0 + n), p.A.dtype) * F(kLog2e);
  });
}

// A thread's part of shared: its channel, and what it reads and writes of it.
template <typename F, int TL>
struct Row {
  int64_t batch, d, begin, end;
  int channel, lane;
  __device__ __forceinline__ explicit Row(const ForwardShared<F, TL>& shared) {
    channel = threadIdx.x / TL;
    lane = threadIdx.x % TL;
    batch = shared.segment.batch;
    d = shared.first + channel;
    begin = shared.segment.begin;
    end = channel < shared.channels ? shared.segment.end : begin;
  }
};

template <typename F, int TL>
__device__ __forceinline__ void load_steps(const ForwardArgs& p,
                                           const ForwardShared<F, TL>& shared, int64_t t,
                                           Steps<F>& steps) {
  const Row<F, TL> at(shared);
  F u[kItems<F>];
  load_times(p.u, p.u.at(at.batch, at.d), t, at.begin, at.end, u);
  load_dt(p, p.delta.at(at.batch, at.d), shared.bias[at.channel], t, at.begin, at.end, steps.dt);
  const F skip = shared.skip[at.channel];
  steps.sum = 0;
#pragma unroll
  for (int i = 0; i < kItems<F>; ++i) {
    steps.sum += steps.dt[i];
    steps.dtu[i] = steps.dt[i] * u[i];
    steps.y[i] = skip * u[i];
  }
}

template <typename F, int TL>
__device__ __forceinline__ void store_steps(const ForwardArgs& p,
                                            const ForwardShared<F, TL>& shared, int64_t t,
                                            Steps<F>& steps) {
  const Row<F, TL> at(shared);
  if (p.ungated.given()) {
    store_times(p.ungated, p.ungated.at(at.batch, at.d), t, at.begin, at.end, steps.y);
  }
  if (p.z.given()) {
    F z[kItems<F>];
    load_times(p.z, p.z.at(at.batch, at.d), t, at.begin, at.end, z);
#pragma unroll
    for (int i = 0; i < kItems<F>; ++i) steps.y[i] *= z[i] * sigmoid(z[i]);
  }
  store_times(p.out, p.out.at(at.batch, at.d), t, at.begin, at.end, steps.y);
}

template <typename F, int TL, bool CONSTANTS, int NS, int BLOCKS>
__global__ void __launch_bounds__(kThreads, BLOCKS) forward(const ForwardArgs p) {
  extern __shared__ __align__(16) char memory[];
  using Shared = ForwardShared<F, TL>;
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  F* const states = reinterpret_cast<F*>(memory + sizeof(Shared));
  constexpr int channels = kChannels<TL>, row = kSteps<F, TL>;
  const int dstate = static_cast<int>(p.dstate), lane = threadIdx.x % TL;
  const int channel = threadIdx.x / TL;
  begin_block(p, shared, states);
  for (int64_t t0 = shared.segment.first(); t0 < shared.segment.end; t0 += row) {
    Steps<F> steps;
    load_steps(p, shared, t0 + lane * kItems<F>, steps);
    for (int n0 = 0; n0 < dstate; n0 += kStates) {
      const int many = min(kStates, dstate - n0);
      __syncthreads();
      fill_tiles<F, TL, CONSTANTS>(p, shared, n0, many, t0);
      __syncthreads();
      const auto add = [&](auto width, int n) {
        constexpr int ns = decltype(width)::value;
        F b_constant[ns] = {}, c_constant[ns] = {};
        const F *b = shared.B + n * row, *c = shared.C + n * row;
        if constexpr (CONSTANTS) {
          const int64_t d = shared.first + channel;
          const bool active = channel < shared.channels;
          if (p.B_constant) b = nullptr;
          if (p.C_constant) c = nullptr;
          for (int j = 0; j < ns && active; ++j) {
            if (p.B_constant) b_constant[j] = load<F>(p.B.at(d, n0 + n + j), p.B.dtype);
            if (p.C_constant) c_constant[j] = load<F>(p.C.at(d, n0 + n + j), p.C.dtype);
          }
        }
        add_states<TL, ns>(steps, shared.A + n * channels + channel, b, c, b_constant, c_constant,
                           states + (n0 + n) * channels + channel, lane);
      };
      int n = 0;
#pragma unroll 1
      for (; n + NS <= many; n += NS) add(std::integral_constant<int, NS>{}, n);
      if constexpr (NS > 1) {
#pragma unroll 1
        for (; n < many; ++n) add(std::integral_constant<int, 1>{}, n);
      }
    }
    store_steps(p, shared, t0 + lane * kItems<F>, steps);
  }
  if (!p.last_states.given()) return;
  __syncthreads();
  for (int i = threadIdx.x; i < shared.channels * dstate; i += kThreads) {
    const int n = i % dstate, to = i / dstate;
    store(p.last_states.at(shared.sequence, shared.first + to, n), p.last_states.dtype,
          states[n * channels + to]);
  }
}

template <typename F, int TL, bool CONSTANTS, int NS, int BLOCKS>
cudaError_t run(const ForwardArgs& p, cudaStream_t stream) {
  const int64_t blocks = p.sequences.count * p.groups * p.blocks_a_group(kChannels<TL>);
  const size_t bytes = sizeof(ForwardShared<F, TL>) + sizeof(F) * p.dstate * kChannels<TL>;
  return launch(forward<F, TL, CONSTANTS, NS, BLOCKS>, blocks, dim3(kThreads), bytes, stream, p);
}

#ifndef FWD_TL
#define FWD_TL 16
#define FWD_NS 2
#define FWD_MINB 2
#endif

template <typename F>
cudaError_t run(const ScanForwardParams& params, cudaStream_t stream) {
  ForwardArgs p{};
  static_cast<Inputs&>(p) = make_inputs(params.inputs);
  p.out = view(params.out);
  p.ungated = view(params.ungated);
  p.last_states = view(params.last_states);
  if constexpr (sizeof(F) == 8) {
    return run<F, 8, true, 1, 1>(p, stream);
  } else {
    if (p.B_constant || p.C_constant) return run<F, 8, true, 1, 2>(p, stream);
    return run<F, FWD_TL, false, FWD_NS, FWD_MINB>(p, stream);
  }
}

}  // namespace
}  // namespace causal_conv1d::gpu::scan

int64_t causal_conv1d_cuda_scan_forward_workspace_size(
    const causal_conv1d_scan_forward_params* params, int) {
  return causal_conv1d::check(params).code == CAUSAL_CONV1D_OK ? 0 : -1;
}

causal_conv1d_status causal_conv1d_cuda_scan_forward(
    const causal_conv1d_scan_forward_params* params, int device, void* stream, void*, int64_t) {
  using namespace causal_conv1d;
  const Status status = check(params);
  if (status.code != CAUSAL_CONV1D_OK) return status;
  return gpu::scan::run_checked(
      "selective_scan_fwd", params, params->inputs.u.dtype, device, [&](auto zero) {
        return gpu::scan::run<decltype(zero)>(*params, static_cast<cudaStream_t>(stream));
      });
}
