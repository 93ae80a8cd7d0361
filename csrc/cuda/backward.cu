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
// shapes alone, and a second kernel adds them up in a fixed order; or, channel_first, a block has
// all of a channel and adds up its warps' sums itself. No atomics.
//
// Both walk along memory that comes by cp.async some steps ahead (tiles.cuh).
// channel_last: a thread owns C adjacent channels and walks up a chunk of time, with the last W
//   inputs and dz in registers; a block's chunks follow each other, and their sums are added up in
//   the block.
// channel_first: a warp walks down its part of a row, tile by tile, or down several rows of one
//   channel, one after the other; the dz after a lane's own come from the next lane, and for lane
//   31 from the tile before.
// WMAX, EXACT, SEQ, C and ACCESS are as in forward.cu.
#include <cub/block/block_reduce.cuh>

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
  // channel_first: rows of bytes for Matches, and what find_matches tells of each block of them, or
  // nullptr if no seq_idx.
  const uint8_t *matches, *mismatches;
  int64_t matches_pitch;
  Compute<T>* partials;  // (parts, W + 1, dim): for each part dweight[k], then dbias, by scale
  int64_t batch, dim, seqlen;
  int width;
  bool silu;
  Compute<T> scale;                 // pre_activation_scale
  const T *x_end, *dout_end;        // one past the last elements
  int64_t x_row, dout_row, dx_row;  // channel_last: bytes from a step to the next
  int64_t chunks, chunk;            // parts of the time axis, and the length of one
  int64_t parts;                    // of partials
  bool sums, whole;           // are dweight or dbias wanted; has a block all parts of a channel,
  int part_bits;              // the power of two of them that it has room for
  int64_t rows;               // channel_first: batch entries a warp
  Columns columns;            // channel_last
  bool wide;                  // channel_last: may x and dout be read by 16 bytes
  Divisor by_dim, by_chunks;  // channel_first

  // x~ at s < seqlen.
  __device__ __forceinline__ Compute<T> input(int64_t b, int64_t d, int64_t s) const {
    if (s >= 0) return to_compute(*x.at(b, d, s));
    const int64_t j = s + width - 1;
    return initial_states.given() && j >= 0 ? initial_states.load(b, d, j) : Compute<T>(0);
  }

  __device__ __forceinline__ Compute<T> gradient(Compute<T> z, Compute<T> g) const {
    return silu ? silu_backward<T>(z, g) : g;
  }

  // Turns N pre-activations into dz, which is 0 where not inside.
  template <int N>
  __device__ __forceinline__ void gradients(const float (&g)[N], bool inside, float (&z)[N]) const {
    if (!inside) {
#pragma unroll
      for (int i = 0; i < N; ++i) z[i] = 0.0f;
    } else if (silu) {
#pragma unroll
      for (int i = 0; i < N; ++i) z[i] = silu_backward<T>(z[i], g[i]);
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) z[i] = g[i];
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
  // Partial sums are to stay in L2 until they are read, beside all that passes through it.
  template <int C>
  __device__ __forceinline__ void store_partials(const float (&sums)[C], int64_t part, int k,
                                                 int64_t d) const {
    store_for_reading_once(pack<float>(sums), partial(part, k, d));
  }
  // The whole sum of dweight[d, k], or for k == width of dbias[d].
  __device__ __forceinline__ void store_sum(Compute<T> sum, int k, int64_t d) const {
    const bool is_weight = k < width;
    AnyView<Compute<T>> to;
    to.data = is_weight ? dweight.data : dbias.data;
    to.dtype = is_weight ? dweight.dtype : dbias.dtype;
    to.strides[0] = is_weight ? dweight.strides[0] : dbias.strides[0];
    to.strides[1] = dweight.strides[1];
    to.strides[2] = 0;
    if (to.given()) to.store(sum * scale, d, is_weight ? k : 0);
  }
};

template <typename T>
__device__ Compute<T> dz_at(const BackwardArgs<T>& p, int64_t b, int64_t d, int64_t t) {
  const int id = p.seq_idx.at(b, t);
  if (id < 0) return 0;
  Compute<T> z = p.bias.given() ? p.bias.load(d) * p.scale : Compute<T>(0);
  for (int k = 0; k < p.width; ++k) {
    const int64_t s = t - (p.width - 1) + k;
    const bool same = p.seq_idx.at(b, max(s, int64_t(0))) == id;
    z = fma(p.weight.load(d, k) * p.scale, same ? p.input(b, d, s) : Compute<T>(0), z);
  }
  return p.gradient(z, to_compute(*p.dout.at(b, d, t)));
}

constexpr int kBackwardLines = 4;  // channel_last: chunks a block, one a warp

// Blocks that a multiprocessor has registers for.
template <int WMAX, bool SEQ>
constexpr int kChannelLastBlocks = WMAX == 8 && SEQ ? 2 : 4;
template <typename T, int WMAX, bool SEQ, Access ACCESS>
constexpr int kChannelFirstBlocks = SEQ ? 4 - (WMAX == 8) - (ACCESS != Access::kAligned)
                                        : (ACCESS == Access::kDense && sizeof(T) == 2 ? 5 : 4);

template <typename T, int C, int WMAX, bool EXACT, bool SEQ>
__global__ void __launch_bounds__(kThreads, kChannelLastBlocks<WMAX, SEQ>)
    backward_channel_last(const BackwardArgs<T> p) {
  if (kSmallPtx && C > 1) return;
  wait_for_kernel_before();
  constexpr int H = WMAX - 1, kGroups = WMAX == 8 ? 2 : 4;
  using Reader = RowPairs<T, C, WMAX, kGroups>;
  struct alignas(sizeof(float) * C) Sums {
    float of[C];
  };
  using FirstDz = Sums[SEQ ? 1 : kBackwardLines - 1][H][32];
  __shared__ union {
    typename Reader::Shared ring;
    Sums sums[WMAX + 1][kBackwardLines][32];
    char room[kRoomFor<kChannelLastBlocks<WMAX, SEQ>, sizeof(FirstDz)>];
  } shared;
  // The dz of each warp's first rows, for the warp before.
  __shared__ FirstDz first_dz;
  const ColumnChunk at(p.columns);
  if (at.b >= p.batch) return;
  // Lanes after the last column do as that one's, for the sake of what they copy for others.
  const int64_t columns_left = p.columns.count - at.column + threadIdx.x % 32;
  const int columns = uniform(static_cast<int>(min(columns_left, int64_t(32))));
  const int64_t d0 = min(int64_t(at.column), p.columns.count - 1) * C;
  const int64_t chunk = uniform(at.chunk), b = at.b, t0 = chunk * p.chunk;
  const int first = EXACT ? 0 : WMAX - p.width;
  float w[WMAX][C], bias[C], dw[WMAX][C], db[C];
#pragma unroll
  for (int c = 0; c < C; ++c) {
    db[c] = 0.0f;
#pragma unroll
    for (int k = 0; k < WMAX; ++k) dw[k][c] = 0.0f;
  }

  const int line = uniform(threadIdx.x / 32);
  // Whether a chunk of this block gives the dz of its first rows to the one before.
  auto gives = [&](int line, int64_t chunk) {
    return !SEQ && p.chunk > H && line > 0 && line < kBackwardLines && chunk < p.columns.chunks &&
           !(p.dfinal_states.given() && p.seqlen - (p.width - 1) < chunk * p.chunk + H);
  };
  const bool has_next = gives(line + 1, chunk + 1);
  const int count = static_cast<int>(min(p.chunk, p.seqlen - t0));
  const int total = count + H;  // rows walked along, for the dz that dx needs
  const int left = static_cast<int>(min(p.seqlen - t0, int64_t(has_next ? count : total)));
  if (chunk < p.columns.chunks) {
    // The last W-1 rows of dx may take dfinal_states.
    const int dfinal_from =
        p.dfinal_states.given()
            ? static_cast<int>(min(p.seqlen - (p.width - 1) - t0, int64_t(total)))
            : total;
    Reader reader(&shared.ring, p.x.at(b, d0, t0), p.dout.at(b, d0, t0), p.x_row, p.dout_row,
                  columns, left, p.wide);
    const History<T, H, C> rows_before(p, b, d0, t0);
    const Parameters<WMAX, C> parameters(p, d0);
    for (int i = 0; i < kGroups; ++i) {
      reader.start(p.x_row, p.dout_row);
      commit_copies();
    }
    char* dx = reinterpret_cast<char*>(p.dx.at(b, d0, t0 - H));
    // Row r is entry r % WMAX of these.
    float h[WMAX][C], dz[WMAX][C];  // x~ and dz of the last rows
    float history[H][C];
    rows_before.get(p, b, d0, t0, history);
    parameters.get(p.scale, w, bias);
    // All threads of a warp have the same rows.
    const int before = static_cast<int>(min(t0, int64_t(H)));
    uint64_t mixed_from = 0;  // whose bit i is of group i from t on
    if (SEQ && p.seq_idx.data != nullptr) {
      mixed_from = mixed_groups<WMAX>(p.seq_idx.from(b, t0), -before, left, total);
    }
#pragma unroll
    for (int j = 0; j < H; ++j) {
#pragma unroll
      for (int c = 0; c < C; ++c) {
        h[j + 1][c] = history[j][c];
        dz[j + 1][c] = 0.0f;
      }
    }

    // Row t + u: its dz, and the dx that is complete then, H before. kWhole: a group of rows
    // in the chunk; kSilu, kLinear: with that activation, so that no branch keeps its rows apart.
    // kLast: its first row alone is in the chunk; kShared: and the other dz come from the next
    // warp. kAny: any rows, and dx may take dfinal_states.
    // MIXED: not all ids of the rows in reach are one; same is of those from t - H on. Times are
    // relative to t0.
    enum Place { kSilu, kLinear, kWhole, kShared, kLast, kAny };
    auto row = [&](auto place, auto mixed, int t, int u, const Matches<WMAX, H>& same,
                   const Pack<T, C>& xs, const Pack<T, C>& gs) {
      constexpr Place PLACE = decltype(place)::value;
      constexpr bool MIXED = decltype(mixed)::value, WHOLE = PLACE <= kWhole;
      const bool inside = (WHOLE || t + u < left) && !(MIXED && same.is_padding(H + u));
      float xk[WMAX][C], g_row[C];
#pragma unroll
      for (int c = 0; c < C; ++c) {
        g_row[c] = gs.get(c);
        h[u][c] = xs.get(c);
        float z = bias[c];
#pragma unroll
        for (int k = 0; k < WMAX; ++k) {
          const int r = (u + 1 + k) % WMAX;
          xk[k][c] = !MIXED || same.at(H + u, k) ? h[r][c] : 0.0f;
          if (has_tap<WMAX>(k, first)) z = fmaf(w[k][c], xk[k][c], z);
        }
        dz[u][c] = z;
      }
      if constexpr (PLACE == kSilu) {
#pragma unroll
        for (int c = 0; c < C; ++c) dz[u][c] = silu_backward<T>(dz[u][c], g_row[c]);
      } else if constexpr (PLACE == kLinear) {
#pragma unroll
        for (int c = 0; c < C; ++c) dz[u][c] = g_row[c];
      } else {
        p.gradients(g_row, inside, dz[u]);
      }
      if (PLACE == kShared && u > 0) {
        const Sums next = first_dz[line][u - 1][threadIdx.x % 32];
#pragma unroll
        for (int c = 0; c < C; ++c) dz[u][c] = next.of[c];
      }
      if (PLACE == kAny ? inside && t + u < count : WHOLE || u == 0) {
#pragma unroll
        for (int c = 0; c < C; ++c) {
          db[c] += dz[u][c];
#pragma unroll
          for (int k = 0; k < WMAX; ++k) {
            if (has_tap<WMAX>(k, first)) dw[k][c] = fmaf(dz[u][c], xk[k][c], dw[k][c]);
          }
        }
      }
      const int s = t + u - H;
      float a[C];
#pragma unroll
      for (int c = 0; c < C; ++c) {
        a[c] = 0.0f;
#pragma unroll
        for (int j = 0; j < WMAX; ++j) {  // dz[s + j] meets weight[W-1-j]
          const int r = (u + 1 + j) % WMAX;
          const float v = !MIXED || same.at(u + j, H - j) ? dz[r][c] : 0.0f;
          if (has_tap<WMAX>(WMAX - 1 - j, first)) a[c] = fmaf(w[WMAX - 1 - j][c], v, a[c]);
        }
      }
      // The first group's rows are H steps ahead of the first dx.
      const bool exists = PLACE == kAny ? s >= 0 && s < count : u == H || t > 0;
      if (PLACE == kAny && exists && s >= dfinal_from) {
#pragma unroll
        for (int c = 0; c < C; ++c) a[c] += p.dfinal(b, d0 + c, t0 + s);
      }
      pack<T>(a).store_if(exists, dx);
      dx += p.dx_row;
    };
    auto rows = [&](auto place, auto mixed, int t) {
      constexpr bool MIXED = decltype(mixed)::value;
      Matches<WMAX, H> same;
      if (MIXED) {
        int id[H + WMAX];
        load_ids(p.seq_idx.from(b, 0), t0 + t - H, p.seqlen, id);
        same.compare(id);
      }
      wait_for_copies<kGroups - 1>();
      __syncwarp();
      Pack<T, C> next_x = reader.read_x(0), next_g = reader.read_g(0);
#pragma unroll
      for (int u = 0; u < WMAX; ++u) {
        // Mixed rows have no registers left to be read ahead.
        const Pack<T, C> xs = MIXED ? reader.read_x(u) : next_x;
        const Pack<T, C> gs = MIXED ? reader.read_g(u) : next_g;
        if (u + 1 < WMAX && !MIXED) {
          next_x = reader.read_x(u + 1);
          next_g = reader.read_g(u + 1);
        }
        row(place, mixed, t, u, same, xs, gs);
      }
      if (t == 0 && gives(line, chunk)) {
#pragma unroll
        for (int u = 0; u < H; ++u) {
          Sums own;
#pragma unroll
          for (int c = 0; c < C; ++c) own.of[c] = dz[u][c];
          first_dz[line - 1][u][threadIdx.x % 32] = own;
        }
        arrive_at_barrier<kBackwardLines - 1>(line, 64);
      }
      if (decltype(place)::value == kShared || decltype(place)::value == kLast) return;
      __syncwarp();  // all have read the group that start() overwrites
      reader.start(p.x_row, p.dout_row);
      commit_copies();
    };
    constexpr std::integral_constant<Place, kWhole> whole;
    constexpr std::integral_constant<Place, kAny> any;
    int t = 0;
    const int end = min(count, dfinal_from);
    if constexpr (SEQ) {
#pragma unroll 1
      for (; t < total; t += WMAX) {
        if ((mixed_from & 1) != 0) {
          rows(any, std::true_type{}, t);
        } else if (t + WMAX <= end) {
          rows(whole, std::false_type{}, t);
        } else {
          rows(any, std::false_type{}, t);
        }
        mixed_from >>= 1;
      }
    } else {
      auto all = [&](auto place) {
#pragma unroll 1
        for (; t + WMAX <= end; t += WMAX) rows(place, std::false_type{}, t);
      };
      if constexpr (!EXACT && WMAX == 4) {
        all(whole);
      } else if (p.silu) {
        all(std::integral_constant<Place, kSilu>{});
      } else {
        all(std::integral_constant<Place, kLinear>{});
      }
      if (has_next) {
        wait_at_barrier<kBackwardLines - 1>(line + 1, 64);
        rows(std::integral_constant<Place, kShared>{}, std::false_type{}, t);
      } else if (EXACT && t + 1 == count && dfinal_from == total) {
        if constexpr (EXACT) rows(std::integral_constant<Place, kLast>{}, std::false_type{}, t);
      } else {
#pragma unroll 1
        for (; t < total; t += WMAX) rows(any, std::false_type{}, t);
      }
    }
  }

  let_next_kernel_start();  // measured faster here than at the beginning
  if (p.partials == nullptr) return;
  wait_for_copies<0>();
  __syncthreads();  // all have read the ring
  auto& sums = shared.sums;
  const int column = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k <= WMAX; ++k) {
    Sums own;
#pragma unroll
    for (int c = 0; c < C; ++c) own.of[c] = k < WMAX ? dw[k % WMAX][c] : db[c];
    sums[k][line][column] = own;
  }
  __syncthreads();
  if (at.column >= p.columns.count) return;
  const int64_t part = b * p.columns.down.count + at.part;
  for (int k = first + line; k <= WMAX; k += kBackwardLines) {
    Sums sum = sums[k][0][column];
#pragma unroll
    for (int i = 1; i < kBackwardLines; ++i) {
#pragma unroll
      for (int c = 0; c < C; ++c) sum.of[c] += sums[k][i][column].of[c];
    }
    p.store_partials(sum.of, part, k - first, d0);
  }
}

template <typename T, int V, int WMAX, bool EXACT, bool SEQ, Access ACCESS>
__global__ void __launch_bounds__(kThreads, kChannelFirstBlocks<T, WMAX, SEQ, ACCESS>)
    backward_channel_first(const BackwardArgs<T> p) {
  if (kSmallPtx && ACCESS != Access::kStrided) return;
  constexpr int H = WMAX - 1, TILE = 32 * V;
  const int lane = threadIdx.x % 32;
  // Warps are numbered by (part, d), or by (d, part) if a block is to have all parts of a channel.
  const uint32_t warp = blockIdx.x * (kThreads / 32) + uniform(threadIdx.x / 32);
  uint32_t index, d = warp >> p.part_bits, part = warp & ((1u << p.part_bits) - 1);
  if (!p.whole) part = p.by_dim.split(warp, &d);
  const int64_t b0 = p.by_chunks.split(part, &index) * p.rows;
  const int64_t b1 = d < p.dim ? min(b0 + p.rows, p.batch) : b0;
  wait_for_kernel_before();

  const int first = EXACT ? 0 : WMAX - p.width;
  float w[WMAX], bias = 0.0f, dw[WMAX], db = 0.0f;
#pragma unroll
  for (int k = 0; k < WMAX; ++k) dw[k] = 0.0f;

  // A ring of stages in shared memory: one is used while the others are on their way. A stage is a
  // tile of dout and one of x, and known by where the lane's own bytes of x are. Tiles begin at
  // multiples of 128 bytes, or cp.async takes longer to write them.
  using ReaderX = TileReader<T, V, WMAX, ACCESS>;
  using ReaderG = TileReader<T, V, 0, ACCESS>;
  ReaderX x(lane);
  ReaderG dout(lane);
  constexpr int kBetween = 128, kTileBytes = TILE * static_cast<int>(sizeof(T));
  constexpr int kFromDout = kTileBytes + kBetween;  // to x
  constexpr int kStageBytes =
      kFromDout + kTileBytes + (ReaderX::kBytesAfter > 0 || ReaderX::kPlaced ? kBetween : 0);
  static_assert(ReaderG::kBytesAfter + ReaderX::kBytesBefore <= kBetween, "room for both");
  constexpr int kStages = 4, kBlocks = kChannelFirstBlocks<T, WMAX, SEQ, ACCESS>;
  constexpr int kRingBytes = kStages * kStageBytes, kRoom = kRoomFor<kBlocks> / (kThreads / 32);
  struct alignas(128) Ring {
    char bytes[kRingBytes > kRoom ? kRingBytes : kRoom];
  };
  __shared__ Ring rings[kThreads / 32];
  uint32_t first_stage =
      shared_address(&rings[threadIdx.x / 32]) + kFromDout + lane * V * sizeof(T);
  keep(first_stage);
  const uint32_t last_stage = first_stage + (kStages - 1) * kStageBytes;
  uint32_t stage = first_stage, stage_before = last_stage;
  auto top = [&](const Segment& s) { return (s.end - 1) / TILE * TILE; };
  const Segment aligned(index, p.chunk, 0, p.seqlen);
  // How far before its first step a row begins its tiles. It depends on shapes alone, as the sums
  // do, and fits rows that lie one after the other.
  const uint32_t seqlen = static_cast<uint32_t>(p.seqlen);
  const uint32_t batch_steps = static_cast<uint32_t>(p.dim) * seqlen;
  const uint32_t steps_before = static_cast<uint32_t>(b0) * batch_steps + d * seqlen;
  constexpr int G = kGranule<T>;
  // Whether simple tiles have code of their own.
  constexpr bool kSplit = EXACT || (WMAX == 8 && ACCESS == Access::kAligned);
  constexpr bool kRagged = kIsRagged<ACCESS>;
  auto offset_after = [&](int offset) {  // that of the next row
    return ACCESS == Access::kAligned ? 0 : static_cast<int>((offset + batch_steps) % G);
  };
  // Of the next row: whether tiles lane and lane + 32 of its part are mixed, which means that not
  // all ids of their steps and of H more are one. There are at most 64.
  using Blocks = std::conditional_t<TILE == 2 * kThreads, uint16_t, uint8_t>;
  static_assert(sizeof(Blocks) * kThreads == TILE, "a tile is blocks of find_matches");
  Blocks mismatches[2] = {};
  auto load_mismatches = [&](int64_t b, int top) {
    const int64_t first = b * p.matches_pitch + Matches<V, H>::kBefore + aligned.origin;
    const Blocks* from = reinterpret_cast<const Blocks*>(p.mismatches + first / kThreads);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int tile = lane + i * 32;
      if (tile * TILE <= top) mismatches[i] = from[tile];
    }
  };

  // Whether the last granule of the row of batch entry b is not whole: only at a tensor's end.
  const bool ragged_end = kRagged && (misalignment(p.x_end) != 0 || misalignment(p.dout_end) != 0);
  auto ends_within = [&](int64_t b) {
    return ragged_end && (p.x.at(b, d, 0) + p.seqlen + (G - 1) > p.x_end ||
                          p.dout.at(b, d, 0) + p.seqlen + (G - 1) > p.dout_end);
  };
  // The tile that is started next, if it is not before its row's first, and how many rows are left
  // after that.
  int next_base = -1, rows_left = static_cast<int>(b1 - b0);
  int offset = ACCESS == Access::kAligned ? 0 : static_cast<int>(steps_before % G);
  int next_offset = offset;
  uint32_t span = 0;
  x.begin(p.x.at(b0 - 1, d, aligned.origin), p.x.time, aligned.lo);
  dout.begin(p.dout.at(b0 - 1, d, aligned.origin), p.dout.time, aligned.lo);
  auto next_row = [&] {
    const Segment s = aligned.with(next_offset);
    x.row(p.x.batch, next_offset, aligned.lo);
    dout.row(p.dout.batch, next_offset, aligned.lo);
    next_base = top(s);
    next_offset = offset_after(next_offset);
    span = ReaderX::span(s.lo, s.hi);
    if (ragged_end && ends_within(b1 - rows_left)) span = s.hi - s.lo > G ? span - G : 0;
  };
  auto start_next = [&](uint32_t stage) {
    if (next_base < 0) {
      if (rows_left > 0) {
        next_row();
        --rows_left;
      } else {
        span = ReaderX::span(0, 0);
        next_base = kFar;
      }
    }
    x.start(stage, next_base, span);
    dout.start(stage - kFromDout, next_base, span);
    if (x.is_shifted()) x.start_after(stage, next_base, span);
    if (dout.is_shifted()) dout.start_after(stage - kFromDout, next_base, span);
    next_base -= TILE;
    commit_copies();
  };
  if (b0 < b1) {
#pragma unroll 1
    for (int i = 0; i < kStages - 1; ++i) start_next(first_stage + i * kStageBytes);
    WarpParameters<WMAX, EXACT>(p, d, lane).get(p, w, bias);
    if (SEQ && p.matches != nullptr) {
      load_mismatches(b0, top(aligned.with(offset)));
    }
  }
  int next_lane = (lane + 1) % 32;
  keep(next_lane);
  const int64_t dx_time = ACCESS == Access::kStrided ? p.dx.time : 1;
  __shared__ Pack<T, ACCESS == Access::kUnit ? G : 1> heads[kThreads / 32];
  const uint32_t head = shared_address(&heads[threadIdx.x / 32]);
  RowWriter<T, V, ACCESS> dx(p.dx.at(b0 - 1, d, aligned.origin), p.dx.time, 0, 0, lane);
  // x's and dout's rows, as misalignment() takes them.
  uint32_t place_x = misalignment(p.x.at(b0, d, aligned.origin));
  uint32_t place_g = misalignment(p.dout.at(b0, d, aligned.origin));
  uint32_t at_x = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(p.x.at(b0, d, aligned.origin)));
  uint32_t at_g =
      static_cast<uint32_t>(reinterpret_cast<uintptr_t>(p.dout.at(b0, d, aligned.origin)));
  Segment s = aligned;
  // Of a row whose tiles begin with it, those from first_simple to last_simple take no states, and
  // need no care for x~ that is not finite; without SEQ they have SiLU.
  const bool states = p.initial_states.given(), dfinal = p.dfinal_states.given();
  int first_simple = -kFar, last_simple = kFar;
  if (states || !p.silu) first_simple = aligned.lo + (states || kRagged);
  if (dfinal || !p.silu) {
    last_simple = aligned.hi - TILE - max(dfinal ? p.width - 1 : 0, kRagged ? G : 0);
  }
  if (!SEQ && !p.silu) first_simple = kFar;
  if (SEQ) {  // or registers would be spilled
    keep(first_simple);
    keep(last_simple);
  }
  // Of 4 * G lanes: which tensor has a place, in a tile at 0, that the lane makes zero.
  const bool is_for_dout = (lane & (2 * G)) != 0;
  int offset_before = 0;
  for (int left = static_cast<int>(b1 - b0); left > 0; --left) {
    const int64_t b = b1 - left;
    int shift_x = 0, shift_g = 0;
    uint32_t line_x = 0, line_g = 0;
    if (ReaderX::kPlaced) {
      line_x = (at_x - offset * uint32_t(sizeof(T))) & 127;
      line_g = (at_g - offset * uint32_t(sizeof(T))) & 127;
      at_x += static_cast<uint32_t>(p.x.batch) * uint32_t(sizeof(T));
      at_g += static_cast<uint32_t>(p.dout.batch) * uint32_t(sizeof(T));
    }
    if (ACCESS == Access::kUnit) {
      shift_x = (place_x - offset) % G;
      shift_g = (place_g - offset) % G;
      place_x += static_cast<uint32_t>(p.x.batch);
      place_g += static_cast<uint32_t>(p.dout.batch);
    }
    const bool partial_end = ragged_end && ends_within(b);
    s = aligned.with(offset);
    const int first_plain = s.lo + ((shift_x | shift_g) != 0);
    const int last_plain = s.hi - TILE - (partial_end ? G : 0);
    const int row_first_simple = first_simple + offset, row_last_simple = last_simple + offset;
    int outside = kNowhere;
    if (kRagged && lane < 4 * G) {
      outside = ReaderX::outside(s.lo, s.hi, is_for_dout ? shift_g : shift_x, lane);
    }
    dx.row(p.dx.batch + (offset_before - offset) * dx_time, max(s.lo, 0), s.end);
    int edge_step = dx.edge_step();
    if (ACCESS != Access::kStrided) keep(edge_step);
    if (kRagged) keep(outside);
    offset_before = offset;
    offset = offset_after(offset);  // from here on, of the next row
    const SeqIdx ids = p.seq_idx.from(b, s.origin);
    uint64_t mixed_tiles = 0;  // from the highest bit on
    if (SEQ && p.matches != nullptr) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        mixed_tiles |= uint64_t(__ballot_sync(0xffffffff, mismatches[i] != 0)) << 32 * i;
      }
      mixed_tiles <<= 63 - top(s) / TILE;
      if (left > 1) load_mismatches(b + 1, top(aligned.with(offset)));
    }
    float above[H] = {};  // dz[0..H) of lane 0 of the tile above
    if (s.end < s.hi) {
      const int64_t end = s.origin + s.end;
      const bool has_x = lane < 2 * H && s.end - H + lane < s.hi;
      const bool has_dz = lane < H && s.end + lane < s.hi;
      const float x_of = has_x ? to_compute(*p.x.at(b, d, end - H + lane)) : 0.0f;
      const float g[1] = {has_dz ? to_compute(*p.dout.at(b, d, end + lane)) : 0.0f};
      const int id_of = SEQ && has_x ? ids.at(0, s.end - H + lane) : -1;
      float dz[1] = {bias};
      const int id = SEQ ? __shfl_sync(0xffffffff, id_of, lane + H) : 0;
#pragma unroll
      for (int k = 0; k < WMAX; ++k) {
        float xk = __shfl_sync(0xffffffff, x_of, lane + k);
        if (SEQ) xk = __shfl_sync(0xffffffff, id_of, lane + k) == id ? xk : 0.0f;
        if (has_tap<WMAX>(k, first)) dz[0] = fmaf(w[k], xk, dz[0]);
      }
      p.gradients(g, has_dz && id >= 0, dz);
#pragma unroll
      for (int j = 0; j < H; ++j) above[j] = __shfl_sync(0xffffffff, dz[0], j);
    }

#pragma unroll 1
    for (int base = top(s); base >= 0; base -= TILE) {
      const int t = base + lane * V;
      const bool plain = base >= first_plain && base <= last_plain;
      const bool simple = base >= row_first_simple && base <= row_last_simple;
      wait_for_copies<kStages - 2>();
      __syncwarp();  // the tile has come, and the one before is read
      start_next(stage_before);
      const uint32_t own_x = stage + line_x, own_g = stage - kFromDout + line_g;
      if (kRagged && !plain) {
        const int i = outside - base;
        if (i >= 0 && i < ReaderX::kPlaces) {
          const uint32_t tile = is_for_dout ? dout.tile(own_g) : x.tile(own_x);
          store_shared(tile + i * int(sizeof(T)), from_compute<T>(0.0f));
        }
        if (partial_end) {
          int64_t row = b;
          asm volatile("" : "+l"(row));  // or what follows were computed for every row
          x.load_end(own_x, base, s.lo, s.hi, shift_x, p.x.at(row, d, s.origin));
          dout.load_end(own_g, base, s.lo, s.hi, shift_g, p.dout.at(row, d, s.origin));
        }
        __syncwarp();
      }
      const auto xs = x.read(own_x, shift_x);
      const auto gs = dout.read(own_g, shift_g);
      const uint32_t room = dout.tile(own_g);
      stage_before = stage;
      stage = stage == last_stage ? first_stage : stage + kStageBytes;
      const bool mixed = SEQ && static_cast<int64_t>(mixed_tiles) < 0;
      if (SEQ) mixed_tiles <<= 1;
      float h[H + V], g[V], dz[V];
#pragma unroll
      for (int j = 0; j < H + V; ++j) h[j] = xs.get(WMAX - H + j);
#pragma unroll
      for (int j = 0; j < V; ++j) g[j] = gs.get(j);
      // From x~ and g to dx and the sums. PLAIN: the tile is a simple one. MIXED: not all ids in
      // reach are one.
      auto finish = [&](auto is_plain, auto is_mixed) {
        constexpr bool PLAIN = decltype(is_plain)::value, MIXED = decltype(is_mixed)::value;
        Matches<V, H> same;
        if (MIXED) {
          same.load(p.matches + b * p.matches_pitch + Matches<V, H>::kBefore + s.origin + t);
        }
        if (!PLAIN && p.initial_states.given() && s.lo >= 0 && base <= s.lo) {
          take_states<H>(p, b, d, lane, first, t, s.lo, h);
        }
        if (MIXED) {
#pragma unroll
          for (int i = 0; i < V; ++i) {
            if (same.is_padding(i)) h[H + i] = 0.0f;  // only its own tap would still meet it
          }
        }
#pragma unroll
        for (int i = 0; i < V; ++i) {
          dz[i] = bias;
#pragma unroll
          for (int k = 0; k < WMAX; ++k) {
            float xk = h[i + k];
            if (MIXED) xk = same.at(i, k) ? xk : 0.0f;
            if (has_tap<WMAX>(k, first)) dz[i] = fmaf(w[k], xk, dz[i]);
          }
        }
        if constexpr (PLAIN && !SEQ) {
#pragma unroll
          for (int i = 0; i < V; ++i) dz[i] = silu_backward<T>(dz[i], g[i]);
        } else {
          p.gradients(g, true, dz);
        }
        // Outside the row g and so dz are zero. Such a dz may meet an x~ that is not finite; with
        // SiLU the sums are NaN then all the same, and so is the dx that a dz of NaN there reaches.
        if (PLAIN || (!MIXED && (p.silu || plain))) {
#pragma unroll
          for (int i = 0; i < V; ++i) {
            db += dz[i];
#pragma unroll
            for (int k = 0; k < WMAX; ++k) {
              if (has_tap<WMAX>(k, first)) dw[k] = fmaf(dz[i], h[i + k], dw[k]);
            }
          }
        } else {
#pragma unroll
          for (int i = 0; i < V; ++i) {
            if (MIXED) dz[i] = same.is_padding(i) ? 0.0f : dz[i];
            db += dz[i];
#pragma unroll
            for (int k = 0; k < WMAX; ++k) {
              const bool inside = t + i >= s.lo && t + i < s.hi;
              const bool takes = inside && (!MIXED || same.at(i, k));
              if (has_tap<WMAX>(k, first)) dw[k] = fmaf(dz[i], takes ? h[i + k] : 0.0f, dw[k]);
            }
          }
        }

        float q[V + H];  // dz, and those after
#pragma unroll
        for (int i = 0; i < V; ++i) q[i] = dz[i];
#pragma unroll
        for (int j = 0; j < H; ++j) {
          q[V + j] = __shfl_sync(0xffffffff, lane == 0 ? above[j] : dz[j], next_lane);
          above[j] = dz[j];
        }
        float a[V];
#pragma unroll
        for (int i = 0; i < V; ++i) {
          a[i] = 0.0f;
#pragma unroll
          for (int j = 0; j < WMAX; ++j) {  // dz[t + i + j] meets weight[W-1-j]
            float v = q[i + j];
            if (MIXED) v = same.at(i + j, H - j) ? v : 0.0f;
            if (has_tap<WMAX>(WMAX - 1 - j, first)) a[i] = fmaf(w[WMAX - 1 - j], v, a[i]);
          }
        }
        if (!PLAIN && p.dfinal_states.given() && base > s.hi - (p.width - 1) - TILE) {
          const int last = p.width - 1;
          const float mine = load_nearest(p.dfinal_states, b, d, lane, last);
#pragma unroll
          for (int i = 0; i < V; ++i) {
            const int j = t + i - s.hi + last;
            a[i] += from_lane(mine, j < last ? j : -1);
          }
        }
        return pack<T>(a);
      };
      Pack<T, V> tile;
      // With EXACT and SEQ there are always matches, and few other tiles than simple ones.
      if (SEQ && (mixed || (EXACT && !simple))) {
        tile = finish(std::false_type{}, std::bool_constant<SEQ>{});
      } else if (kSplit && simple) {
        tile = finish(std::bool_constant<kSplit>{}, std::false_type{});
      } else if constexpr (!(EXACT && SEQ)) {
        tile = finish(std::false_type{}, std::false_type{});
      }
      dx.store(plain, base, tile, room, head, edge_step);
    }
    dx.flush(head);
  }

  let_next_kernel_start();  // as in backward_channel_last
  if (!p.sums) return;
  __shared__ float sums[WMAX + 1][kThreads / 32];
#pragma unroll
  for (int k = 0; k <= WMAX; ++k) {
    float sum = k < WMAX ? dw[k] : db;
#pragma unroll
    for (int n = 16; n > 0; n /= 2) sum += __shfl_xor_sync(0xffffffff, sum, n);
    if (lane == 0) sums[k][threadIdx.x / 32] = sum;
  }
  if (p.whole) {
    __syncthreads();
  } else {
    __syncwarp();
  }
  if ((part > 0 && p.whole) || lane < first || lane > WMAX || b0 >= p.batch || d >= p.dim) return;
  float sum = sums[lane][threadIdx.x / 32];
  if (!p.whole) {
    p.store_partials({sum}, part, lane - first, d);
    return;
  }
  for (int i = 1; i < 1 << p.part_bits; ++i) sum += sums[lane][threadIdx.x / 32 + i];
  p.store_sum(sum, lane - first, d);
}

// The parts below take any width, strides and type, one output a thread, and recompute dz.

// dx at s, which lies before the sequence for dinitial_states.
template <typename T>
__device__ Compute<T> dx_at(const BackwardArgs<T>& p, int64_t b, int64_t d, int64_t s) {
  Compute<T> a = 0;
  for (int j = 0; j < p.width; ++j) {
    const int64_t t = s + j;
    if (t < 0 || t >= p.seqlen) continue;
    if (p.seq_idx.at(b, t) != p.seq_idx.at(b, max(s, int64_t(0)))) continue;
    a = fma(p.weight.load(d, p.width - 1 - j) * p.scale, dz_at(p, b, d, t), a);
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

// The bytes that Matches reads, one a thread, for inputs up to H steps back, and for each block
// whether the bytes from 8 before it to 8 after it are not all matches. Steps outside the row have
// the id of the nearest inside: no tile is mixed for their sake, and a step after the row, whose dz
// is zero if x~ is finite, meets no x~ that nothing else there meets.
template <int V, int H>
__global__ void __launch_bounds__(kThreads)
    find_matches(const SeqIdx seq_idx, int64_t seqlen, int64_t pitch, uint8_t* matches,
                 uint8_t* mismatches) {
  using Row = Matches<V, H>;
  int64_t i;
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t b = split(n, pitch, &i);
  auto id_of = [&](int64_t t) { return seq_idx.at(b, max(min(t, seqlen - 1), int64_t(0))); };
  auto match_of = [&](int64_t t) {
    const int id = id_of(t);
    uint32_t match = id < 0 ? Row::kPadding : Row::kAll;
    for (int k = 0; k < H; ++k) {
      if (id_of(t - H + k) != id) match &= ~(1u << k);
    }
    return match;
  };
  wait_for_kernel_before();
  let_next_kernel_start();
  const int64_t t = i - Row::kBefore;
  const uint32_t match = match_of(t);
  matches[n] = static_cast<uint8_t>(match);
  bool differs = match != Row::kAll;
  if (threadIdx.x < 8) {
    differs |= match_of(t - 8) != Row::kAll || match_of(t + kThreads) != Row::kAll;
  }
  differs = __syncthreads_or(differs) != 0;
  if (threadIdx.x == 0) mismatches[blockIdx.x] = differs;
}

// One block a (part, d): the sums of one chunk of one row.
template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    backward_any_width_partials(const BackwardArgs<T> p) {
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
  const int64_t columns = (p.width + 1) * p.dim;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kColumns + column;
  Compute<T> sum = 0, lost = 0;  // Kahan's: there may be millions of parts
  wait_for_kernel_before();
  let_next_kernel_start();
  if (i < columns) {
#pragma unroll 4
    for (int64_t part = part_lane; part < p.parts; part += kLanes) {
      const Compute<T> v = load_once(&p.partials[part * columns + i]) - lost;
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
  p.store_sum(sum, static_cast<int>(k), d);
}

// How the backward divides a problem. It depends on sizes and types alone, so that the sums' order
// does; the workspace follows from it.
struct Plan {
  bool any_width, channel_last;
  int vector;  // channels or time steps a thread; 1: any strides (channel_last)
  Access access = Access::kStrided;  // channel_first
  int64_t chunk, chunks, rows = 1;
  Columns columns;
  bool wide = false;  // channel_last: all of x and dout is 16-byte aligned
  int64_t parts;
  bool whole = false;         // channel_first: a block has all parts of a channel, and adds them up
  int part_bits = 0;          // of the number of warps that are for them
  int64_t matches_pitch = 0;  // channel_first with seq_idx: bytes a row of matches
  int64_t partials, workspace;  // bytes of the partial sums, and of all

  explicit Plan(const BackwardParams& params) {
    const Tensor& x = params.x;
    const int size =
        x.dtype == CAUSAL_CONV1D_FLOAT64 ? 8 : (x.dtype == CAUSAL_CONV1D_FLOAT32 ? 4 : 2);
    const int64_t batch = x.sizes[0], dim = x.sizes[1], seqlen = x.sizes[2];
    const int64_t width = params.weight.sizes[1];
    any_width = width > 8 || size == 8 || batch * dim * ceil_div(seqlen, 64) > kMostParts;
    channel_last = is_channel_last(x);
    vector = 1;
    if (any_width) {
      chunk = 4096;
      chunks = ceil_div(seqlen, chunk);
      parts = batch * chunks;
    } else if (channel_last) {
      const int widest = width > 4 || size == 4 ? 2 : 4;  // more would spill registers
      vector =
          common_channels(widest, size, dim, {&x, &params.dout, &params.dx}) == widest ? widest : 1;
      wide = common_channels(16 / size, size, dim, {&x, &params.dout}) == 16 / size;
      // Chunks of even length, of a multiple of U plus 1 steps, as many as `down` blocks take.
      const int64_t U = width > 4 ? 8 : 4;
      auto even_chunk = [&](int64_t down) {
        return ceil_div(ceil_div(seqlen, down * kBackwardLines) - 1, U) * U + 1;
      };
      // Long chunks repeat less work at their ends, short ones make more blocks. Those are taken
      // whose blocks need the fewest steps one after the other, so many blocks at a time as 132 SMs
      // run, with 3 steps more a block, a fifth of a chunk until the last have ended, and 0.15
      // steps to add up the sums of a block: so fitted to 42 shapes. Blocks are counted as if
      // tensors were aligned, for the sums' order not to depend on that.
      const int64_t across = ceil_div(ceil_div(dim, widest), 32);
      int64_t best = 1, fewest = INT64_MAX, down_before = 0;
      for (int64_t most = 129; most >= 17 && seqlen > 0; most -= U) {
        const int64_t down = ceil_div(seqlen, most * kBackwardLines);
        if (down == down_before) continue;
        down_before = down;
        const int64_t steps = even_chunk(down);
        const int64_t blocks = batch * ceil_div(ceil_div(seqlen, steps), kBackwardLines);
        const int64_t rounds = ceil_div(blocks * across, 528);
        const int64_t cost = 20 * rounds * (steps + 3) + 4 * steps + 3 * blocks;
        if (cost >= fewest) continue;
        fewest = cost;
        best = steps;
      }
      chunk = best;
      chunks = ceil_div(seqlen, chunk);
      columns = Columns(dim / vector, chunks, 5);  // whatever vector is, kBackwardLines high
      parts = batch * ceil_div(chunks, kBackwardLines);
    } else {
      vector = width > 4 || size == 2 ? 8 : 4;
      access = common_access({&x, &params.dout, &params.dx}, size);
      const bool ragged = seqlen % (16 / size) != 0;
      const int64_t tile = 32 * vector;
      const int64_t tiles = ceil_div(seqlen + (ragged ? 16 / size - 1 : 0), tile);
      const int64_t all = batch * tiles;
      auto divide = [&](int64_t most) {  // tiles a warp
        chunks = ceil_div(tiles, most);
        chunk = chunks > 0 ? ceil_div(tiles, chunks) * tile : tile;
        rows = chunks == 1 ? min(most / tiles, batch) : 1;
        parts = rows > 0 ? ceil_div(batch, rows) * chunks : 0;
      };
      // A block takes all parts of a channel if these are few enough: one, two or four warps a
      // channel, as many as there need be for so many of them, or for blocks that are nearly a
      // multiple of the 528 that 132 SMs run at a time, if each has 8 tiles or more.
      const int64_t warps = size == 2 ? 4096 : 8192;
      auto idle = [&](int bits) {  // of 100 places for blocks, until the last have ended
        const int64_t blocks = ceil_div(dim << bits, kThreads / 32), rounds = ceil_div(blocks, 528);
        return 100 - 100 * blocks / (rounds * 528);
      };
      for (int bits = 0; bits <= 2 && !whole && all > 0; ++bits) {
        const int64_t most = ceil_div(all, 1 << bits);
        const bool few = dim << bits < warps || (!ragged && idle(bits) > idle(bits + 1) + 10);
        const bool more = bits < 2 && most >= 16 && few;
        if (more || most > (dim >= 1024 ? 64 : 8)) continue;
        divide(most);
        whole = parts <= 1 << bits;
        part_bits = bits;
      }
      // Else warps take what makes 16k of them.
      const int64_t fair = ceil_div(dim * all, 16384);
      if (!whole) divide(fair < 8 ? 8 : (fair > 16 ? 16 : fair));
      using Row = Matches<8, 7>;  // which needs most
      if (given(params.seq_idx)) matches_pitch = Row::kBefore + tiles * tile + Row::kAfter;
    }
    const bool sums = given(params.dweight) || given(params.dbias);
    partials = sums && !whole ? parts * (width + 1) * dim * (size == 8 ? 8 : 4) : 0;
    workspace = partials + batch * (matches_pitch + matches_pitch / kThreads);
  }
};

template <typename T, int WMAX>
cudaError_t launch_fast(BackwardArgs<T>& p, Plan plan, cudaStream_t stream) {
  if (!has_every_kernel()) {
    plan.vector = 1;
    plan.access = Access::kStrided;
    p.columns = Columns(p.dim, p.chunks, p.columns.bits);
  }
  const bool seq = p.seq_idx.data != nullptr, exact = p.width == 4;
  if (!plan.channel_last) {
    constexpr int V = WMAX == 8 || sizeof(T) == 2 ? 8 : 4;
    constexpr Access kUnit = Access::kUnit, kDense = WMAX == 4 ? Access::kDense : kUnit;
    auto kernel = backward_channel_first<T, V, WMAX, false, true, Access::kStrided>;
    if (plan.access == Access::kAligned && seq && exact) {
      kernel = backward_channel_first<T, V, WMAX, WMAX == 4, WMAX == 4, Access::kAligned>;
    } else if (plan.access != Access::kStrided && seq) {
      kernel = backward_channel_first<T, V, WMAX, false, true, kUnit>;
    } else if (plan.access == Access::kAligned && (exact || WMAX == 8)) {
      kernel = backward_channel_first<T, V, WMAX, WMAX == 4, false, Access::kAligned>;
    } else if (plan.access == Access::kDense && exact) {
      kernel = backward_channel_first<T, V, WMAX, WMAX == 4, false, kDense>;
    } else if (plan.access != Access::kStrided) {
      kernel = exact ? backward_channel_first<T, V, WMAX, WMAX == 4, false, kUnit>
                     : backward_channel_first<T, V, WMAX, false, false, kUnit>;
    }
    if (p.matches != nullptr) {
      const cudaError_t e = launch_early(
          find_matches<V, WMAX - 1>, p.batch * p.matches_pitch, stream, p.seq_idx, p.seqlen,
          p.matches_pitch, const_cast<uint8_t*>(p.matches), const_cast<uint8_t*>(p.mismatches));
      if (e != cudaSuccess) return e;
    }
    const int64_t warps = plan.whole ? p.dim << plan.part_bits : p.parts * p.dim;
    return launch_early(kernel, warps * 32, stream, p);
  }
  constexpr int C = WMAX > 4 || sizeof(T) == 4 ? 2 : 4;
  auto kernel = backward_channel_last<T, 1, WMAX, false, true>;
  if (plan.vector > 1 && seq) kernel = backward_channel_last<T, C, WMAX, false, true>;
  if (plan.vector > 1 && !seq) {
    kernel = exact ? backward_channel_last<T, C, WMAX, WMAX == 4, false>
                   : backward_channel_last<T, C, WMAX, false, false>;
  }
  return launch_early(kernel, p.columns.threads(p.batch), stream, p);
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
  p.scale = pre_activation_scale<T>(p.silu);
  p.x_end = p.x.data + extent(params.x);
  p.dout_end = p.dout.data + extent(params.dout);
  p.x_row = p.x.time * static_cast<int64_t>(sizeof(T));
  p.dout_row = p.dout.time * static_cast<int64_t>(sizeof(T));
  p.dx_row = p.dx.time * static_cast<int64_t>(sizeof(T));
  p.chunk = plan.chunk;
  p.chunks = plan.chunks;
  p.rows = plan.rows;
  p.columns = plan.columns;
  p.wide = plan.wide;
  p.by_dim = Divisor(p.dim);
  p.by_chunks = Divisor(plan.chunks);
  p.parts = plan.parts;
  p.sums = given(params.dweight) || given(params.dbias);
  p.whole = plan.whole;
  p.part_bits = plan.part_bits;
  p.partials = plan.partials > 0 ? static_cast<Compute<T>*>(workspace) : nullptr;
  if (plan.matches_pitch > 0) {
    p.matches = static_cast<uint8_t*>(workspace) + plan.partials;
    p.mismatches = p.matches + p.batch * plan.matches_pitch;
  }
  p.matches_pitch = plan.matches_pitch;

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
  if (e == cudaSuccess && p.sums && !plan.whole) {  // no positions at all: the sums are zero
    e = launch_early(reduce_partials<T>, (p.width + 1) * p.dim * kLanes, stream, p);
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
  return gpu::run_operator("causal_conv1d_bwd", *params, device, [&](auto zero) {
    const gpu::Plan plan(*params);
    if (plan.workspace > workspace_size || (plan.workspace > 0 && workspace == nullptr)) {
      return cudaErrorInvalidValue;
    }
    return gpu::run<decltype(zero)>(*params, plan, workspace, static_cast<cudaStream_t>(stream));
  });
}
