// Launches the kernels of the pool of states.
#include "pool.cuh"

#include "launch.cuh"

namespace causal_conv1d::gpu {
namespace {

constexpr int64_t kTile = 16;  // tokens of a part, at most
constexpr int64_t kFew = 8;    // tokens of a sequence that is a part of its own

// The channels that a thread of a variant may take at once: C or 1.
template <typename T>
bool takes_packs(const PoolParams& params, int C) {
  const Tensor x = as_row(params.x), out = as_row(params.out);
  return has_every_kernel() && common_channels(C, sizeof(T), x.sizes[1], {&x, &out}) == C;
}

template <typename K, typename T>
cudaError_t launch_walk(K, const PoolParams& params, PoolArgs<T> p, cudaStream_t stream) {
  const Tensor& states = params.conv_states;
  p.state_packs =
      states.dtype == params.x.dtype && vector_width(states, 1, K::C, sizeof(T)) == K::C;
  const bool in_place = params.out.data == params.x.data;
  const bool short_sequences = params.max_seqlen > 0 && params.max_seqlen <= kFew;
  p.tile = 0;
  int64_t parts = p.sequences + 2;
  if (!in_place && !short_sequences && p.sequences > 0) {
    p.tile = 1;
    while (p.tile < kTile && 2 * p.tile <= p.seqlen / p.sequences) p.tile *= 2;
    while (ceil_div(p.seqlen, p.tile) * ceil_div(p.dim / K::C, 32) > kMaxParts) p.tile *= 2;
    parts = ceil_div(p.seqlen, p.tile);
  }
  p.columns = Columns(p.dim / K::C, parts, -1);
  if (p.columns.threads(1) / kThreads > kMaxParts) return cudaErrorInvalidConfiguration;
  return launch_pdl(pool_walk<K>, p.columns.threads(1), stream, p);
}

template <typename T>
cudaError_t run(const PoolParams& params, cudaStream_t stream) {
  const PoolArgs<T> p(params);
  if (p.width > 8) return launch(pool_any<T>, (p.sequences + 2) * p.dim, stream, p);
  if constexpr (kHasVariants && sizeof(T) <= 4) {
    using Narrow = Pool<T, 4, channels_per_thread(4, sizeof(T))>;
    using Wide = Pool<T, 8, channels_per_thread(8, sizeof(T))>;
    if (p.width <= 4 && takes_packs<T>(params, Narrow::C)) {
      return launch_walk(Narrow{}, params, p, stream);
    }
    if (p.width > 4 && takes_packs<T>(params, Wide::C)) {
      return launch_walk(Wide{}, params, p, stream);
    }
  }
  return launch_walk(Pool<T, 8, 1>{}, params, p, stream);
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
