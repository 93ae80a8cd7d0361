// Launches the update's kernels.
#include "access.h"
#include "launch.cuh"
#include "update_any.cuh"
#include "update_slots.h"
#include "update_suits.cuh"

#ifndef CAUSAL_CONV1D_GENERAL
#include "update_decode.h"
#include "update_rows.cuh"
#include "update_staged.cuh"
#include "update_token.cuh"
#endif

namespace causal_conv1d::gpu {
namespace {

#ifndef CAUSAL_CONV1D_GENERAL

// Whether every row (b, d, :) lies in n elements behind the one before it, and those of a batch
// entry begin and end at multiples of 16 bytes.
bool is_staged(const Tensor& t, int64_t n, int size) {
  const bool rows = (t.ndim == 2 || n == 1 || t.strides[2] == 1) &&
                    (t.sizes[1] == 1 || t.strides[1] == n) && t.sizes[1] * n * size % 16 == 0;
  return rows && reinterpret_cast<uintptr_t>(t.data) % 16 == 0 &&
         (t.sizes[0] == 1 || t.strides[0] * size % 16 == 0);
}

// A view with three dimensions.
Tensor with_time(Tensor t) {
  if (t.ndim == 2) t.sizes[2] = t.strides[2] = 1;
  t.ndim = 3;
  return t;
}

template <typename T, int C, int S, bool DIM_FASTEST, int L = 1>
bool launch_token(const UpdateParams& params, UpdateArgs<T>& p, cudaStream_t stream,
                  cudaError_t* e) {
  using Indexed = Token<T, C, S, DIM_FASTEST, true, L>;
  using Plain = Token<T, C, S, DIM_FASTEST, L != 1, L>;  // of several tokens there is one for both
  if (!suits<Plain>(params)) return false;
  const bool indexed = p.conv_state_indices.data != nullptr;
  const int64_t columns = indexed || L > 1 ? whole_blocks(p.dim / C) : p.dim / C;
  const int64_t threads = p.batch * columns;
  if (threads > kMaxParts || p.states > kMaxParts) return false;
  p.entries = threads >= (1 << 18) ? Plain::ENTRIES : 1;  // an H200 runs so many threads at a time
  p.whole_warps = p.dim / C % 32 == 0;
  p.by_column = Divisor(columns);
  auto kernel = indexed ? update_token<Indexed> : update_token<Plain>;
  *e = launch_pdl(kernel, ceil_div(p.batch, p.entries) * columns, stream, p);
  return true;
}

// Four tokens of bf16.
template <typename T>
bool launch_tokens(const UpdateParams& params, UpdateArgs<T>& p, cudaStream_t stream,
                   cudaError_t* e) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return launch_token<T, 2, 4, false, 4>(params, p, stream, e) ||
           launch_token<T, 2, 3, false, 4>(params, p, stream, e);
  }
  return false;
}

template <typename T, int S>
bool launch_rows(const UpdateParams& params, UpdateArgs<T>& p, cudaStream_t stream,
                 cudaError_t* e) {
  using K = Rows<T, S>;
  const Tensor x = with_time(params.x), out = with_time(params.out);
  if (p.state_len != S ||
      common_channels(K::C, sizeof(T), p.dim, {&x, &out, &params.conv_state}) != K::C) {
    return false;
  }
  const int64_t columns =
      p.conv_state_indices.data != nullptr ? whole_blocks(p.dim / K::C) : p.dim / K::C;
  if (p.batch * columns > kMaxParts) return false;
  p.by_column = Divisor(columns);
  *e = launch_pdl(update_rows<K>, p.batch * columns, stream, p);
  return true;
}

template <typename T>
bool launch_staged(const UpdateParams& params, UpdateArgs<T>& p, cudaStream_t stream,
                   cudaError_t* e) {
  constexpr int64_t kBytes = 8192, kMostBytes = 40960;  // of a block
  constexpr int64_t kEnough = 512;                      // blocks
  constexpr int size = sizeof(T);
  if (p.state_len + p.seqlen > kMostBytes / (kThreads * size)) return false;
  if (!is_staged(params.x, p.seqlen, size) || !is_staged(params.out, p.seqlen, size) ||
      !is_staged(params.conv_state, p.state_len, size)) {
    return false;
  }
  if (p.state_len == 0) return false;  // a ring without positions has none to write to
  const int64_t channel = (p.state_len + p.seqlen) * size;
  int64_t channels = kThreads;
  while (2 * channels * channel <= kBytes && p.batch * ceil_div(p.dim, 2 * channels) >= kEnough) {
    channels *= 2;
  }
  const int64_t parts = ceil_div(p.dim, channels);
  if (p.batch * parts > kMaxParts / kThreads) return false;
  p.channels = static_cast<int>(channels);
  p.by_column = Divisor(parts);
  *e = launch_pdl_shared(update_staged<T>, p.batch * parts * kThreads, channels * channel, stream,
                         p);
  return true;
}

// Whether one of the kernels for certain shapes suits.
template <typename T>
bool launch_fast(const UpdateParams& params, UpdateArgs<T> p, cudaStream_t stream, cudaError_t* e) {
  if constexpr (sizeof(T) <= 4) {
    constexpr int C = 4 / sizeof(T);
    return has_every_kernel() && p.width <= 4 && params.conv_state.dtype == params.x.dtype &&
           (launch_decode(params, p, stream, e) ||
            launch_token<T, C, 4, false>(params, p, stream, e) ||
            launch_token<T, 2 * C, 4, true>(params, p, stream, e) ||
            launch_token<T, 2 * C, 3, false>(params, p, stream, e) ||
            launch_token<T, 2 * C, 3, true>(params, p, stream, e) ||
            launch_tokens(params, p, stream, e) || launch_rows<T, 4>(params, p, stream, e) ||
            launch_rows<T, 3>(params, p, stream, e) || launch_staged(params, p, stream, e));
  }
  return false;
}

#else

template <typename T>
bool launch_fast(const UpdateParams&, const UpdateArgs<T>&, cudaStream_t, cudaError_t*) {
  return false;
}

#endif

template <typename T>
cudaError_t run(const UpdateParams& params, cudaStream_t stream) {
  UpdateArgs<T> p(params);
  cudaError_t e = cudaSuccess;
  if (p.seqlen == 0 || launch_fast(params, p, stream, &e)) return e;
  p.columns = p.conv_state_indices.data == nullptr ? p.dim : whole_blocks(p.dim);
  return launch(update_any<T>, p.batch * p.columns, stream, p);
}

}  // namespace

bool update_slots(const UpdateParams& params, int64_t pad_slot, cudaStream_t stream,
                  cudaError_t* e) {
  bool done = false;
  dispatch_dtype(params.x.dtype, [&](auto zero) {
    UpdateArgs<decltype(zero)> p(params);
    p.may_share = false;
    p.slots = true;
    p.pad_slot = pad_slot;
    done = launch_fast(params, p, stream, e);
  });
  return done;
}

}  // namespace causal_conv1d::gpu

causal_conv1d_status causal_conv1d_cuda_update(const causal_conv1d_update_params* params,
                                               int device, void* stream) {
  using namespace causal_conv1d;
  return gpu::run_operator("causal_conv1d_update", params, device, [&](auto zero) {
    return gpu::run<decltype(zero)>(*params, static_cast<cudaStream_t>(stream));
  });
}
