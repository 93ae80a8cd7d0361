// Launches the forward's kernels.
#include "../layout.h"
#include "forward_any.cuh"
#include "forward_channel_first.cuh"
#include "forward_channel_last.cuh"
#include "launch.cuh"

namespace causal_conv1d::gpu {
namespace {

template <typename K, typename T>
cudaError_t launch_channel_last(K, ForwardArgs<T> p, cudaStream_t stream) {
  p.columns = Columns(p.dim / K::C, ceil_div(p.seqlen, kChunk<K::WMAX>), -1);
  return launch_pdl(forward_channel_last<K>, p.columns.threads(p.batch), stream, p);
}

template <typename K, typename T>
cudaError_t launch_channel_first(K, ForwardArgs<T> p, const Tensor& out, cudaStream_t stream) {
  // A row of out that begins within a vector begins its first tile before it.
  constexpr int G = kPerVector<T>;
  const bool early = K::kRagged && vector_width(out, 2, G, sizeof(T)) < G;
  const int64_t tiles = ceil_div(p.seqlen + (early ? G - 1 : 0), K::TILE);
  const int64_t chunks = ceil_div(tiles, kTiles);
  p.chunk = ceil_div(tiles, chunks) * K::TILE;
  const int64_t channels = K::SEQ ? ceil_div(p.dim, kWarps) : p.dim;
  p.by_dim = Divisor(channels);
  p.by_chunks = Divisor(chunks);
  return launch_pdl(forward_channel_first<K>,
                    p.batch * channels * chunks * (K::SEQ ? kThreads : 32), stream, p);
}

// Whether a kernel of this width was started: all calls but some with gates or a residual have one.
template <typename T, int WMAX>
bool launch_width(const ForwardParams& params, const Options& options, const ForwardArgs<T>& p,
                  cudaStream_t stream, cudaError_t* e) {
  using Table = Tables<T, WMAX>;
  const auto tensors = {&params.x, &params.out, &options.pre_gate, &options.post_gate,
                        &options.residual};
  Case wanted{p.width, p.seq_idx.data != nullptr, Access::kStrided, false};
  wanted.fused = p.pre_gate.given() || p.post_gate.given() || p.residual.given();
  if (is_channel_last(params.x)) {
    wanted.vector = common_channels(Table::C, sizeof(T), p.dim, tensors) == Table::C;
    if (!has_variant(typename Table::Last{}, wanted)) return false;
    *e = with_variant(typename Table::Last{}, wanted,
                      [&](auto variant) { return launch_channel_last(variant, p, stream); });
    return true;
  }
  wanted.access = common_access(tensors, sizeof(T));
  if (!has_variant(typename Table::First{}, wanted)) return false;
  *e = with_variant(typename Table::First{}, wanted, [&](auto variant) {
    return launch_channel_first(variant, p, params.out, stream);
  });
  return true;
}

template <typename T>
cudaError_t launch_out(const ForwardParams& params, const Options& options, const ForwardArgs<T>& p,
                       cudaStream_t stream) {
  if (!has_elements(params.x)) return cudaSuccess;
  if constexpr (sizeof(T) <= 4) {
    const bool few = p.batch * p.dim * ceil_div(p.seqlen, 256) <= kMaxParts;
    cudaError_t e;
    if (few && p.width <= 4 && launch_width<T, 4>(params, options, p, stream, &e)) return e;
    if (few && p.width > 4 && p.width <= 8 && launch_width<T, 8>(params, options, p, stream, &e)) {
      return e;
    }
  }
  return launch(forward_any_width<T>, p.batch * p.dim * p.seqlen, stream, p,
                is_channel_last(params.x));
}

template <typename T>
cudaError_t run(const ForwardParams& params, cudaStream_t stream) {
  Options options{};
  options.dilation = 1;
  const ForwardArgs<T> p(params, options);
  const cudaError_t e = launch_out<T>(params, options, p, stream);
  if (e != cudaSuccess || !p.final_states.given()) return e;
  // After what reads initial_states, since the final ones may be written there.
  const int64_t row = p.seq_idx.data == nullptr ? p.dim : ceil_div(p.dim, kThreads) * kThreads;
  return launch_pdl(write_final_states<T>, p.batch * row, stream, p);
}

}  // namespace
}  // namespace causal_conv1d::gpu

causal_conv1d_status causal_conv1d_cuda_forward(const causal_conv1d_forward_params* params,
                                                int device, void* stream) {
  using namespace causal_conv1d;
  return gpu::run_operator("causal_conv1d_fn", params, device, [&](auto zero) {
    return gpu::run<decltype(zero)>(*params, static_cast<cudaStream_t>(stream));
  });
}
