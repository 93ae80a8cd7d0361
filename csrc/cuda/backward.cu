// Backward. With z the pre-activation and dz[t] = dout[t] * act'(z[t]) (0 where seq_idx < 0):
//
//   dx[s]      = sum over t = s..s+W-1, ascending, of weight[W-1-(t-s)] * dz[t]   (t < L)
//                + dfinal_states[s-(L-(W-1))] where that exists
//   dweight[k] = sum over b, t of dz[t] * x~[t-(W-1)+k]        dbias = sum over b, t of dz[t]
//   dinitial_states[j] is dx at s = j-(W-1)
//
// One pass: x and dout are read once and z is recomputed. dx[s] needs dz up to s+W-1, so it is
// written W-1 steps late, and a chunk of time also computes the W-1 dz after its end.
// dweight and dbias: every chunk writes its partial sums to the workspace, whose size depends on
// shapes alone, and a second kernel adds them up in a fixed order. No atomics.
//
// The kernels divide the work as those of forward.cu do.
#include <cub/block/block_reduce.cuh>
#include <cub/warp/warp_reduce.cuh>

#include "common.cuh"
#include "launch.cuh"
#include "tiles.cuh"

namespace causal_conv1d::gpu {
namespace {

template <typename T>
struct BackwardArgs {
  using Element = T;
  View<T> x, dout, dx;
  AnyView<Compute<T>> weight, bias, initial_states, dfinal_states, dweight, dbias, dinitial_states;
  SeqIdx seq_idx;
  Compute<T>* partials;  // (parts, W + 1, dim): for each chunk dweight[k], then dbias
  int64_t batch, dim, seqlen;
  int width;
  bool silu;
  int64_t groups, chunks, chunk;  // as in the forward

  // x~ at s < seqlen.
  __device__ __forceinline__ Compute<T> input(int64_t b, int64_t d, int64_t s) const {
    if (s >= 0) return to_compute(*x.at(b, d, s));
    const int64_t j = s + width - 1;
    return initial_states.given() && j >= 0 ? initial_states.load(b, d, j) : Compute<T>(0);
  }

  __device__ __forceinline__ Compute<T> gradient(Compute<T> z, Compute<T> g) const {
    return silu ? g * silu_grad<T>(z) : g;
  }

  // Turns N pre-activations into dz, which is 0 where not inside.
  template <int N>
  __device__ __forceinline__ void gradients(const Pack<T, N>& g, bool inside, float (&z)[N]) const {
    if (!inside) {
#pragma unroll
      for (int i = 0; i < N; ++i) z[i] = 0.0f;
    } else if (silu) {
#pragma unroll
      for (int i = 0; i < N; ++i) z[i] = g.get(i) * silu_grad<T>(z[i]);
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) z[i] = g.get(i);
    }
  }

  // What dfinal_states adds to dx at s.
  __device__ __forceinline__ Compute<T> dfinal(int64_t b, int64_t d, int64_t s) const {
    const int64_t j = s - (seqlen - (width - 1));
    return dfinal_states.given() && j >= 0 ? dfinal_states.load(b, d, j) : Compute<T>(0);
  }

  __device__ __forceinline__ Compute<T>* partial(int64_t part, int k, int64_t d) const {
    return partials + (part * (width + 1) + k) * dim + d;
  }
};

template <typename T, int C, int WMAX, bool EXACT, bool SEQ, bool VECTOR>
__global__ void __launch_bounds__(kThreads, WMAX == 4 && (EXACT || sizeof(T) == 2) ? 4 : 3)
    backward_channel_last(const BackwardArgs<T> p) {
  constexpr int H = WMAX - 1, U = WMAX, STAGES = 8;
  using Reader = Rows<T, C, U, STAGES, VECTOR>;
  __shared__ typename Reader::Row rings[2][Reader::kSharedRows];

  int64_t group, chunk;
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t b = split(split(n, p.groups, &group), p.chunks, &chunk);
  if (b >= p.batch) return;
  const int64_t d0 = group * C, t0 = chunk * p.chunk, t1 = min(t0 + p.chunk, p.seqlen);
  const int count = static_cast<int>(t1 - t0);
  const int ahead =
      static_cast<int>(min(t1 + p.width - 1, p.seqlen) - t0);  // dz is needed up to here
  const SeqIdx ids = p.seq_idx.from(b, t0);

  Reader x(rings[0], p.x.at(b, d0, t0), p.x.time, ahead);
  Reader g(rings[1], p.dout.at(b, d0, t0), p.dout.time, ahead);
  for (int i = 0; i < STAGES / U; ++i) {
    x.prefetch(i);
    g.prefetch(i);
    __pipeline_commit();
  }

  const int first = EXACT ? 0 : WMAX - p.width;
  float w[WMAX][C], bias[C], dw[WMAX][C], db[C], before[H][C];
  float h[H + U][C], dz[H + U][C];  // x~ and dz; entry H + u belongs to the row in hand
  int id[H + U];
  load_weights<WMAX, C>(p.weight, d0, p.width, w);
  load_history<H, C, VECTOR>(p, b, d0, t0, before);
#pragma unroll
  for (int c = 0; c < C; ++c) {
    bias[c] = p.bias.given() ? p.bias.load(d0 + c) : 0.0f;
    db[c] = 0.0f;
#pragma unroll
    for (int k = 0; k < WMAX; ++k) dw[k][c] = 0.0f;
#pragma unroll
    for (int j = 0; j < H; ++j) {
      h[j][c] = before[j][c];
      dz[j][c] = 0.0f;
    }
  }
#pragma unroll
  for (int j = 0; j < H; ++j) id[j] = SEQ ? p.seq_idx.at(b, max(t0 - H + j, int64_t(0))) : 0;

  // U rows of dz, and those of dx that are complete then, H before. EDGE: not all are inside. Times
  // are relative to t0.
  T* dx = p.dx.at(b, d0, t0 - H);
  auto step = [&](auto edge, int t) {
    constexpr bool EDGE = decltype(edge)::value;
    Pack<T, C> xs[U], gs[U];
    __pipeline_wait_prior(STAGES / U - 1);
    x.fetch(xs);
    g.fetch(gs);
    __pipeline_commit();
    if (SEQ) {
#pragma unroll
      for (int u = 0; u < U; ++u) id[H + u] = !EDGE || t + u < ahead ? ids.at(0, t + u) : -1;
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const bool inside = (!EDGE || t + u < ahead) && (!SEQ || id[H + u] >= 0);
      float xk[WMAX][C];
#pragma unroll
      for (int c = 0; c < C; ++c) {
        h[H + u][c] = xs[u].get(c);
        float z = bias[c];
#pragma unroll
        for (int k = 0; k < WMAX; ++k) {
          xk[k][c] = !SEQ || id[u + k] == id[H + u] ? h[u + k][c] : 0.0f;
          if (k >= first) z = fmaf(w[k][c], xk[k][c], z);
        }
        dz[H + u][c] = z;
      }
      p.gradients(gs[u], inside, dz[H + u]);
      if (inside && (!EDGE || t + u < count)) {
#pragma unroll
        for (int c = 0; c < C; ++c) {
          db[c] += dz[H + u][c];
#pragma unroll
          for (int k = 0; k < WMAX; ++k) {
            if (k >= first) dw[k][c] = fmaf(dz[H + u][c], xk[k][c], dw[k][c]);
          }
        }
      }
      const int s = t + u - H;
      if (!EDGE || (s >= 0 && s < count)) {
        float a[C];
#pragma unroll
        for (int c = 0; c < C; ++c) {
          a[c] = 0.0f;
#pragma unroll
          for (int j = 0; j < WMAX; ++j) {  // dz[s + j] meets weight[W-1-j]
            const float v = !SEQ || id[u + j] == id[u] ? dz[u + j][c] : 0.0f;
            if (WMAX - 1 - j >= first) a[c] = fmaf(w[WMAX - 1 - j][c], v, a[c]);
          }
        }
        if (EDGE && p.dfinal_states.given() && t0 + s >= p.seqlen - (p.width - 1)) {
#pragma unroll
          for (int c = 0; c < C; ++c) a[c] += p.dfinal(b, d0 + c, t0 + s);
        }
        pack<T>(a).store(dx);
      }
      dx += p.dx.time;
    }
#pragma unroll
    for (int j = 0; j < H; ++j) {
      if (SEQ) id[j] = id[U + j];
#pragma unroll
      for (int c = 0; c < C; ++c) {
        h[j][c] = h[U + j][c];
        dz[j][c] = dz[U + j][c];
      }
    }
  };
  for (int t = 0; t < count + H; t += U) {
    if (t > 0 && t + U <= count - H) {  // the last H rows of dx may take dfinal_states
      step(std::false_type{}, t);
    } else {
      step(std::true_type{}, t);
    }
  }

  if (p.partials != nullptr) {
    const int64_t part = b * p.chunks + chunk;
#pragma unroll
    for (int c = 0; c < C; ++c) {
#pragma unroll
      for (int k = 0; k < WMAX; ++k) {
        if (k >= first) *p.partial(part, k - first, d0 + c) = dw[k][c];
      }
      *p.partial(part, p.width, d0 + c) = db[c];
    }
  }
}

template <typename T, int V, int WMAX, bool EXACT, bool SEQ, Access ACCESS>
__global__ void __launch_bounds__(kThreads, WMAX == 4 && !SEQ ? (EXACT ? 5 : 4) : 3)
    backward_channel_first(const BackwardArgs<T> p) {
  constexpr int H = WMAX - 1, TILE = 32 * V;
  static_assert(H <= V, "the halo comes from one lane");
  const int lane = threadIdx.x % 32;
  int64_t segment, d;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  const int64_t b = split(split(warp, p.chunks, &segment), p.dim, &d);
  if (b >= p.batch) return;
  const int64_t start = segment * p.chunk;
  const int count = static_cast<int>(min(p.chunk, p.seqlen - start));
  const int readable = static_cast<int>(min(p.chunk + TILE, p.seqlen - start));
  const SeqIdx ids = p.seq_idx.from(b, start);

  const TileReader<T, V, ACCESS> x(p.x.at(b, d, start), p.x.time, readable, lane);
  const TileReader<T, V, ACCESS> dout(p.dout.at(b, d, start), p.dout.time, readable, lane);
  TileWriter<T, V, ACCESS> dx(p.dx.at(b, d, start), p.dx.time, count, lane);
  Pack<T, V> next_x = x.template load<true>(lane * V);
  Pack<T, V> next_g = dout.template load<true>(lane * V);

  const int first = EXACT ? 0 : WMAX - p.width;
  const WarpValues<T> values(p, b, d, start - H, lane);
  float w[WMAX], dw[WMAX], db = 0.0f, prev[H], dz_prev[V];
  int prev_id[H];
  Matches<V, H> same_prev;
#pragma unroll
  for (int k = 0; k < WMAX; ++k) {
    w[k] = values.weight(k - first);
    dw[k] = 0.0f;
  }
  const float bias = values.bias;
  const float lane_dfinal =
      p.dfinal_states.given() && lane < p.width - 1 ? p.dfinal_states.load(b, d, lane) : 0.0f;
#pragma unroll
  for (int j = 0; j < H; ++j) {
    prev[j] = values.before(j);
    prev_id[j] = SEQ ? p.seq_idx.at(b, max(start - H + j, int64_t(0))) : 0;
  }

  // A step makes dz of the tile at base and writes dx of the tile before it. The tile from count on
  // is another warp's: of it only the first W-1 dz are needed, which lane 0 makes. EDGE: some of
  // what the step touches is outside.
  auto step = [&](auto edge, int base) {
    constexpr bool EDGE = decltype(edge)::value;
    const int t = base + lane * V;
    const int lanes =
        !EDGE || base + TILE < count ? 32 : (base < count ? 2 : 0);  // of the next tile
    const Pack<T, V> raw_x = next_x, raw_g = next_g;
    next_x = lane < lanes ? x.template load<EDGE>(t + TILE) : Pack<T, V>{};
    next_g = lane < lanes ? dout.template load<EDGE>(t + TILE) : Pack<T, V>{};
    const Pack<T, V> xs = x.own(raw_x, next_x), gs = dout.own(raw_g, next_g);

    float dz[V] = {};
    Matches<V, H> same;
    if (!EDGE || base < readable) {  // else past the end of the row, where dz is 0
      float h[H + V];
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
      if (SEQ) same.set(id);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        dz[i] = bias;
#pragma unroll
        for (int k = 0; k < WMAX; ++k) {
          float xk = h[i + k];
          if (SEQ) xk = same.at(i, k) ? xk : 0.0f;
          if (k >= first) dz[i] = fmaf(w[k], xk, dz[i]);
        }
      }
      p.gradients(gs, true, dz);
      if (SEQ || (EDGE && t + V > readable)) {
#pragma unroll
        for (int i = 0; i < V; ++i) {
          if (t + i >= readable || (SEQ && id[H + i] < 0)) {
            dz[i] = 0.0f;
            h[H + i] = SEQ ? 0.0f : h[H + i];  // only its own tap would still meet it
          }
        }
      }
      if (!EDGE || base < count) {
#pragma unroll
        for (int i = 0; i < V; ++i) {
          db += dz[i];
#pragma unroll
          for (int k = 0; k < WMAX; ++k) {
            float xk = h[i + k];
            if (SEQ) xk = same.at(i, k) ? xk : 0.0f;
            if (k >= first) dw[k] = fmaf(dz[i], xk, dw[k]);
          }
        }
      }
    }

    // dz of the previous tile, followed by the H of the lane after this one
    float q[V + H];
    Matches<V, H> same_next;
#pragma unroll
    for (int i = 0; i < V; ++i) q[i] = dz_prev[i];
    const int from = (lane + 1) % 32;
#pragma unroll
    for (int j = 0; j < H; ++j) {
      q[V + j] = __shfl_sync(0xffffffff, lane == 0 ? dz[j] : dz_prev[j], from);
    }
    if (SEQ) {
#pragma unroll
      for (int j = 0; j < static_cast<int>(sizeof same.bits) / 4; ++j) {
        same_next.bits[j] =
            __shfl_sync(0xffffffff, lane == 0 ? same.bits[j] : same_prev.bits[j], from);
      }
    }
    const int s = t - TILE;
    if (base > 0) {
      float a[V];
#pragma unroll
      for (int i = 0; i < V; ++i) {
        a[i] = 0.0f;
#pragma unroll
        for (int j = 0; j < WMAX; ++j) {  // dz[s + i + j] meets weight[W-1-j]
          float v = q[i + j];
          if (SEQ) {
            const bool match =
                i + j < V ? same_prev.at(i + j, H - j) : same_next.at(i + j - V, H - j);
            v = match ? v : 0.0f;
          }
          if (WMAX - 1 - j >= first) a[i] = fmaf(w[WMAX - 1 - j], v, a[i]);
        }
      }
      if (EDGE && p.dfinal_states.given() && start + base > p.seqlen - p.width) {
#pragma unroll
        for (int i = 0; i < V; ++i) {
          const int64_t j = start + s + i - (p.seqlen - (p.width - 1));
          a[i] += WarpValues<T>::pick(lane_dfinal, j < p.width - 1 ? static_cast<int>(j) : -1);
        }
      }
      dx.template store<EDGE>(s, pack<T>(a));
    }
#pragma unroll
    for (int i = 0; i < V; ++i) dz_prev[i] = dz[i];
    same_prev = same;
  };
  for (int base = 0; base < count + TILE;) {
    // Two at a time: the other takes in registers what the one leaves there. More code would spill.
    if (WMAX == 4 && !SEQ && base + 3 * TILE <= count) {
      step(std::false_type{}, base);
      step(std::false_type{}, base + TILE);
      base += 2 * TILE;
    } else if (base + 2 * TILE <= count) {
      step(std::false_type{}, base);
      base += TILE;
    } else {
      step(std::true_type{}, base);
      base += TILE;
    }
  }
  dx.flush(static_cast<int>(ceil_div(count, TILE)) * TILE + lane * V);

  if (p.partials != nullptr) {
    using WarpReduce = cub::WarpReduce<float>;
    __shared__ typename WarpReduce::TempStorage storage[kThreads / 32];
    const int64_t part = b * p.chunks + segment;
#pragma unroll
    for (int k = 0; k <= WMAX; ++k) {
      const float sum = WarpReduce(storage[threadIdx.x / 32]).Sum(k < WMAX ? dw[k] : db);
      if (lane == 0 && k >= first) *p.partial(part, k - first, d) = sum;
    }
  }
}

// The parts below take any width, strides and type, one output a thread, and recompute dz.

template <typename T>
__device__ Compute<T> dz_at(const BackwardArgs<T>& p, int64_t b, int64_t d, int64_t t) {
  const int id = p.seq_idx.at(b, t);
  if (id < 0) return 0;
  Compute<T> z = p.bias.given() ? p.bias.load(d) : Compute<T>(0);
  for (int k = 0; k < p.width; ++k) {
    const int64_t s = t - (p.width - 1) + k;
    const bool same = p.seq_idx.at(b, max(s, int64_t(0))) == id;
    z = fma(p.weight.load(d, k), same ? p.input(b, d, s) : Compute<T>(0), z);
  }
  return p.gradient(z, to_compute(*p.dout.at(b, d, t)));
}

// dx at s, which lies before the sequence for dinitial_states.
template <typename T>
__device__ Compute<T> dx_at(const BackwardArgs<T>& p, int64_t b, int64_t d, int64_t s) {
  Compute<T> a = 0;
  for (int j = 0; j < p.width; ++j) {
    const int64_t t = s + j;
    if (t < 0 || t >= p.seqlen) continue;
    if (p.seq_idx.at(b, t) != p.seq_idx.at(b, max(s, int64_t(0)))) continue;
    a = fma(p.weight.load(d, p.width - 1 - j), dz_at(p, b, d, t), a);
  }
  return a + p.dfinal(b, d, s);
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    backward_any_width(const BackwardArgs<T> p, bool dim_fastest) {
  int64_t b, d, s;
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (dim_fastest) {
    b = split(split(n, p.dim, &d), p.seqlen, &s);
  } else {
    b = split(split(n, p.seqlen, &s), p.dim, &d);
  }
  if (b < p.batch) *p.dx.at(b, d, s) = from_compute<T>(dx_at(p, b, d, s));
}

template <typename T>
__global__ void __launch_bounds__(kThreads) backward_initial_states(const BackwardArgs<T> p) {
  int64_t d, j;
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t b = split(split(n, p.width - 1, &j), p.dim, &d);
  if (b < p.batch) p.dinitial_states.store(dx_at(p, b, d, j - (p.width - 1)), b, d, j);
}

// One block a (part, d): the sums of one chunk of one row.
template <typename T>
__global__ void __launch_bounds__(kThreads) backward_any_width_partials(const BackwardArgs<T> p) {
  using BlockReduce = cub::BlockReduce<Compute<T>, kThreads>;
  __shared__ typename BlockReduce::TempStorage storage;
  int64_t d, chunk;
  const int64_t part = split(blockIdx.x, p.dim, &d);
  const int64_t b = split(part, p.chunks, &chunk);
  const int64_t t0 = chunk * p.chunk, t1 = min(t0 + p.chunk, p.seqlen);
  for (int k = 0; k <= p.width; ++k) {
    Compute<T> sum = 0;
    for (int64_t t = t0 + threadIdx.x; t < t1; t += kThreads) {
      const int64_t s = t - (p.width - 1) + k;
      const Compute<T> dz = dz_at(p, b, d, t);
      if (k == p.width) {
        sum += dz;
      } else if (p.seq_idx.at(b, max(s, int64_t(0))) == p.seq_idx.at(b, t)) {
        sum = fma(dz, p.input(b, d, s), sum);
      }
    }
    sum = BlockReduce(storage).Sum(sum);
    __syncthreads();
    if (threadIdx.x == 0) *p.partial(part, k, d) = sum;
  }
}

// Adds up the partial sums of one (k, d) in a fixed order: kLanes threads take every kLanes-th
// part.
constexpr int kLanes = 8;

template <typename T>
__global__ void __launch_bounds__(kThreads) reduce_partials(const BackwardArgs<T> p) {
  constexpr int kColumns = kThreads / kLanes;
  __shared__ Compute<T> sums[kLanes][kColumns];
  const int column = threadIdx.x % kColumns, part_lane = threadIdx.x / kColumns;
  const int64_t parts = p.batch * p.chunks, columns = (p.width + 1) * p.dim;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kColumns + column;
  Compute<T> sum = 0, lost = 0;  // Kahan's: there may be millions of parts
  if (i < columns) {
#pragma unroll 4
    for (int64_t part = part_lane; part < parts; part += kLanes) {
      const Compute<T> v = p.partials[part * columns + i] - lost;
      const Compute<T> next = sum + v;
      lost = (next - sum) - v;
      sum = next;
    }
  }
  sums[part_lane][column] = sum;
  __syncthreads();
  if (part_lane > 0 || i >= columns) return;
#pragma unroll
  for (int j = 1; j < kLanes; ++j) sum += sums[j][column];
  int64_t d;
  const int64_t k = split(i, p.dim, &d);
  if (k < p.width) {
    if (p.dweight.given()) p.dweight.store(sum, d, k);
  } else if (p.dbias.given()) {
    p.dbias.store(sum, d);
  }
}

// How the backward divides a problem. It depends on sizes and types alone, so that the sums' order
// does; the workspace follows from it.
struct Plan {
  bool any_width, channel_last;
  int vector;  // channels or time steps a thread; 1: any strides (channel_last)
  Access access = Access::kStrided;  // channel_first
  int64_t chunk, chunks;
  int64_t workspace;  // bytes

  explicit Plan(const BackwardParams& params) {
    const Tensor& x = params.x;
    const int size =
        x.dtype == CAUSAL_CONV1D_FLOAT64 ? 8 : (x.dtype == CAUSAL_CONV1D_FLOAT32 ? 4 : 2);
    const int64_t batch = x.sizes[0], dim = x.sizes[1], seqlen = x.sizes[2];
    const int64_t width = params.weight.sizes[1];
    any_width = width > 8 || size == 8;
    channel_last = is_channel_last(x);
    vector = 1;
    if (any_width) {
      chunk = 4096;
      chunks = ceil_div(seqlen, chunk);
    } else if (channel_last) {
      const int most = width > 4 ? 2 : 4;  // more would spill registers
      vector = common_channels(most, size, dim, {&x, &params.dout, &params.dx}) == most ? most : 1;
      // About 32k threads of 4 channels, but chunks of 32 to 512 steps: measured best on 132 SMs.
      const int64_t wanted = ceil_div(32768 * 4, batch * dim > 0 ? batch * dim : 1);
      chunk = ceil_div(seqlen, wanted);
      chunk = ceil_div(chunk < 32 ? 32 : (chunk > 512 ? 512 : chunk), 8) * 8;
      chunks = ceil_div(seqlen, chunk);
    } else {
      vector = width > 4 || size == 2 ? 8 : 4;
      access = common_access({&x, &params.dout, &params.dx}, size);
      const int64_t wanted = ceil_div(8192, batch * dim > 0 ? batch * dim : 1);
      const int64_t tile = 32 * vector;
      chunk = ceil_div(ceil_div(seqlen, wanted), tile) * tile;
      if (chunk > 16 * tile) chunk = 16 * tile;
      if (chunk < tile) chunk = tile;
      chunks = ceil_div(seqlen, chunk);
    }
    const bool sums = given(params.dweight) || given(params.dbias);
    workspace = sums ? batch * chunks * (width + 1) * dim * (size == 8 ? 8 : 4) : 0;
  }
};

template <typename T, int WMAX>
cudaError_t launch_fast(BackwardArgs<T>& p, const Plan& plan, cudaStream_t stream) {
  const bool seq = p.seq_idx.data != nullptr, exact = p.width == WMAX;
  if (!plan.channel_last) {
    constexpr int V = WMAX == 8 || sizeof(T) == 2 ? 8 : 4;
    constexpr Access kAligned = Access::kAligned, kUnit = Access::kUnit;
    auto kernel = backward_channel_first<T, V, WMAX, false, true, Access::kStrided>;
    if (plan.access == kUnit) {
      kernel = seq ? backward_channel_first<T, V, WMAX, false, true, kUnit>
                   : backward_channel_first<T, V, WMAX, false, false, kUnit>;
    } else if (plan.access == kAligned && seq) {
      kernel = backward_channel_first<T, V, WMAX, false, true, kAligned>;
    } else if (plan.access == kAligned) {
      kernel = exact ? backward_channel_first<T, V, WMAX, true, false, kAligned>
                     : backward_channel_first<T, V, WMAX, false, false, kAligned>;
    }
    return launch(kernel, p.batch * p.dim * p.chunks * 32, stream, p);
  }
  constexpr int C = WMAX > 4 ? 2 : 4;
  auto kernel = backward_channel_last<T, 1, WMAX, false, true, false>;
  if (plan.vector > 1 && seq) kernel = backward_channel_last<T, C, WMAX, false, true, true>;
  if (plan.vector > 1 && !seq) {
    kernel = exact ? backward_channel_last<T, C, WMAX, true, false, true>
                   : backward_channel_last<T, C, WMAX, false, false, true>;
  }
  p.groups = p.dim / plan.vector;
  return launch(kernel, p.batch * p.chunks * p.groups, stream, p);
}

template <typename T>
cudaError_t run(const BackwardParams& params, const Plan& plan, void* workspace,
                cudaStream_t stream) {
  BackwardArgs<T> p{};
  p.x = view<T>(params.x);
  p.dout = view<T>(params.dout);
  p.dx = view<T>(params.dx);
  p.weight = any_view<Compute<T>>(params.weight);
  p.bias = any_view<Compute<T>>(params.bias);
  p.initial_states = any_view<Compute<T>>(params.initial_states);
  p.dfinal_states = any_view<Compute<T>>(params.dfinal_states);
  p.dweight = any_view<Compute<T>>(params.dweight);
  p.dbias = any_view<Compute<T>>(params.dbias);
  p.dinitial_states = any_view<Compute<T>>(params.dinitial_states);
  p.seq_idx = seq_idx_view(params.seq_idx);
  p.batch = params.x.sizes[0];
  p.dim = params.x.sizes[1];
  p.seqlen = params.x.sizes[2];
  p.width = static_cast<int>(params.weight.sizes[1]);
  p.silu = params.silu != 0;
  p.chunk = plan.chunk;
  p.chunks = plan.chunks;
  const bool sums = given(params.dweight) || given(params.dbias);
  p.partials = plan.workspace > 0 ? static_cast<Compute<T>*>(workspace) : nullptr;

  cudaError_t e = cudaSuccess;
  if (p.dinitial_states.given()) {
    e = launch(backward_initial_states<T>, p.batch * p.dim * (p.width - 1), stream, p);
  }
  if (e == cudaSuccess && p.batch * p.dim * p.seqlen > 0) {
    if (plan.any_width) {
      e = launch(backward_any_width<T>, p.batch * p.dim * p.seqlen, stream, p, plan.channel_last);
      if (e == cudaSuccess && p.partials != nullptr) {
        e = launch(backward_any_width_partials<T>, p.batch * p.chunks * p.dim * kThreads, stream,
                   p);
      }
    } else if constexpr (sizeof(T) <= 4) {
      e = p.width <= 4 ? launch_fast<T, 4>(p, plan, stream) : launch_fast<T, 8>(p, plan, stream);
    }
  }
  if (e == cudaSuccess && sums) {  // no positions at all: the sums are zero
    e = launch(reduce_partials<T>, (p.width + 1) * p.dim * kLanes, stream, p);
  }
  return e;
}

}  // namespace
}  // namespace causal_conv1d::gpu

int64_t causal_conv1d_cuda_backward_workspace_size(const causal_conv1d_backward_params* params) {
  using namespace causal_conv1d;
  if (check(*params).code != CAUSAL_CONV1D_OK) return -1;
  return gpu::Plan(*params).workspace;
}

causal_conv1d_status causal_conv1d_cuda_backward(const causal_conv1d_backward_params* params,
                                                 int device, void* stream, void* workspace,
                                                 int64_t workspace_size) {
  using namespace causal_conv1d;
  return gpu::run_operator("causal_conv1d_bwd", *params, device, [&](auto zero, int) {
    const gpu::Plan plan(*params);
    if (plan.workspace > workspace_size || (plan.workspace > 0 && workspace == nullptr)) {
      return cudaErrorInvalidValue;
    }
    return gpu::run<decltype(zero)>(*params, plan, workspace, static_cast<cudaStream_t>(stream));
  });
}
