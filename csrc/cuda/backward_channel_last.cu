// The backward of channel-last tensors: a thread owns C adjacent channels and walks up a chunk of
// time, with the last W inputs and dz in registers. Rows come by cp.async some steps ahead
// (RowPairs). A block's warps have chunks that follow each other: each gives the dz of its first
// rows to the one before, which needs them at its end, and their sums are added up in the block.
#include "backward.cuh"
#include "launch.cuh"
#include "parameters.cuh"
#include "row_pairs.cuh"
#include "seq_ids.cuh"
#include "states.cuh"
#include "taps.cuh"
#include "variants.cuh"

namespace causal_conv1d::gpu {
namespace {

template <typename T>
constexpr bool kIsHalf = std::is_same_v<T, __half>;

// Blocks that an SM has registers for.
template <typename K>
constexpr int kLastBlocks = K::FUSED                                      ? (K::WMAX > 4 ? 2 : 3)
                            : K::WMAX == 8 && K::SEQ && !K::EXACT         ? 2
                            : K::WMAX > 4 && kIsHalf<typename K::Element> ? 3
                                                                          : 4;

// Rows that are walked along at a time, at least W: as many as registers go round in.
template <typename K>
constexpr int kGroupRows = K::WMAX > 4 ? 8 : 4;

// A value for each channel of a thread.
template <int C>
struct alignas(sizeof(float) * C) PerChannel {
  float of[C];
};

// Shared memory of a block. Rows come through the ring; then the warps' sums take its place.
template <typename K>
struct LastShared {
  using T = typename K::Element;
  static constexpr int kGroups = kTuring ? 1 : K::FUSED ? 2 : 16 / kGroupRows<K>;  // in flight
  using Reader = RowPairs<T, K::C, kGroupRows<K>, kGroups>;
  // The dz of each warp's first rows, for the warp before.
  using FirstDz = PerChannel<K::C>[kBackwardLines - 1][K::H][32];
  union Room {
    typename Reader::Shared ring[K::FUSED ? 2 : 1];  // x and dout; pre_gate and post_gate
    PerChannel<K::C> sums[K::WMAX + 1][kBackwardLines][32];
    char room[kRoomFor<kLastBlocks<K>, sizeof(FirstDz)>];
  };
};

// What a thread has in registers: entry r % ROWS of h and dz is that of row r.
template <typename K>
struct LastRegisters {
  static constexpr int C = K::C, WMAX = K::WMAX, ROWS = kGroupRows<K>;
  float w[WMAX][C], bias[C], dw[WMAX][C], db[C];
  float h[ROWS][C], dz[ROWS][C];  // x~ and dz of the last rows
  Pack<typename K::Element, C> x[K::FUSED ? ROWS : 1], pre_gate[K::FUSED ? ROWS : 1],
      dout[K::FUSED ? ROWS : 1];
};

// What is known of a group of rows, t being its first. kWhole: all are in the chunk; kSilu,
// kLinear: and have that activation, so that no branch keeps rows apart. kLast: the first row alone
// is in the chunk; kShared: and the dz of the others come from the next warp. kAny: nothing, and dx
// may take dfinal_states.
enum Place { kSilu, kLinear, kWhole, kShared, kLast, kAny };

// A warp's chunk of a row. Times are relative to its first step, at t0. What can be computed again
// takes no registers.
template <typename K>
struct LastChunk {
  uint32_t b, column, chunk;
  int columns;        // of the warp
  int line;           // the warp's place in the block
  int count;          // steps of the chunk
  int left;           // of these, those to be computed: in the row, and not shared
  int rows_with_ids;  // in the row
  int dfinal_from;    // from here on dx takes dfinal_states
  bool has_next;      // the dz after the chunk are those of the next warp's first rows

  template <typename Args>
  __device__ __forceinline__ LastChunk(const Args& p, const ColumnChunk& at) {
    // Lanes after the last column do as that one's, for the sake of what they copy for others.
    const int64_t columns_left = p.columns.count - at.column + threadIdx.x % 32;
    columns = uniform(static_cast<int>(min(columns_left, int64_t(32))));
    column = static_cast<uint32_t>(min(int64_t(at.column), p.columns.count - 1));
    chunk = uniform(at.chunk);
    const int64_t t0 = this->t0(p);
    b = uniform(at.b);
    line = uniform(threadIdx.x / 32);
    // Not where dx needs dfinal_states too.
    has_next = p.chunk > K::H && line + 1 < kBackwardLines &&
               int64_t(chunk) + 1 < p.columns.chunks &&
               !(p.dfinal_states.given() && p.seqlen - (p.width - 1) < t0 + p.chunk + K::H);
    count = static_cast<int>(min(p.chunk, p.seqlen - t0));
    rows_with_ids = static_cast<int>(min(p.seqlen - t0, int64_t(total())));
    left = has_next ? count : rows_with_ids;
    dfinal_from = p.dfinal_states.given()
                      ? static_cast<int>(min(p.seqlen - (p.width - 1) - t0, int64_t(total())))
                      : total();
  }

  // Rows walked along: H more, for the dz that dx needs.
  __device__ __forceinline__ int total() const { return count + K::H; }
  __device__ __forceinline__ int64_t d0() const { return int64_t(column) * K::C; }
  template <typename Args>
  __device__ __forceinline__ int64_t t0(const Args& p) const {
    return chunk * p.chunk;
  }
};

template <typename K>
class LastWalk {
  using T = typename K::Element;
  using Args = BackwardArgs<T>;
  using Shared = LastShared<K>;
  using Reader = typename Shared::Reader;
  using FirstDz = typename Shared::FirstDz;
  using Registers = LastRegisters<K>;
  static constexpr int C = K::C, H = K::H, WMAX = K::WMAX, ROWS = kGroupRows<K>;
  static constexpr int kGroups = Shared::kGroups;
  static constexpr bool SEQ = K::SEQ, EXACT = K::EXACT;
  using Inputs = History<T, H, C, K::FUSED>;
  using Same = WarpMatches<ROWS, H>;

 public:
  using Groups =
      std::conditional_t<ROWS == 8, uint32_t, uint64_t>;  // a bit each, of up to 136 rows

  __device__ __forceinline__ LastWalk(const Args& p, const LastChunk<K>& c, Reader& reader,
                                      Reader& gates, FirstDz& first_dz)
      : p_(p),
        c_(c),
        reader_(reader),
        gates_(gates),
        first_dz_(first_dz),
        first_(EXACT ? 0 : WMAX - p.width),
        b_(c.b),
        d0_(c.d0()),
        t0_(c.t0(p)),
        dx_(reinterpret_cast<char*>(p.dx.at(c.b, c.d0(), c.t0(p) - H))) {
    if constexpr (K::FUSED) {
      dpre_gate_ = p.dpre_gate.at(c.b, c.d0(), c.t0(p) - H);
      dpost_gate_ = p.dpost_gate.at(c.b, c.d0(), c.t0(p));
    }
  }

  // Loads weights and the inputs before the chunk.
  __device__ __forceinline__ void start(Registers& r) {
    float history[H][C];
    Inputs::load_first(p_, c_.b, c_.d0(), c_.t0(p_), history);
    const Inputs rows_before(p_, c_.b, c_.d0(), c_.t0(p_));
    const Parameters<WMAX, C, EXACT, true> parameters(p_, c_.d0());
    for (int i = 0; i < kGroups; ++i) start_group();
    rows_before.get(p_, c_.t0(p_), history);
    parameters.get(p_.scale, r.w, r.bias);
#pragma unroll
    for (int j = 0; j < H; ++j) {
#pragma unroll
      for (int c = 0; c < C; ++c) {
        r.h[before(0, H - j)][c] = history[j][c];
        r.dz[before(0, H - j)][c] = 0.0f;
      }
    }
  }

  // All rows. mixed_from: a bit for each group that has several ids.
  __device__ __forceinline__ void walk(Groups mixed_from, Registers& r) {
    int t = 0;
    if constexpr (SEQ) {
      while (t < c_.total()) {
        // Up to the next group that has several ids.
        const Groups left = mixed_from >> t / ROWS;
        const int next = left == 0 ? c_.count : t + ROWS * (__ffsll(left) - 1);
        t = whole_groups(t, min(next, end()), r);
        special_group((mixed_from >> t / ROWS & 1) != 0, t, r);
        t += ROWS;
      }
    } else {
      t = whole_groups(t, end(), r);
      if (c_.has_next) {
        group<kShared, false>(t, Same(), r);
      } else if (EXACT && t + 1 == c_.count && c_.dfinal_from == c_.total()) {
        if constexpr (EXACT) group<kLast, false>(t, Same(), r);
      } else {
#pragma unroll 1
        for (; t < c_.total(); t += ROWS) group<kAny, false>(t, Same(), r);
      }
    }
  }

 private:
  // The end of the steps that take no dfinal_states.
  __device__ __forceinline__ int end() const { return min(c_.count, c_.dfinal_from); }

  // Where the entry of the row n rows before row u of a group is.
  static __device__ __forceinline__ constexpr int before(int u, int n) {
    return (u + ROWS - n) % ROWS;
  }

  // Starts to copy the next group of rows.
  __device__ __forceinline__ void start_group() {
    reader_.start(p_.x_row, p_.dout_row, p_.wide);
    if constexpr (K::FUSED) {
      gates_.start(p_.pre_gate.time * static_cast<int64_t>(sizeof(T)),
                   p_.post_gate.time * static_cast<int64_t>(sizeof(T)), p_.wide,
                   p_.pre_gate.given(), p_.post_gate.given());
    }
    commit_copies();
  }

  // Whole groups of one id, up to end.
  __device__ __forceinline__ int whole_groups(int t, int end, Registers& r) {
    if constexpr (K::FUSED) {
      return groups<kWhole>(t, end, r);
    } else {
      return p_.silu ? groups<kSilu>(t, end, r) : groups<kLinear>(t, end, r);
    }
  }
  template <Place PLACE>
  __device__ __forceinline__ int groups(int t, int end, Registers& r) {
#pragma unroll 1
    for (; t + ROWS <= end; t += ROWS) group<PLACE, false>(t, Same(), r);
    return t;
  }

  // A group that has several ids, or is not whole.
  __device__ __forceinline__ void special_group(bool mixed, int t, Registers& r) {
    if (!mixed && c_.has_next) {
      group<kShared, false>(t, Same(), r);
      return;
    }
    if (EXACT && !mixed && t + 1 == c_.count && c_.dfinal_from == c_.total()) {
      if constexpr (EXACT) group<kLast, false>(t, Same(), r);
      return;
    }
    // Again, as it is not kept while whole groups need all registers.
    const ColumnChunk at(p_.columns, block_again());
    b_ = at.b;
    d0_ = min(int64_t(at.column), p_.columns.count - 1) * C;
    t0_ = at.chunk * p_.chunk;
    Same same;
    same.find(p_.seq_idx.from(b_, 0), t0_ + t, p_.seqlen);
    if (t + ROWS <= end()) {
      group<kWhole, true>(t, same, r);
    } else {
      group<kAny, true>(t, same, r);
    }
  }

  // The rows from t on. MIXED: they, or the H before them, may have several ids.
  template <Place PLACE, bool MIXED>
  __device__ __forceinline__ void group(int t, const Same& same, Registers& r) {
    wait_for_copies<kGroups - 1>();
    __syncwarp();
    Pack<T, C> next_x = reader_.read_x(0), next_g = reader_.read_g(0);
#pragma unroll
    for (int u = 0; u < ROWS; ++u) {
      // Mixed rows have no registers left to be read ahead.
      const Pack<T, C> xs = MIXED ? reader_.read_x(u) : next_x;
      const Pack<T, C> gs = MIXED ? reader_.read_g(u) : next_g;
      if (u + 1 < ROWS && !MIXED) {
        next_x = reader_.read_x(u + 1);
        next_g = reader_.read_g(u + 1);
      }
      row<PLACE, MIXED>(t, u, same, xs, gs, r);
      if (MIXED) __syncwarp();  // keeps rows apart, for fewer registers
    }
    if (t == 0) share_first_dz(r);
    if (PLACE == kShared || PLACE == kLast) return;
    __syncwarp();  // all have read the group that start() overwrites
    start_group();
  }

  __device__ __forceinline__ void share_first_dz(const Registers& r) {
    if (c_.line > 0) {
#pragma unroll
      for (int u = 0; u < H; ++u) {
        PerChannel<C> own;
#pragma unroll
        for (int c = 0; c < C; ++c) own.of[c] = r.dz[u][c];
        first_dz_[c_.line - 1][u][threadIdx.x % 32] = own;
      }
    }
    synchronize_warps();
  }

  // Row t + u: its dz and its part of the sums, and the dx that is complete then, H before.
  template <Place PLACE, bool MIXED>
  __device__ __forceinline__ void row(int t, int u, const Same& same, const Pack<T, C>& xs,
                                      const Pack<T, C>& gs, Registers& r) {
    constexpr bool WHOLE = PLACE <= kWhole;
    const bool inside = (WHOLE || t + u < c_.left) && !(MIXED && same.is_padding(u));
    float xk[WMAX][C], g[C];
    Pack<T, C> x = xs;
    if constexpr (K::FUSED) {
      r.x[u] = xs;
      r.dout[u] = gs;
      r.pre_gate[u] = gates_.read_x(u);
      if (p_.pre_gate.given()) x = product(xs, r.pre_gate[u]);
    }
#pragma unroll
    for (int c = 0; c < C; ++c) {
      g[c] = gs.get(c);
      r.h[u][c] = x.get(c);
      r.dz[u][c] = convolve<WMAX>(
          r.bias[c], first_, [&](int k) { return r.w[k][c]; },
          [&](int k) {
            const float x = r.h[before(u, H - k)][c];
            return xk[k][c] = !MIXED || same.takes(u, H - k) ? x : 0.0f;
          });
    }
    if constexpr (K::FUSED) {
      const bool own = PLACE == kAny ? t + u < c_.count : WHOLE || u == 0;
      after_activation(own, inside, gates_.read_g(u), r.dz[u], g);
    }
    if constexpr (PLACE == kSilu) {
#pragma unroll
      for (int c = 0; c < C; ++c) r.dz[u][c] = silu_backward<T>(r.dz[u][c], g[c]);
    } else if constexpr (PLACE == kLinear) {
#pragma unroll
      for (int c = 0; c < C; ++c) r.dz[u][c] = g[c];
    } else {
      p_.gradients(g, inside, r.dz[u]);
    }
    if (PLACE == kShared
            ? u > 0 && u <= H
            : SEQ && PLACE == kAny && c_.has_next && t + u >= c_.count && t + u < c_.total()) {
      const int n = PLACE == kShared ? u - 1 : t + u - c_.count;
      const PerChannel<C> next = first_dz_[c_.line][n][threadIdx.x % 32];
#pragma unroll
      for (int c = 0; c < C; ++c) r.dz[u][c] = next.of[c];
    }
    // The inputs of padding may be anything.
    if ((PLACE == kAny ? t + u < c_.count : WHOLE || u == 0) &&
        (inside || !(MIXED || PLACE == kAny))) {
#pragma unroll
      for (int c = 0; c < C; ++c) {
        r.db[c] += r.dz[u][c];
        accumulate<WMAX>(
            r.dz[u][c], first_, [&](int k) -> float& { return r.dw[k][c]; },
            [&](int k) { return xk[k][c]; });
      }
    }
    store_dx<PLACE, MIXED>(t, u, same, r);
  }

  template <Place PLACE, bool MIXED>
  __device__ __forceinline__ void store_dx(int t, int u, const Same& same, const Registers& r) {
    const int s = t + u - H;
    float a[C];
#pragma unroll
    for (int c = 0; c < C; ++c) {
      a[c] = correlate<WMAX>(
          first_, [&](int k) { return r.w[k][c]; },
          [&](int j) {
            const float dz = r.dz[before(u, H - j)][c];
            return !MIXED || same.takes(u - H + j, j) ? dz : 0.0f;
          });
    }
    // The first group's rows are H steps ahead of the first dx.
    const bool exists = PLACE == kAny                        ? s >= 0 && s < c_.count
                        : PLACE == kShared || PLACE == kLast ? u <= H && (u == H || t > 0)
                                                             : u >= H || t > 0;
    if (PLACE == kAny && exists && s >= c_.dfinal_from) {
#pragma unroll
      for (int c = 0; c < C; ++c) a[c] += p_.dfinal(b_, d0_ + c, t0_ + s);
    }
    if constexpr (K::FUSED) {
      before_convolution(exists, MIXED && same.is_padding(u - H), before(u, H), r, a);
    }
    pack<T>(a).store_if(exists, dx_);
    dx_ += p_.dx_row;
    opaque(dx_);  // or the sum of all rows is computed beside
  }

  // Turns dout of a row into the gradient of the activation, and stores dpost_gate. z: the row's
  // pre-activations.
  __device__ __forceinline__ void after_activation(bool own, bool inside, const Pack<T, C>& gate,
                                                   const float (&z)[C], float (&g)[C]) {
    if (p_.dpost_gate.given()) {
      float d[C];
#pragma unroll
      for (int c = 0; c < C; ++c) {
        d[c] = inside ? __fmul_rn(g[c], p_.silu ? silu<T>(z[c]) : z[c]) : 0.0f;
      }
      pack<T>(d).store_if(own, dpost_gate_);
      dpost_gate_ += p_.dpost_gate.time;
    }
    if (p_.post_gate.given()) {
#pragma unroll
      for (int c = 0; c < C; ++c) g[c] = __fmul_rn(g[c], gate.get(c));
    }
  }

  // Turns the gradient of x' into that of x, and stores dpre_gate. i: the row's entry.
  __device__ __forceinline__ void before_convolution(bool exists, bool padding, int i,
                                                     const Registers& r, float (&a)[C]) {
    if (p_.dpre_gate.given()) {
      float d[C];
#pragma unroll
      for (int c = 0; c < C; ++c) d[c] = padding ? 0.0f : __fmul_rn(a[c], r.x[i].get(c));
      pack<T>(d).store_if(exists, dpre_gate_);
      dpre_gate_ += p_.dpre_gate.time;
    }
    const bool gated = p_.pre_gate.given() && !padding;
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const float dout = p_.add_dout ? r.dout[i].get(c) : -0.0f;
      a[c] = fmaf(a[c], gated ? r.pre_gate[i].get(c) : 1.0f, dout);
    }
  }

  const Args& p_;
  const LastChunk<K>& c_;
  Reader &reader_, &gates_;
  FirstDz& first_dz_;
  int first_;
  int64_t b_, d0_, t0_;
  char* dx_;  // of the next row
  T *dpre_gate_, *dpost_gate_;
};

// Adds up the sums of a block's warps.
template <typename K, typename Args>
__device__ __forceinline__ void store_block_sums(const Args& p, typename LastShared<K>::Room& room,
                                                 const LastRegisters<K>& r) {
  constexpr int C = K::C, WMAX = K::WMAX;
  const int first = K::EXACT ? 0 : WMAX - p.width;
  wait_for_copies<0>();
  __syncthreads();  // all have read the ring
  auto& sums = room.sums;
  const int lane = threadIdx.x % 32, line = threadIdx.x / 32;
#pragma unroll
  for (int k = 0; k <= WMAX; ++k) {
    PerChannel<C> own;
#pragma unroll
    for (int i = 0; i < C; ++i) own.of[i] = k < WMAX ? r.dw[k % WMAX][i] : r.db[i];
    sums[k][line][lane] = own;
  }
  __syncthreads();
  const ColumnChunk at(p.columns, block_again());
  if (at.column >= p.columns.count) return;
  const int64_t part = at.b * p.columns.down.count + at.part;
  for (int k = first + line; k <= WMAX; k += kBackwardLines) {
    PerChannel<C> sum = sums[k][0][lane];
#pragma unroll
    for (int i = 1; i < kBackwardLines; ++i) {
#pragma unroll
      for (int j = 0; j < C; ++j) sum.of[j] += sums[k][i][lane].of[j];
    }
    p.store_partials(sum.of, part, k - first, int64_t(at.column) * C);
  }
}

template <typename K>
__global__ void __launch_bounds__(kThreads, kLastBlocks<K>)
    backward_channel_last(const BackwardArgs<typename K::Element> p) {
  if (kSmallPtx && !K::kAnyStride) return;
  using Shared = LastShared<K>;
  __shared__ typename Shared::Room shared;
  __shared__ typename Shared::FirstDz first_dz;
  pdl_wait();
  const ColumnChunk at(p.columns);
  if (at.b >= p.batch) return;
  const LastChunk<K> c(p, at);
  LastRegisters<K> r;
#pragma unroll
  for (int i = 0; i < K::C; ++i) {
    r.db[i] = 0.0f;
#pragma unroll
    for (int k = 0; k < K::WMAX; ++k) r.dw[k][i] = 0.0f;
  }
  if (c.t0(p) < p.seqlen) {
    typename Shared::Reader reader(&shared.ring[0], p.x.at(c.b, c.d0(), c.t0(p)),
                                   p.dout.at(c.b, c.d0(), c.t0(p)), p.x_row, p.dout_row, c.columns,
                                   c.left, p.wide);
    const View<typename K::Element>&a = K::FUSED ? p.pre_gate : p.x,
                        &b = K::FUSED ? p.post_gate : p.dout;
    typename Shared::Reader gates(&shared.ring[K::FUSED], a.at(c.b, c.d0(), c.t0(p)),
                                  b.at(c.b, c.d0(), c.t0(p)), a.time * int64_t(sizeof(*a.data)),
                                  b.time * int64_t(sizeof(*b.data)), c.columns, c.left, p.wide);
    LastWalk<K> walk(p, c, reader, gates, first_dz);
    walk.start(r);
    typename LastWalk<K>::Groups mixed_from = 0;
    if (K::SEQ && p.seq_idx.data != nullptr) {
      const int before = static_cast<int>(min(c.t0(p), int64_t(K::H)));
      mixed_from = mixed_groups<kGroupRows<K>, decltype(mixed_from)>(
          p.seq_idx.from(c.b, c.t0(p)), -before, c.rows_with_ids, c.total());
    }
    walk.walk(mixed_from, r);
  } else {
    synchronize_warps();
  }
  pdl_launch();  // measured faster here than at the beginning
  if (p.partials != nullptr) store_block_sums<K>(p, shared, r);
}

}  // namespace

template <typename T>
cudaError_t launch_backward_channel_last(const BackwardArgs<T>& args, const BackwardPlan& plan,
                                         cudaStream_t stream) {
  const bool fused = args.pre_gate.given() || args.post_gate.given() || args.add_dout;
  const Case wanted{args.width, args.seq_idx.data != nullptr, Access::kStrided, plan.vector, fused};
  const auto launch_variant = [&](auto variant) {
    using K = decltype(variant);
    BackwardArgs<T> p = args;
    p.columns = Columns(p.dim / K::C, plan.chunks, 5);  // kBackwardLines chunks per block
    return launch_pdl(backward_channel_last<K>, p.columns.threads(p.batch), stream, p);
  };
  return args.width <= 4
             ? with_variant(typename Tables<T, 4>::LastBackward{}, wanted, launch_variant)
             : with_variant(typename Tables<T, 8>::LastBackward{}, wanted, launch_variant);
}

template cudaError_t launch_backward_channel_last<float>(const BackwardArgs<float>&,
                                                         const BackwardPlan&, cudaStream_t);
template cudaError_t launch_backward_channel_last<__half>(const BackwardArgs<__half>&,
                                                          const BackwardPlan&, cudaStream_t);
template cudaError_t launch_backward_channel_last<__nv_bfloat16>(const BackwardArgs<__nv_bfloat16>&,
                                                                 const BackwardPlan&, cudaStream_t);

}  // namespace causal_conv1d::gpu
