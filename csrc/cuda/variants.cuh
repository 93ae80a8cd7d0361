// The variants that kernels are compiled in, and which one a call gets.
//
// A variant is a type. WMAX is the taps there is room for; EXACT: W is WMAX, else it may be less
// and WMAX is 4 or 8; SEQ: seq_idx may be given; FUSED: for calls with a pre_gate, a post_gate, a
// residual, or (in the backward) add_dout, each of which may be missing. A call that no variant
// suits is left to the kernels for any strides: forward_any.cuh, backward_any.cuh and, with
// options, backward_options.cuh.
#pragma once

#include <type_traits>

#include "access.h"
#include "types.cuh"

namespace causal_conv1d::gpu {

// What a call needs.
struct Case {
  int width;
  bool seq;
  Access access;  // channel-first
  bool vector;    // channel-last: all tensors give C adjacent channels in one access
  bool fused = false;
};

// A lane has V adjacent steps of a tile, and a warp the tile.
template <typename T, int WMAX_, bool EXACT_, bool SEQ_, Access ACCESS_, bool FUSED_ = false>
struct ChannelFirst {
  using Element = T;
  static constexpr int WMAX = WMAX_, H = WMAX - 1;
  static constexpr int HP = H <= 4 ? 4 : 8;  // steps before its own that a lane reads
  static constexpr int V = steps_per_lane(WMAX, sizeof(T)), TILE = 32 * V;
  static constexpr bool EXACT = EXACT_, SEQ = SEQ_, FUSED = FUSED_;
  static constexpr Access ACCESS = ACCESS_;
  // A row may begin or end within a vector, which it shares with another.
  static constexpr bool kRagged = ACCESS == Access::kDense || ACCESS == Access::kUnit;
  static constexpr bool kAnyStride = ACCESS == Access::kStrided;

  static bool suits(const Case& c) {
    return (!EXACT || c.width == WMAX) && (SEQ || !c.seq) && FUSED == c.fused && c.access <= ACCESS;
  }
};

// A thread has C adjacent channels.
template <typename T, int C_, int WMAX_, bool EXACT_, bool SEQ_, bool FUSED_ = false>
struct ChannelLast {
  using Element = T;
  static constexpr int WMAX = WMAX_, H = WMAX - 1, C = C_;
  static constexpr bool EXACT = EXACT_, SEQ = SEQ_, FUSED = FUSED_;
  static constexpr bool kAnyStride = C == 1;

  static bool suits(const Case& c) {
    return (!EXACT || c.width == WMAX) && (SEQ || !c.seq) && FUSED == c.fused &&
           (C == 1 || c.vector);
  }
};

template <typename... Vs>
struct Variants {};

template <typename... As, typename... Bs>
Variants<As..., Bs...> operator+(Variants<As...>, Variants<Bs...>);
template <typename... Tables>
using Joined = decltype((Tables() + ...));

constexpr bool kExact = true, kUpTo = false;       // W is WMAX, or up to that
constexpr bool kSeqIdx = true, kNoSeqIdx = false;  // may seq_idx be given
constexpr bool kFused = true;

// Variants for bf16 alone, in which most models run: of fp16 and fp32 a more general one takes the
// call, to keep the library small.
template <typename T, typename... Vs>
using OfBf16 = std::conditional_t<std::is_same_v<T, __nv_bfloat16>, Variants<Vs...>, Variants<>>;
template <typename T, typename... Vs>
using OfOthers = std::conditional_t<std::is_same_v<T, __nv_bfloat16>, Variants<>, Variants<Vs...>>;
template <typename T, typename... Vs>
using Of16Bits = std::conditional_t<sizeof(T) == 2, Variants<Vs...>, Variants<>>;

// Those there are, the fastest first.
template <typename T, int WMAX>
struct Tables;

// For widths to 4, which AnyStrides cannot take: a kernel of 8 taps always has those from 3 on, see
// has_tap().
template <typename T>
struct Tables<T, 4> {
  static constexpr int C = forward_channels(sizeof(T));
  using First = Joined<Variants<ChannelFirst<T, 4, kExact, kNoSeqIdx, Access::kAligned>,
                                ChannelFirst<T, 4, kExact, kNoSeqIdx, Access::kDense>>,
                       OfBf16<T, ChannelFirst<T, 4, kExact, kNoSeqIdx, Access::kUnit>>,
                       Variants<ChannelFirst<T, 4, kUpTo, kNoSeqIdx, Access::kUnit>>,
                       OfBf16<T, ChannelFirst<T, 4, kExact, kSeqIdx, Access::kAligned>>,
                       Variants<ChannelFirst<T, 4, kUpTo, kSeqIdx, Access::kAligned, kFused>,
                                ChannelFirst<T, 4, kUpTo, kSeqIdx, Access::kUnit>,
                                ChannelFirst<T, 4, kUpTo, kSeqIdx, Access::kStrided>>>;
  using FirstBackward = First;
  using Last = Joined<
      Variants<ChannelLast<T, C, 4, kExact, kNoSeqIdx>>,
      OfBf16<T, ChannelLast<T, C, 4, kUpTo, kNoSeqIdx>, ChannelLast<T, C, 4, kExact, kSeqIdx>>,
      Variants<ChannelLast<T, C, 4, kUpTo, kSeqIdx>, ChannelLast<T, C, 4, kUpTo, kSeqIdx, kFused>,
               ChannelLast<T, 1, 4, kUpTo, kSeqIdx>>>;
  using LastBackward = Last;
};

// For widths to 8.
template <typename T>
struct AnyStrides {
  static constexpr int C = 1;
  using First = Variants<ChannelFirst<T, 8, kUpTo, kSeqIdx, Access::kStrided>>;
  using Last = Variants<ChannelLast<T, 1, 8, kUpTo, kSeqIdx>>;
};

// bf16 has a kernel for each width, as the taps that are not there take time. The forward goes on
// to AnyStrides.
template <typename T>
struct Tables<T, 8> {
  template <bool SEQ>
  using Exact = OfBf16<T, ChannelFirst<T, 5, kExact, SEQ, Access::kAligned>,
                       ChannelFirst<T, 6, kExact, SEQ, Access::kAligned>,
                       ChannelFirst<T, 7, kExact, SEQ, Access::kAligned>,
                       ChannelFirst<T, 8, kExact, SEQ, Access::kAligned>>;
  template <typename Fused>
  using FirstWith =
      Joined<Exact<kNoSeqIdx>, OfBf16<T, ChannelFirst<T, 8, kUpTo, kNoSeqIdx, Access::kUnit>>,
             OfOthers<T, ChannelFirst<T, 8, kUpTo, kNoSeqIdx, Access::kAligned>>, Exact<kSeqIdx>,
             Fused, Variants<ChannelFirst<T, 8, kUpTo, kSeqIdx, Access::kUnit>>>;
  using FusedFirst = ChannelFirst<T, 8, kUpTo, kSeqIdx, Access::kAligned, kFused>;
  // fp32 has no registers for it.
  using First = FirstWith<Of16Bits<T, FusedFirst>>;
  using FirstBackward = Joined<FirstWith<OfBf16<T, FusedFirst>>, typename AnyStrides<T>::First>;

  template <int C, typename Fused>
  using LastWith =
      Joined<OfBf16<T, ChannelLast<T, C, 8, kExact, kSeqIdx>, ChannelLast<T, C, 7, kExact, kSeqIdx>,
                    ChannelLast<T, C, 6, kExact, kSeqIdx>, ChannelLast<T, C, 5, kExact, kSeqIdx>>,
             OfOthers<T, ChannelLast<T, C, 8, kUpTo, kSeqIdx>>, Fused>;
  template <int C>
  using FusedLast = ChannelLast<T, C, 8, kUpTo, kSeqIdx, kFused>;
  static constexpr int C = forward_channels(sizeof(T));
  static constexpr int kBackwardC = channels_per_thread(8, sizeof(T));
  using Last = LastWith<C, Of16Bits<T, FusedLast<C>>>;
  using LastBackward =
      Joined<LastWith<kBackwardC, OfBf16<T, FusedLast<kBackwardC>>>, typename AnyStrides<T>::Last>;
};

// With CAUSAL_CONV1D_SMALL_PTX the PTX, which serves the GPUs that there is no machine code for,
// has kernels for any strides alone; the others are empty there and not chosen. In a wheel by CUDA
// 12.4 the PTX of all kernels is half of it (2.5 MB): nvcc's compression is weak, and the wheel's
// own makes no less of PTX that is not compressed.
#if defined(CAUSAL_CONV1D_SMALL_PTX) && defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 800
constexpr bool kSmallPtx = true;
#else
constexpr bool kSmallPtx = false;
#endif

// Whether every kernel is there on the current device.
inline bool has_every_kernel() {
#ifdef CAUSAL_CONV1D_SMALL_PTX
  int device = 0, major = 0, minor = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  return major == 8 && minor == 7;
#else
  return true;
#endif
}

// Whether a variant of the table suits.
template <typename... Vs>
bool has_variant(Variants<Vs...>, const Case& c) {
  const bool every = has_every_kernel();
  return (((every || Vs::kAnyStride) && Vs::suits(c)) || ...);
}

// f(a value of the first variant that suits); there has to be one.
template <typename F, typename... Vs>
cudaError_t with_variant(Variants<Vs...>, const Case& c, F&& f) {
  cudaError_t e = cudaErrorInvalidValue;
  const bool every = has_every_kernel();
  (void)(((every || Vs::kAnyStride) && Vs::suits(c) && ((e = f(Vs{})), true)) || ...);
  return e;
}

}  // namespace causal_conv1d::gpu
