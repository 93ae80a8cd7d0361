#include "check.h"

#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "overlap.h"

namespace causal_conv1d {

const char* dtype_name(int32_t dtype) {
  switch (dtype) {
    case CAUSAL_CONV1D_FLOAT32: return "float32";
    case CAUSAL_CONV1D_FLOAT16: return "float16";
    case CAUSAL_CONV1D_BFLOAT16: return "bfloat16";
    case CAUSAL_CONV1D_FLOAT64: return "float64";
    case CAUSAL_CONV1D_INT32: return "int32";
    case CAUSAL_CONV1D_INT64: return "int64";
    case CAUSAL_CONV1D_BOOL: return "bool";
    case CAUSAL_CONV1D_UINT8: return "uint8";
    case CAUSAL_CONV1D_INT8: return "int8";
    case CAUSAL_CONV1D_INT16: return "int16";
    case CAUSAL_CONV1D_UINT16: return "uint16";
    case CAUSAL_CONV1D_UINT32: return "uint32";
    case CAUSAL_CONV1D_UINT64: return "uint64";
    case CAUSAL_CONV1D_COMPLEX32: return "complex32";
    case CAUSAL_CONV1D_COMPLEX64: return "complex64";
    case CAUSAL_CONV1D_COMPLEX128: return "complex128";
    case CAUSAL_CONV1D_FLOAT8_E4M3FN: return "float8_e4m3fn";
    case CAUSAL_CONV1D_FLOAT8_E5M2: return "float8_e5m2";
    case CAUSAL_CONV1D_FLOAT8_E4M3FNUZ: return "float8_e4m3fnuz";
    case CAUSAL_CONV1D_FLOAT8_E5M2FNUZ: return "float8_e5m2fnuz";
    case CAUSAL_CONV1D_FLOAT8_E8M0FNU: return "float8_e8m0fnu";
    default: return "an unsupported dtype";
  }
}

namespace {

bool is_float(int32_t dtype) {
  return dtype >= CAUSAL_CONV1D_FLOAT32 && dtype <= CAUSAL_CONV1D_FLOAT64;
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

// Bounds that no memory reaches, within which the kernels' products of sizes fit int64_t.
constexpr int64_t kMostElements = int64_t{1} << 52;
constexpr int64_t kMostProducts = int64_t{1} << 58;  // of a tap and an input
// Far above any filter that is worth summing directly: the backward takes up to width^2 steps for
// an element, here 2^32, and a thread of the CPU has some 32 * width values of scratch memory.
constexpr int64_t kMostWidth = 1 << 16;

// The bytes from a tensor's first to past its last.
struct Range {
  uintptr_t begin, end;
};

struct Argument {
  const char* name;
  const Tensor* tensor;
};

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

  Status no_negative_size(const char* name, const Tensor& t) const {
    for (int i = 0; i < t.ndim; ++i) {
      if (t.sizes[i] < 0) return fail(name, "must have sizes >= 0, got %s", shape(t).text);
    }
    return ok();
  }

  // A required tensor of the given sizes; -1 in want matches any size.
  Status sizes(const char* name, const Tensor& t, const char* dims, int ndim,
               const int64_t* want) const {
    bool same = t.ndim == ndim;
    for (int i = 0; same && i < ndim; ++i) same = want[i] < 0 || t.sizes[i] == want[i];
    if (same) return no_negative_size(name, t);
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
};

#define RETURN_IF_FAILED(expression)                      \
  do {                                                    \
    Status status_ = (expression);                        \
    if (status_.code != CAUSAL_CONV1D_OK) return status_; \
  } while (0)

// Whether a tensor is in memory that is there and can be addressed, and what range it is. Runs for
// every argument of every call, so what is wrong is left to describe_range.
inline bool find_range(const Tensor& t, Range* range) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(t.data);
  const uintptr_t size = static_cast<uintptr_t>(element_size(t.dtype));
  int64_t elements = 1, below = 0, above = 0;
  bool wrong = false;
  for (int i = 0; i < t.ndim; ++i) {
    int64_t span;
    wrong |= __builtin_mul_overflow(elements, t.sizes[i], &elements);
    wrong |= __builtin_mul_overflow(t.sizes[i] - 1, t.strides[i], &span);
    wrong |= span <= -kMostSpan || span >= kMostSpan;
    if (wrong) return false;
    below += span < 0 ? span : 0;
    above += span < 0 ? 0 : span;
  }
  *range = {0, 0};
  if (elements == 0 || t.ndim == 0) return true;
  const uintptr_t before = static_cast<uintptr_t>(-below) * size;
  const uintptr_t after = static_cast<uintptr_t>(above + 1) * size;
  *range = {at - before, at + after};
  return at != 0 && (at & (size - 1)) == 0 && elements <= kMostElements && before <= at &&
         after <= UINTPTR_MAX - at;
}

// What keeps find_range from its answer, if anything does: tensors without elements may be
// anywhere.
Status describe_range(const Checker& c, const Argument& argument) {
  const Tensor& t = *argument.tensor;
  if (!has_elements(t)) return ok();
  const int64_t size = element_size(t.dtype);
  if (t.data == nullptr) return c.fail(argument.name, "has no data");
  if (reinterpret_cast<uintptr_t>(t.data) % static_cast<uintptr_t>(size) != 0) {
    return c.fail(argument.name, "must have data aligned to its elements' %d bytes",
                  static_cast<int>(size));
  }
  int64_t elements = 1;
  bool few = true;
  for (int i = 0; i < t.ndim; ++i) {
    few = few && !__builtin_mul_overflow(elements, t.sizes[i], &elements);
  }
  if (!few || elements > kMostElements) {
    return c.fail(argument.name, "must have at most 2^52 elements, got %s", shape(t).text);
  }
  return c.fail(argument.name, "must lie within memory, got sizes %s and strides %s", shape(t).text,
                shape(t.ndim, t.strides).text);
}

// Whether no dimension reaches the next larger stride: the common case, told fast.
bool is_nested(const Tensor& t) {
  struct Dimension {
    int64_t stride, size;
  } dims[3];
  int n = 0;
  for (int i = t.ndim - 1; i >= 0; --i) {
    if (t.sizes[i] == 1) continue;
    const Dimension d{t.strides[i] < 0 ? -t.strides[i] : t.strides[i], t.sizes[i]};
    int at = n++;
    for (; at > 0 && dims[at - 1].stride > d.stride; --at) dims[at] = dims[at - 1];
    dims[at] = d;
  }
  int64_t reach = 0;
  for (int i = 0; i < n; ++i) {
    if (dims[i].stride <= reach) return false;
    reach += dims[i].stride * (dims[i].size - 1);
  }
  return true;
}

// A tensor that is written is a set of distinct elements.
Status check_distinct(const Checker& c, const Argument& argument) {
  const Tensor& t = *argument.tensor;
  const Overlap found = find_overlap_within(t);
  if (found == Overlap::kNone) return ok();
  for (int i = 0; i < t.ndim; ++i) {
    if (t.sizes[i] > 1 && t.strides[i] == 0) {
      return c.fail(argument.name, "is written and must not be an expanded tensor (stride 0)");
    }
  }
  return c.fail(argument.name,
                found == Overlap::kFound
                    ? "is written and must not overlap itself in memory, got sizes %s, strides %s"
                    : "is written and may overlap itself in memory, which takes too long to find "
                      "out for sizes %s, strides %s",
                shape(t).text, shape(t.ndim, t.strides).text);
}

Status check_disjoint(const Checker& c, const Argument& written, const Argument& other) {
  const Overlap found = find_overlap(*written.tensor, *other.tensor);
  if (found == Overlap::kNone) return ok();
  return c.fail(
      written.name,
      found == Overlap::kFound
          ? "must not overlap %s in memory"
          : "may overlap %s in memory, which takes too long to find out for their strides",
      other.name);
}

bool is_same(const Tensor& a, const Tensor& b) {
  bool same = a.data == b.data && a.dtype == b.dtype && a.ndim == b.ndim;
  for (int i = 0; same && i < a.ndim; ++i) {
    same = a.sizes[i] == b.sizes[i] && (a.strides[i] == b.strides[i] || a.sizes[i] == 1);
  }
  return same;
}

// Whether all arguments lie in memory, and those that are written, which follow `read` others,
// apart from each other and from the rest. in_place: one that is written and may be one that is
// read.
template <int N>
Status check_memory(const Checker& c, const Argument (&arguments)[N], int read,
                    const Tensor* in_place = nullptr, const Tensor* as = nullptr) {
  Range ranges[N];
  for (int i = 0; i < N; ++i) {
    if (find_range(*arguments[i].tensor, &ranges[i])) continue;
    RETURN_IF_FAILED(describe_range(c, arguments[i]));
    ranges[i] = {0, 0};
  }
  for (int i = read; i < N; ++i) {
    if (ranges[i].begin == ranges[i].end) continue;
    if (!is_nested(*arguments[i].tensor)) RETURN_IF_FAILED(check_distinct(c, arguments[i]));
    for (int j = 0; j < i; ++j) {
      if (ranges[i].begin >= ranges[j].end || ranges[j].begin >= ranges[i].end) continue;
      const Tensor &a = *arguments[i].tensor, &b = *arguments[j].tensor;
      if (&a == in_place && &b == as && is_same(a, b)) continue;
      RETURN_IF_FAILED(check_disjoint(c, arguments[i], arguments[j]));
    }
  }
  return ok();
}

Status check_work(const Checker& c, const Tensor& x, int64_t width) {
  if (!has_elements(x)) return ok();
  int64_t products = width;
  bool fits = true;
  for (int i = 0; i < x.ndim; ++i) {
    fits &= !__builtin_mul_overflow(products, x.sizes[i], &products);
  }
  if (fits && products <= kMostProducts) return ok();
  return c.fail("x", "must have at most 2^58 elements times width, got %s with width %lld",
                shape(x).text, static_cast<long long>(width));
}

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
  if (weight.sizes[1] > kMostWidth) {
    return c.fail("weight", "must have width <= %lld, got %s", static_cast<long long>(kMostWidth),
                  shape(weight).text);
  }
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

Status check(const ForwardParams* params) {
  const Checker c{"causal_conv1d_fn"};
  if (params == nullptr) return c.fail("params", "must not be NULL");
  const ForwardParams& p = *params;
  RETURN_IF_FAILED(check_x(c, p.x));
  RETURN_IF_FAILED(check_weight(c, p.weight, p.bias, p.x));
  const int64_t width = p.weight.sizes[1];
  RETURN_IF_FAILED(check_seq_idx(c, p.seq_idx, p.x));
  RETURN_IF_FAILED(check_states(c, "initial_states", p.initial_states, p.x, width));
  RETURN_IF_FAILED(check_like_x(c, "out", p.out, p.x));
  RETURN_IF_FAILED(check_states(c, "final_states_out", p.final_states_out, p.x, width));
  const Argument arguments[] = {
      {"x", &p.x},
      {"weight", &p.weight},
      {"bias", &p.bias},
      {"seq_idx", &p.seq_idx},
      {"initial_states", &p.initial_states},
      {"out", &p.out},
      {"final_states_out", &p.final_states_out},
  };
  RETURN_IF_FAILED(check_memory(c, arguments, 5, &p.final_states_out, &p.initial_states));
  return check_work(c, p.x, width);
}

Status check(const BackwardParams* params) {
  const Checker c{"causal_conv1d_bwd"};
  if (params == nullptr) return c.fail("params", "must not be NULL");
  const BackwardParams& p = *params;
  RETURN_IF_FAILED(check_x(c, p.x));
  RETURN_IF_FAILED(check_weight(c, p.weight, p.bias, p.x));
  const int64_t width = p.weight.sizes[1];
  RETURN_IF_FAILED(check_like_x(c, "dout", p.dout, p.x));
  RETURN_IF_FAILED(check_seq_idx(c, p.seq_idx, p.x));
  RETURN_IF_FAILED(check_states(c, "initial_states", p.initial_states, p.x, width));
  RETURN_IF_FAILED(check_states(c, "dfinal_states", p.dfinal_states, p.x, width));
  RETURN_IF_FAILED(check_like_x(c, "dx", p.dx, p.x));
  if (given(p.dweight)) {
    RETURN_IF_FAILED(c.sizes("dweight", p.dweight, "(dim, width)", 2, p.weight.sizes));
    RETURN_IF_FAILED(c.float_like("dweight", p.dweight, p.x));
  }
  if (given(p.dbias)) {
    RETURN_IF_FAILED(c.sizes("dbias", p.dbias, "(dim,)", 1, p.weight.sizes));
    RETURN_IF_FAILED(c.float_like("dbias", p.dbias, p.x));
  }
  RETURN_IF_FAILED(check_states(c, "dinitial_states", p.dinitial_states, p.x, width));
  // dinitial_states may not even be dfinal_states: it is written while the latter is still read.
  const Argument arguments[] = {
      {"x", &p.x},
      {"weight", &p.weight},
      {"bias", &p.bias},
      {"dout", &p.dout},
      {"seq_idx", &p.seq_idx},
      {"initial_states", &p.initial_states},
      {"dfinal_states", &p.dfinal_states},
      {"dx", &p.dx},
      {"dweight", &p.dweight},
      {"dbias", &p.dbias},
      {"dinitial_states", &p.dinitial_states},
  };
  RETURN_IF_FAILED(check_memory(c, arguments, 7));
  return check_work(c, p.x, width);
}

Status check(const UpdateParams* params) {
  const Checker c{"causal_conv1d_update"};
  if (params == nullptr) return c.fail("params", "must not be NULL");
  const UpdateParams& p = *params;
  const Tensor& x = p.x;
  if (x.ndim != 2 && x.ndim != 3) {
    return c.fail("x", "must be (batch, dim) or (batch, dim, seqlen), got %s", shape(x).text);
  }
  RETURN_IF_FAILED(c.no_negative_size("x", x));
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
  // More rows than entries would mean a guess whose they are.
  if (!given(p.conv_state_indices) && p.conv_state.sizes[0] != x.sizes[0]) {
    return c.fail("conv_state",
                  "must have batch = %lld rows unless conv_state_indices is given, got %s",
                  static_cast<long long>(x.sizes[0]), shape(p.conv_state).text);
  }
  RETURN_IF_FAILED(check_like_x(c, "out", p.out, x));
  RETURN_IF_FAILED(check_batch_vector(c, "cache_seqlens", p.cache_seqlens, x));
  RETURN_IF_FAILED(check_batch_vector(c, "conv_state_indices", p.conv_state_indices, x));
  const Argument arguments[] = {
      {"x", &p.x},
      {"weight", &p.weight},
      {"bias", &p.bias},
      {"cache_seqlens", &p.cache_seqlens},
      {"conv_state_indices", &p.conv_state_indices},
      {"conv_state", &p.conv_state},
      {"out", &p.out},
  };
  RETURN_IF_FAILED(check_memory(c, arguments, 5));
  return check_work(c, x, width);
}

Status check_varlen_sizes(const Tensor& x, const Tensor& cu_seqlens, int64_t state_len) {
  const Checker c{"causal_conv1d_varlen_states"};
  const int64_t any[3] = {-1, -1, -1};
  RETURN_IF_FAILED(c.sizes("x", x, "(total_tokens, dim)", 2, any));
  RETURN_IF_FAILED(c.float_like("x", x, x));
  RETURN_IF_FAILED(c.sizes("cu_seqlens", cu_seqlens, "(batch + 1,)", 1, any));
  RETURN_IF_FAILED(c.index("cu_seqlens", cu_seqlens));
  if (cu_seqlens.sizes[0] < 1) return c.fail("cu_seqlens", "must have at least one element");
  const double states = static_cast<double>(cu_seqlens.sizes[0] - 1) *
                        static_cast<double>(x.sizes[1]) * static_cast<double>(state_len);
  if (state_len < 0 || states > static_cast<double>(kMostElements)) {
    return c.fail("state_len", "must be >= 0 and give at most 2^52 states, got %lld",
                  static_cast<long long>(state_len));
  }
  return ok();
}

Status check(const VarlenStatesParams* params) {
  const Checker c{"causal_conv1d_varlen_states"};
  if (params == nullptr) return c.fail("params", "must not be NULL");
  const VarlenStatesParams& p = *params;
  RETURN_IF_FAILED(check_varlen_sizes(p.x, p.cu_seqlens, 0));
  const int64_t want[3] = {p.cu_seqlens.sizes[0] - 1, p.x.sizes[1], -1};
  RETURN_IF_FAILED(c.sizes("states", p.states, "(batch, dim, state_len)", 3, want));
  RETURN_IF_FAILED(c.same_dtype("states", p.states, p.x));
  const Argument arguments[] = {{"x", &p.x}, {"cu_seqlens", &p.cu_seqlens}, {"states", &p.states}};
  return check_memory(c, arguments, 2);
}

}  // namespace causal_conv1d
