// Forward: out[b,d,t] = act(bias[d] + sum over k of weight[d,k] * x~[b,d,t-(W-1)+k]).
//
// channel_last: a thread owns C adjacent channels and walks along a chunk of time with the last W-1
//   inputs in registers; rows ahead of it are on their way through cp.async.
// channel_first: a warp walks along one row, each lane with V adjacent time steps; the W-1 inputs
//   before a lane's own come from the lane before it.
// any_width: one thread an output, for W > 8 and fp64.
//
// WMAX is 4 or 8, and EXACT means W == WMAX; else taps k < WMAX - W are skipped by a predicate, not
// multiplied by zero, since 0 * inf would be NaN. SEQ: seq_idx may be given. VECTOR: accesses of C
// channels at once, else any strides.
#include "common.cuh"
#include "launch.cuh"
#include "tiles.cuh"

namespace causal_conv1d::gpu {
namespace {

template <typename T>
struct ForwardArgs {
  using Element = T;
  View<T> x, out;
  AnyView<Compute<T>> weight, bias, initial_states, final_states;
  SeqIdx seq_idx;
  int64_t batch, dim, seqlen;
  int width;
  bool silu;
  int64_t groups;         // channel_last: groups of C channels
  int64_t chunks, chunk;  // parts of the time axis, and the length of one

  // x~ at s < seqlen.
  __device__ __forceinline__ Compute<T> input(int64_t b, int64_t d, int64_t s) const {
    if (s >= 0) return to_compute(*x.at(b, d, s));
    const int64_t j = s + width - 1;
    return initial_states.given() && j >= 0 ? initial_states.load(b, d, j) : Compute<T>(0);
  }
};

template <typename T, int C, int WMAX, bool EXACT, bool SEQ, bool VECTOR>
__global__ void __launch_bounds__(kThreads) forward_channel_last(const ForwardArgs<T> p) {
  constexpr int H = WMAX - 1, U = WMAX, STAGES = 2 * U;
  using Reader = Rows<T, C, U, STAGES, VECTOR>;
  __shared__ typename Reader::Row ring[Reader::kSharedRows];

  int64_t group, chunk;
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t b = split(split(n, p.groups, &group), p.chunks, &chunk);
  if (b >= p.batch) return;
  const int64_t d0 = group * C, t0 = chunk * p.chunk, t1 = min(t0 + p.chunk, p.seqlen);

  const int count = static_cast<int>(t1 - t0);
  const SeqIdx ids = p.seq_idx.from(b, t0);

  Reader x(ring, p.x.at(b, d0, t0), p.x.time, count);
  for (int g = 0; g < STAGES / U; ++g) {
    x.prefetch(g);
    __pipeline_commit();
  }

  const int first = EXACT ? 0 : WMAX - p.width;
  float w[WMAX][C], bias[C], before[H][C], h[H + U][C];
  int id[H + U];
  load_weights<WMAX, C>(p.weight, d0, p.width, w);
  load_history<H, C, VECTOR>(p, b, d0, t0, before);
#pragma unroll
  for (int c = 0; c < C; ++c) {
    bias[c] = p.bias.given() ? p.bias.load(d0 + c) : 0.0f;
#pragma unroll
    for (int j = 0; j < H; ++j) h[j][c] = before[j][c];
  }
#pragma unroll
  for (int j = 0; j < H; ++j) id[j] = SEQ ? p.seq_idx.at(b, max(t0 - H + j, int64_t(0))) : 0;

  T* out = p.out.at(b, d0, t0);
  // U rows; EDGE: not all of them are inside.
  auto step = [&](auto edge, int t) {
    constexpr bool EDGE = decltype(edge)::value;
    Pack<T, C> rows[U];
    __pipeline_wait_prior(STAGES / U - 1);
    x.fetch(rows);
    __pipeline_commit();
    if (SEQ) {
#pragma unroll
      for (int u = 0; u < U; ++u) id[H + u] = !EDGE || t + u < count ? ids.at(0, t + u) : -1;
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
      float z[C];
#pragma unroll
      for (int c = 0; c < C; ++c) {
        h[H + u][c] = rows[u].get(c);
        z[c] = bias[c];
#pragma unroll
        for (int k = 0; k < WMAX; ++k) {
          float xk = h[u + k][c];
          if (SEQ) xk = id[u + k] == id[H + u] ? xk : 0.0f;
          if (k >= first) z[c] = fmaf(w[k][c], xk, z[c]);
        }
      }
      if (p.silu) {
#pragma unroll
        for (int c = 0; c < C; ++c) z[c] = silu<T>(z[c]);
      }
      if (SEQ && id[H + u] < 0) {
#pragma unroll
        for (int c = 0; c < C; ++c) z[c] = 0.0f;
      }
      if (!EDGE || t + u < count) pack<T>(z).store(out);
      out += p.out.time;
    }
#pragma unroll
    for (int j = 0; j < H; ++j) {
      if (SEQ) id[j] = id[U + j];
#pragma unroll
      for (int c = 0; c < C; ++c) h[j][c] = h[U + j][c];
    }
  };
  for (int t = 0; t < count; t += U) {
    if (t + U <= count) {
      step(std::false_type{}, t);
    } else {
      step(std::true_type{}, t);
    }
  }
}

template <typename T, int V, int WMAX, bool EXACT, bool SEQ, Access ACCESS>
__global__ void __launch_bounds__(kThreads, SEQ ? 4 : 1)
    forward_channel_first(const ForwardArgs<T> p) {
  constexpr int H = WMAX - 1, TILE = 32 * V;
  static_assert(H <= V, "the halo comes from one lane");
  const int lane = threadIdx.x % 32;
  int64_t segment, d;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  const int64_t b = split(split(warp, p.chunks, &segment), p.dim, &d);
  if (b >= p.batch) return;
  const int64_t start = segment * p.chunk;
  const int count = static_cast<int>(min(p.chunk, p.seqlen - start));
  const int readable = static_cast<int>(min(p.chunk + V, p.seqlen - start));
  const SeqIdx ids = p.seq_idx.from(b, start);

  const TileReader<T, V, ACCESS> x(p.x.at(b, d, start), p.x.time, readable, lane);
  TileWriter<T, V, ACCESS> out(p.out.at(b, d, start), p.out.time, count, lane);
  Pack<T, V> next = x.template load<true>(lane * V);
  Pack<T, V> second = x.template load<true>(lane * V + TILE);

  const int first = EXACT ? 0 : WMAX - p.width;
  const WarpValues<T> values(p, b, d, start - H, lane);
  float w[WMAX], prev[H];
  int prev_id[H];
#pragma unroll
  for (int k = 0; k < WMAX; ++k) w[k] = values.weight(k - first);
  const float bias = values.bias;
#pragma unroll
  for (int j = 0; j < H; ++j) {
    prev[j] = values.before(j);
    prev_id[j] = SEQ ? p.seq_idx.at(b, max(start - H + j, int64_t(0))) : 0;
  }

  // A tile, while the two after it are on their way. EDGE: some of what it touches is outside.
  auto step = [&](auto edge, int t) {
    constexpr bool EDGE = decltype(edge)::value;
    const Pack<T, V> xs = x.own(next, second);
    next = second;
    second = x.template load<EDGE>(t + 2 * TILE);

    float h[H + V], z[V];
    int id[H + V];
#pragma unroll
    for (int i = 0; i < V; ++i) h[H + i] = xs.get(i);
    if (SEQ) load_ids<V>(ids, t, readable, id + H);
#pragma unroll
    for (int j = 0; j < H; ++j) {
      const int from = (lane + 31) % 32;  // lane 31 hands over the end of the previous tile
      h[j] = __shfl_sync(0xffffffff, lane == 31 ? prev[j] : h[V + j], from);
      prev[j] = h[V + j];
      if (SEQ) {
        id[j] = __shfl_sync(0xffffffff, lane == 31 ? prev_id[j] : id[V + j], from);
        prev_id[j] = id[V + j];
      }
    }
#pragma unroll
    for (int i = 0; i < V; ++i) {
      z[i] = bias;
#pragma unroll
      for (int k = 0; k < WMAX; ++k) {
        float xk = h[i + k];
        if (SEQ) xk = id[i + k] == id[H + i] ? xk : 0.0f;
        if (k >= first) z[i] = fmaf(w[k], xk, z[i]);
      }
    }
    if (p.silu) {
#pragma unroll
      for (int i = 0; i < V; ++i) z[i] = silu<T>(z[i]);
    }
    if (SEQ) {
#pragma unroll
      for (int i = 0; i < V; ++i) z[i] = id[H + i] < 0 ? 0.0f : z[i];
    }
    out.template store<EDGE>(t, pack<T>(z));
  };
  for (int base = 0; base < count; base += TILE) {
    if (base + 3 * TILE <= count) {
      step(std::false_type{}, base + lane * V);
    } else {
      step(std::true_type{}, base + lane * V);
    }
  }
  out.flush(static_cast<int>(ceil_div(count, TILE)) * TILE + lane * V);
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    forward_any_width(const ForwardArgs<T> p, bool dim_fastest) {
  int64_t b, d, t;
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (dim_fastest) {
    b = split(split(n, p.dim, &d), p.seqlen, &t);
  } else {
    b = split(split(n, p.seqlen, &t), p.dim, &d);
  }
  if (b >= p.batch) return;
  const int id = p.seq_idx.at(b, t);
  Compute<T> z = p.bias.given() ? p.bias.load(d) : Compute<T>(0);
  for (int k = 0; k < p.width; ++k) {
    const int64_t s = t - (p.width - 1) + k;
    const bool same = p.seq_idx.at(b, max(s, int64_t(0))) == id;
    z = fma(p.weight.load(d, k), same ? p.input(b, d, s) : Compute<T>(0), z);
  }
  if (p.silu) z = silu<T>(z);
  *p.out.at(b, d, t) = from_compute<T>(id < 0 ? Compute<T>(0) : z);
}

// final_states_out[b,d,j] = x~[b,d,L-(W-1)+j]
template <typename T>
__global__ void __launch_bounds__(kThreads) write_final_states(const ForwardArgs<T> p) {
  int64_t d, j;
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t b = split(split(n, p.width - 1, &j), p.dim, &d);
  if (b < p.batch) p.final_states.store(p.input(b, d, p.seqlen - (p.width - 1) + j), b, d, j);
}

// Parts of the time axis for channel_last. Enough threads to fill the machine some times over, but
// no chunk so short that re-reading its W-1 rows of halo shows.
int64_t channel_last_chunk(int64_t threads_per_chunk, int64_t seqlen, int sms) {
  const int64_t wanted = ceil_div(int64_t(sms) * 4096, threads_per_chunk);
  const int64_t chunk = ceil_div(seqlen, wanted);
  return ceil_div(chunk < 16 ? 16 : (chunk > 512 ? 512 : chunk), 8) * 8;
}

// A warp's share of a row for channel_first: whole rows if they fill the machine, else parts.
int64_t channel_first_chunk(int64_t rows, int64_t seqlen, int64_t tile, int sms) {
  const int64_t wanted = ceil_div(int64_t(sms) * 64, rows);
  const int64_t chunk = ceil_div(ceil_div(seqlen, wanted), tile) * tile;
  return chunk < (1 << 24) ? chunk : 1 << 24;
}

template <typename T, int C, int WMAX, bool EXACT, bool SEQ, bool VECTOR>
cudaError_t launch_channel_last(ForwardArgs<T> p, int sms, cudaStream_t stream) {
  p.groups = p.dim / C;
  p.chunk = channel_last_chunk(p.batch * p.groups, p.seqlen, sms);
  p.chunks = ceil_div(p.seqlen, p.chunk);
  return launch(forward_channel_last<T, C, WMAX, EXACT, SEQ, VECTOR>, p.batch * p.chunks * p.groups,
                stream, p);
}

template <typename T, int V, int WMAX, bool EXACT, bool SEQ, Access ACCESS>
cudaError_t launch_channel_first(ForwardArgs<T> p, int sms, cudaStream_t stream) {
  p.chunk = channel_first_chunk(p.batch * p.dim, p.seqlen, 32 * V, sms);
  p.chunks = ceil_div(p.seqlen, p.chunk);
  return launch(forward_channel_first<T, V, WMAX, EXACT, SEQ, ACCESS>,
                p.batch * p.dim * p.chunks * 32, stream, p);
}

template <typename T, int WMAX>
cudaError_t launch_fast(const ForwardParams& params, const ForwardArgs<T>& p, int sms,
                        cudaStream_t stream) {
  constexpr int size = sizeof(T);
  const bool seq = p.seq_idx.data != nullptr, exact = p.width == WMAX;
  if (!is_channel_last(params.x)) {
    constexpr int V = WMAX == 8 ? 8 : 16 / size;
    const Access access = common_access({&params.x, &params.out}, size);
    if (access == Access::kStrided) {
      return launch_channel_first<T, V, WMAX, false, true, Access::kStrided>(p, sms, stream);
    }
    if (access == Access::kUnit) {
      return seq ? launch_channel_first<T, V, WMAX, false, true, Access::kUnit>(p, sms, stream)
                 : launch_channel_first<T, V, WMAX, false, false, Access::kUnit>(p, sms, stream);
    }
    constexpr Access kAligned = Access::kAligned;
    if (seq) return launch_channel_first<T, V, WMAX, false, true, kAligned>(p, sms, stream);
    return exact ? launch_channel_first<T, V, WMAX, true, false, kAligned>(p, sms, stream)
                 : launch_channel_first<T, V, WMAX, false, false, kAligned>(p, sms, stream);
  }
  constexpr int C = 4;
  if (common_channels(C, size, p.dim, {&params.x, &params.out}) < C) {
    return launch_channel_last<T, 1, WMAX, false, true, false>(p, sms, stream);
  }
  if (seq) return launch_channel_last<T, C, WMAX, false, true, true>(p, sms, stream);
  return exact ? launch_channel_last<T, C, WMAX, true, false, true>(p, sms, stream)
               : launch_channel_last<T, C, WMAX, false, false, true>(p, sms, stream);
}

template <typename T>
cudaError_t run(const ForwardParams& params, cudaStream_t stream, int sms) {
  ForwardArgs<T> p{};
  p.x = view<T>(params.x);
  p.out = view<T>(params.out);
  p.weight = any_view<Compute<T>>(params.weight);
  p.bias = any_view<Compute<T>>(params.bias);
  p.initial_states = any_view<Compute<T>>(params.initial_states);
  p.final_states = any_view<Compute<T>>(params.final_states_out);
  p.seq_idx = seq_idx_view(params.seq_idx);
  p.batch = params.x.sizes[0];
  p.dim = params.x.sizes[1];
  p.seqlen = params.x.sizes[2];
  p.width = static_cast<int>(params.weight.sizes[1]);
  p.silu = params.silu != 0;

  cudaError_t e = cudaSuccess;
  if (p.final_states.given()) {
    e = launch(write_final_states<T>, p.batch * p.dim * (p.width - 1), stream, p);
  }
  if (e != cudaSuccess || p.batch * p.dim * p.seqlen == 0) return e;
  if constexpr (sizeof(T) <= 4) {
    if (p.width <= 4) return launch_fast<T, 4>(params, p, sms, stream);
    if (p.width <= 8) return launch_fast<T, 8>(params, p, sms, stream);
  }
  return launch(forward_any_width<T>, p.batch * p.dim * p.seqlen, stream, p,
                is_channel_last(params.x));
}

}  // namespace
}  // namespace causal_conv1d::gpu

causal_conv1d_status causal_conv1d_cuda_forward(const causal_conv1d_forward_params* params,
                                                int device, void* stream) {
  using namespace causal_conv1d;
  return gpu::run_operator("causal_conv1d_fn", *params, device, [&](auto zero, int sms) {
    return gpu::run<decltype(zero)>(*params, static_cast<cudaStream_t>(stream), sms);
  });
}
