// The backward of channel-first tensors: a warp walks down its part of a row, tile by tile, or down
// several rows of one channel, one after the other. Tiles come by cp.async some steps ahead
// (TileReader). The dz after a lane's own come from the next lane, and for lane 31 from the tile
// before. WMAX, EXACT, SEQ and ACCESS are as in forward.cu.
#include "backward.cuh"
#include "launch.cuh"

namespace causal_conv1d::gpu {
namespace {

// Blocks that a multiprocessor has registers for.
template <typename T, int WMAX, bool SEQ, Access ACCESS>
constexpr int kChannelFirstBlocks = SEQ ? 4 - (WMAX == 8) - (ACCESS != Access::kAligned)
                                        : (ACCESS == Access::kDense && sizeof(T) == 2 ? 5 : 4);

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
  int64_t b1 = d < p.dim ? min(b0 + p.rows, p.batch) : b0;
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
  // A row whose tiles begin early may end before its last part: what follows it is to meet no sum.
  if (ACCESS != Access::kAligned && aligned.hi + offset <= 0) b1 = b0;
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

  let_next_kernel_start();  // measured faster here than at the beginning
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

template <typename T, int WMAX>
cudaError_t launch_width(const BackwardArgs<T>& p, const BackwardPlan& plan, cudaStream_t stream) {
  const bool seq = p.seq_idx.data != nullptr, exact = p.width == 4;
  constexpr int V = WMAX == 8 || sizeof(T) == 2 ? 8 : 4;
  constexpr Access kAligned = Access::kAligned, kUnit = Access::kUnit;
  const bool aligned = plan.access == kAligned, unit = plan.access != Access::kStrided;
  auto kernel = backward_channel_first<T, V, WMAX, false, true, Access::kStrided>;
  if constexpr (WMAX == 4) {
    if (seq && aligned && exact) {
      kernel = backward_channel_first<T, V, WMAX, true, true, kAligned>;
    } else if (seq && unit) {
      kernel = backward_channel_first<T, V, WMAX, false, true, kUnit>;
    } else if (aligned && exact) {
      kernel = backward_channel_first<T, V, WMAX, true, false, kAligned>;
    } else if (plan.access == Access::kDense && exact) {
      kernel = backward_channel_first<T, V, WMAX, true, false, Access::kDense>;
    } else if (unit) {
      kernel = exact ? backward_channel_first<T, V, WMAX, true, false, kUnit>
                     : backward_channel_first<T, V, WMAX, false, false, kUnit>;
    }
  } else if (!seq && unit) {  // several sequences and W > 4 are rare enough to do without
    kernel = aligned ? backward_channel_first<T, V, WMAX, false, false, kAligned>
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

}  // namespace

template <typename T>
cudaError_t launch_backward_channel_first(const BackwardArgs<T>& p, const BackwardPlan& plan,
                                          cudaStream_t stream) {
  return p.width <= 4 ? launch_width<T, 4>(p, plan, stream) : launch_width<T, 8>(p, plan, stream);
}

template cudaError_t launch_backward_channel_first<float>(const BackwardArgs<float>&,
                                                          const BackwardPlan&, cudaStream_t);
template cudaError_t launch_backward_channel_first<__half>(const BackwardArgs<__half>&,
                                                           const BackwardPlan&, cudaStream_t);
template cudaError_t launch_backward_channel_first<__nv_bfloat16>(
    const BackwardArgs<__nv_bfloat16>&, const BackwardPlan&, cudaStream_t);

}  // namespace causal_conv1d::gpu
