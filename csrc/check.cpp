#include "check.h"

#include <cstdarg>
#include <cstdio>

#include "checker.h"
#include "sized.h"

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

using Argument = ArgumentOf<Tensor>;

// Far above any filter that is worth summing directly: the backward takes up to width^2 steps for
// an element, here 2^32, and a thread of the CPU has some 32 * width values of scratch memory.
constexpr int64_t kMostWidth = 1 << 16;
constexpr int64_t kMostDilation = 1 << 16;

Status check_x(const Checker& c, const Tensor& x) {
  const int64_t any[3] = {-1, -1, -1};
  RETURN_IF_FAILED(c.sizes("x", x, "(batch, dim, seqlen)", 3, any));
  return c.float_like("x", x, x);
}

Status check_states(const Checker& c, const char* name, const Tensor& t, const Tensor& x,
                    int64_t width, const Options& options) {
  if (!given(t)) return ok();
  const bool packed = given(options.cu_seqlens), dilated = options.dilation > 1;
  const int64_t rows = packed ? options.cu_seqlens.sizes[0] - 1 : x.sizes[0];
  const int64_t want[3] = {rows, x.sizes[1], (width - 1) * options.dilation};
  const char* dims =
      packed
          ? (dilated ? "(sequences, dim, (width - 1) * dilation)" : "(sequences, dim, width - 1)")
          : (dilated ? "(batch, dim, (width - 1) * dilation)" : "(batch, dim, width - 1)");
  RETURN_IF_FAILED(c.sizes(name, t, dims, 3, want));
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

// Of the inputs that a forward and a backward read alike.
Status check_options(const Checker& c, const Options& options, const Tensor& x,
                     const Tensor& seq_idx) {
  if (options.dilation < 1 || options.dilation > kMostDilation) {
    return c.fail("dilation", "must be 1..%lld, got %lld", static_cast<long long>(kMostDilation),
                  static_cast<long long>(options.dilation));
  }
  if (given(options.cu_seqlens)) {
    const Tensor& bounds = options.cu_seqlens;
    const int64_t any[1] = {-1};
    RETURN_IF_FAILED(c.sizes("cu_seqlens", bounds, "(sequences + 1,)", 1, any));
    RETURN_IF_FAILED(c.index("cu_seqlens", bounds));
    if (bounds.sizes[0] < 1) return c.fail("cu_seqlens", "must have at least one element");
    if (given(seq_idx)) return c.fail("cu_seqlens", "must not be given with seq_idx");
    if (x.sizes[0] != 1) {
      return c.fail("x", "must be (1, dim, total) with cu_seqlens, got %s", shape(x).text);
    }
  }
  if (given(options.pre_gate)) {
    RETURN_IF_FAILED(check_like_x(c, "pre_gate", options.pre_gate, x));
  }
  if (given(options.post_gate)) {
    RETURN_IF_FAILED(check_like_x(c, "post_gate", options.post_gate, x));
  }
  return ok();
}

Status copy_options(const Checker& c, const Options* options, Options* own) {
  *own = Options{};
  if (options != nullptr) RETURN_IF_FAILED(read_sized(c, *options, own, "options.size"));
  if (own->dilation == 0) own->dilation = 1;
  return ok();
}

// The arguments that are given, those that are written last.
class Arguments {
 public:
  void add(const char* name, const Tensor& t) {
    if (given(t)) arguments_[count_++] = {name, &t};
  }
  void are_read() { read_ = count_; }
  Status check(const Checker& c, const Tensor* in_place = nullptr,
               const Tensor* as = nullptr) const {
    return check_memory(c, arguments_, count_, read_, in_place, as);
  }

 private:
  Argument arguments_[kMostArguments];
  int count_ = 0, read_ = 0;
};

Status check_batch_vector(const Checker& c, const char* name, const Tensor& t, const Tensor& x) {
  if (!given(t)) return ok();
  RETURN_IF_FAILED(c.sizes(name, t, "(batch,)", 1, x.sizes));
  return c.index(name, t);
}

}  // namespace

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
  Options none;
  return check(params, nullptr, &none);
}

Status check(const ForwardParams* params, const Options* options, Options* own) {
  const Checker c{"causal_conv1d_fn"};
  if (params == nullptr) return c.fail("params", "must not be NULL");
  RETURN_IF_FAILED(copy_options(c, options, own));
  const ForwardParams& p = *params;
  RETURN_IF_FAILED(check_x(c, p.x));
  RETURN_IF_FAILED(check_weight(c, p.weight, p.bias, p.x));
  const int64_t width = p.weight.sizes[1];
  RETURN_IF_FAILED(check_seq_idx(c, p.seq_idx, p.x));
  RETURN_IF_FAILED(check_options(c, *own, p.x, p.seq_idx));
  if (given(own->residual)) RETURN_IF_FAILED(check_like_x(c, "residual", own->residual, p.x));
  RETURN_IF_FAILED(check_states(c, "initial_states", p.initial_states, p.x, width, *own));
  RETURN_IF_FAILED(check_like_x(c, "out", p.out, p.x));
  RETURN_IF_FAILED(check_states(c, "final_states_out", p.final_states_out, p.x, width, *own));
  Arguments arguments;
  arguments.add("x", p.x);
  arguments.add("weight", p.weight);
  arguments.add("bias", p.bias);
  arguments.add("seq_idx", p.seq_idx);
  arguments.add("initial_states", p.initial_states);
  arguments.add("cu_seqlens", own->cu_seqlens);
  arguments.add("pre_gate", own->pre_gate);
  arguments.add("post_gate", own->post_gate);
  arguments.add("residual", own->residual);
  arguments.are_read();
  arguments.add("out", p.out);
  arguments.add("final_states_out", p.final_states_out);
  RETURN_IF_FAILED(arguments.check(c, &p.final_states_out, &p.initial_states));
  return check_work(c, p.x, width);
}

namespace {

Status check_gradient(const Checker& c, const char* name, const Tensor& gradient, const char* of,
                      const Tensor& t, const Tensor& x) {
  if (!given(gradient)) return ok();
  if (!given(t)) return c.fail(name, "must not be given without %s", of);
  return check_like_x(c, name, gradient, x);
}

}  // namespace

Status check(const BackwardParams* params) {
  Options none;
  OptionGradients no_gradients;
  return check(params, nullptr, nullptr, &none, &no_gradients);
}

Status check(const BackwardParams* params, const Options* options, const OptionGradients* gradients,
             Options* own, OptionGradients* own_gradients) {
  const Checker c{"causal_conv1d_bwd"};
  if (params == nullptr) return c.fail("params", "must not be NULL");
  RETURN_IF_FAILED(copy_options(c, options, own));
  *own_gradients = OptionGradients{};
  if (gradients != nullptr) {
    RETURN_IF_FAILED(read_sized(c, *gradients, own_gradients, "gradients.size"));
  }
  const BackwardParams& p = *params;
  RETURN_IF_FAILED(check_x(c, p.x));
  RETURN_IF_FAILED(check_weight(c, p.weight, p.bias, p.x));
  const int64_t width = p.weight.sizes[1];
  RETURN_IF_FAILED(check_like_x(c, "dout", p.dout, p.x));
  RETURN_IF_FAILED(check_seq_idx(c, p.seq_idx, p.x));
  RETURN_IF_FAILED(check_options(c, *own, p.x, p.seq_idx));
  RETURN_IF_FAILED(check_states(c, "initial_states", p.initial_states, p.x, width, *own));
  RETURN_IF_FAILED(check_states(c, "dfinal_states", p.dfinal_states, p.x, width, *own));
  RETURN_IF_FAILED(check_like_x(c, "dx", p.dx, p.x));
  if (given(p.dweight)) {
    RETURN_IF_FAILED(c.sizes("dweight", p.dweight, "(dim, width)", 2, p.weight.sizes));
    RETURN_IF_FAILED(c.float_like("dweight", p.dweight, p.x));
  }
  if (given(p.dbias)) {
    RETURN_IF_FAILED(c.sizes("dbias", p.dbias, "(dim,)", 1, p.weight.sizes));
    RETURN_IF_FAILED(c.float_like("dbias", p.dbias, p.x));
  }
  RETURN_IF_FAILED(check_states(c, "dinitial_states", p.dinitial_states, p.x, width, *own));
  RETURN_IF_FAILED(
      check_gradient(c, "dpre_gate", own_gradients->dpre_gate, "pre_gate", own->pre_gate, p.x));
  RETURN_IF_FAILED(
      check_gradient(c, "dpost_gate", own_gradients->dpost_gate, "post_gate", own->post_gate, p.x));
  // dinitial_states may not even be dfinal_states: it is written while the latter is still read.
  Arguments arguments;
  arguments.add("x", p.x);
  arguments.add("weight", p.weight);
  arguments.add("bias", p.bias);
  arguments.add("dout", p.dout);
  arguments.add("seq_idx", p.seq_idx);
  arguments.add("initial_states", p.initial_states);
  arguments.add("dfinal_states", p.dfinal_states);
  arguments.add("cu_seqlens", own->cu_seqlens);
  arguments.add("pre_gate", own->pre_gate);
  arguments.add("post_gate", own->post_gate);
  arguments.are_read();
  arguments.add("dx", p.dx);
  arguments.add("dweight", p.dweight);
  arguments.add("dbias", p.dbias);
  arguments.add("dinitial_states", p.dinitial_states);
  arguments.add("dpre_gate", own_gradients->dpre_gate);
  arguments.add("dpost_gate", own_gradients->dpost_gate);
  RETURN_IF_FAILED(arguments.check(c));
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
