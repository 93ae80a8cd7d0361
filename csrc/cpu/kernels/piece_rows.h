// The sequence that a piece belongs to, as rows of all the tensors of a problem.
#pragma once

#include <stdint.h>

#include "../problem.h"
#include "pieces.h"
#include "seq_ids.h"
#include "tensor.h"
#include "tile.h"

namespace causal_conv1d {
namespace {

struct ForwardRow {
  Inputs in;
  Plane out, post_gate, residual, final_, before;
  IdRow ids;
  bool unit_time;  // all that is like x has unit strides over time
  bool plain;      // without gates and residual, not joined, and taps are not apart
};

CAUSAL_CONV1D_INLINE bool has_unit_time(const Plane& p) { return !is_given(p) || p.time == 1; }

__attribute__((noinline)) inline ForwardRow row_of(const ForwardProblem& p, const Piece& piece) {
  const int64_t step = p.sequences.dilation;
  const auto like_x = [&](const Tensor& t) { return plane_of(t, piece.b, piece.start, step); };
  ForwardRow row;
  row.in = {like_x(p.x), like_x(p.pre_gate), {}};
  if (piece.has_initial) {
    row.in.initial = plane_of(p.initial_states, piece.row, piece.initial, step);
  }
  row.out = like_x(p.out);
  row.post_gate = like_x(p.post_gate);
  row.residual = like_x(p.residual);
  row.before = like_x(p.joined.before);
  row.final_ = plane_of(p.final_states_out, piece.row, piece.final_, step);
  row.ids = id_row_of(p.seq_idx, piece, step);
  row.unit_time = has_unit_time(row.in.x) && has_unit_time(row.in.pre_gate) &&
                  has_unit_time(row.out) && has_unit_time(row.post_gate) &&
                  has_unit_time(row.residual);
  row.plain = !is_given(row.in.pre_gate) && !is_given(row.post_gate) && !is_given(row.residual) &&
              !is_given(row.before) && p.sequences.apart == 1;
  return row;
}

// `length` steps, before whose step `end` the final states lie; has_end: there are inputs before
// them, if not in this phase.
struct BackwardRow {
  Inputs in;
  Plane dout, post_gate, dfinal, dx, dpre_gate, dpost_gate, dinitial, before, behind;
  IdRow ids;
  int64_t length, end;
  bool has_end, residual_is_x, unit_time, plain;
};

__attribute__((noinline)) inline BackwardRow row_of(const BackwardProblem& p, const Piece& piece) {
  const int64_t step = p.sequences.dilation;
  const auto like_x = [&](const Tensor& t) { return plane_of(t, piece.b, piece.start, step); };
  const auto like_states = [&](const Tensor& t, int64_t first) {
    return plane_of(t, piece.row, first, step);
  };
  BackwardRow row;
  row.in = {like_x(p.x), like_x(p.pre_gate), like_states(p.initial_states, piece.initial)};
  row.dout = like_x(p.dout);
  row.post_gate = like_x(p.post_gate);
  row.dfinal = like_states(p.dfinal_states, piece.final_);
  row.dx = like_x(p.dx);
  row.dpre_gate = like_x(p.dpre_gate);
  row.dpost_gate = like_x(p.dpost_gate);
  row.before = like_x(p.joined.before);
  row.behind = like_x(p.joined.behind);
  row.dinitial = like_states(p.dinitial_states, piece.initial);
  row.ids = id_row_of(p.seq_idx, piece, step);
  row.length = piece.length;
  row.end = piece.end;
  row.has_end = piece.has_end;
  row.residual_is_x = p.residual_is_x;
  row.unit_time = has_unit_time(row.in.x) && has_unit_time(row.in.pre_gate) &&
                  has_unit_time(row.dout) && has_unit_time(row.post_gate) &&
                  has_unit_time(row.dx) && has_unit_time(row.dpre_gate) &&
                  has_unit_time(row.dpost_gate);
  row.plain = !is_given(row.in.pre_gate) && !is_given(row.post_gate) && !p.residual_is_x &&
              !is_given(row.before) && p.sequences.apart == 1;
  return row;
}

}  // namespace
}  // namespace causal_conv1d
