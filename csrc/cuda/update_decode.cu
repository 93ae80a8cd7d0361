// Launches update_decode. The update's other kernels can do the same, so CMakeLists.txt leaves its
// PTX out: where there is no machine code for the GPU, those take the call.
#include "update_decode.cuh"

#include "launch.cuh"
#include "update_decode.h"
#include "update_suits.cuh"

namespace causal_conv1d::gpu {
namespace {

// Of a thread that has several: four are up to 4 % faster or 5 % slower.
constexpr int kEntries = 2;

// Whether a parameter, rows of n elements each, is dense, of x's type, and aligned for a Pack.
template <typename Pack>
bool is_plain(const Tensor& t, const Tensor& x, int64_t n) {
  return t.dtype == x.dtype && t.strides[0] == n && (n == 1 || t.strides[1] == 1) &&
         reinterpret_cast<uintptr_t>(t.data) % Pack::kAlignment == 0;
}

template <typename D, typename T>
cudaError_t run(const UpdateParams& params, const UpdateArgs<T>& p, cudaStream_t stream) {
  const int64_t columns = p.dim / D::C, threads = D::INDEXED ? whole_blocks(columns) : columns;
  DecodeArgs<T> a{};
  a.x = p.x.data;
  a.weight = static_cast<const T*>(params.weight.data);
  a.bias = static_cast<const T*>(params.bias.data);
  a.state = static_cast<T*>(params.conv_state.data);
  a.out = p.out.data;
  a.x_batch = p.x.batch;
  a.out_batch = p.out.batch;
  a.state_batch = p.state.strides[0];
  a.state_input = p.state.strides[2];
  a.conv_state_indices = p.conv_state_indices;
  a.by_column = Divisor(threads);
  a.batch = static_cast<uint32_t>(p.batch);
  a.columns = static_cast<uint32_t>(columns);
  a.states = static_cast<uint32_t>(p.states);
  const bool pad_is_row = p.pad_slot >= 0 && p.pad_slot < p.states;
  a.pad_slot = pad_is_row ? static_cast<uint32_t>(p.pad_slot) : ~0u;
  a.scale = p.scale;
  a.silu = p.silu;
  a.slots = p.slots;
  a.may_share = p.may_share;
  a.whole_warps = columns % 32 == 0;
  const int64_t all = ceil_div(p.batch, D::E) * threads;
  if constexpr (D::INDEXED) {
    return launch_pdl(update_decode<D>, all, stream, IndexedDecodeArgs<T>{a, p});
  } else {
    return launch_pdl(update_decode<D>, all, stream, a);
  }
}

// Whether a variant of update_decode suits, with or without indices, each for its number of
// entries: width 4, weights and bias of x's type, no ring.
template <typename K>
bool suits_decode(const UpdateParams& params) {
  using T = typename K::Element;
  constexpr int C = K::C;
  return suits<K>(params) && !given(params.cache_seqlens) && params.weight.sizes[1] == 4 &&
         is_plain<Pack<T, C * 4>>(params.weight, params.x, 4) &&
         (!given(params.bias) || is_plain<Pack<T, C>>(params.bias, params.x, 1));
}

// C channels per thread, or MANY_C of several batch entries.
template <typename T, int C, int MANY_C, int S, bool DIM_FASTEST>
bool launch_layout(const UpdateParams& params, const UpdateArgs<T>& p, cudaStream_t stream,
                   cudaError_t* e) {
  using Plain = Decode<Token<T, C, S, DIM_FASTEST, false>, 1>;
  using Indexed = Decode<Token<T, C, S, DIM_FASTEST, true>, 1>;
  const bool indexed = given(params.conv_state_indices);
  if constexpr (sizeof(T) == 2) {  // a state of fp32 keeps as much on its way alone
    using ManyPlain = Decode<Token<T, MANY_C, S, DIM_FASTEST, false>, kEntries>;
    using ManyIndexed = Decode<Token<T, MANY_C, S, DIM_FASTEST, true>, kEntries>;
    // An H200 runs so many threads at a time.
    const bool many = p.batch * (p.dim / MANY_C) >= kEntries << 18;
    if (many && suits_decode<typename ManyPlain::K>(params)) {
      *e = indexed ? run<ManyIndexed>(params, p, stream) : run<ManyPlain>(params, p, stream);
      return true;
    }
  }
  if (!suits_decode<typename Plain::K>(params)) return false;
  *e = indexed ? run<Indexed>(params, p, stream) : run<Plain>(params, p, stream);
  return true;
}

}  // namespace

template <typename T>
bool launch_decode(const UpdateParams& params, const UpdateArgs<T>& p, cudaStream_t stream,
                   cudaError_t* e) {
  constexpr int C = 4 / sizeof(T);
  if (p.states > kMaxParts || p.batch * whole_blocks(p.dim / C) > kMaxParts ||
      !has_code(update_decode<Decode<Token<T, C, 4, false, false>, 1>>)) {
    return false;
  }
  return launch_layout<T, C, C, 4, false>(params, p, stream, e) ||
         launch_layout<T, C, 2 * C, 4, true>(params, p, stream, e) ||
         launch_layout<T, C, 2 * C, 3, false>(params, p, stream, e) ||
         launch_layout<T, C, 2 * C, 3, true>(params, p, stream, e);
}

template bool launch_decode(const UpdateParams&, const UpdateArgs<float>&, cudaStream_t,
                            cudaError_t*);
template bool launch_decode(const UpdateParams&, const UpdateArgs<__half>&, cudaStream_t,
                            cudaError_t*);
template bool launch_decode(const UpdateParams&, const UpdateArgs<__nv_bfloat16>&, cudaStream_t,
                            cudaError_t*);

}  // namespace causal_conv1d::gpu
