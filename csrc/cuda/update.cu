// Launches the update's kernels.
#include "access.h"
#include "launch.cuh"
#include "update_any.cuh"
#include "update_token.cuh"

namespace causal_conv1d::gpu {
namespace {

int64_t whole_blocks(int64_t threads) { return ceil_div(threads, kThreads) * kThreads; }

// Whether a variant of update_token suits, with or without indices.
template <typename K>
bool suits(const UpdateParams& params) {
  constexpr int C = K::C, S = K::S, size = sizeof(typename K::Element);
  const Tensor &x = params.x, &state = params.conv_state;
  const bool one = x.ndim == 2 || x.sizes[2] == 1;
  if (!one || state.dtype != x.dtype || state.sizes[2] != S || params.weight.sizes[1] > K::WMAX) {
    return false;
  }
  if (x.sizes[1] % C != 0 || vector_width(x, 1, C, size) != C ||
      vector_width(params.out, 1, C, size) != C) {
    return false;
  }
  if (K::DIM_FASTEST) return vector_width(state, 1, C, size) == C;
  // A thread's channels are one dense block.
  constexpr int kAlignment = Pack<typename K::Element, S * C>::kAlignment;
  return state.strides[2] == 1 && (state.strides[1] == S || C == 1) &&
         reinterpret_cast<uintptr_t>(state.data) % kAlignment == 0 &&
         state.strides[0] * size % kAlignment == 0 &&
         (C * state.strides[1]) * size % kAlignment == 0;
}

template <typename T, int C, int S, bool DIM_FASTEST>
bool launch_token(const UpdateParams& params, UpdateArgs<T>& p, cudaStream_t stream,
                  cudaError_t* e) {
  using Plain = Token<T, C, S, DIM_FASTEST, false>;
  using Indexed = Token<T, C, S, DIM_FASTEST, true>;
  if (!has_every_kernel() || !suits<Plain>(params)) return false;
  const bool indexed = p.conv_state_indices.data != nullptr;
  const int64_t columns = indexed ? whole_blocks(p.dim / C) : p.dim / C;
  const int64_t threads = p.batch * columns;
  if (threads > kMaxParts || p.states > kMaxParts) return false;
  p.entries = threads >= (1 << 18) ? kEntries : 1;  // where there are enough for every thread
  p.by_column = Divisor(columns);
  auto kernel = indexed ? update_token<Indexed> : update_token<Plain>;
  *e = launch_pdl(kernel, ceil_div(p.batch, p.entries) * columns, stream, p);
  return true;
}

template <typename T>
cudaError_t run(const UpdateParams& params, cudaStream_t stream) {
  UpdateArgs<T> p(params);
  if (p.seqlen == 0) return cudaSuccess;
  if constexpr (sizeof(T) <= 4) {
    cudaError_t e = cudaSuccess;
    constexpr int half = sizeof(T) == 2 ? 2 : 1;
    if (launch_token<T, half, 4, false>(params, p, stream, &e) ||
        launch_token<T, 2 * half, 4, true>(params, p, stream, &e) ||
        launch_token<T, 2 * half, 3, false>(params, p, stream, &e) ||
        launch_token<T, 2 * half, 3, true>(params, p, stream, &e)) {
      return e;
    }
  }
  if (p.conv_state_indices.data == nullptr) {
    return launch(update_any<T, false>, p.batch * p.dim, stream, p);
  }
  p.columns = whole_blocks(p.dim);
  return launch(update_any<T, true>, p.batch * p.columns, stream, p);
}

}  // namespace
}  // namespace causal_conv1d::gpu

causal_conv1d_status causal_conv1d_cuda_update(const causal_conv1d_update_params* params,
                                               int device, void* stream) {
  using namespace causal_conv1d;
  return gpu::run_operator("causal_conv1d_update", params, device, [&](auto zero) {
    return gpu::run<decltype(zero)>(*params, static_cast<cudaStream_t>(stream));
  });
}
