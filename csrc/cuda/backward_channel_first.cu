// The backward of channel-first tensors: a warp walks down its part of a row, tile by tile, or down
// several rows of one channel, one after the other. Tiles come by cp.async some steps ahead
// (TilePipeline). The dz after a lane's own come from the next lane, and for lane 31 from the tile
// before (DzExchange).
#include "any_options.cuh"
#include "backward.cuh"
#include "find_matches.cuh"
#include "launch.cuh"
#include "parameters.cuh"
#include "row_geometry.cuh"
#include "states.cuh"
#include "taps.cuh"
#include "tile_pipeline.cuh"

namespace causal_conv1d::gpu {
namespace {

template <typename K>
struct FirstRegisters {
  float w[K::WMAX], bias = 0.0f, dw[K::WMAX], db = 0.0f;
};

template <typename K>
class FirstWalk {
  using T = typename K::Element;
  using Args = BackwardArgs<T>;
  using Registers = FirstRegisters<K>;
  using Pipeline = TilePipeline<K>;
  static constexpr int V = K::V, H = K::H, WMAX = K::WMAX, TILE = K::TILE;
  static constexpr bool SEQ = K::SEQ, EXACT = K::EXACT, FUSED = K::FUSED;
  static constexpr Access ACCESS = K::ACCESS;
  // Whether tiles may begin before the row, where initial_states are.
  static constexpr bool kEarly = ACCESS != Access::kAligned;
  // Whether simple tiles have code of their own.
  static constexpr bool kSplit = EXACT || (WMAX == 8 && ACCESS == Access::kAligned);
  // Twice, or the compiler would keep a predicate for each tap: so it gets those of a step by one
  // instruction, for the sums and again for dx.
  struct Same {
    Matches<V, H, H == 3> of_own;
    Matches<V + H, H, H == 3> of_later;
  };
  // Of the lane's steps, with FUSED: as far as they are given.
  struct Gates {
    Pack<T, V> x, dout, pre, post;
  };
  struct Nothing {};
  using Others = std::conditional_t<FUSED, Gates, Nothing>;

 public:
  __device__ __forceinline__ FirstWalk(const Args& p, const FirstWork<K>& work,
                                       const Segment& aligned, Pipeline& pipeline,
                                       RowGeometry<K>& at, uint32_t head,
                                       typename DzExchange<H>::Shared* dz, int lane)
      : p_(p),
        work_(work),
        aligned_(aligned),
        pipeline_(pipeline),
        at_(at),
        dx_(p.dx.at(work.b0 - 1, work.d, aligned.origin), p.dx.time, 0, 0, lane),
        dpre_gate_(gradient(p.dpre_gate), 1, 0, 0, lane),
        dpost_gate_(gradient(p.dpost_gate), 1, 0, 0, lane),
        dz_(dz, lane),
        head_(head),
        lane_(lane),
        first_(EXACT ? 0 : WMAX - p.width) {}

  // All rows. mixed has loaded those of the first.
  __device__ __forceinline__ void rows(MixedTiles<K>& mixed, Registers& r) {
    int offset_before = 0;
    for (int left = static_cast<int>(work_.b1 - work_.b0); left > 0; --left) {
      const int64_t b = work_.b1 - left;
      at_.row(p_, work_, aligned_, b);
      const int64_t dx_time = ACCESS == Access::kStrided ? p_.dx.time : 1;
      dx_.row(p_.dx.batch + (offset_before - at_.offset()) * dx_time, max(at_.s.lo, 0), at_.s.end);
      if constexpr (FUSED) {
        dpre_gate_.row(p_.dpre_gate.batch, max(at_.s.lo, 0), at_.s.end);
        dpost_gate_.row(p_.dpost_gate.batch, max(at_.s.lo, 0), at_.s.end);
      }
      int edge_step = dx_.edge_step();
      if (K::kRagged) {
        keep(edge_step);
        keep(at_.outside);
      }
      offset_before = at_.offset();
      at_.set_next_offset(work_);
      const int last = last_tile<TILE>(at_.s);
      uint64_t mixed_tiles = 0;  // from the highest bit on
      const uint8_t* matches = nullptr;
      if (SEQ && p_.matches != nullptr) {
        matches = p_.matches + b * p_.matches_pitch + kMatchesBefore + at_.s.origin + lane_ * V;
        keep(matches);
        mixed_tiles = mixed.get(last);
        if (left > 1) {
          const int next_last = last_tile<TILE>(aligned_.with(at_.offset()));
          mixed.load(p_, b + 1, aligned_.origin, next_last, lane_);
        }
      }
      dz_.begin(at_.s.end < at_.s.hi ? dz_after(b, r) : 0.0f);
#pragma unroll 1
      for (int base = last; base >= 0; base -= TILE) {
        step(b, base, edge_step, SEQ && static_cast<int64_t>(mixed_tiles) < 0, matches, r);
        if (SEQ) mixed_tiles <<= 1;
      }
      dx_.flush(head_);
    }
  }

 private:
  // The H dz after the part, one per lane.
  __device__ __forceinline__ float dz_after(int64_t b, const Registers& r) const {
    const Segment& s = at_.s;
    const uint32_t d = work_.d;
    const SeqIdx ids = p_.seq_idx.from(b, s.origin);
    const int64_t end = s.origin + s.end;
    const bool has_x = lane_ < 2 * H && s.end - H + lane_ < s.hi;
    const bool has_dz = lane_ < H && s.end + lane_ < s.hi;
    float x_of = has_x ? to_compute(*p_.x.at(b, d, end - H + lane_)) : 0.0f;
    float g = has_dz ? to_compute(*p_.dout.at(b, d, end + lane_)) : 0.0f;
    if (FUSED && has_x && p_.pre_gate.given()) {
      x_of = round_to<T>(to_compute(*p_.pre_gate.at(b, d, end - H + lane_)) * x_of);
    }
    if (FUSED && has_dz && p_.post_gate.given()) {
      g = multiply(g, to_compute(*p_.post_gate.at(b, d, end + lane_)));
    }
    const int id_of = SEQ && has_x ? ids.at(0, s.end - H + lane_) : -1;
    const int id = SEQ ? __shfl_sync(0xffffffff, id_of, lane_ + H) : 0;
    const float z = convolve<WMAX>(
        r.bias, first_, [&](int k) { return r.w[k]; },
        [&](int k) {
          const float xk = __shfl_sync(0xffffffff, x_of, lane_ + k);
          return !SEQ || __shfl_sync(0xffffffff, id_of, lane_ + k) == id ? xk : 0.0f;
        });
    const float own = p_.gradient(z, g);  // of all lanes, which part less so
    return has_dz && id >= 0 ? own : 0.0f;
  }

  // The tile at base: waits for it, and writes its dx. mixed: not all ids in reach are one; matches
  // are those of the tile at 0, from the lane's first step on.
  __device__ __forceinline__ void step(int64_t b, int base, int edge_step, bool mixed,
                                       const uint8_t* matches, Registers& r) {
    const bool plain = base >= at_.first_plain && base <= at_.last_plain;
    const bool simple = base >= at_.first_simple && base <= at_.last_simple;
    // With EXACT and SEQ there are always matches, and few other tiles than simple ones.
    if (EXACT && SEQ && !simple) mixed = true;
    Same same;
    if (SEQ && mixed) {  // long before they are used
      if (ACCESS == Access::kAligned && V == 8) {
        same.of_own.load_aligned(matches + base);
        same.of_later.load_aligned(matches + base);
      } else {
        same.of_own.load(matches + base);
        same.of_later.load(matches + base);
      }
    }
    pipeline_.next(p_, work_, aligned_);
    const uint32_t own_x = pipeline_.own_x() + at_.line_x;
    const uint32_t own_g = pipeline_.own_dout() + at_.line_g;
    if (K::kRagged && !plain) mend(b, base, own_x, own_g);
    auto xs = Pipeline::ReaderX::read(own_x, at_.shift_x);
    const auto gs = Pipeline::ReaderG::read(own_g, at_.shift_g);
    Others others;
    if constexpr (FUSED) {
      others.x = own(xs);
      others.dout = gs;
      if (p_.pre_gate.given()) {
        const auto pre = Pipeline::ReaderX::read(pipeline_.own_pre_gate(), 0);
        others.pre = own(pre);
        xs = product(pre, xs);
      }
      if (p_.post_gate.given()) {
        others.post = Pipeline::ReaderG::read(pipeline_.own_post_gate(), 0);
      }
    }
    const uint32_t room = pipeline_.dout().tile(own_g);
    pipeline_.advance();
    float h[H + V], g[V];
#pragma unroll
    for (int j = 0; j < H + V; ++j) h[j] = xs.get(K::HP - H + j);
#pragma unroll
    for (int j = 0; j < V; ++j) g[j] = gs.get(j);
    if constexpr (FUSED) {
      if (p_.post_gate.given()) {
#pragma unroll
        for (int j = 0; j < V; ++j) g[j] = multiply(g[j], others.post.get(j));
      }
    }
    Pack<T, V> tile;
    if (SEQ && mixed) {
      tile = gradients<false, SEQ>(b, base, plain, simple, h, g, others, same, r);
    } else if (kSplit && simple) {
      tile = gradients<kSplit, false>(b, base, plain, simple, h, g, others, same, r);
    } else if constexpr (!(EXACT && SEQ)) {
      tile = gradients<false, false>(b, base, plain, simple, h, g, others, same, r);
    }
    dx_.store(plain, base, tile, room, head_, edge_step);
  }

  // Makes what is not the row's zero in a tile that has come, and loads the row's end if its last
  // vector was not read.
  __device__ __forceinline__ void mend(int64_t b, int base, uint32_t own_x, uint32_t own_g) const {
    const auto& x = pipeline_.x();
    const auto& dout = pipeline_.dout();
    const int i = at_.outside - base;
    if (i >= 0 && i < Pipeline::ReaderX::kPlaces) {
      const uint32_t tile = at_.is_for_dout() ? dout.tile(own_g) : x.tile(own_x);
      store_shared(tile + i * int(sizeof(T)), from_compute<T>(0.0f));
    }
    if (at_.partial_end) {
      const Segment& s = at_.s;
      int64_t row = b;
      asm volatile("" : "+l"(row));  // or what follows would be computed for every row
      x.load_end(own_x, base, s.lo, s.hi, at_.shift_x, p_.x.at(row, work_.d, s.origin));
      dout.load_end(own_g, base, s.lo, s.hi, at_.shift_g, p_.dout.at(row, work_.d, s.origin));
    }
    __syncwarp();
  }

  // From x~ and g to dx and the sums. PLAIN: the tile is a simple one. MIXED: not all ids in reach
  // are one.
  template <bool PLAIN, bool MIXED>
  __device__ __forceinline__ Pack<T, V> gradients(int64_t b, int base, bool plain, bool simple,
                                                  float (&h)[H + V], const float (&g)[V],
                                                  const Others& others, Same& same, Registers& r) {
    const Segment& s = at_.s;
    const uint32_t d = work_.d;
    const int t = base + lane_ * V;
    if constexpr (MIXED) {
      if (base <= at_.edges.states_until) take_states<H>(p_, b, d, lane_, first_, t, s.lo, h);
    } else if (!PLAIN && !simple && p_.initial_states.given() && s.lo >= 0 && base <= s.lo) {
      take_states<H>(p_, b, d, lane_, first_, t, s.lo, h);
    }
    const int first = MIXED ? 0 : first_;  // mixed tiles know by `same`
    float dz[V];
#pragma unroll
    for (int i = 0; i < V; ++i) {
      dz[i] = convolve<WMAX>(
          r.bias, first, [&](int k) { return r.w[k]; }, [&](int k) { return h[i + k]; },
          [&](int k) { return !MIXED || same.of_own.takes(i, k); });
    }
    [[maybe_unused]] float y[V];
    if constexpr (FUSED) activations(dz, others, y);
    if constexpr (PLAIN && !SEQ) {
#pragma unroll
      for (int i = 0; i < V; ++i) dz[i] = silu_backward<T>(dz[i], g[i]);
    } else {
      p_.gradients(g, true, dz);
    }
    if constexpr (MIXED) {
      if ((kEarly && base < s.lo) || base > at_.edges.last_whole) {
#pragma unroll
        for (int i = 0; i < V; ++i) {
          if (t + i >= s.lo && t + i < s.hi) continue;
          same.of_own.set_padding(i);
          same.of_later.set_padding(i);
        }
      }
      if (same.of_own.has_padding()) {
#pragma unroll
        for (int i = 0; i < V; ++i) {
          if (!same.of_own.is_padding(i)) continue;
          dz[i] = 0.0f;
          if (!kEarly) h[H + i] = 0.0f;  // only its own tap still meets it
          if (FUSED) y[i] = 0.0f;
        }
      }
    }
    if constexpr (FUSED) {
      if (p_.dpost_gate.given()) dpost_gate_.write_vectors(base, pack<T>(y));
    }
    float q[V + H];  // dz, and those after
#pragma unroll
    for (int i = 0; i < V; ++i) q[i] = dz[i];
    dz_.template exchange<V>(q);
    float a[V];
    if (MIXED) {
      add_mixed(same, h, q, a, r);
    } else {
      add_to_sums<PLAIN>(t, plain, h, dz, r);
      correlate_steps<WMAX, V>([&](int k) { return r.w[k]; }, q,
                               [&](int, int k) { return has_tap<WMAX>(k, first_); }, a);
    }
    if constexpr (MIXED) {
      if (base > at_.edges.dfinal_after) add_dfinal(b, t, a);
    } else if (!PLAIN && !simple && p_.dfinal_states.given() &&
               base > s.hi - (p_.width - 1) - TILE) {
      add_dfinal(b, t, a);
    }
    if constexpr (FUSED) gate<MIXED>(base, others, same, a);
    return pack<T>(a);
  }

  // To a = dx of the steps from t on.
  __device__ __forceinline__ void add_dfinal(int64_t b, int t, float (&a)[V]) const {
    const int last = p_.width - 1;
    const float mine = load_nearest(p_.dfinal_states, b, work_.d, lane_, last);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const int j = t + i - at_.s.hi + last;
      a[i] += from_lane(mine, j < last ? j : -1);
    }
  }

  // With FUSED, y: dpost_gate of the pre-activations z, but for padding.
  __device__ __forceinline__ void activations(const float (&z)[V], const Others& others,
                                              float (&y)[V]) const {
#pragma unroll
    for (int i = 0; i < V; ++i) y[i] = 0.0f;
    if (!p_.dpost_gate.given()) return;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      y[i] = multiply(p_.silu ? silu<T>(z[i]) : z[i], others.dout.get(i));
    }
  }

  // With FUSED: makes dx of a = dx', and writes dpre_gate.
  template <bool MIXED>
  __device__ __forceinline__ void gate(int base, const Others& others, const Same& same,
                                       float (&a)[V]) const {
    float dpre[V];
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const bool padding = MIXED && same.of_own.is_padding(i);
      const float dout = p_.add_dout ? others.dout.get(i) : -0.0f;  // changes no product
      dpre[i] = padding ? 0.0f : multiply(a[i], others.x.get(i));
      if (padding) {
        a[i] = dout + 0.0f;
      } else {
        a[i] = p_.pre_gate.given() ? fmaf(a[i], others.pre.get(i), dout) : add(a[i], dout);
      }
    }
    if (p_.dpre_gate.given()) dpre_gate_.write_vectors(base, pack<T>(dpre));
  }

  // The lane's own steps.
  static __device__ __forceinline__ Pack<T, V> own(const Pack<T, K::HP + V>& all) {
    Pack<T, V> p;
    constexpr int kBefore = Pack<T, K::HP + V>::kWords - Pack<T, V>::kWords;
#pragma unroll
    for (int i = 0; i < Pack<T, V>::kWords; ++i) p.w[i] = all.w[kBefore + i];
    return p;
  }

  // Where the row before the first has the lane's step 0.
  __device__ __forceinline__ T* gradient(const View<T>& v) const {
    return FUSED ? v.at(work_.b0 - 1, work_.d, aligned_.origin) : nullptr;
  }

  // To the sums and to a = dx of a mixed tile.
  __device__ __forceinline__ void add_mixed(const Same& same, const float (&h)[H + V],
                                            const float (&dz)[V + H], float (&a)[V],
                                            Registers& r) const {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      r.db += dz[i];
      a[i] = 0.0f;
    }
#pragma unroll
    for (int i = 0; i < V; ++i) {
      accumulate<WMAX>(
          dz[i], 0, [&](int k) -> float& { return r.dw[k]; },
          [&](int k) { return kEarly && k == H && same.of_own.is_padding(i) ? 0.0f : h[i + k]; },
          [&](int k) { return same.of_own.takes(i, k); });
    }
    correlate_steps<WMAX, V>([&](int k) { return r.w[k]; }, dz,
                             [&](int m, int k) { return same.of_later.takes(m, k); }, a);
  }

  // Outside the row g and so dz are zero. Such a dz may meet an x~ that is not finite; with SiLU
  // the sums are NaN then all the same, and so is the dx that a dz of NaN there reaches.
  template <bool PLAIN>
  __device__ __forceinline__ void add_to_sums(int t, bool plain, const float (&h)[H + V],
                                              const float (&dz)[V], Registers& r) const {
    const auto dweight = [&](int k) -> float& { return r.dw[k]; };
    const bool every = PLAIN || p_.silu || plain;  // step counts
#pragma unroll
    for (int i = 0; i < V; ++i) r.db += dz[i];
    if (every) {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        accumulate<WMAX>(dz[i], first_, dweight, [&](int k) { return h[i + k]; });
      }
    } else {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const bool inside = t + i >= at_.s.lo && t + i < at_.s.hi;
        accumulate<WMAX>(dz[i], first_, dweight, [&](int k) { return inside ? h[i + k] : 0.0f; });
      }
    }
  }

  const Args& p_;
  const FirstWork<K>& work_;
  const Segment& aligned_;
  Pipeline& pipeline_;
  RowGeometry<K>& at_;
  RowWriter<T, V, ACCESS> dx_, dpre_gate_, dpost_gate_;
  DzExchange<H> dz_;
  const uint32_t head_;
  const int lane_;
  const int first_;
};

// Adds up the sums of a warp's lanes; if a block has all of a channel, those of its warps too.
template <typename K, typename Args>
__device__ __forceinline__ void store_sums(const Args& p, const FirstWork<K>& work, int lane,
                                           float (&sums)[K::WMAX + 1][kWarps],
                                           const FirstRegisters<K>& r) {
  constexpr int WMAX = K::WMAX;
  const int first = K::EXACT ? 0 : WMAX - p.width;
#pragma unroll
  for (int k = 0; k <= WMAX; ++k) {
    float sum = k < WMAX ? r.dw[k] : r.db;
#pragma unroll
    for (int n = 16; n > 0; n /= 2) sum += __shfl_xor_sync(0xffffffff, sum, n);
    if (lane == 0) sums[k][threadIdx.x / 32] = sum;
  }
  if (p.whole) {
    __syncthreads();
  } else {
    __syncwarp();
  }
  if ((work.part > 0 && p.whole) || lane < first || lane > WMAX || work.b0 >= p.batch ||
      work.d >= p.dim) {
    return;
  }
  float sum = sums[lane][threadIdx.x / 32];
  if (!p.whole) {
    p.store_partials({sum}, work.part, lane - first, work.d);
    return;
  }
  for (int i = 1; i < 1 << p.part_bits; ++i) sum += sums[lane][threadIdx.x / 32 + i];
  p.store_sum(sum, lane - first, work.d);
}

template <typename K>
__global__ void __launch_bounds__(kThreads, kFirstBlocks<K>)
    backward_channel_first(const BackwardArgs<typename K::Element> p) {
  if (kSmallPtx && !K::kAnyStride) return;
  using T = typename K::Element;
  using Pipeline = TilePipeline<K>;
  const int lane = threadIdx.x % 32;
  FirstWork<K> work(p);
  pdl_wait();
  __shared__ typename Pipeline::Ring rings[kWarps];
  alignas(16) __shared__ Pack<T, K::ACCESS == Access::kUnit ? kPerVector<T> : 1> heads[kWarps];
  __shared__ typename DzExchange<K::H>::Shared dz[kWarps];
  __shared__ float sums[K::WMAX + 1][kWarps];
  FirstRegisters<K> r;
#pragma unroll
  for (int k = 0; k < K::WMAX; ++k) r.dw[k] = 0.0f;

  const Segment aligned(work.index, p.chunk, 0, p.seqlen);
  const bool ragged_end =
      K::kRagged && (misalignment(p.x_end) != 0 || misalignment(p.dout_end) != 0);
  // A row whose tiles begin early may end before its last part: what follows it is to meet no sum.
  if (K::ACCESS != Access::kAligned && aligned.hi + work.first_offset <= 0) work.b1 = work.b0;
  Pipeline pipeline(p, work, aligned, ragged_end, &rings[threadIdx.x / 32], lane);
  MixedTiles<K> mixed;
  if (work.b0 < work.b1) {
    pipeline.fill(p, work, aligned);
    WarpParameters<K::WMAX, K::EXACT>(p, work.d, lane).get(p, r.w, r.bias);
    if (K::SEQ && p.matches != nullptr) {
      const int last = last_tile<K::TILE>(aligned.with(work.first_offset));
      mixed.load(p, work.b0, aligned.origin, last, lane);
    }
  }
  RowGeometry<K> at(p, work, aligned, ragged_end, lane);
  const uint32_t head = shared_address(&heads[threadIdx.x / 32]);
  FirstWalk<K>(p, work, aligned, pipeline, at, head, &dz[threadIdx.x / 32], lane).rows(mixed, r);

  pdl_launch();  // measured faster here than at the beginning
  if (p.sums) store_sums<K>(p, work, lane, sums, r);
}

}  // namespace

template <typename T>
cudaError_t launch_backward_channel_first(const BackwardArgs<T>& p, const BackwardPlan& plan,
                                          cudaStream_t stream) {
  const bool fused = p.pre_gate.given() || p.post_gate.given() || p.add_dout;
  const Case wanted{p.width, p.seq_idx.data != nullptr, plan.access, false, fused};
  const int64_t warps = plan.whole ? p.dim << plan.part_bits : p.parts * p.dim;
  const auto launch_variant = [&](auto variant) {
    using K = decltype(variant);
    if (p.matches != nullptr) {
      const int first = K::EXACT ? 0 : K::WMAX - p.width;
      const cudaError_t e =
          launch_pdl(find_matches<K::H>, p.batch * p.matches_pitch, stream, p.seq_idx, p.seqlen,
                     p.matches_pitch, first, const_cast<uint8_t*>(p.matches),
                     const_cast<uint8_t*>(p.mismatches));
      if (e != cudaSuccess) return e;
    }
    return launch_pdl(backward_channel_first<decltype(variant)>, warps * 32, stream, p);
  };
  return p.width <= 4
             ? with_variant(typename Tables<T, 4>::FirstBackward{}, wanted, launch_variant)
             : with_variant(typename Tables<T, 8>::FirstBackward{}, wanted, launch_variant);
}

template cudaError_t launch_backward_channel_first<float>(const BackwardArgs<float>&,
                                                          const BackwardPlan&, cudaStream_t);
template cudaError_t launch_backward_channel_first<__half>(const BackwardArgs<__half>&,
                                                           const BackwardPlan&, cudaStream_t);
template cudaError_t launch_backward_channel_first<__nv_bfloat16>(
    const BackwardArgs<__nv_bfloat16>&, const BackwardPlan&, cudaStream_t);

}  // namespace causal_conv1d::gpu
