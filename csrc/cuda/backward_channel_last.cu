// The backward of channel-last tensors: a thread owns C adjacent channels and walks up a chunk of
// time, with the last W inputs and dz in registers. Rows come by cp.async some steps ahead
// (RowPairs). A block's warps have chunks that follow each other: each gives the dz of its first
// rows to the one before, which needs them at its end, and their sums are added up in the block.
#include "backward.cuh"
#include "launch.cuh"
#include "parameters.cuh"
#include "row_pairs.cuh"
#include "states.cuh"
#include "taps.cuh"
#include "variants.cuh"

namespace causal_conv1d::gpu {
namespace {

// Blocks that an SM has registers for.
template <typename K>
constexpr int kLastBlocks = K::WMAX == 8 && K::SEQ ? 2 : 4;

// A value for each channel of a thread.
template <int C>
struct alignas(sizeof(float) * C) PerChannel {
  float of[C];
};

// Shared memory of a block. Rows come through the ring; then the warps' sums take its place.
template <typename K>
struct LastShared {
  using T = typename K::Element;
  static constexpr int kGroups = K::WMAX == 8 ? 2 : 4;  // of WMAX rows, in flight
  using Reader = RowPairs<T, K::C, K::WMAX, kGroups>;
  // The dz of each warp's first rows, for the warp before.
  using FirstDz = PerChannel<K::C>[K::SEQ ? 1 : kBackwardLines - 1][K::H][32];
  union Room {
    typename Reader::Shared ring;
    PerChannel<K::C> sums[K::WMAX + 1][kBackwardLines][32];
    char room[kRoomFor<kLastBlocks<K>, sizeof(FirstDz)>];
  };
};

// What a thread has in registers: entry r % WMAX of h and dz is that of row r.
template <typename K>
struct LastRegisters {
  static constexpr int C = K::C, WMAX = K::WMAX;
  float w[WMAX][C], bias[C], dw[WMAX][C], db[C];
  float h[WMAX][C], dz[WMAX][C];  // x~ and dz of the last rows
};

// What is known of a group of WMAX rows, t being its first. kWhole: all are in the chunk; kSilu,
// kLinear: and have that activation, so that no branch keeps rows apart. kLast: the first row alone
// is in the chunk; kShared: and the dz of the others come from the next warp. kAny: nothing, and dx
// may take dfinal_states.
enum Place { kSilu, kLinear, kWhole, kShared, kLast, kAny };

// A warp's chunk of a row. Times are relative to its first step, at t0.
template <typename K>
struct LastChunk {
  int64_t b, d0, t0;
  int columns;      // of the warp
  int line;         // the warp's place in the block
  int count;        // steps of the chunk
  int total;        // rows walked along: H more, for the dz that dx needs
  int left;         // of these, those to be computed: in the row, and not shared
  int dfinal_from;  // from here on dx takes dfinal_states
  bool has_next;    // the dz after the chunk are those of the next warp's first rows

  template <typename Args>
  __device__ __forceinline__ LastChunk(const Args& p, const ColumnChunk& at) {
    // Lanes after the last column do as that one's, for the sake of what they copy for others.
    const int64_t columns_left = p.columns.count - at.column + threadIdx.x % 32;
    columns = uniform(static_cast<int>(min(columns_left, int64_t(32))));
    d0 = min(int64_t(at.column), p.columns.count - 1) * K::C;
    const int64_t chunk = uniform(at.chunk);
    b = at.b;
    t0 = chunk * p.chunk;
    line = uniform(threadIdx.x / 32);
    // Not where dx needs dfinal_states too.
    has_next =
        !K::SEQ && p.chunk > K::H && line + 1 < kBackwardLines && chunk + 1 < p.columns.chunks &&
        !(p.dfinal_states.given() && p.seqlen - (p.width - 1) < (chunk + 1) * p.chunk + K::H);
    count = static_cast<int>(min(p.chunk, p.seqlen - t0));
    total = count + K::H;
    left = static_cast<int>(min(p.seqlen - t0, int64_t(has_next ? count : total)));
    dfinal_from = p.dfinal_states.given()
                      ? static_cast<int>(min(p.seqlen - (p.width - 1) - t0, int64_t(total)))
                      : total;
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
  static constexpr int C = K::C, H = K::H, WMAX = K::WMAX, kGroups = Shared::kGroups;
  static constexpr bool SEQ = K::SEQ, EXACT = K::EXACT;
  using Same = Matches<WMAX + H, H>;

 public:
  __device__ __forceinline__ LastWalk(const Args& p, const LastChunk<K>& c, Reader& reader,
                                      FirstDz& first_dz)
      : p_(p),
        c_(c),
        reader_(reader),
        first_dz_(first_dz),
        first_(EXACT ? 0 : WMAX - p.width),
        dx_(reinterpret_cast<char*>(p.dx.at(c.b, c.d0, c.t0 - H))) {}

  // Loads weights and the inputs before the chunk.
  __device__ __forceinline__ void start(Registers& r) {
    const History<T, H, C> rows_before(p_, c_.b, c_.d0, c_.t0);
    const Parameters<WMAX, C> parameters(p_, c_.d0);
    for (int i = 0; i < kGroups; ++i) {
      reader_.start(p_.x_row, p_.dout_row);
      commit_copies();
    }
    float history[H][C];
    rows_before.get(p_, c_.b, c_.d0, c_.t0, history);
    parameters.get(p_.scale, r.w, r.bias);
#pragma unroll
    for (int j = 0; j < H; ++j) {
#pragma unroll
      for (int c = 0; c < C; ++c) {
        r.h[j + 1][c] = history[j][c];
        r.dz[j + 1][c] = 0.0f;
      }
    }
  }

  // All rows. mixed_from: a bit for each group that has several ids.
  __device__ __forceinline__ void walk(uint64_t mixed_from, Registers& r) {
    int t = 0;
    const int end = min(c_.count, c_.dfinal_from);
    if constexpr (SEQ) {
#pragma unroll 1
      for (; t < c_.total; t += WMAX) {
        if ((mixed_from & 1) != 0) {
          group<kAny, true>(t, r);
        } else if (t + WMAX <= end) {
          group<kWhole, false>(t, r);
        } else {
          group<kAny, false>(t, r);
        }
        mixed_from >>= 1;
      }
    } else {
      if constexpr (!EXACT && WMAX == 4) {
        t = groups<kWhole>(t, end, r);
      } else if (p_.silu) {
        t = groups<kSilu>(t, end, r);
      } else {
        t = groups<kLinear>(t, end, r);
      }
      if (c_.has_next) {
        group<kShared, false>(t, r);
      } else if (EXACT && t + 1 == c_.count && c_.dfinal_from == c_.total) {
        if constexpr (EXACT) group<kLast, false>(t, r);
      } else {
#pragma unroll 1
        for (; t < c_.total; t += WMAX) group<kAny, false>(t, r);
      }
    }
  }

 private:
  template <Place PLACE>
  __device__ __forceinline__ int groups(int t, int end, Registers& r) {
#pragma unroll 1
    for (; t + WMAX <= end; t += WMAX) group<PLACE, false>(t, r);
    return t;
  }

  // The rows from t on. MIXED: they, or the H before them, have several ids.
  template <Place PLACE, bool MIXED>
  __device__ __forceinline__ void group(int t, Registers& r) {
    Same same;
    if (MIXED) {
      int id[H + WMAX];
      load_ids(p_.seq_idx.from(c_.b, 0), c_.t0 + t - H, p_.seqlen, id);
      same.compare(id);
    }
    wait_for_copies<kGroups - 1>();
    __syncwarp();
    Pack<T, C> next_x = reader_.read_x(0), next_g = reader_.read_g(0);
#pragma unroll
    for (int u = 0; u < WMAX; ++u) {
      // Mixed rows have no registers left to be read ahead.
      const Pack<T, C> xs = MIXED ? reader_.read_x(u) : next_x;
      const Pack<T, C> gs = MIXED ? reader_.read_g(u) : next_g;
      if (u + 1 < WMAX && !MIXED) {
        next_x = reader_.read_x(u + 1);
        next_g = reader_.read_g(u + 1);
      }
      row<PLACE, MIXED>(t, u, same, xs, gs, r);
    }
    if (!SEQ && t == 0) share_first_dz(r);
    if (PLACE == kShared || PLACE == kLast) return;
    __syncwarp();  // all have read the group that start() overwrites
    reader_.start(p_.x_row, p_.dout_row);
    commit_copies();
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
    const bool inside = (WHOLE || t + u < c_.left) && !(MIXED && same.is_padding(H + u));
    float xk[WMAX][C], g[C];
#pragma unroll
    for (int c = 0; c < C; ++c) {
      g[c] = gs.get(c);
      r.h[u][c] = xs.get(c);
      r.dz[u][c] = convolve<WMAX>(
          r.bias[c], first_, [&](int k) { return r.w[k][c]; },
          [&](int k) {
            const float x = r.h[(u + 1 + k) % WMAX][c];
            return xk[k][c] = !MIXED || same.takes(H + u, k) ? x : 0.0f;
          });
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
    if (PLACE == kShared && u > 0) {
      const PerChannel<C> next = first_dz_[c_.line][u - 1][threadIdx.x % 32];
#pragma unroll
      for (int c = 0; c < C; ++c) r.dz[u][c] = next.of[c];
    }
    if (PLACE == kAny ? inside && t + u < c_.count : WHOLE || u == 0) {
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
            return !MIXED || same.takes(u + j, H - j) ? r.dz[(u + 1 + j) % WMAX][c] : 0.0f;
          });
    }
    // The first group's rows are H steps ahead of the first dx.
    const bool exists = PLACE == kAny ? s >= 0 && s < c_.count : u == H || t > 0;
    if (PLACE == kAny && exists && s >= c_.dfinal_from) {
#pragma unroll
      for (int c = 0; c < C; ++c) a[c] += p_.dfinal(c_.b, c_.d0 + c, c_.t0 + s);
    }
    pack<T>(a).store_if(exists, dx_);
    dx_ += p_.dx_row;
  }

  const Args& p_;
  const LastChunk<K>& c_;
  Reader& reader_;
  FirstDz& first_dz_;
  int first_;
  char* dx_;  // of the next row
};

// Adds up the sums of a block's warps.
template <typename K, typename Args>
__device__ __forceinline__ void store_block_sums(const Args& p, const ColumnChunk& at, int64_t b,
                                                 int64_t d0, int line,
                                                 typename LastShared<K>::Room& room,
                                                 const LastRegisters<K>& r) {
  constexpr int C = K::C, WMAX = K::WMAX;
  const int first = K::EXACT ? 0 : WMAX - p.width;
  wait_for_copies<0>();
  __syncthreads();  // all have read the ring
  auto& sums = room.sums;
  const int column = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k <= WMAX; ++k) {
    PerChannel<C> own;
#pragma unroll
    for (int c = 0; c < C; ++c) own.of[c] = k < WMAX ? r.dw[k % WMAX][c] : r.db[c];
    sums[k][line][column] = own;
  }
  __syncthreads();
  if (at.column >= p.columns.count) return;
  const int64_t part = b * p.columns.down.count + at.part;
  for (int k = first + line; k <= WMAX; k += kBackwardLines) {
    PerChannel<C> sum = sums[k][0][column];
#pragma unroll
    for (int i = 1; i < kBackwardLines; ++i) {
#pragma unroll
      for (int c = 0; c < C; ++c) sum.of[c] += sums[k][i][column].of[c];
    }
    p.store_partials(sum.of, part, k - first, d0);
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
  if (c.t0 < p.seqlen) {
    typename Shared::Reader reader(&shared.ring, p.x.at(c.b, c.d0, c.t0),
                                   p.dout.at(c.b, c.d0, c.t0), p.x_row, p.dout_row, c.columns,
                                   c.left, p.wide);
    LastWalk<K> walk(p, c, reader, first_dz);
    walk.start(r);
    uint64_t mixed_from = 0;
    if (K::SEQ && p.seq_idx.data != nullptr) {
      const int before = static_cast<int>(min(c.t0, int64_t(K::H)));
      mixed_from = mixed_groups<K::WMAX>(p.seq_idx.from(c.b, c.t0), -before, c.left, c.total);
    }
    walk.walk(mixed_from, r);
  } else if (!K::SEQ) {
    synchronize_warps();
  }
  pdl_launch();  // measured faster here than at the beginning
  if (p.partials != nullptr) store_block_sums<K>(p, at, c.b, c.d0, c.line, shared, r);
}

}  // namespace

template <typename T>
cudaError_t launch_backward_channel_last(const BackwardArgs<T>& args, const BackwardPlan& plan,
                                         cudaStream_t stream) {
  const Case wanted{args.width, args.seq_idx.data != nullptr, Access::kStrided, plan.vector};
  const auto launch_variant = [&](auto variant) {
    using K = decltype(variant);
    BackwardArgs<T> p = args;
    p.columns = Columns(p.dim / K::C, plan.chunks, 5);  // kBackwardLines chunks per block
    return launch_pdl(backward_channel_last<K>, p.columns.threads(p.batch), stream, p);
  };
  return args.width <= 4 ? with_variant(typename Tables<T, 4>::Last{}, wanted, launch_variant)
                         : with_variant(typename Tables<T, 8>::Last{}, wanted, launch_variant);
}

template cudaError_t launch_backward_channel_last<float>(const BackwardArgs<float>&,
                                                         const BackwardPlan&, cudaStream_t);
template cudaError_t launch_backward_channel_last<__half>(const BackwardArgs<__half>&,
                                                          const BackwardPlan&, cudaStream_t);
template cudaError_t launch_backward_channel_last<__nv_bfloat16>(const BackwardArgs<__nv_bfloat16>&,
                                                                 const BackwardPlan&, cudaStream_t);

}  // namespace causal_conv1d::gpu
