// Where the steps of a row lie in the tiles of the channel-first backward.
#pragma once

#include "tile_pipeline.cuh"

namespace causal_conv1d::gpu {

// Of the row at hand, computed once per row. Time is that of its Segment, whose tiles begin at 0:
//
//     0         TILE
//     |   lo    |         |         |         |   hi    |
//         |<---------- the row ---------------->|
//               |<------- plain tiles ------->|           whole tiles and vectors of the row
//
// A simple tile takes no states, and needs no care for what is not finite outside the row; without
// SEQ it has SiLU.
template <typename K>
struct RowGeometry {
  using T = typename K::Element;
  using Args = BackwardArgs<T>;
  using Reader = typename TilePipeline<K>::ReaderX;
  static constexpr int G = kPerVector<T>, TILE = K::TILE;
  static constexpr Access ACCESS = K::ACCESS;

  Segment s;
  int shift_x = 0, shift_g = 0;         // misalignment of x and dout against tiles
  uint32_t line_x = 0, line_g = 0;      // where tiles begin in lines of 128 bytes
  int first_plain = 0, last_plain = 0;  // where such tiles begin, from .. to
  int first_simple = -kFar, last_simple = kFar;
  // The last tile with states, the last one before those with dfinal_states, and the last one that
  // the row does not end within.
  struct Edges {
    int states_until = -kFar, dfinal_after = kFar, last_whole = 0;
  };
  struct None {};
  std::conditional_t<K::SEQ, Edges, None> edges;
  int outside = kNowhere;  // the place that this lane makes zero: see TileReader::outside()
  bool partial_end = false;

  __device__ __forceinline__ RowGeometry(const Args& p, const FirstWork<K>& work,
                                         const Segment& aligned, bool ragged_end, int lane)
      : s(aligned), ragged_end_(ragged_end), lane_(lane), offset_(work.first_offset) {
    const T* x = p.x.at(work.b0, work.d, aligned.origin);
    const T* dout = p.dout.at(work.b0, work.d, aligned.origin);
    place_x_ = misalignment(x);
    place_g_ = misalignment(dout);
    at_x_ = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(x));
    at_g_ = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(dout));
    const bool states = p.initial_states.given(), dfinal = p.dfinal_states.given();
    if (states || !p.silu) simple_from_ = aligned.lo + (states || K::kRagged);
    if (dfinal || !p.silu) {
      simple_to_ = aligned.hi - TILE - max(dfinal ? p.width - 1 : 0, K::kRagged ? G : 0);
    }
    if (!K::SEQ && !p.silu) simple_from_ = kFar;
    if constexpr (K::SEQ) {
      if (states) aligned_edges_.states_until = aligned.lo;
      if (dfinal) aligned_edges_.dfinal_after = aligned.hi - (p.width - 1) - TILE;
      keep(aligned_edges_.states_until);
      keep(aligned_edges_.dfinal_after);
    }
    keep(simple_from_);  // or they are computed again for every tile
    keep(simple_to_);
  }

  // Of 4 * G lanes: whether the lane's place outside is one of dout.
  __device__ __forceinline__ bool is_for_dout() const { return (lane_ & (2 * G)) != 0; }
  // How far before its first step the row at hand begins its tiles, then that of the next.
  __device__ __forceinline__ int offset() const { return offset_; }

  // Goes on to row b.
  __device__ __forceinline__ void row(const Args& p, const FirstWork<K>& work,
                                      const Segment& aligned, int64_t b) {
    if (Reader::kPlaced) {
      line_x = (at_x_ - offset_ * uint32_t(sizeof(T))) & 127;
      line_g = (at_g_ - offset_ * uint32_t(sizeof(T))) & 127;
      at_x_ += static_cast<uint32_t>(p.x.batch) * uint32_t(sizeof(T));
      at_g_ += static_cast<uint32_t>(p.dout.batch) * uint32_t(sizeof(T));
    }
    if (ACCESS == Access::kUnit) {
      shift_x = (place_x_ - offset_) % G;
      shift_g = (place_g_ - offset_) % G;
      place_x_ += static_cast<uint32_t>(p.x.batch);
      place_g_ += static_cast<uint32_t>(p.dout.batch);
    }
    partial_end = ragged_end_ && work.ends_within(p, b);
    s = aligned.with(offset_);
    first_plain = s.lo + ((shift_x | shift_g) != 0);
    last_plain = s.hi - TILE - (partial_end ? G : 0);
    first_simple = simple_from_ + offset_;
    last_simple = simple_to_ + offset_;
    if constexpr (K::SEQ) {
      edges = {aligned_edges_.states_until + offset_, aligned_edges_.dfinal_after + offset_,
               s.hi - TILE};
    }
    outside = kNowhere;
    if (K::kRagged && lane_ < 4 * G) {
      outside = Reader::outside(s.lo, s.hi, is_for_dout() ? shift_g : shift_x, lane_);
    }
  }
  // Once all is known of the row.
  __device__ __forceinline__ void set_next_offset(const FirstWork<K>& work) {
    offset_ = work.offset_after(offset_);
  }

 private:
  const bool ragged_end_;
  const int lane_;
  int offset_;
  uint32_t place_x_, place_g_, at_x_, at_g_;    // of the next row, as misalignment() takes them
  int simple_from_ = -kFar, simple_to_ = kFar;  // of a row whose tiles begin with it
  std::conditional_t<K::SEQ, Edges, None> aligned_edges_;  // likewise
};

}  // namespace causal_conv1d::gpu
