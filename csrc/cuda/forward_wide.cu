// The forward's kernels for widths 5 to 8. They are half of the forward, so CMakeLists.txt leaves
// their PTX out: where there is no machine code for the GPU, those for any strides take the call.
#include "forward_launch.cuh"

namespace causal_conv1d::gpu {

template <typename T>
bool launch_wide(const ForwardParams& params, const Options& options, const ForwardArgs<T>& p,
                 cudaStream_t stream, cudaError_t* e) {
  const auto any = forward_channel_first<ChannelFirst<T, 8, kUpTo, kSeqIdx, Access::kUnit>>;
  return has_code(any) && launch_of<Tables<T, 8>>(params, options, p, stream, e);
}

template bool launch_wide(const ForwardParams&, const Options&, const ForwardArgs<float>&,
                          cudaStream_t, cudaError_t*);
template bool launch_wide(const ForwardParams&, const Options&, const ForwardArgs<__half>&,
                          cudaStream_t, cudaError_t*);
template bool launch_wide(const ForwardParams&, const Options&, const ForwardArgs<__nv_bfloat16>&,
                          cudaStream_t, cudaError_t*);

}  // namespace causal_conv1d::gpu
