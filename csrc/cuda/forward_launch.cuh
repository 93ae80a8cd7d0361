// Chooses among the forward's kernels of a table in variants.cuh.
#pragma once

#include "../layout.h"
#include "forward_channel_first.cuh"
#include "forward_channel_last.cuh"
#include "launch.cuh"

namespace causal_conv1d::gpu {

template <typename K, typename T>
cudaError_t launch_channel_last(K, ForwardArgs<T> p, cudaStream_t stream) {
  p.columns = Columns(p.dim / K::C, ceil_div(p.seqlen, kChunk<K>), -1);
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

// Whether a kernel of the table was started.
template <typename Table, typename T>
bool launch_of(const ForwardParams& params, const Options& options, const ForwardArgs<T>& p,
               cudaStream_t stream, cudaError_t* e) {
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

// The same of the kernels for widths 5 to 8, which GPUs that there is no machine code for do not
// have: forward_wide.cu.
template <typename T>
bool launch_wide(const ForwardParams& params, const Options& options, const ForwardArgs<T>& p,
                 cudaStream_t stream, cudaError_t* e);

}  // namespace causal_conv1d::gpu
