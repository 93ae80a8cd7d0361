// Forward: out[b,d,t] = act(bias[d] + sum over k of weight[d,k] * x~[b,d,t-(W-1)+k]).
//
// channel_last: a thread owns C adjacent channels over a chunk of kRows steps; it loads kBurst of
//   them at once and keeps the last W-1 inputs in registers.
// channel_first: a warp owns a few tiles of one row, each lane V adjacent steps of a tile; a lane
//   loads the W-1 inputs before its own too, which its neighbour has just brought to L1.
// any_width: one thread an output, for W > 8 and fp64.
//
// Chunks are short, so that the threads at work at any time are in one region of memory: a copy
// that walks along 64 tiles a warp is 10 % slower than one that takes four (H200).
// For the same reason neighbouring warps take neighbouring parts of a row, then rows: numbered by
// channel first they reach 0.92 to 0.96 of a copy instead of 0.96 to 0.97 (bf16, large shapes).
//
// WMAX is 4 or 8, and EXACT means W == WMAX == 4; else taps k < WMAX - W are skipped by a
// predicate, not multiplied by zero, since 0 * inf would be NaN. SEQ: seq_idx may be given. C == 1
// suits any strides.
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
  Compute<T> scale;           // pre_activation_scale
  const T* x_end;             // one past x's last element
  int64_t chunk;              // channel_first: steps a warp
  Columns columns;            // channel_last
  Divisor by_dim, by_chunks;  // channel_first

  // x~ at s < seqlen.
  __device__ __forceinline__ Compute<T> input(int64_t b, int64_t d, int64_t s) const {
    if (s >= 0) return to_compute(*x.at(b, d, s));
    const int64_t j = s + width - 1;
    return initial_states.given() && j >= 0 ? initial_states.load(b, d, j) : Compute<T>(0);
  }
};

template <int WMAX>
constexpr int kBurst = WMAX == 8 ? 8 : 16;  // channel_last: steps that a thread loads at once,
template <int WMAX>
constexpr int kRows = WMAX == 8 ? 32 : 16;  // and in all
constexpr int kTiles = 4;                   // channel_first: tiles a warp
// Above it the next kernel's blocks are let in early; where about as many as the GPU holds at a
// time are all there are, that was slower.
constexpr unsigned kManyBlocks = 2048;

template <typename T, int C, int N>
struct Rows {  // an array that a function can return
  Pack<T, C> of[N];
};

template <typename T, int C, int WMAX, bool EXACT, bool SEQ>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 && WMAX == 4 ? 6 : 5)
    forward_channel_last(const ForwardArgs<T> p) {
  if (kSmallPtx && (C > 1 || WMAX > 4)) return;
  constexpr int H = WMAX - 1;
  const ColumnChunk at(p.columns);
  [[maybe_unused]] const int lanes = __popc(__ballot_sync(0xffffffff, at.inside));
  if (!at.inside || at.b >= p.batch) return;
  const int64_t b = at.b, d0 = int64_t(at.column) * C;
  constexpr int kChunk = kRows<WMAX>;
  // The last chunk may overlap the one before it: both write the same there.
  const int64_t t0 = max(min(int64_t(at.chunk) * kChunk, p.seqlen - kChunk), int64_t(0));
  const int first = EXACT ? 0 : WMAX - p.width;
  const T* x = p.x.at(b, d0, t0);
  T* out = p.out.at(b, d0, t0);
  float w[WMAX][C], bias[C], h[H][C];
  wait_for_kernel_before();
  if (gridDim.x > kManyBlocks) let_next_kernel_start();

  // The next N rows, of which count are inside.
  auto load = [&](auto n, int count) {
    constexpr int N = decltype(n)::value;
    Rows<T, C, N> rows;
#pragma unroll
    for (int u = 0; u < N; ++u) {
      if (u < count) rows.of[u] = Pack<T, C>::load(x);
      x += p.x.time;
    }
    return rows;
  };
  // They are at t0 + t. EDGE: only count of them are inside, and they may have several ids.
  auto step = [&](auto edge, auto n, int t, int count, const auto& rows) {
    constexpr bool EDGE = decltype(edge)::value, MIXED = SEQ && EDGE;
    constexpr int N = decltype(n)::value;
    float v[H + N][C];
    int id[H + N];
#pragma unroll
    for (int j = 0; j < H; ++j) {
#pragma unroll
      for (int c = 0; c < C; ++c) v[j][c] = h[j][c];
    }
    if (MIXED) load_ids(p.seq_idx.from(b, 0), t0 + t - H, p.seqlen, id);
#pragma unroll
    for (int u = 0; u < N; ++u) {
      float z[C];
#pragma unroll
      for (int c = 0; c < C; ++c) {
        v[H + u][c] = rows.of[u].get(c);
        z[c] = bias[c];
#pragma unroll
        for (int k = 0; k < WMAX; ++k) {
          float xk = v[u + k][c];
          if (MIXED) xk = id[u + k] == id[H + u] ? xk : 0.0f;
          if (has_tap<WMAX>(k, first)) z[c] = fmaf(w[k][c], xk, z[c]);
        }
      }
      if (p.silu) {
#pragma unroll
        for (int c = 0; c < C; ++c) z[c] = silu<T>(z[c]);
      }
      if (MIXED && id[H + u] < 0) {
#pragma unroll
        for (int c = 0; c < C; ++c) z[c] = 0.0f;
      }
      if (!EDGE || u < count) pack<T>(z).store(out);
      out += p.out.time;
    }
#pragma unroll
    for (int j = 0; j < H; ++j) {
#pragma unroll
      for (int c = 0; c < C; ++c) h[j][c] = v[N + j][c];
    }
  };
  auto prologue = [&] {
    const History<T, H, C> history(p, b, d0, t0);
    const Parameters<WMAX, C> parameters(p, d0);
    history.get(p, b, d0, t0, h);
    parameters.get(p.scale, w, bias);
  };
  const int count = static_cast<int>(min(p.seqlen, int64_t(kChunk)));
  bool plain = count == kChunk && !SEQ;
  // Where a warp has one chunk, it is quick to tell whether that has one id.
  if (SEQ && count == kChunk && p.columns.bits == 5) {
    // While the ids come, x does as far as L2.
    for (int u = 0; u < kBurst<WMAX>; ++u) prefetch(x + u * p.x.time);
    const int before = static_cast<int>(min(t0, int64_t(H)));
    plain = one_id(p.seq_idx.from(b, t0), -before, kChunk, lanes);
  }
  if (plain) {
    constexpr int N = kBurst<WMAX>;
    constexpr std::integral_constant<int, N> n;
    auto next = load(n, N);
    // What a warp loads later does as far as L2, a row a lane, in sectors of 32 bytes. fp32 has
    // enough on its way without, and is slower with it.
    if (sizeof(T) == 2 && N < kChunk && lanes == 32 && p.columns.bits == 5) {
      const int lane = threadIdx.x % 32;
      const T* row = p.x.at(b, d0 - lane * C, t0 + N + lane);
#pragma unroll
      for (int i = 0; i < C * static_cast<int>(sizeof(T)); ++i) {
        if (lane < kChunk - N) prefetch(row + i * (32 / sizeof(T)));
      }
    }
    prologue();
#pragma unroll 1
    for (int t = 0; t < kChunk; t += N) {
      const auto rows = next;
      if (t + N < kChunk) next = load(n, N);
      step(std::false_type{}, n, t, N, rows);
    }
    return;
  }
  prologue();
#pragma unroll 1
  for (int t = 0; t < count; t += WMAX) {
    constexpr std::integral_constant<int, WMAX> n;
    step(std::true_type{}, n, t, count - t, load(n, count - t));
  }
}

// What a block of forward_channel_first knows of seq_idx in its chunk, which begins at step 0 here.
// A row's tiles begin up to kEarly steps before the chunk's.
template <int TILE, int V, int H, int kEarly>
class ChunkIds {
  enum : int { kPadding = 0x80, kAll = 2, kSteps = kTiles * TILE + kEarly };

 public:
  struct alignas(8) Shared {
    uint8_t matches[(kSteps + 3) / 4 * 4 + 4];  // load() reads a word more
    uint8_t mixed[kTiles];                      // whether a tile has several ids; kAll for all
  };

  __device__ __forceinline__ explicit ChunkIds(Shared* shared) : shared_(shared) {}

  // Returns which tiles have several ids, a bit each, or all if one warp wants that. To be called
  // by all threads of the block, maybe from different places. ids.data is at step 0, [lo, hi) the
  // row.
  __device__ __forceinline__ uint32_t find_mixed(const SeqIdx& ids, int lo, int hi,
                                                 bool all) const {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    constexpr int kBefore = kEarly + H;
    IdWindow<TILE + kBefore> window;  // a tile a warp
    window.load(ids, warp * TILE - kBefore, lo, hi, lane);
    const bool several = !window.one();
    if (lane == 0) shared_->mixed[warp] = static_cast<uint8_t>(all ? int(kAll) : several);
    synchronize_warps();
    uint32_t mixed = 0;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      mixed |= shared_->mixed[i] == kAll ? (1u << kTiles) - 1 : uint32_t(shared_->mixed[i]) << i;
    }
    if (mixed == 0) return 0;
#pragma unroll 1
    for (int i = 0; i < kTiles; ++i) {
      if ((mixed >> i & 1) == 0) continue;
      for (int n = threadIdx.x; n < TILE + kEarly; n += kThreads) {
        const int t = i * TILE - kEarly + n;
        int id[H + 1], match = 0;
        load_ids(ids, t - H, lo, hi, id);
#pragma unroll
        for (int k = 0; k < H; ++k) match |= id[k] == id[H] ? 1 << k : 0;
        shared_->matches[t + kEarly] = static_cast<uint8_t>(id[H] < 0 ? int(kPadding) : match);
      }
    }
    synchronize_warps();
    return mixed;
  }

  // Starts to answer what else is asked about the V steps from t on, which are in a mixed tile.
  __device__ __forceinline__ void load(int t) {
    const int at = t + kEarly;
    const uint32_t* words = reinterpret_cast<const uint32_t*>(shared_->matches) + at / 4;
#pragma unroll
    for (int i = 0; i < V / 4; ++i) {
      const uint32_t next = kEarly == 0 ? 0 : words[i + 1];
      of_[i] = kEarly == 0 ? words[i] : __funnelshift_r(words[i], next, at % 4 * 8);
    }
  }
  // Whether the input of tap k, 0 <= k <= H, counts for step j.
  __device__ __forceinline__ bool takes(int j, int k) const {
    return k == H || (of_[j / 4] & 1u << (j % 4 * 8 + k)) != 0;
  }
  __device__ __forceinline__ bool is_padding(int j) const {
    return (of_[j / 4] & uint32_t(kPadding) << j % 4 * 8) != 0;
  }

 private:
  Shared* shared_;
  uint32_t of_[V / 4];  // a byte a step
};

constexpr int kWarps = kThreads / 32;

template <typename T, int V, int WMAX, bool EXACT, bool SEQ, Access ACCESS>
__global__ void __launch_bounds__(kThreads, WMAX == 8
                                                ? 4 - SEQ
                                                : (SEQ ? 5 : (ACCESS == Access::kUnit ? 7 : 9)))
    forward_channel_first(const ForwardArgs<T> p) {
  if (kSmallPtx && (ACCESS != Access::kStrided || WMAX > 4)) return;
  constexpr int H = WMAX - 1, TILE = 32 * V;
  const int lane = threadIdx.x % 32;
  uint32_t index, d, b;
  bool spare = false;   // a warp without a channel, which only looks at ids
  if constexpr (SEQ) {  // a block's warps have the same steps of kWarps channels
    static_assert(kWarps == kTiles, "each warp looks at the ids of one tile");
    b = p.by_dim.split(p.by_chunks.split(blockIdx.x, &index), &d);
    d = d * kWarps + threadIdx.x / 32;
    spare = d >= p.dim;
    if (spare) d = 0;
  } else {
    // uniform() takes its time, which pays where much code follows from it.
    constexpr bool kUniform = EXACT && ACCESS == Access::kUnit;
    const uint32_t warp_of_block = threadIdx.x / 32;
    const uint32_t warp = blockIdx.x * kWarps + (kUniform ? uniform(warp_of_block) : warp_of_block);
    b = p.by_dim.split(p.by_chunks.split(warp, &index), &d);
  }
  if (b >= p.batch) return;
  // Tiles are where out is aligned.
  auto time = [](const View<T>& v) { return ACCESS == Access::kStrided ? v.time : 1; };
  const T* x_row = p.x.at(b, d, 0);
  T* out_row = p.out.at(b, d, 0);
  constexpr bool kRagged = kIsRagged<ACCESS>;
  const int offset = kRagged ? misalignment(out_row) : 0;
  const Segment s(index, p.chunk, offset, p.seqlen);
  const bool states = p.initial_states.given() && s.lo >= 0;

  wait_for_kernel_before();
  if (gridDim.x > kManyBlocks) let_next_kernel_start();
  using Reader = RowReader<T, V, WMAX, ACCESS>;
  const Reader x(x_row + s.origin * time(p.x), p.x.time, p.x_end, s.lo, s.end, lane);
  const RowWriter<T, V, ACCESS> out(out_row + s.origin * time(p.out), p.out.time, max(s.lo, 0),
                                    s.end, lane);
  using Ids = ChunkIds<TILE, V, H, ACCESS == Access::kUnit ? kGranule<T> - 1 : 0>;
  __shared__ std::conditional_t<SEQ, typename Ids::Shared, char> shared;
  // At the end of a tensor, where it is rare, code for tiles with one id is spared.
  constexpr bool kOnlyMixed = SEQ && ACCESS == Access::kUnit;
  auto find_mixed = [&]() -> uint32_t {  // tiles with several ids, a bit each
    if constexpr (SEQ) {
      const Segment chunk = s.with(-offset);
      const SeqIdx ids = p.seq_idx.from(b, chunk.origin);
      return Ids(&shared).find_mixed(ids, chunk.lo, chunk.hi, kOnlyMixed && !x.whole(s.end));
    }
    return 0;
  };
  const int first = EXACT ? 0 : WMAX - p.width;
  // Before x: registers that its loads fill for nothing would make these wait for them.
  const WarpParameters<WMAX, EXACT> parameters(p, d, lane);
  float w[WMAX], bias;

  // EDGE: the tile may have steps before the row, or take states. MIXED: it may have several ids.
  auto step = [&](auto edge, auto mixed, int base, const typename Reader::Raw& raw) {
    constexpr bool EDGE = decltype(edge)::value, MIXED = decltype(mixed)::value;
    const int t = base + lane * V;
    const auto xs = x.own(raw);
    float h[H + V], z[V];
#pragma unroll
    for (int j = 0; j < H + V; ++j) h[j] = xs.get(WMAX - H + j);
    if (EDGE && kRagged && base <= s.lo) {
#pragma unroll
      for (int j = 0; j < H + V; ++j) h[j] = t - H + j < s.lo ? 0.0f : h[j];
    }
    if (EDGE && base <= s.lo && states) {
      take_states<H>(p, b, d, lane, first, t, s.lo, h);
    }
    [[maybe_unused]] Ids ids(nullptr);
    if constexpr (MIXED) {
      ids = Ids(&shared);
      ids.load(t - offset);
    }
#pragma unroll
    for (int j = 0; j < V; ++j) {
      z[j] = bias;
#pragma unroll
      for (int k = 0; k < WMAX; ++k) {
        float xk = h[j + k];
        if (MIXED) xk = ids.takes(j, k) ? xk : 0.0f;
        if (has_tap<WMAX>(k, first)) z[j] = fmaf(w[k], xk, z[j]);
      }
    }
    if (p.silu) {
#pragma unroll
      for (int j = 0; j < V; ++j) z[j] = silu<T>(z[j]);
    }
    if (MIXED) {
#pragma unroll
      for (int j = 0; j < V; ++j) z[j] = ids.is_padding(j) ? 0.0f : z[j];
    }
    if (ACCESS == Access::kAligned) {
      out.write_granules(base, pack<T>(z));
    } else {
      out.write(base, pack<T>(z));
    }
  };

  // N tiles, all loaded before the first is used.
  [[maybe_unused]] auto burst = [&](auto n) {
    constexpr int N = decltype(n)::value;
    typename Reader::Raw raw[N];
#pragma unroll
    for (int i = 0; i < N; ++i) raw[i] = x.granules(i * TILE);
    const uint32_t mixed = find_mixed();
    if (spare) return;
    parameters.get(p, w, bias);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if ((mixed >> i & 1) != 0 || (!EXACT && i * TILE >= s.end)) continue;
      if (i == 0) {
        step(std::true_type{}, std::false_type{}, 0, raw[i]);
      } else {
        step(std::false_type{}, std::false_type{}, i * TILE, raw[i]);
      }
    }
    if constexpr (SEQ) {
#pragma unroll 1
      for (int i = 0; i < N; ++i) {
        if ((mixed >> i & 1) != 0) {
          step(std::true_type{}, std::true_type{}, i * TILE, x.granules(i * TILE));
        }
      }
    }
  };
  if constexpr (ACCESS != Access::kStrided) {
    if (x.whole(s.end)) {
      if constexpr (EXACT) {
        if (s.end <= kTiles / 2 * TILE) return burst(std::integral_constant<int, kTiles / 2>{});
      }
      return burst(std::integral_constant<int, kTiles>{});
    }
  }
  auto next = x.load(0);
  const uint32_t mixed = find_mixed();
  if (spare) return;
  parameters.get(p, w, bias);
#pragma unroll 1
  for (int base = 0; base < s.end; base += TILE) {
    const auto raw = next;
    if (base + TILE < s.end) next = x.load(base + TILE);
    if (kOnlyMixed || (mixed >> base / TILE & 1) != 0) {
      step(std::true_type{}, std::bool_constant<SEQ>{}, base, raw);
    } else {
      step(std::true_type{}, std::false_type{}, base, raw);
    }
  }
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
  Compute<T> z = p.bias.given() ? p.bias.load(d) * p.scale : Compute<T>(0);
  for (int k = 0; k < p.width; ++k) {
    const int64_t s = t - (p.width - 1) + k;
    const bool same = p.seq_idx.at(b, max(s, int64_t(0))) == id;
    z = fma(p.weight.load(d, k) * p.scale, same ? p.input(b, d, s) : Compute<T>(0), z);
  }
  if (p.silu) z = silu<T>(z);
  *p.out.at(b, d, t) = from_compute<T>(id < 0 ? Compute<T>(0) : z);
}

// final_states_out[b,d,j] = x~[b,d,e-(W-1)+j], e being the row's end without the padding there;
// padding further on counts as zeros, and as the end of what comes before the row. A thread has all
// of a (b, d) and walks up j, so that what it reads of initial_states, which may be the same
// memory, is never what it has written.
template <typename T>
__global__ void __launch_bounds__(kThreads) write_final_states(const ForwardArgs<T> p) {
  wait_for_kernel_before();
  let_next_kernel_start();
  int64_t b, d, end = p.seqlen;
  if (p.seq_idx.data == nullptr) {
    b = split(static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, p.dim, &d);
    if (b >= p.batch) return;
  } else {  // a block has channels of one row
    b = split(blockIdx.x, ceil_div(p.dim, kThreads), &d);
    d = d * kThreads + threadIdx.x;
    end = p.seq_idx.end(b, p.seqlen);
    if (d >= p.dim) return;
  }
  const bool takes_states = p.initial_states.given() && (end == 0 || p.seq_idx.at(b, 0) >= 0);
  constexpr int N = 4;  // on their way at a time, which is why they are converted after the last
  const int states = p.width - 1;
  for (int j0 = 0; j0 < states; j0 += N) {
    const int64_t s0 = end - states + j0;
    const int count = min(N, states - j0);
    T x[N];
    Compute<T> state[N];
    bool counts[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int64_t s = s0 + i;
      const bool is_x = i < count && s >= 0;
      if (is_x) x[i] = *p.x.at(b, d, s);
      counts[i] = is_x && p.seq_idx.at(b, s) >= 0;
    }
    if (s0 < 0) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const bool before = takes_states && i < count && s0 + i < 0;
        state[i] = before ? p.initial_states.load(b, d, s0 + i + states) : Compute<T>(0);
      }
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
      Compute<T> v = counts[i] ? to_compute(x[i]) : Compute<T>(0);
      if (s0 + i < 0) v = state[i];
      if (i < count) p.final_states.store(v, b, d, j0 + i);
    }
  }
}

template <typename T, int C, int WMAX, bool EXACT, bool SEQ>
cudaError_t launch_channel_last(ForwardArgs<T> p, cudaStream_t stream) {
  p.columns = Columns(p.dim / C, ceil_div(p.seqlen, kRows<WMAX>), -1);
  return launch_early(forward_channel_last<T, C, WMAX, EXACT, SEQ>, p.columns.threads(p.batch),
                      stream, p);
}

template <typename T, int V, int WMAX, bool EXACT, bool SEQ, Access ACCESS>
cudaError_t launch_channel_first(ForwardArgs<T> p, const Tensor& out, cudaStream_t stream) {
  constexpr int TILE = 32 * V;
  // A row of out that begins within a granule begins its first tile before it.
  constexpr int G = kGranule<T>;
  const bool early = kIsRagged<ACCESS> && vector_width(out, 2, G, sizeof(T)) < G;
  const int64_t tiles = ceil_div(p.seqlen + (early ? G - 1 : 0), TILE);
  const int64_t chunks = ceil_div(tiles, kTiles);
  p.chunk = ceil_div(tiles, chunks) * TILE;
  const int64_t channels = SEQ ? ceil_div(p.dim, kWarps) : p.dim;
  p.by_dim = Divisor(channels);
  p.by_chunks = Divisor(chunks);
  return launch_early(forward_channel_first<T, V, WMAX, EXACT, SEQ, ACCESS>,
                      p.batch * channels * chunks * (SEQ ? kThreads : 32), stream, p);
}

template <typename T, int WMAX>
cudaError_t launch_fast(const ForwardParams& params, const ForwardArgs<T>& p, cudaStream_t stream) {
  constexpr int size = sizeof(T);
  const bool seq = p.seq_idx.data != nullptr, exact = p.width == 4, every = has_every_kernel();
  if (!is_channel_last(params.x)) {
    constexpr int V = WMAX == 8 ? 8 : 16 / size;
    constexpr Access kAligned = Access::kAligned, kUnit = Access::kUnit;
    const Access access = common_access({&params.x, &params.out}, size);
    // Several sequences and W > 4 are rare enough to do without faster kernels.
    if (access == Access::kStrided || !every || (seq && WMAX == 8)) {
      return launch_channel_first<T, V, WMAX, false, true, Access::kStrided>(p, params.out, stream);
    }
    if constexpr (WMAX == 4) {
      if (seq && access == kAligned && exact) {
        return launch_channel_first<T, V, WMAX, true, true, kAligned>(p, params.out, stream);
      }
      if (seq) return launch_channel_first<T, V, WMAX, false, true, kUnit>(p, params.out, stream);
    }
    if (access == kAligned && (exact || WMAX == 8)) {
      return launch_channel_first<T, V, WMAX, WMAX == 4, false, kAligned>(p, params.out, stream);
    }
    if constexpr (WMAX == 4) {
      if (access == Access::kDense && exact) {
        return launch_channel_first<T, V, WMAX, true, false, Access::kDense>(p, params.out, stream);
      }
    }
    return exact ? launch_channel_first<T, V, WMAX, WMAX == 4, false, kUnit>(p, params.out, stream)
                 : launch_channel_first<T, V, WMAX, false, false, kUnit>(p, params.out, stream);
  }
  // A warp's row of 256 bytes, or less where that needs too many registers.
  constexpr int C = WMAX == 8 ? 2 : 8 / size;
  if (!every || common_channels(C, size, p.dim, {&params.x, &params.out}) < C) {
    return launch_channel_last<T, 1, WMAX, false, true>(p, stream);
  }
  if (seq) return launch_channel_last<T, C, WMAX, false, true>(p, stream);
  return exact ? launch_channel_last<T, C, WMAX, WMAX == 4, false>(p, stream)
               : launch_channel_last<T, C, WMAX, false, false>(p, stream);
}

template <typename T>
cudaError_t launch_out(const ForwardParams& params, const ForwardArgs<T>& p, cudaStream_t stream) {
  if (!has_elements(params.x)) return cudaSuccess;
  if constexpr (sizeof(T) <= 4) {
    const bool few = p.batch * p.dim * ceil_div(p.seqlen, 256) <= kMostParts;
    if (few && p.width <= 4) return launch_fast<T, 4>(params, p, stream);
    if (few && p.width <= 8 && has_every_kernel()) return launch_fast<T, 8>(params, p, stream);
  }
  return launch(forward_any_width<T>, p.batch * p.dim * p.seqlen, stream, p,
                is_channel_last(params.x));
}

template <typename T>
cudaError_t run(const ForwardParams& params, cudaStream_t stream) {
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
  p.scale = pre_activation_scale<T>(p.silu);
  p.x_end = p.x.data + extent(params.x);

  const cudaError_t e = launch_out<T>(params, p, stream);
  if (e != cudaSuccess || !p.final_states.given()) return e;
  // After what reads initial_states, since the final ones may be written there.
  const int64_t row = p.seq_idx.data == nullptr ? p.dim : ceil_div(p.dim, kThreads) * kThreads;
  return launch_early(write_final_states<T>, p.batch * row, stream, p);
}

}  // namespace
}  // namespace causal_conv1d::gpu

causal_conv1d_status causal_conv1d_cuda_forward(const causal_conv1d_forward_params* params,
                                                int device, void* stream) {
  using namespace causal_conv1d;
  return gpu::run_operator("causal_conv1d_fn", params, device, [&](auto zero) {
    return gpu::run<decltype(zero)>(*params, static_cast<cudaStream_t>(stream));
  });
}
