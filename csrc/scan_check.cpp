#include "scan_check.h"

#include <initializer_list>

#include "checker.h"

namespace causal_conv1d {
namespace {

using Argument = ArgumentOf<Tensor4>;

long long number(int64_t n) { return static_cast<long long>(n); }

// Sizes and type of a float tensor that may be left out.
Status check_optional(const Checker& c, const char* name, const Tensor4& t, const char* dims,
                      int ndim, const int64_t* want, const Tensor4& first) {
  if (!given(t)) return ok();
  RETURN_IF_FAILED(c.sizes(name, t, dims, ndim, want));
  return c.float_like(name, t, first);
}

Status check_required(const Checker& c, const char* name, const Tensor4& t, const char* dims,
                      int ndim, const int64_t* want, const Tensor4& first) {
  if (!given(t)) return c.fail(name, "must be given");
  return check_optional(c, name, t, dims, ndim, want, first);
}

// Of A and the state, whose last dimension it is.
Status check_dstate(const Checker& c, const char* name, const Tensor4& t) {
  const int64_t dstate = t.sizes[t.ndim - 1];
  if (dstate >= 1 && dstate <= kMostStates) return ok();
  return c.fail(name, "must have dstate from 1 to %lld, got %s", number(kMostStates),
                shape(t).text);
}

Status check_groups(const Checker& c, const char* name, const Tensor4& t, const char* whole,
                    int64_t size) {
  if (t.sizes[1] >= 1 && size % t.sizes[1] == 0) return ok();
  return c.fail(name, "must have a number of groups that divides %s = %lld, got %s", whole,
                number(size), shape(t).text);
}

// Of B and C.
Status check_projection(const Checker& c, const char* name, const Tensor4& t,
                        const ScanInputs& in) {
  if (!given(t)) return c.fail(name, "must be given");
  const int64_t batch = in.u.sizes[0], dim = in.u.sizes[1], seqlen = in.u.sizes[2];
  const int64_t dstate = in.A.sizes[1];
  const bool fits = t.ndim == 2 ? t.sizes[0] == dim && t.sizes[1] == dstate
                                : t.ndim == 4 && t.sizes[0] == batch && t.sizes[2] == dstate &&
                                      t.sizes[3] == seqlen;
  if (!fits) {
    return c.fail(name,
                  "must be (batch, groups, dstate, seqlen) = (%lld, groups, %lld, %lld) or (dim, "
                  "dstate) = (%lld, %lld), got %s",
                  number(batch), number(dstate), number(seqlen), number(dim), number(dstate),
                  shape(t).text);
  }
  if (t.ndim == 4) RETURN_IF_FAILED(check_groups(c, name, t, "dim", dim));
  return c.float_like(name, t, in.u);
}

Status check_cu_seqlens(const Checker& c, const Tensor4& t, int64_t batch) {
  if (!given(t)) return ok();
  const int64_t any[1] = {-1};
  RETURN_IF_FAILED(c.sizes("cu_seqlens", t, "(sequences + 1,)", 1, any));
  RETURN_IF_FAILED(c.index("cu_seqlens", t));
  if (t.sizes[0] < 1) return c.fail("cu_seqlens", "must have at least one element");
  if (batch == 1) return ok();
  return c.fail("cu_seqlens", "must be left out unless batch is 1, got batch = %lld",
                number(batch));
}

// The number of (b, d, n, t) fits the kernels' arithmetic.
Status check_work(const Checker& c, const char* name, const Tensor4& t, int64_t dstate) {
  if (!has_elements(t)) return ok();
  int64_t products = dstate;
  bool fits = true;
  for (int i = 0; i < t.ndim; ++i) {
    fits &= !__builtin_mul_overflow(products, t.sizes[i], &products);
  }
  if (fits && products <= kMostProducts) return ok();
  return c.fail(name, "must have at most 2^58 elements times dstate, got %s with dstate %lld",
                shape(t).text, number(dstate));
}

Status check_states(const Checker& c, const char* name, const Tensor4& t, const ScanInputs& in) {
  const int64_t want[3] = {sequences_of(in), in.u.sizes[1], in.A.sizes[1]};
  return check_optional(c, name, t,
                        given(in.cu_seqlens) ? "(sequences, dim, dstate)" : "(batch, dim, dstate)",
                        3, want, in.u);
}

Status check_inputs(const Checker& c, const ScanInputs& in) {
  const int64_t any[3] = {-1, -1, -1};
  RETURN_IF_FAILED(check_required(c, "u", in.u, "(batch, dim, seqlen)", 3, any, in.u));
  const int64_t dim[2] = {in.u.sizes[1], -1};
  RETURN_IF_FAILED(check_required(c, "delta", in.delta, "u's shape", 3, in.u.sizes, in.u));
  RETURN_IF_FAILED(check_required(c, "A", in.A, "(dim, dstate)", 2, dim, in.u));
  RETURN_IF_FAILED(check_dstate(c, "A", in.A));
  RETURN_IF_FAILED(check_projection(c, "B", in.B, in));
  RETURN_IF_FAILED(check_projection(c, "C", in.C, in));
  if (!is_constant(in.B) && !is_constant(in.C) && in.B.sizes[1] != in.C.sizes[1]) {
    return c.fail("C", "must have B's number of groups %lld, got %s", number(in.B.sizes[1]),
                  shape(in.C).text);
  }
  RETURN_IF_FAILED(check_optional(c, "D", in.D, "(dim,)", 1, dim, in.u));
  RETURN_IF_FAILED(check_optional(c, "z", in.z, "u's shape", 3, in.u.sizes, in.u));
  RETURN_IF_FAILED(check_optional(c, "delta_bias", in.delta_bias, "(dim,)", 1, dim, in.u));
  RETURN_IF_FAILED(check_cu_seqlens(c, in.cu_seqlens, in.u.sizes[0]));
  return check_states(c, "initial_states", in.initial_states, in);
}

}  // namespace

bool has_work(const ScanForwardParams& p) {
  return has_elements(p.out) || has_elements(p.last_states);
}

bool has_work(const ScanBackwardParams& p) {
  for (const Tensor4* t : {&p.du, &p.ddelta, &p.dA, &p.dB, &p.dC, &p.dD, &p.dz, &p.ddelta_bias,
                           &p.dinitial_states, &p.out}) {
    if (has_elements(*t)) return true;
  }
  return false;
}

Status check(const ScanForwardParams* params) {
  const Checker c{"selective_scan_fwd", "u"};
  if (params == nullptr) return c.fail("params", "must not be NULL");
  const ScanForwardParams& p = *params;
  const ScanInputs& in = p.inputs;
  RETURN_IF_FAILED(check_inputs(c, in));
  RETURN_IF_FAILED(check_required(c, "out", p.out, "u's shape", 3, in.u.sizes, in.u));
  RETURN_IF_FAILED(check_optional(c, "ungated", p.ungated, "u's shape", 3, in.u.sizes, in.u));
  RETURN_IF_FAILED(check_states(c, "last_states", p.last_states, in));
  const Argument arguments[] = {
      {"u", &in.u},
      {"delta", &in.delta},
      {"A", &in.A},
      {"B", &in.B},
      {"C", &in.C},
      {"D", &in.D},
      {"z", &in.z},
      {"delta_bias", &in.delta_bias},
      {"initial_states", &in.initial_states},
      {"cu_seqlens", &in.cu_seqlens},
      {"out", &p.out},
      {"ungated", &p.ungated},
      {"last_states", &p.last_states},
  };
  RETURN_IF_FAILED(check_memory(c, arguments, 10));
  return check_work(c, "u", in.u, in.A.sizes[1]);
}

Status check(const ScanBackwardParams* params) {
  const Checker c{"selective_scan_bwd", "u"};
  if (params == nullptr) return c.fail("params", "must not be NULL");
  const ScanBackwardParams& p = *params;
  const ScanInputs& in = p.inputs;
  RETURN_IF_FAILED(check_inputs(c, in));
  RETURN_IF_FAILED(check_required(c, "dout", p.dout, "u's shape", 3, in.u.sizes, in.u));
  RETURN_IF_FAILED(check_states(c, "dlast_states", p.dlast_states, in));
  RETURN_IF_FAILED(check_optional(c, "du", p.du, "u's shape", 3, in.u.sizes, in.u));
  RETURN_IF_FAILED(check_optional(c, "ddelta", p.ddelta, "u's shape", 3, in.u.sizes, in.u));
  RETURN_IF_FAILED(check_optional(c, "dA", p.dA, "A's shape", 2, in.A.sizes, in.u));
  RETURN_IF_FAILED(check_optional(c, "dB", p.dB, "B's shape", in.B.ndim, in.B.sizes, in.u));
  RETURN_IF_FAILED(check_optional(c, "dC", p.dC, "C's shape", in.C.ndim, in.C.sizes, in.u));
  const int64_t* const dim = in.u.sizes + 1;
  RETURN_IF_FAILED(check_optional(c, "dD", p.dD, "(dim,)", 1, dim, in.u));
  if (given(p.dz) && !given(in.z)) return c.fail("dz", "must be left out without z");
  RETURN_IF_FAILED(check_optional(c, "dz", p.dz, "u's shape", 3, in.u.sizes, in.u));
  RETURN_IF_FAILED(check_optional(c, "ddelta_bias", p.ddelta_bias, "(dim,)", 1, dim, in.u));
  RETURN_IF_FAILED(check_states(c, "dinitial_states", p.dinitial_states, in));
  RETURN_IF_FAILED(check_optional(c, "out", p.out, "u's shape", 3, in.u.sizes, in.u));
  const Argument arguments[] = {
      {"u", &in.u},
      {"delta", &in.delta},
      {"A", &in.A},
      {"B", &in.B},
      {"C", &in.C},
      {"D", &in.D},
      {"z", &in.z},
      {"delta_bias", &in.delta_bias},
      {"initial_states", &in.initial_states},
      {"cu_seqlens", &in.cu_seqlens},
      {"dout", &p.dout},
      {"dlast_states", &p.dlast_states},
      {"du", &p.du},
      {"ddelta", &p.ddelta},
      {"dA", &p.dA},
      {"dB", &p.dB},
      {"dC", &p.dC},
      {"dD", &p.dD},
      {"dz", &p.dz},
      {"ddelta_bias", &p.ddelta_bias},
      {"dinitial_states", &p.dinitial_states},
      {"out", &p.out},
  };
  RETURN_IF_FAILED(check_memory(c, arguments, 12));
  return check_work(c, "u", in.u, in.A.sizes[1]);
}

Status check(const StateUpdateParams* params) {
  const Checker c{"selective_state_update"};
  if (params == nullptr) return c.fail("params", "must not be NULL");
  const StateUpdateParams& p = *params;
  const int64_t any[3] = {-1, -1, -1};
  RETURN_IF_FAILED(check_required(c, "x", p.x, "(batch, heads, dim)", 3, any, p.x));
  const int64_t batch = p.x.sizes[0], heads = p.x.sizes[1], dim = p.x.sizes[2];
  if (!given(p.state)) return c.fail("state", "must be given");
  if (p.state.ndim != 4 || p.state.sizes[1] != heads || p.state.sizes[2] != dim) {
    return c.fail("state",
                  "must be (states, heads, dim, dstate) with heads = %lld and dim = %lld, got %s",
                  number(heads), number(dim), shape(p.state).text);
  }
  RETURN_IF_FAILED(c.no_negative_size("state", p.state));
  RETURN_IF_FAILED(check_dstate(c, "state", p.state));
  RETURN_IF_FAILED(c.float_like("state", p.state, p.x));
  if (!given(p.state_indices) && p.state.sizes[0] != batch) {
    return c.fail("state", "must have batch = %lld rows unless state_indices is given, got %s",
                  number(batch), shape(p.state).text);
  }
  const int64_t* const per_head = p.state.sizes + 1;  // heads, dim, dstate
  RETURN_IF_FAILED(check_required(c, "dt", p.dt, "x's shape", 3, p.x.sizes, p.x));
  RETURN_IF_FAILED(check_required(c, "A", p.A, "(heads, dim, dstate)", 3, per_head, p.x));
  const Argument projections[] = {{"B", &p.B}, {"C", &p.C}};
  for (const auto& [name, t] : projections) {
    if (!given(*t)) return c.fail(name, "must be given");
    if (t->ndim != 3 || t->sizes[0] != batch || t->sizes[2] != per_head[2]) {
      return c.fail(name, "must be (batch, groups, dstate) = (%lld, groups, %lld), got %s",
                    number(batch), number(per_head[2]), shape(*t).text);
    }
    RETURN_IF_FAILED(check_groups(c, name, *t, "heads", heads));
    RETURN_IF_FAILED(c.float_like(name, *t, p.x));
  }
  if (p.B.sizes[1] != p.C.sizes[1]) {
    return c.fail("C", "must have B's number of groups %lld, got %s", number(p.B.sizes[1]),
                  shape(p.C).text);
  }
  RETURN_IF_FAILED(check_optional(c, "D", p.D, "(heads, dim)", 2, per_head, p.x));
  RETURN_IF_FAILED(check_optional(c, "z", p.z, "x's shape", 3, p.x.sizes, p.x));
  RETURN_IF_FAILED(check_optional(c, "dt_bias", p.dt_bias, "(heads, dim)", 2, per_head, p.x));
  if (given(p.state_indices)) {
    RETURN_IF_FAILED(c.sizes("state_indices", p.state_indices, "(batch,)", 1, p.x.sizes));
    RETURN_IF_FAILED(c.index("state_indices", p.state_indices));
  }
  RETURN_IF_FAILED(check_required(c, "out", p.out, "x's shape", 3, p.x.sizes, p.x));
  const Argument arguments[] = {
      {"x", &p.x},
      {"dt", &p.dt},
      {"A", &p.A},
      {"B", &p.B},
      {"C", &p.C},
      {"D", &p.D},
      {"z", &p.z},
      {"dt_bias", &p.dt_bias},
      {"state_indices", &p.state_indices},
      {"state", &p.state},
      {"out", &p.out},
  };
  RETURN_IF_FAILED(check_memory(c, arguments, 9));
  return check_work(c, "x", p.x, per_head[2]);
}

}  // namespace causal_conv1d
