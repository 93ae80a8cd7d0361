// Which rows a warp of the channel-first backward has, and their tiles in flight.
#pragma once

#include "backward.cuh"
#include "dz_exchange.cuh"
#include "tile_reader.cuh"
#include "variants.cuh"

namespace causal_conv1d::gpu {

// Blocks that an SM has registers for.
template <typename K>
constexpr int kFirstBlocks =
    K::SEQ ? (K::EXACT ? 4 : 3 - (K::WMAX > 4 && !K::FUSED))
           : (K::ACCESS == Access::kDense && sizeof(typename K::Element) == 2 ? 5 : 4);

// The first step of the last tile of a part, whose tiles begin at multiples of TILE.
template <int TILE>
__device__ __forceinline__ int last_tile(const Segment& s) {
  return (s.end - 1) / TILE * TILE;
}

// The warp's part of the problem: one part of the time axis of several rows of one channel. Warps
// are numbered by (part, d), or by (d, part) if a block is to have all parts of a channel.
template <typename K>
struct FirstWork {
  using T = typename K::Element;
  static constexpr int G = kPerVector<T>;
  static constexpr bool kAligned = K::ACCESS == Access::kAligned;
  uint32_t index, d, part;
  int64_t b0, b1;  // the rows
  // How far before its first step a row begins its tiles. It depends on shapes alone, as the sums
  // do, and fits rows that lie one after the other.
  int first_offset = 0;
  uint32_t batch_steps = 0;  // from a row to the next

  template <typename Args>
  __device__ __forceinline__ explicit FirstWork(const Args& p) {
    const uint32_t warp = blockIdx.x * kWarps + uniform(threadIdx.x / 32);
    d = warp >> p.part_bits;
    part = warp & ((1u << p.part_bits) - 1);
    if (!p.whole) part = split(warp, p.by_dim, &d);
    b0 = split(part, p.by_chunks, &index) * p.rows;
    b1 = d < p.dim ? min(b0 + p.rows, p.batch) : b0;
    if (kAligned) return;
    const uint32_t seqlen = static_cast<uint32_t>(p.seqlen);
    batch_steps = static_cast<uint32_t>(p.dim) * seqlen;
    first_offset = static_cast<int>((static_cast<uint32_t>(b0) * batch_steps + d * seqlen) % G);
  }

  // That of the next row.
  __device__ __forceinline__ int offset_after(int offset) const {
    return kAligned ? 0 : static_cast<int>((offset + batch_steps) % G);
  }

  // Whether the last vector of row b is not whole: only at a tensor's end.
  template <typename Args>
  __device__ __forceinline__ bool ends_within(const Args& p, int64_t b) const {
    return p.x.at(b, d, 0) + p.seqlen + (G - 1) > p.x_end ||
           p.dout.at(b, d, 0) + p.seqlen + (G - 1) > p.dout_end;
  }
};

// A ring of stages in shared memory: one is used while the others are in flight. A stage is a tile
// of dout, then one of x, then with FUSED those of post_gate and pre_gate, as far as they are
// given; it is known by where the lane's own bytes of x are. Tiles begin at multiples of 128 bytes,
// or cp.async takes longer to write them.
template <typename K>
class TilePipeline {
  using T = typename K::Element;
  using Args = BackwardArgs<T>;

 public:
  using ReaderX = TileReader<T, K::V, K::HP, K::ACCESS>;
  using ReaderG = TileReader<T, K::V, 0, K::ACCESS>;
  static constexpr int kStages = kTuring ? 2 : 4;

 private:
  static constexpr int kBetween = 128, kTileBytes = K::TILE * static_cast<int>(sizeof(T));
  static constexpr int kFromDout = kTileBytes + kBetween;  // to x, and so on
  static constexpr int kStageBytes = (K::FUSED ? 3 : 1) * kFromDout + kTileBytes +
                                     (ReaderX::kBytesAfter > 0 || ReaderX::kPlaced ? kBetween : 0);
  static_assert(ReaderG::kBytesAfter + ReaderX::kBytesBefore <= kBetween, "room for both");
  static constexpr int kRingBytes = kStages * kStageBytes;
  static constexpr int kRoom =
      kRoomFor<kFirstBlocks<K>, kWarps * sizeof(typename DzExchange<K::H>::Shared)> / kWarps;

 public:
  struct alignas(128) Ring {
    char bytes[kRingBytes > kRoom ? kRingBytes : kRoom];
  };

  // aligned: the part if its tiles began with the row.
  __device__ __forceinline__ TilePipeline(const Args& p, const FirstWork<K>& work,
                                          const Segment& aligned, bool ragged_end, Ring* ring,
                                          int lane)
      : x_(lane),
        pre_gate_(lane),
        dout_(lane),
        post_gate_(lane),
        ragged_end_(ragged_end),
        next_offset_(work.first_offset) {
    first_stage_ = shared_address(ring) + kFromDout + lane * K::V * sizeof(T);
    keep(first_stage_);
    last_stage_ = first_stage_ + (kStages - 1) * kStageBytes;
    stage_ = first_stage_;
    stage_before_ = last_stage_;
    rows_left_ = static_cast<int>(work.b1 - work.b0);
    x_.begin(p.x.at(work.b0 - 1, work.d, aligned.origin), p.x.time, aligned.lo);
    dout_.begin(p.dout.at(work.b0 - 1, work.d, aligned.origin), p.dout.time, aligned.lo);
    if constexpr (K::FUSED) {
      pre_gate_.begin(p.pre_gate.at(work.b0 - 1, work.d, aligned.origin), 1, aligned.lo);
      post_gate_.begin(p.post_gate.at(work.b0 - 1, work.d, aligned.origin), 1, aligned.lo);
    }
  }

  // Starts to read the first tiles.
  __device__ __forceinline__ void fill(const Args& p, const FirstWork<K>& work,
                                       const Segment& aligned) {
#pragma unroll 1
    for (int i = 0; i < kStages - 1; ++i) {
      start(p, work, aligned, first_stage_ + i * kStageBytes);
    }
  }

  // Waits for a tile, and starts to read another one to where the tile before was.
  __device__ __forceinline__ void next(const Args& p, const FirstWork<K>& work,
                                       const Segment& aligned) {
    if constexpr (kTuring) land(p, stage_);  // read two tiles ago
    wait_for_copies<kStages - 2>();
    __syncwarp();  // the tile has come, and the one before is read
    start(p, work, aligned, stage_before_);
  }
  // The lane's own bytes of that tile.
  __device__ __forceinline__ uint32_t own_x() const { return stage_; }
  __device__ __forceinline__ uint32_t own_dout() const { return stage_ - kFromDout; }
  __device__ __forceinline__ uint32_t own_post_gate() const { return stage_ + kFromDout; }
  __device__ __forceinline__ uint32_t own_pre_gate() const { return stage_ + 2 * kFromDout; }
  // Once they are read.
  __device__ __forceinline__ void advance() {
    stage_before_ = stage_;
    stage_ = stage_ == last_stage_ ? first_stage_ : stage_ + kStageBytes;
  }

  __device__ __forceinline__ const ReaderX& x() const { return x_; }
  __device__ __forceinline__ const ReaderG& dout() const { return dout_; }

 private:
  // Starts to read the next tile, of the next row if there are no more of this one, or zeros.
  __device__ __forceinline__ void start(const Args& p, const FirstWork<K>& work,
                                        const Segment& aligned, uint32_t stage) {
    if (next_base_ < 0) {
      if (rows_left_ > 0) {
        next_row(p, work, aligned);
        --rows_left_;
      } else {
        span_ = ReaderX::span(0, 0);
        next_base_ = kFar;
      }
    }
    const uint32_t dout = stage - kFromDout;
    x_.start(stage, next_base_, span_, x_tile_);
    dout_.start(dout, next_base_, span_, dout_tile_);
    if (x_.is_shifted()) x_.start_after(stage, next_base_, span_, x_tile_);
    if (dout_.is_shifted()) dout_.start_after(dout, next_base_, span_, dout_tile_);
    if constexpr (K::FUSED) {
      const uint32_t post_gate = stage + kFromDout, pre_gate = stage + 2 * kFromDout;
      if (p.post_gate.given()) post_gate_.start(post_gate, next_base_, span_, post_gate_tile_);
      if (p.pre_gate.given()) pre_gate_.start(pre_gate, next_base_, span_, pre_gate_tile_);
    }
    next_base_ -= K::TILE;
    commit_copies();
  }

  __device__ __forceinline__ void land(const Args& p, uint32_t stage) const {
    x_.land(stage, x_tile_);
    dout_.land(stage - kFromDout, dout_tile_);
    if constexpr (K::FUSED) {
      if (p.post_gate.given()) post_gate_.land(stage + kFromDout, post_gate_tile_);
      if (p.pre_gate.given()) pre_gate_.land(stage + 2 * kFromDout, pre_gate_tile_);
    }
  }

  __device__ __forceinline__ void next_row(const Args& p, const FirstWork<K>& work,
                                           const Segment& aligned) {
    const Segment s = aligned.with(next_offset_);
    x_.row(p.x.batch, next_offset_, aligned.lo);
    dout_.row(p.dout.batch, next_offset_, aligned.lo);
    if constexpr (K::FUSED) {
      pre_gate_.row(p.pre_gate.batch, next_offset_, aligned.lo);
      post_gate_.row(p.post_gate.batch, next_offset_, aligned.lo);
    }
    next_base_ = last_tile<K::TILE>(s);
    next_offset_ = work.offset_after(next_offset_);
    span_ = ReaderX::span(s.lo, s.hi);
    constexpr int G = kPerVector<T>;
    if (ragged_end_ && work.ends_within(p, work.b1 - rows_left_)) {
      span_ = s.hi - s.lo > G ? span_ - G : 0;
    }
  }

  ReaderX x_, pre_gate_;
  ReaderG dout_, post_gate_;
  typename ReaderX::Tile x_tile_, pre_gate_tile_;
  typename ReaderG::Tile dout_tile_, post_gate_tile_;
  uint32_t first_stage_, last_stage_, stage_, stage_before_;
  const bool ragged_end_;
  int next_base_ = -1, next_offset_, rows_left_;  // of the tile that is started next
  uint32_t span_ = 0;
};

}  // namespace causal_conv1d::gpu
