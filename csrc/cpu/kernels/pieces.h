// The pieces of sequences that a unit works on. With a dilation d a sequence is d phases that know
// nothing of each other: phase r has the steps of times r, r + d, ... of the sequence, and of the
// states the columns at distance d. So kernels see plain sequences, of greater strides.
#pragma once

#include <stdint.h>

#include "../integers.h"
#include "../problem.h"
#include "scratch.h"
#include "tile.h"

namespace causal_conv1d {
namespace {

// Steps t0 to t1 of the `length` steps of a sequence (a phase of it), which start at time `start`
// of batch entry b.
struct Piece {
  int64_t b, start, length, t0, t1;
  int64_t end;              // the step that the final states precede
  bool has_end;             // of the whole sequence: there are inputs before its final states
  int64_t row;              // of the states
  bool has_initial;         // if there are initial states
  int64_t initial, final_;  // first columns of the states
  int64_t window_row;       // of a pool

  // Whether it lies in the same sequence, so that rows of tensors are the same.
  bool is_with(const Piece& other) const {
    return start == other.start && b == other.b && row == other.row && length == other.length;
  }
};

class Pieces {
 public:
  // ends: as BackwardProblem's.
  Pieces(const Sequences& s, const Tiling& tiling, const Range& range, const int64_t* ends)
      : s_(s), seqlen_(tiling.seqlen), range_(range), ends_(ends), phase_(s.dilation) {
    next_ = s.bounds == nullptr ? range.b0 : first_in_range();
  }

  __attribute__((noinline)) bool next(Piece* piece) {
    for (;;) {
      if (phase_ == s_.dilation) {
        if (!take_sequence()) return false;
        phase_ = 0;
      }
      if (take_phase(phase_++, piece)) return true;
    }
  }

  // Whether there is one piece alone, which most units have.
  bool is_one(Piece* piece) {
    *piece = {};
    Piece second = {};
    return next(piece) && !next(&second);
  }

 private:
  // The first sequence that ends at or after the range's start.
  int64_t first_in_range() const {
    int64_t low = 0, high = s_.count;
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      if (s_.bounds[middle + 1] < range_.t0) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }

  bool take_sequence() {
    if (s_.bounds == nullptr) {
      if (next_ == range_.b1) return false;
      b_ = row_ = next_++;
      begin_ = 0;
      length_ = seqlen_;
      end_ = ends_ == nullptr ? length_ : ends_[b_];
      return true;
    }
    for (; next_ < s_.count && s_.bounds[next_] <= range_.t1; ++next_) {
      begin_ = s_.bounds[next_];
      length_ = s_.bounds[next_ + 1] - begin_;
      if (!is_here()) continue;
      b_ = 0;
      row_ = next_++;
      end_ = length_;
      return true;
    }
    return false;
  }

  // Whether some of the sequence lies in the range, or where it would start if it is empty.
  bool is_here() const {
    if (s_.pool != nullptr) return length_ > 0 && starts_here() && s_.pool[next_].slot >= 0;
    if (length_ > 0) return begin_ < range_.t1 && begin_ + length_ > range_.t0;
    return starts_here();
  }
  bool starts_here() const {
    return begin_ >= range_.t0 &&
           (begin_ < range_.t1 || (begin_ == seqlen_ && range_.t1 == seqlen_));
  }

  // Steps of phase r before a time of the sequence.
  int64_t steps_before(int64_t time, int64_t r) const {
    if (s_.dilation == 1) return time;
    return time <= r ? 0 : (time - r + s_.dilation - 1) / s_.dilation;
  }

  // Where a sequence is cut at a time: at a whole number of groups, as the direct kernels ask for.
  int64_t cut_at(int64_t time, int64_t r, int64_t length) const {
    if (time <= 0) return 0;
    return smaller(length, (steps_before(time, r) + kPad - 1) / kPad * kPad);
  }

  bool take_phase(int64_t r, Piece* piece) const {
    piece->length = steps_before(length_, r);
    piece->t0 = cut_at(range_.t0 - begin_, r, piece->length);
    piece->t1 = cut_at(range_.t1 - begin_, r, piece->length);
    if (piece->t0 >= piece->t1 && !(piece->length == 0 && starts_here())) return false;
    piece->b = b_;
    piece->start = begin_ + r;
    piece->row = row_;
    piece->has_initial = true;
    piece->end = steps_before(end_, r);
    piece->has_end = end_ > 0;
    piece->initial = r;
    piece->final_ = s_.dilation == 1 ? 0 : ((r - end_) % s_.dilation + s_.dilation) % s_.dilation;
    if (s_.pool != nullptr) take_whole(s_.pool[row_], piece);
    return true;
  }

  // Of a pool, whoever has the start has all of a sequence: its state is changed, and out may be x.
  void take_whole(const PoolSequence& sequence, Piece* piece) const {
    piece->t1 = length_;
    piece->has_initial = sequence.has_history;
    piece->initial = sequence.first_column;
    piece->row = sequence.slot;
    piece->window_row = sequence.window_row;
  }

  const Sequences& s_;
  const int64_t seqlen_;
  const Range range_;
  const int64_t* const ends_;
  int64_t next_, phase_;
  int64_t b_ = 0, row_ = 0, begin_ = 0, length_ = 0, end_ = 0;  // of the sequence at hand
};

}  // namespace
}  // namespace causal_conv1d
