// The forward of channel-first tensors: see forward.cuh.
#pragma once

#include "forward.cuh"
#include "parameters.cuh"
#include "rows.cuh"
#include "seq_ids.cuh"
#include "states.cuh"
#include "taps.cuh"

namespace causal_conv1d::gpu {

constexpr int kTiles = 4;  // per warp

// Which part of which row the calling warp has.
template <typename K>
struct ForwardRow {
  uint32_t b, d, index;  // index: of the part
  bool spare = false;    // a warp without a channel, which only looks at ids

  template <typename Args>
  __device__ __forceinline__ explicit ForwardRow(const Args& p) {
    if constexpr (K::SEQ) {  // a block's warps have the same steps of kWarps channels
      b = split(split(blockIdx.x, p.by_chunks, &index), p.by_dim, &d);
      d = d * kWarps + threadIdx.x / 32;
      spare = d >= p.dim;
      if (spare) d = 0;
    } else {
      // uniform() takes its time, which pays where much code follows from it.
      constexpr bool kUniform = K::EXACT && K::ACCESS == Access::kUnit;
      const uint32_t warp_of_block = threadIdx.x / 32;
      const uint32_t warp =
          blockIdx.x * kWarps + (kUniform ? uniform(warp_of_block) : warp_of_block);
      b = split(split(warp, p.by_chunks, &index), p.by_dim, &d);
    }
  }
};

// A warp's tiles of a row.
template <typename K>
class ForwardTiles {
  using T = typename K::Element;
  using Args = ForwardArgs<T>;
  using Reader = RowReader<T, K::V, K::HP, K::ACCESS>;
  using Raw = typename Reader::Raw;
  static constexpr bool FUSED = K::FUSED;
  using OwnReader = RowReader<T, K::V, 0, K::ACCESS>;
  static constexpr int V = K::V, H = K::H, WMAX = K::WMAX, TILE = K::TILE;
  static constexpr bool SEQ = K::SEQ, EXACT = K::EXACT;
  static constexpr Access ACCESS = K::ACCESS;
  static constexpr int kEarly = ACCESS == Access::kUnit ? kPerVector<T> - 1 : 0;
  using Ids = ChunkMatches<V, H, kEarly>;
  // What is loaded before it is used; with FUSED of several tensors.
  static constexpr int kAtOnce = FUSED ? 2 : kTiles;
  struct Nothing {};
  struct Gates {
    Raw pre;
    typename OwnReader::Raw post, residual;
  };
  using Others = std::conditional_t<FUSED, Gates, Nothing>;
  // Whether tiles after the row are computed, too; else there is a branch, which keeps the compiler
  // from mixing the code of tiles, and so saves registers.
  static constexpr bool kAllTiles = EXACT && WMAX <= 4;
  static_assert(kTiles == kWarps, "each warp of a block looks at the ids of one tile");
  // Where it is rare, code for tiles with one id is spared.
  static constexpr bool kOnlyMixed = SEQ && ACCESS == Access::kUnit;

 public:
  using Shared = std::conditional_t<SEQ, typename Ids::Shared, char>;

  // x and out: step 0 of s. states: the row begins here, with initial_states.
  __device__ __forceinline__ ForwardTiles(const Args& p, const ForwardRow<K>& row, const Segment& s,
                                          int offset, int lane, bool states, const T* x, T* out,
                                          Shared* shared)
      : p_(p),
        row_(row),
        s_(s),
        offset_(offset),
        lane_(lane),
        states_(states),
        x_(x, p.x.time, p.x_end, s.lo, s.end, lane_),
        pre_gate_(of(p.pre_gate), p.x.time, p.x_end, s.lo, s.end, lane_),
        post_gate_(of(p.post_gate), p.x.time, p.x_end, s.lo, s.end, lane_),
        residual_(of(p.residual), p.x.time, p.x_end, s.lo, s.end, lane_),
        out_(out, p.out.time, max(s.lo, 0), s.end, lane_),
        shared_(shared),
        first_(EXACT ? 0 : WMAX - p.width),
        parameters_(p, row.d, lane_) {}

  __device__ __forceinline__ void run() {
    if constexpr (ACCESS != Access::kStrided) {
      if (x_.whole(s_.end)) {
        if constexpr (EXACT) {
          if (s_.end <= kTiles / 2 * TILE) return all_at_once<kTiles / 2>();
        }
        return all_at_once<kAtOnce>();
      }
    }
    one_by_one();
  }

 private:
  // Loads N tiles before it uses the first.
  template <int N>
  __device__ __forceinline__ void all_at_once() {
    Raw raw[N];
    Others others[N];
    load(0, raw, others);
    uint32_t mixed = find_mixed();
    if (row_.spare) return;
    float w[WMAX], bias;
    parameters_.get(p_, w, bias);
#pragma unroll 1
    for (int from = 0;;) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const int base = from + i * TILE;
        if (!kAllTiles && base >= s_.end) continue;
        if (SEQ && (kOnlyMixed || (mixed >> i & 1) != 0)) {
          tile<true, SEQ>(base, raw[i], others[i], w, bias);
        } else if (FUSED || i == 0) {
          tile<true, false>(base, raw[i], others[i], w, bias);
        } else {
          tile<false, false>(base, raw[i], others[i], w, bias);
        }
      }
      from += N * TILE;
      if (!FUSED || from >= s_.end) return;
      mixed >>= N;
      load(from, raw, others);
    }
  }

  template <int N>
  __device__ __forceinline__ void load(int from, Raw (&raw)[N], Others (&others)[N]) const {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int base = from + i * TILE;
      raw[i] = x_.vectors(base);
      if constexpr (FUSED) {
        if (p_.pre_gate.given()) others[i].pre = pre_gate_.vectors(base);
        others[i].post = load_or(p_.post_gate, post_gate_, base, 1.0f);
        others[i].residual = load_or(p_.residual, residual_, base, -0.0f);  // changes no product
      }
    }
  }

  // A tile of a tensor, or `missing` for every step if that is not given.
  __device__ __forceinline__ typename OwnReader::Raw load_or(const View<T>& v,
                                                             const OwnReader& reader, int base,
                                                             float missing) const {
    if (v.given()) return reader.vectors(base);
    float values[V];
#pragma unroll
    for (int j = 0; j < V; ++j) values[j] = missing;
    const Pack<T, V> tile = pack<T>(values);
    typename OwnReader::Raw raw;
#pragma unroll
    for (int j = 0; j < Pack<T, V>::kWords; ++j) raw.w[j] = tile.w[j];
    return raw;
  }

  // The row of a gate or residual, at step 0 of s.
  __device__ __forceinline__ const T* of(const View<T>& v) const {
    return FUSED ? v.at(row_.b, row_.d, s_.origin) : nullptr;
  }

  // Loads a tile ahead.
  __device__ __forceinline__ void one_by_one() {
    Raw next = x_.load(0);
    const uint32_t mixed = find_mixed();
    if (row_.spare) return;
    float w[WMAX], bias;
    parameters_.get(p_, w, bias);
#pragma unroll 1
    for (int base = 0; base < s_.end; base += TILE) {
      const Raw raw = next;
      if (base + TILE < s_.end) next = x_.load(base + TILE);
      if (kOnlyMixed || (mixed >> base / TILE & 1) != 0) {
        tile<true, SEQ>(base, raw, Others{}, w, bias);
      } else {
        tile<true, false>(base, raw, Others{}, w, bias);
      }
    }
  }

  // A bit for each tile that has several ids.
  __device__ __forceinline__ uint32_t find_mixed() const {
    if constexpr (SEQ) {
      if (!kOnlyMixed && p_.seq_idx.data == nullptr) return 0;
      const Segment chunk = s_.with(-offset_);
      const SeqIdx ids = p_.seq_idx.from(row_.b, chunk.origin);
      return Ids(shared_).find_mixed(ids, chunk.lo, chunk.hi, first_);
    }
    return 0;
  }

  // EDGE: the tile may have steps before the row, or take states. MIXED: it may have several ids.
  template <bool EDGE, bool MIXED>
  __device__ __forceinline__ void tile(int base, const Raw& raw, const Others& others,
                                       const float (&w)[WMAX], float bias) const {
    const int t = base + lane_ * V;
    auto xs = x_.own(raw);
    if constexpr (FUSED) {
      if (p_.pre_gate.given()) xs = product(pre_gate_.own(others.pre), xs);
    }
    float h[H + V], z[V];
#pragma unroll
    for (int j = 0; j < H + V; ++j) h[j] = xs.get(K::HP - H + j);
    if (EDGE && K::kRagged && base <= s_.lo) {
#pragma unroll
      for (int j = 0; j < H + V; ++j) h[j] = t - H + j < s_.lo ? 0.0f : h[j];
    }
    if (EDGE && base <= s_.lo && states_) {
      take_states<H>(p_, row_.b, row_.d, lane_, first_, t, s_.lo, h);
    }
    [[maybe_unused]] Matches<V, H> same;
    if constexpr (MIXED) same = Ids(shared_).load(t - offset_);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      z[j] = convolve<WMAX>(
          bias, MIXED ? 0 : first_, [&](int k) { return w[k]; }, [&](int k) { return h[j + k]; },
          [&](int k) { return !MIXED || same.takes(j, k); });
    }
    if (p_.silu) {
#pragma unroll
      for (int j = 0; j < V; ++j) z[j] = silu<T>(z[j]);
    }
    if constexpr (FUSED) gate<MIXED>(others, same, z);
    if (!FUSED && MIXED && same.has_padding()) {
#pragma unroll
      for (int j = 0; j < V; ++j) z[j] = same.is_padding(j) ? 0.0f : z[j];
    }
    if (ACCESS == Access::kAligned) {
      out_.write_vectors(base, pack<T>(z));
    } else {
      out_.write(base, pack<T>(z));
    }
  }

  // Applies post_gate and residual to the activations z.
  template <bool MIXED>
  __device__ __forceinline__ void gate(const Others& others, const Matches<V, H>& same,
                                       float (&z)[V]) const {
    const auto gates = post_gate_.own(others.post), residuals = residual_.own(others.residual);
#pragma unroll
    for (int j = 0; j < V; ++j) z[j] = fmaf(z[j], gates.get(j), residuals.get(j));
    if (MIXED && same.has_padding()) {
#pragma unroll
      for (int j = 0; j < V; ++j) {
        z[j] = same.is_padding(j) ? residuals.get(j) + 0.0f : z[j];  // no -0
      }
    }
  }

  const Args& p_;
  const ForwardRow<K> row_;
  const Segment s_;
  int offset_, lane_;
  const bool states_;
  Reader x_, pre_gate_;             // the gates and the residual with FUSED
  OwnReader post_gate_, residual_;  // with access as x has
  RowWriter<T, V, ACCESS> out_;
  Shared* shared_;
  int first_;
  // After x_, and read before it: registers that its loads fill for nothing would make these wait.
  WarpParameters<WMAX, EXACT> parameters_;
};

template <typename K>
constexpr int kForwardFirstBlocks =
    K::EXACT ? (K::WMAX > 4 ? 8 - (K::WMAX == 8) - 2 * K::SEQ
                            : (K::ACCESS == Access::kUnit ? 7 : 9 - K::SEQ))
             : (K::WMAX > 4 && !K::FUSED ? 4 - K::SEQ
                                         : (K::SEQ ? 5 : (K::ACCESS == Access::kUnit ? 7 : 9)));

template <typename K>
__global__ void __launch_bounds__(kThreads, kAtMost<kForwardFirstBlocks<K>>)
    forward_channel_first(const ForwardArgs<typename K::Element> p) {
  if (kSmallPtx && !K::kAnyStride) return;
  using T = typename K::Element;
  const int lane = threadIdx.x % 32;
  const ForwardRow<K> row(p);
  if (row.b >= p.batch) return;
  const T* x = p.x.at(row.b, row.d, 0);
  T* out = p.out.at(row.b, row.d, 0);
  // Tiles are where out is aligned.
  const int offset = K::kRagged ? misalignment(out) : 0;
  const Segment s(row.index, p.chunk, offset, p.seqlen);
  const auto time = [](const View<T>& v) { return K::ACCESS == Access::kStrided ? v.time : 1; };

  const bool states = p.initial_states.given() && s.lo >= 0;
  pdl_wait();
  if (gridDim.x > kManyBlocks) pdl_launch();
  __shared__ typename ForwardTiles<K>::Shared shared;
  ForwardTiles<K> tiles(p, row, s, offset, lane, states, x + s.origin * time(p.x),
                        out + s.origin * time(p.out), &shared);
  tiles.run();
}

}  // namespace causal_conv1d::gpu
