// Launches the kernels of the pool of states.
#include <utility>

#include "../pool_check.h"  // before launch.cuh, which calls its check()
#include "access.h"
#include "launch.cuh"
#include "pool_packs.cuh"
#include "pool_walk.cuh"
#include "update_slots.h"

namespace causal_conv1d::gpu {
namespace {

constexpr int64_t kFew = 8;  // tokens of a sequence that a thread walks along

bool in_place(const PoolParams& params) { return params.out.data == params.x.data; }

// Whether parts of the tokens are better than sequences.
bool has_tiles(const PoolParams& params) {
  const bool few = params.max_seqlen > 0 && params.max_seqlen <= kFew;
  return !in_place(params) && !few && sequences_of(params) > 0;
}

// What of the tokens, and which channels, a thread has.
template <typename T>
void divide(const PoolParams& params, int channels, PoolArgs<T>* p) {
  constexpr int64_t kTile = 16;
  int64_t parts = p->sequences + 2;
  if (has_tiles(params)) {
    p->tile = 1;
    while (p->tile < kTile && 2 * p->tile <= p->seqlen / p->sequences) p->tile *= 2;
    parts = ceil_div(p->seqlen, p->tile);
  }
  p->columns = Columns(p->dim / channels, parts, p->tile > 0 ? 5 : -1);
}

template <typename T>
cudaError_t launch_parts(void (*kernel)(PoolArgs<T>), const PoolArgs<T>& p, cudaStream_t stream) {
  if (p.columns.threads(1) / kThreads > kMaxParts) return cudaErrorInvalidConfiguration;
  return launch_pdl(kernel, p.columns.threads(1), stream, p);
}

// How C adjacent channels of a state of a type may be accessed.
template <typename K>
StateAccess state_access(const PoolParams& params) {
  const Tensor& t = params.conv_states;
  constexpr int size = sizeof(typename K::Element), kBlock = K::C * 3 * size;
  constexpr int kAlignment = kBlock & -kBlock;
  if (t.dtype != params.x.dtype) return StateAccess::kAny;
  if (vector_width(t, 1, K::C, size) == K::C) return StateAccess::kRows;
  const bool block = params.weight.sizes[1] == 4 && t.sizes[2] == 3 && t.strides[2] == 1 &&
                     t.strides[1] == 3 && t.strides[0] * size % kAlignment == 0 &&
                     reinterpret_cast<uintptr_t>(t.data) % kAlignment == 0;
  return block ? StateAccess::kBlock : StateAccess::kAny;
}

// Whether channels are adjacent, K::C of them.
template <typename K, typename T>
bool launch_packs(const PoolParams& params, PoolArgs<T> p, cudaStream_t stream, cudaError_t* e) {
  const Tensor x = as_row(params.x), out = as_row(params.out);
  if (!has_every_kernel() || p.windows.given()) return false;
  if (p.width > K::WMAX || (K::WMAX == 8 && p.width <= 4)) return false;
  if (common_channels(K::C, sizeof(T), p.dim, {&x, &out}) != K::C) return false;
  p.access = state_access<K>(params);
  if (p.access == StateAccess::kAny && !has_tiles(params)) return false;
  divide(params, K::C, &p);
  *e = launch_parts<T>(p.tile > 0 ? pool_tiles<K> : pool_sequences<K>, p, stream);
  return true;
}

// A token for each sequence, as the update by slots.
[[maybe_unused]] bool launch_update(const PoolParams& params, cudaStream_t stream, cudaError_t* e) {
  const bool slots = given(params.cache_indices);
  if (given(params.query_start_loc) || given(params.has_initial_state) ||
      given(params.num_accepted_tokens) || given(params.windows_out) ||
      (!slots && params.pad_slot >= 0)) {
    return false;
  }
  UpdateParams update{};
  const auto by_token = [](Tensor t) {
    std::swap(t.sizes[0], t.sizes[1]);
    std::swap(t.strides[0], t.strides[1]);
    return t;
  };
  update.x = by_token(params.x);
  update.out = by_token(params.out);
  update.conv_state = params.conv_states;
  update.conv_state.sizes[2] = params.weight.sizes[1] - 1;
  update.weight = params.weight;
  update.bias = params.bias;
  update.silu = params.silu;
  update.conv_state_indices = params.cache_indices;
  return update_slots(update, params.pad_slot, stream, e);
}

template <typename T>
cudaError_t run(const PoolParams& params, cudaStream_t stream) {
  PoolArgs<T> p(params);
  cudaError_t e = cudaSuccess;
  if (p.width > 8) return launch(pool_any<T>, (p.sequences + 2) * p.dim, stream, p);
  if constexpr (kHasVariants && sizeof(T) <= 4) {
    if (launch_update(params, stream, &e) || launch_packs<Pool<T, 4>>(params, p, stream, &e)) {
      return e;
    }
  }
  // Wide filters of other types are left to pool_walk, to keep the library small.
  if constexpr (kHasVariants && std::is_same_v<T, __nv_bfloat16>) {
    if (launch_packs<Pool<T, 8>>(params, p, stream, &e)) return e;
  }
  divide(params, 1, &p);
  return launch_parts<T>(pool_walk<T>, p, stream);
}

}  // namespace
}  // namespace causal_conv1d::gpu

causal_conv1d_status causal_conv1d_cuda_pool(const causal_conv1d_pool_params* params, int device,
                                             void* stream) {
  using namespace causal_conv1d;
  PoolParams full;
  const Status status = read(params, &full);
  if (status.code != CAUSAL_CONV1D_OK) return status;
  // A thread there would need memory of its own for the inputs that it overwrites.
  if (full.out.data != nullptr && full.out.data == full.x.data && full.weight.sizes[1] > 8) {
    return error(CAUSAL_CONV1D_INVALID_ARGUMENT,
                 "causal_conv1d_pool: out must not be x on CUDA if weight has width > 8");
  }
  return gpu::run_operator("causal_conv1d_pool", &full, device, [&](auto zero) {
    return gpu::run<decltype(zero)>(full, static_cast<cudaStream_t>(stream));
  });
}
