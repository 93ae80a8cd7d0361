// Weights and bias, as threads and warps load them.
#pragma once

#include "pack.cuh"
#include "views.cuh"

namespace causal_conv1d::gpu {

// Weights and bias of C adjacent channels from d on. The constructor starts to load them and get()
// converts: what is done in between hides the latency. EXACT: W is WMAX. LOOP: weights that are not
// dense, which are rare, come by a loop, as else they need much code and many registers.
template <int WMAX, int C, bool EXACT = false, bool LOOP = false>
class Parameters {
 public:
  template <typename Args>
  __device__ __forceinline__ Parameters(const Args& p, int64_t d)
      : width_(p.width), dtype_(p.weight.dtype), bias_dtype_(p.bias.dtype) {
    if (dtype_ == CAUSAL_CONV1D_FLOAT32) {
      load<uint32_t>(p.weight, d);
    } else {
      load<uint16_t>(p.weight, d);
    }
    if (!p.bias.given()) return;
#pragma unroll
    for (int c = 0; c < C; ++c) bias_[c] = p.bias.bits(d + c);
  }

  // w from tap WMAX - W on, and the bias or 0, times scale.
  __device__ __forceinline__ void get(float scale, float (&w)[WMAX][C], float (&bias)[C]) const {
    if (dtype_ == CAUSAL_CONV1D_FLOAT32) {
      convert<CAUSAL_CONV1D_FLOAT32>(scale, w);
    } else if (dtype_ == CAUSAL_CONV1D_BFLOAT16) {
      convert<CAUSAL_CONV1D_BFLOAT16>(scale, w);
    } else {
      convert<CAUSAL_CONV1D_FLOAT16>(scale, w);
    }
#pragma unroll
    for (int c = 0; c < C; ++c) bias[c] = AnyView<float>::convert(bias_[c], bias_dtype_) * scale;
  }

 private:
  template <typename Word>
  __device__ __forceinline__ void load(const AnyView<float>& weight, int64_t d) {
    const Word* p = static_cast<const Word*>(weight.data) + d * weight.strides[0];
    if (weight.strides[1] == 1 && weight.strides[0] == width_) {
      if (load_dense<Word, WMAX>(p)) return;
      if constexpr (C > 1 && !EXACT && WMAX == 4) {
        if (load_dense<Word, 3>(p) || load_dense<Word, 2>(p)) return;
      }
    }
    const int first = WMAX - width_;
    if constexpr (LOOP && C > 1) {
#pragma unroll 1
      for (int k = first; k < WMAX; ++k) {
#pragma unroll
        for (int c = 0; c < C; ++c) {
          const uint32_t bits = p[c * weight.strides[0] + (k - first) * weight.strides[1]];
#pragma unroll
          for (int i = 0; i < WMAX; ++i) {
            if (i == k) set<Word>(c * WMAX + i, bits);
          }
        }
      }
    } else {
#pragma unroll
      for (int c = 0; c < C; ++c) {
#pragma unroll
        for (int k = 0; k < WMAX; ++k) {
          if (k < first) continue;
          set<Word>(c * WMAX + k, p[c * weight.strides[0] + (k - first) * weight.strides[1]]);
        }
      }
    }
  }

  // The weights of all channels, one after the other, if W is that and they are aligned.
  template <typename Word, int W>
  __device__ __forceinline__ bool load_dense(const Word* p) {
    using Block = Pack<std::conditional_t<sizeof(Word) == 4, float, __half>, W * C>;
    if (width_ != W || reinterpret_cast<uintptr_t>(p) % Block::kAlignment != 0) return false;
    const Block block = Block::load(p);
    if constexpr (W == WMAX) {
#pragma unroll
      for (int i = 0; i < Block::kWords; ++i) w_[i] = block.w[i];
    } else {
#pragma unroll
      for (int i = 0; i < W * C; ++i) {
        const uint32_t bits =
            sizeof(Word) == 4 ? block.w[i] : block.w[i / 2] >> i % 2 * 16 & 0xffff;
        set<Word>(i / W * WMAX + WMAX - W + i % W, bits);
      }
    }
    return true;
  }

  // Of zeros.
  template <typename Word>
  __device__ __forceinline__ void set(int i, uint32_t bits) {
    if constexpr (sizeof(Word) == 4) {
      w_[i] = bits;
    } else {
      w_[i / 2] |= bits << i % 2 * 16;
    }
  }

  template <int32_t DTYPE>
  __device__ __forceinline__ void convert(float scale, float (&w)[WMAX][C]) const {
#pragma unroll
    for (int c = 0; c < C; ++c) {
#pragma unroll
      for (int k = 0; k < WMAX; ++k) {
        const int i = c * WMAX + k;
        const uint32_t bits =
            DTYPE == CAUSAL_CONV1D_FLOAT32 ? w_[i] : w_[i / 2] >> i % 2 * 16 & 0xffff;
        w[k][c] = AnyView<float>::convert(bits, DTYPE) * scale;
      }
    }
  }

  uint32_t w_[WMAX * C] = {}, bias_[C] = {};  // two 16-bit weights per word
  int width_;
  int32_t dtype_, bias_dtype_;
};

// The same of channel d for a whole warp: each lane loads one weight, and get() gives all of them
// to all lanes. EXACT: W is WMAX.
template <int WMAX, bool EXACT>
class WarpParameters {
 public:
  template <typename Args>
  __device__ __forceinline__ WarpParameters(const Args& p, int64_t d, int lane) {
    if (lane < (EXACT ? WMAX : p.width)) weight_ = p.weight.bits(d, lane);
    if (p.bias.given()) bias_ = p.bias.bits(d);
  }

  template <typename Args>
  __device__ __forceinline__ void get(const Args& p, float (&w)[WMAX], float& bias) const {
    const int width = EXACT ? WMAX : p.width;
    const float mine = AnyView<float>::convert(weight_, p.weight.dtype) * p.scale;
#pragma unroll
    for (int k = 0; k < WMAX; ++k) {
      const int from = k - (WMAX - width);
      w[k] = __shfl_sync(0xffffffff, mine, max(from, 0));
      if (from < 0) w[k] = 0.0f;
    }
    bias = AnyView<float>::convert(bias_, p.bias.dtype) * p.scale;
  }

 private:
  uint32_t weight_ = 0, bias_ = 0;
};

}  // namespace causal_conv1d::gpu
