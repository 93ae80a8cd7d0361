// The backward of channel-last tensors: a thread owns C adjacent channels and walks up a chunk of
// time, with the last W inputs and dz in registers. Rows come by cp.async some steps ahead
// (RowPairs). A block's warps have chunks that follow each other: each gives the dz of its first
// rows to the one before, which needs them at its end, and their sums are added up in the block.
// WMAX, EXACT, SEQ and C are as in forward.cu.
#include "backward.cuh"
#include "launch.cuh"

namespace causal_conv1d::gpu {
namespace {

// Blocks that a multiprocessor has registers for.
template <int WMAX, bool SEQ>
constexpr int kChannelLastBlocks = WMAX == 8 && SEQ ? 2 : 4;

template <typename T, int C, int WMAX, bool EXACT, bool SEQ>
__global__ void __launch_bounds__(kThreads, kChannelLastBlocks<WMAX, SEQ>)
    backward_channel_last(const BackwardArgs<T> p) {
  if (kSmallPtx && C > 1) return;
  constexpr int H = WMAX - 1, kGroups = WMAX == 8 ? 2 : 4;
  using Reader = RowPairs<T, C, WMAX, kGroups>;
  struct alignas(sizeof(float) * C) PerChannel {
    float of[C];
  };
  using FirstDz = PerChannel[SEQ ? 1 : kBackwardLines - 1][H][32];
  __shared__ union {
    typename Reader::Shared ring;
    PerChannel sums[WMAX + 1][kBackwardLines][32];
    char room[kRoomFor<kChannelLastBlocks<WMAX, SEQ>, sizeof(FirstDz)>];
  } shared;
  // The dz of each warp's first rows, for the warp before.
  __shared__ FirstDz first_dz;
  wait_for_kernel_before();
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
  // Whether the dz after the chunk are those of the next warp's first rows. Not where dx needs
  // dfinal_states too.
  const bool has_next =
      !SEQ && p.chunk > H && line + 1 < kBackwardLines && chunk + 1 < p.columns.chunks &&
      !(p.dfinal_states.given() && p.seqlen - (p.width - 1) < (chunk + 1) * p.chunk + H);
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
        const PerChannel next = first_dz[line][u - 1][threadIdx.x % 32];
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
      if (!SEQ && t == 0) {
        if (line > 0) {
#pragma unroll
          for (int u = 0; u < H; ++u) {
            PerChannel own;
#pragma unroll
            for (int c = 0; c < C; ++c) own.of[c] = dz[u][c];
            first_dz[line - 1][u][threadIdx.x % 32] = own;
          }
        }
        synchronize_warps();
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
        rows(std::integral_constant<Place, kShared>{}, std::false_type{}, t);
      } else if (EXACT && t + 1 == count && dfinal_from == total) {
        if constexpr (EXACT) rows(std::integral_constant<Place, kLast>{}, std::false_type{}, t);
      } else {
#pragma unroll 1
        for (; t < total; t += WMAX) rows(any, std::false_type{}, t);
      }
    }
  } else if (!SEQ) {
    synchronize_warps();
  }

  let_next_kernel_start();  // measured faster here than at the beginning
  if (p.partials == nullptr) return;
  wait_for_copies<0>();
  __syncthreads();  // all have read the ring
  auto& sums = shared.sums;
  const int column = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k <= WMAX; ++k) {
    PerChannel own;
#pragma unroll
    for (int c = 0; c < C; ++c) own.of[c] = k < WMAX ? dw[k % WMAX][c] : db[c];
    sums[k][line][column] = own;
  }
  __syncthreads();
  if (at.column >= p.columns.count) return;
  const int64_t part = b * p.columns.down.count + at.part;
  for (int k = first + line; k <= WMAX; k += kBackwardLines) {
    PerChannel sum = sums[k][0][column];
#pragma unroll
    for (int i = 1; i < kBackwardLines; ++i) {
#pragma unroll
      for (int c = 0; c < C; ++c) sum.of[c] += sums[k][i][column].of[c];
    }
    p.store_partials(sum.of, part, k - first, d0);
  }
}

template <typename T, int WMAX>
cudaError_t launch_width(const BackwardArgs<T>& p, const BackwardPlan& plan, cudaStream_t stream) {
  const bool seq = p.seq_idx.data != nullptr, exact = p.width == 4;
  constexpr int C = WMAX > 4 || sizeof(T) == 4 ? 2 : 4;
  auto kernel = backward_channel_last<T, 1, WMAX, false, true>;
  if (plan.vector > 1 && !seq) {
    kernel = exact ? backward_channel_last<T, C, WMAX, WMAX == 4, false>
                   : backward_channel_last<T, C, WMAX, false, false>;
  } else if (plan.vector > 1) {
    kernel = backward_channel_last<T, C, WMAX, false, true>;
  }
  return launch_early(kernel, p.columns.threads(p.batch), stream, p);
}

}  // namespace

template <typename T>
cudaError_t launch_backward_channel_last(const BackwardArgs<T>& p, const BackwardPlan& plan,
                                         cudaStream_t stream) {
  return p.width <= 4 ? launch_width<T, 4>(p, plan, stream) : launch_width<T, 8>(p, plan, stream);
}

template cudaError_t launch_backward_channel_last<float>(const BackwardArgs<float>&,
                                                         const BackwardPlan&, cudaStream_t);
template cudaError_t launch_backward_channel_last<__half>(const BackwardArgs<__half>&,
                                                          const BackwardPlan&, cudaStream_t);
template cudaError_t launch_backward_channel_last<__nv_bfloat16>(const BackwardArgs<__nv_bfloat16>&,
                                                                 const BackwardPlan&, cudaStream_t);

}  // namespace causal_conv1d::gpu
