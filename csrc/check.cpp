#include "check.h"

#include <cstdarg>
#include <cstdio>
#include <cstring>

namespace causal_conv1d {

const char* dtype_name(int32_t dtype) {
  switch (dtype) {
    case CAUSAL_CONV1D_FLOAT32: return "float32";
    case CAUSAL_CONV1D_FLOAT16: return "float16";
    case CAUSAL_CONV1D_BFLOAT16: return "bfloat16";
    case CAUSAL_CONV1D_FLOAT64: return "float64";
    case CAUSAL_CONV1D_INT32: return "int32";
    case CAUSAL_CONV1D_INT64: return "int64";
    default: return "an unsupported dtype";
  }
}

namespace {

bool is_float(int32_t dtype) {
  return dtype >= CAUSAL_CONV1D_FLOAT32 && dtype <= CAUSAL_CONV1D_FLOAT64;
}

bool is_empty(const Tensor& t) {
  for (int i = 0; i < t.ndim; ++i) {
    if (t.sizes[i] == 0) return true;
  }
  return false;
}

struct Shape {
  char text[96];
};

Shape shape(int ndim, const int64_t* sizes) {
  Shape s;
  int n = std::snprintf(s.text, sizeof s.text, "(");
  for (int i = 0; i < ndim && i < 3; ++i) {
    n += std::snprintf(s.text + n, sizeof s.text - static_cast<size_t>(n), i ? ", %lld" : "%lld",
                       static_cast<long long>(sizes[i]));
  }
  std::snprintf(s.text + n, sizeof s.text - static_cast<size_t>(n),
                ndim > 3 ? ", ...)" : (ndim == 1 ? ",)" : ")"));
  return s;
}

Shape shape(const Tensor& t) { return shape(t.ndim, t.sizes); }

// Collects the first failure; later checks are skipped by the callers' early returns.
struct Checker {
  const char* op;

  Status fail(const char* name, const char* format, ...) const
      __attribute__((format(printf, 3, 4))) {
    char text[200];
    va_list args;
    va_start(args, format);
    std::vsnprintf(text, sizeof text, format, args);
    va_end(args);
    return error(CAUSAL_CONV1D_INVALID_ARGUMENT, "%s: %s %s", op, name, text);
  }

  Status data(const char* name, const Tensor& t) const {
    for (int i = 0; i < t.ndim; ++i) {
      if (t.sizes[i] < 0) return fail(name, "must have sizes >= 0, got %s", shape(t).text);
    }
    if (!is_empty(t) && t.data == nullptr) return fail(name, "has no data");
    return ok();
  }

  // A required tensor of the given sizes; -1 in want matches any size.
  Status sizes(const char* name, const Tensor& t, const char* dims, int ndim,
               const int64_t* want) const {
    bool same = t.ndim == ndim;
    for (int i = 0; same && i < ndim; ++i) same = want[i] < 0 || t.sizes[i] == want[i];
    if (same) return data(name, t);
    if (!given(t)) return fail(name, "must be given");
    bool known = true;
    for (int i = 0; i < ndim; ++i) known = known && want[i] >= 0;
    if (known)
      return fail(name, "must be %s = %s, got %s", dims, shape(ndim, want).text, shape(t).text);
    for (int i = 0; i < ndim; ++i) {
      if (want[i] >= 0) {
        return fail(name, "must be %s with dim = %lld, got %s", dims,
                    static_cast<long long>(want[i]), shape(t).text);
      }
    }
    return fail(name, "must be %s, got %s", dims, shape(t).text);
  }

  // Floating point, and float64 exactly if x is.
  Status float_like(const char* name, const Tensor& t, const Tensor& x) const {
    if (!is_float(t.dtype)) {
      return fail(name, "must be float32, float16 or bfloat16 (or float64 with x), got %s",
                  dtype_name(t.dtype));
    }
    if ((t.dtype == CAUSAL_CONV1D_FLOAT64) != (x.dtype == CAUSAL_CONV1D_FLOAT64)) {
      return fail(name, "must be float64 if and only if x is, got %s with x %s",
                  dtype_name(t.dtype), dtype_name(x.dtype));
    }
    return ok();
  }

  Status same_dtype(const char* name, const Tensor& t, const Tensor& x) const {
    if (t.dtype == x.dtype) return ok();
    return fail(name, "must have x's dtype %s, got %s", dtype_name(x.dtype), dtype_name(t.dtype));
  }

  Status index(const char* name, const Tensor& t) const {
    if (t.dtype == CAUSAL_CONV1D_INT32 || t.dtype == CAUSAL_CONV1D_INT64) return ok();
    return fail(name, "must be int32 or int64, got %s", dtype_name(t.dtype));
  }

  // Memory that is written must be a set of distinct elements, and not an input's.
  Status writable(const char* name, const Tensor& t, const Tensor& x) const {
    if (!given(t) || is_empty(t)) return ok();
    for (int i = 0; i < t.ndim; ++i) {
      if (t.sizes[i] > 1 && t.strides[i] == 0) {
        return fail(name, "is written and must not be an expanded tensor (stride 0)");
      }
    }
    if (t.data == x.data && !is_empty(x)) return fail(name, "must not share x's memory");
    return ok();
  }
};

#define RETURN_IF_FAILED(expression)                      \
  do {                                                    \
    Status status_ = (expression);                        \
    if (status_.code != CAUSAL_CONV1D_OK) return status_; \
  } while (0)

Status check_x(const Checker& c, const Tensor& x) {
  const int64_t any[3] = {-1, -1, -1};
  RETURN_IF_FAILED(c.sizes("x", x, "(batch, dim, seqlen)", 3, any));
  return c.float_like("x", x, x);
}

Status check_weight(const Checker& c, const Tensor& weight, const Tensor& bias, const Tensor& x) {
  const int64_t want[2] = {x.sizes[1], -1};
  RETURN_IF_FAILED(c.sizes("weight", weight, "(dim, width)", 2, want));
  RETURN_IF_FAILED(c.float_like("weight", weight, x));
  if (weight.sizes[1] < 1)
    return c.fail("weight", "must have width >= 1, got %s", shape(weight).text);
  if (!given(bias)) return ok();
  RETURN_IF_FAILED(c.sizes("bias", bias, "(dim,)", 1, want));
  return c.float_like("bias", bias, x);
}

Status check_states(const Checker& c, const char* name, const Tensor& t, const Tensor& x,
                    int64_t width) {
  if (!given(t)) return ok();
  const int64_t want[3] = {x.sizes[0], x.sizes[1], width - 1};
  RETURN_IF_FAILED(c.sizes(name, t, "(batch, dim, width - 1)", 3, want));
  return c.float_like(name, t, x);
}

Status check_seq_idx(const Checker& c, const Tensor& seq_idx, const Tensor& x) {
  if (!given(seq_idx)) return ok();
  const int64_t want[2] = {x.sizes[0], x.sizes[2]};
  RETURN_IF_FAILED(c.sizes("seq_idx", seq_idx, "(batch, seqlen)", 2, want));
  return c.index("seq_idx", seq_idx);
}

Status check_like_x(const Checker& c, const char* name, const Tensor& t, const Tensor& x) {
  RETURN_IF_FAILED(c.sizes(name, t, "x's shape", x.ndim, x.sizes));
  return c.same_dtype(name, t, x);
}

Status check_batch_vector(const Checker& c, const char* name, const Tensor& t, const Tensor& x) {
  if (!given(t)) return ok();
  RETURN_IF_FAILED(c.sizes(name, t, "(batch,)", 1, x.sizes));
  return c.index(name, t);
}

}  // namespace

Status ok() {
  Status s;
  s.code = CAUSAL_CONV1D_OK;
  s.message[0] = '\0';
  return s;
}

Status error(causal_conv1d_code code, const char* format, ...) {
  Status s;
  s.code = code;
  va_list args;
  va_start(args, format);
  std::vsnprintf(s.message, sizeof s.message, format, args);
  va_end(args);
  return s;
}

Status check(const ForwardParams& p) {
  const Checker c{"causal_conv1d_fn"};
  RETURN_IF_FAILED(check_x(c, p.x));
  RETURN_IF_FAILED(check_weight(c, p.weight, p.bias, p.x));
  const int64_t width = p.weight.sizes[1];
  RETURN_IF_FAILED(check_seq_idx(c, p.seq_idx, p.x));
  RETURN_IF_FAILED(check_states(c, "initial_states", p.initial_states, p.x, width));
  RETURN_IF_FAILED(check_like_x(c, "out", p.out, p.x));
  RETURN_IF_FAILED(c.writable("out", p.out, p.x));
  RETURN_IF_FAILED(check_states(c, "final_states_out", p.final_states_out, p.x, width));
  return c.writable("final_states_out", p.final_states_out, p.x);
}

Status check(const BackwardParams& p) {
  const Checker c{"causal_conv1d_bwd"};
  RETURN_IF_FAILED(check_x(c, p.x));
  RETURN_IF_FAILED(check_weight(c, p.weight, p.bias, p.x));
  const int64_t width = p.weight.sizes[1];
  RETURN_IF_FAILED(check_like_x(c, "dout", p.dout, p.x));
  RETURN_IF_FAILED(check_seq_idx(c, p.seq_idx, p.x));
  RETURN_IF_FAILED(check_states(c, "initial_states", p.initial_states, p.x, width));
  RETURN_IF_FAILED(check_states(c, "dfinal_states", p.dfinal_states, p.x, width));
  RETURN_IF_FAILED(check_like_x(c, "dx", p.dx, p.x));
  RETURN_IF_FAILED(c.writable("dx", p.dx, p.x));
  if (p.dx.data == p.dout.data && p.dx.data != nullptr) {
    return c.fail("dx", "must not share dout's memory");
  }
  if (given(p.dweight)) {
    RETURN_IF_FAILED(c.sizes("dweight", p.dweight, "(dim, width)", 2, p.weight.sizes));
    RETURN_IF_FAILED(c.float_like("dweight", p.dweight, p.x));
    RETURN_IF_FAILED(c.writable("dweight", p.dweight, p.x));
  }
  if (given(p.dbias)) {
    RETURN_IF_FAILED(c.sizes("dbias", p.dbias, "(dim,)", 1, p.weight.sizes));
    RETURN_IF_FAILED(c.float_like("dbias", p.dbias, p.x));
    RETURN_IF_FAILED(c.writable("dbias", p.dbias, p.x));
  }
  RETURN_IF_FAILED(check_states(c, "dinitial_states", p.dinitial_states, p.x, width));
  return c.writable("dinitial_states", p.dinitial_states, p.x);
}

Status check(const UpdateParams& p) {
  const Checker c{"causal_conv1d_update"};
  const Tensor& x = p.x;
  if (x.ndim != 2 && x.ndim != 3) {
    return c.fail("x", "must be (batch, dim) or (batch, dim, seqlen), got %s", shape(x).text);
  }
  RETURN_IF_FAILED(c.data("x", x));
  RETURN_IF_FAILED(c.float_like("x", x, x));
  RETURN_IF_FAILED(check_weight(c, p.weight, p.bias, x));
  const int64_t width = p.weight.sizes[1];
  const int64_t want[3] = {-1, x.sizes[1], -1};
  RETURN_IF_FAILED(c.sizes("conv_state", p.conv_state, "(batch, dim, state_len)", 3, want));
  RETURN_IF_FAILED(c.float_like("conv_state", p.conv_state, x));
  if (p.conv_state.sizes[2] < width - 1) {
    return c.fail("conv_state", "must have state_len >= width - 1 = %lld, got %s",
                  static_cast<long long>(width - 1), shape(p.conv_state).text);
  }
  if (!given(p.conv_state_indices) && p.conv_state.sizes[0] < x.sizes[0]) {
    return c.fail("conv_state", "must have at least batch = %lld rows, got %s",
                  static_cast<long long>(x.sizes[0]), shape(p.conv_state).text);
  }
  RETURN_IF_FAILED(c.writable("conv_state", p.conv_state, x));
  RETURN_IF_FAILED(check_like_x(c, "out", p.out, x));
  RETURN_IF_FAILED(c.writable("out", p.out, x));
  if (p.out.data == p.conv_state.data && p.out.data != nullptr) {
    return c.fail("out", "must not share conv_state's memory");
  }
  RETURN_IF_FAILED(check_batch_vector(c, "cache_seqlens", p.cache_seqlens, x));
  return check_batch_vector(c, "conv_state_indices", p.conv_state_indices, x);
}

Status check(const VarlenStatesParams& p) {
  const Checker c{"causal_conv1d_varlen_states"};
  const int64_t any[3] = {-1, -1, -1};
  RETURN_IF_FAILED(c.sizes("x", p.x, "(total_tokens, dim)", 2, any));
  RETURN_IF_FAILED(c.float_like("x", p.x, p.x));
  RETURN_IF_FAILED(c.sizes("cu_seqlens", p.cu_seqlens, "(batch + 1,)", 1, any));
  if (p.cu_seqlens.dtype != CAUSAL_CONV1D_INT32 && p.cu_seqlens.dtype != CAUSAL_CONV1D_INT64) {
    return c.fail("cu_seqlens", "must be int32 or int64, got %s", dtype_name(p.cu_seqlens.dtype));
  }
  if (p.cu_seqlens.sizes[0] < 1) return c.fail("cu_seqlens", "must have at least one element");
  const int64_t want[3] = {p.cu_seqlens.sizes[0] - 1, p.x.sizes[1], -1};
  RETURN_IF_FAILED(c.sizes("states", p.states, "(batch, dim, state_len)", 3, want));
  RETURN_IF_FAILED(c.same_dtype("states", p.states, p.x));
  return c.writable("states", p.states, p.x);
}

}  // namespace causal_conv1d
