#include "pool_check.h"

#include "sized.h"

namespace causal_conv1d {
namespace {

constexpr Checker kChecker{"causal_conv1d_pool"};

Status check_states(const PoolParams& p, int64_t dim, int64_t width) {
  const Checker& c = kChecker;
  const int64_t want[3] = {-1, dim, -1};
  RETURN_IF_FAILED(c.sizes("conv_states", p.conv_states, "(slots, dim, state_len)", 3, want));
  RETURN_IF_FAILED(c.float_like("conv_states", p.conv_states, p.x));
  if (p.conv_states.sizes[2] < width - 1) {
    return c.fail("conv_states", "must have state_len >= width - 1 = %lld, got %s",
                  static_cast<long long>(width - 1), shape(p.conv_states).text);
  }
  return ok();
}

Status check_vector(const char* name, const Tensor& t, int64_t sequences) {
  if (!given(t)) return ok();
  RETURN_IF_FAILED(kChecker.sizes(name, t, "(sequences,)", 1, &sequences));
  return kChecker.index(name, t);
}

Status check_sequences(const PoolParams& p) {
  const Checker& c = kChecker;
  if (given(p.query_start_loc)) {
    const int64_t any[1] = {-1};
    RETURN_IF_FAILED(c.sizes("query_start_loc", p.query_start_loc, "(sequences + 1,)", 1, any));
    RETURN_IF_FAILED(c.index("query_start_loc", p.query_start_loc));
    if (p.query_start_loc.sizes[0] < 1) {
      return c.fail("query_start_loc", "must have at least one element");
    }
  }
  const int64_t sequences = sequences_of(p);
  RETURN_IF_FAILED(check_vector("cache_indices", p.cache_indices, sequences));
  if (!given(p.cache_indices) && p.conv_states.sizes[0] < sequences) {
    return c.fail("conv_states",
                  "must have at least %lld slots unless cache_indices is given, got %s",
                  static_cast<long long>(sequences), shape(p.conv_states).text);
  }
  const Tensor& has = p.has_initial_state;
  if (given(has)) {
    RETURN_IF_FAILED(c.sizes("has_initial_state", has, "(sequences,)", 1, &sequences));
    const bool is_flag = has.dtype == CAUSAL_CONV1D_BOOL || has.dtype == CAUSAL_CONV1D_UINT8 ||
                         has.dtype == CAUSAL_CONV1D_INT32 || has.dtype == CAUSAL_CONV1D_INT64;
    if (!is_flag) {
      return c.fail("has_initial_state", "must be bool, uint8, int32 or int64, got %s",
                    dtype_name(has.dtype));
    }
    if (given(p.num_accepted_tokens)) {
      return c.fail("has_initial_state", "must not be given with num_accepted_tokens");
    }
  }
  return check_vector("num_accepted_tokens", p.num_accepted_tokens, sequences);
}

Status check_windows(const PoolParams& p, int64_t dim, int64_t width) {
  const Checker& c = kChecker;
  const Tensor& windows = p.windows_out;
  if (!given(windows)) {
    if (!given(p.window_indices)) return ok();
    return c.fail("window_indices", "must not be given without windows_out");
  }
  const int64_t sequences = sequences_of(p);
  RETURN_IF_FAILED(check_vector("window_indices", p.window_indices, sequences));
  int64_t inputs;
  if (__builtin_mul_overflow(dim, width - 1, &inputs)) {
    return c.fail("windows_out", "cannot have dim * (width - 1) columns: they are too many");
  }
  const bool rows_fit = given(p.window_indices) || windows.sizes[0] == sequences;
  if (windows.ndim != 3 || !rows_fit || windows.sizes[2] != inputs) {
    return c.fail("windows_out", "must be (%s, tokens, dim * (width - 1) = %lld), got %s",
                  given(p.window_indices) ? "rows" : "sequences", static_cast<long long>(inputs),
                  shape(windows).text);
  }
  RETURN_IF_FAILED(c.no_negative_size("windows_out", windows));
  return c.float_like("windows_out", windows, p.x);
}

Status check_numbers(const PoolParams& p) {
  if (p.max_seqlen >= 0) return ok();
  return kChecker.fail("max_seqlen", "must be >= 0, got %lld",
                       static_cast<long long>(p.max_seqlen));
}

}  // namespace

Status read(const PoolParams* params, PoolParams* full) {
  if (params == nullptr) return kChecker.fail("params", "must not be NULL");
  return read_sized(kChecker, *params, full);
}

Status check(const PoolParams* params) {
  const Checker& c = kChecker;
  const PoolParams& p = *params;
  const int64_t any[2] = {-1, -1};
  RETURN_IF_FAILED(c.sizes("x", p.x, "(dim, total)", 2, any));
  RETURN_IF_FAILED(c.float_like("x", p.x, p.x));
  const Tensor row = as_row(p.x);
  RETURN_IF_FAILED(check_weight(c, p.weight, p.bias, row));
  const int64_t dim = p.x.sizes[0], width = p.weight.sizes[1];
  RETURN_IF_FAILED(check_states(p, dim, width));
  RETURN_IF_FAILED(c.sizes("out", p.out, "x's shape", 2, p.x.sizes));
  RETURN_IF_FAILED(c.same_dtype("out", p.out, p.x));
  RETURN_IF_FAILED(check_sequences(p));
  RETURN_IF_FAILED(check_windows(p, dim, width));
  RETURN_IF_FAILED(check_numbers(p));
  const ArgumentOf<Tensor> arguments[] = {
      {"x", &p.x},
      {"weight", &p.weight},
      {"bias", &p.bias},
      {"query_start_loc", &p.query_start_loc},
      {"cache_indices", &p.cache_indices},
      {"has_initial_state", &p.has_initial_state},
      {"num_accepted_tokens", &p.num_accepted_tokens},
      {"window_indices", &p.window_indices},
      {"conv_states", &p.conv_states},
      {"out", &p.out},
      {"windows_out", &p.windows_out},
  };
  RETURN_IF_FAILED(check_memory(c, arguments, 8, &p.out, &p.x));
  return check_work(c, row, width);
}

}  // namespace causal_conv1d
