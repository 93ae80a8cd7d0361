// The CPU kernels, compiled once per instruction set by kernels_*.cpp.
//
// Widths 2 to 4 without seq_idx, where there are vectors, go through direct.inl. All else, and
// update, shares one scheme for all layouts and types. A block of x (some rows of time x one tile
// of channels) is converted into scratch memory in the L1 or L2 cache, behind the width - 1 rows
// before it:
//
//   channel_first: a tile is one channel, a row one element; vectors run along time.
//   channel_last:  a tile is `cols` channels, a row `pitch` >= cols elements; vectors run along
//                  channels, so that long contiguous pieces are read however long a row is.
//
// Both then compute z[i] = bias + sum over k of w[k] * x[i + k * pitch] with the same fused
// multiply-adds in the same order, so that layouts, chunks and updates agree bitwise. Rows outside
// the sequence are zeros in scratch; scratch is padded to whole vectors, so there are no tails but
// where memory of the caller is touched.
//
// backward: with dz the gradient of z, dx[s] = sum over j of w[width-1-j] * dz[s + j] is the same
// convolution with the taps reversed, width - 1 rows late; rows s < 0 are dinitial_states.
//
// Everything but the table at the end has internal linkage, and no standard library is used: an
// inline function compiled for AVX-512 here might otherwise be linked into the code for all CPUs.
#include "exp.h"
#include "kernels.h"
#include "simd/vec.h"

namespace causal_conv1d {
namespace {

CAUSAL_CONV1D_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
CAUSAL_CONV1D_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Scratch rows start at multiples of this, the widest vector.
constexpr int64_t kPad = 32;
CAUSAL_CONV1D_INLINE int64_t padded(int64_t n) { return (n + kPad - 1) / kPad * kPad; }

CAUSAL_CONV1D_INLINE bool is_given(const Tensor& t) { return t.ndim != 0; }

CAUSAL_CONV1D_INLINE int64_t element_size(int32_t dtype) {
  return dtype == CAUSAL_CONV1D_FLOAT64 ? 8 : dtype == CAUSAL_CONV1D_FLOAT32 ? 4 : 2;
}

CAUSAL_CONV1D_INLINE char* address(const Tensor& t, int64_t i, int64_t j = 0, int64_t k = 0) {
  const int64_t offset = i * t.strides[0] + j * t.strides[1] + k * t.strides[2];
  return static_cast<char*>(t.data) + offset * element_size(t.dtype);
}

CAUSAL_CONV1D_INLINE int32_t read_int32(const Tensor& t, int64_t i, int64_t j = 0) {
  int32_t value;
  const int64_t offset = i * t.strides[0] + j * t.strides[1];
  __builtin_memcpy(&value, static_cast<const char*>(t.data) + offset * 4, sizeof(value));
  return value;
}

// Of an int32 or int64 tensor.
CAUSAL_CONV1D_INLINE int64_t read_index(const Tensor& t, int64_t i) {
  if (t.dtype == CAUSAL_CONV1D_INT32) return read_int32(t, i);
  int64_t value;
  __builtin_memcpy(&value, static_cast<const char*>(t.data) + i * t.strides[0] * 8, sizeof(value));
  return value;
}

// ---- activation ----------------------------------------------------------------------------

// Between these, exp(-z) is a normal float. Below, sigmoid(z) is taken as 0 and is less than 4e-39;
// above, it is 1. Infinities and NaN keep their way through z * sigmoid(z): z itself is not
// clamped.
CAUSAL_CONV1D_INLINE Vec lowest() { return Vec::set(-88.7f); }
CAUSAL_CONV1D_INLINE Vec at_most_highest(Vec z) { return min(Vec::set(87.3365402f), z); }

// 1 + exp(-z) for z between those, anything below: exp(-z) = 2^n * p(q), q = z + n * ln(2), with
// minimax polynomials p. fp32: n is whole, |q| <= ln(2) / 2, and p has degree 5 (relative error
// 9e-8). 16 bits: degree 4 (3e-6) or, where a register holds the powers of 2 between, n in
// sixteenths and degree 2 (4e-7), a shorter chain. `shifted` is n + 1.5 * 2^23 (2^19), which leaves
// n in its lowest bits.
template <bool kShort>
CAUSAL_CONV1D_INLINE Vec one_plus_exp_of_minus(Vec z) {
  const Vec one = Vec::set(1.0f);
  const bool sixteenths = kShort && kHasExp2OfSixteenths;
  const Vec shift = Vec::set(sixteenths ? 786432.0f : 12582912.0f);
  const Vec shifted = fma(z, Vec::set(-1.44269504f), shift);
  const Vec q = fma(sub(shifted, shift), Vec::set(0.693147182f), z);
  Vec p;
  if (sixteenths) {
    p = fma(q, Vec::set(0.5f), Vec::set(-1.00005866f));
    return fma(fma(p, q, one), exp2_of_sixteenths(shifted), one);
  }
  if (kShort) {
    p = fma(q, Vec::set(0.04151368295f), Vec::set(-0.1678759163f));
    p = fma(p, q, Vec::set(0.5000302178f));
    p = fma(p, q, Vec::set(-0.9999667728f));
  } else {
    p = fma(q, Vec::set(-0.008290272112f), Vec::set(0.04189815962f));
    p = fma(p, q, Vec::set(-0.1666763813f));
    p = fma(p, q, Vec::set(0.4999914784f));
    p = fma(p, q, Vec::set(-0.9999997063f));
  }
  return add(one, scale_by_exp2(fma(p, q, one), shifted));
}

// silu(z) = z * sigmoid(z) and its derivative are each computed in two parts, which loops may take
// in different rounds: the chain from z to the result is longer than the CPU looks ahead.
struct SiluPart {
  Vec z, denominator;
};

template <bool kShort>
CAUSAL_CONV1D_INLINE SiluPart begin_silu(Vec z) {
  return {z, one_plus_exp_of_minus<kShort>(at_most_highest(z))};
}

// kShort: for results of 16 bits, with a relative error of at most 7e-5.
template <bool kShort>
CAUSAL_CONV1D_INLINE Vec end_silu(SiluPart part) {
  const Vec r = kShort ? reciprocal_estimate(part.denominator) : reciprocal(part.denominator);
  return mul(part.z, select_or_zero(not_less(part.z, lowest()), r));
}

template <bool kShort>
CAUSAL_CONV1D_INLINE Vec silu(Vec z) {
  return end_silu<kShort>(begin_silu<kShort>(z));
}

// It begins as silu does. The end is not as short for 16 bits: what dweight and dbias sum is not
// rounded to 16 bits.
CAUSAL_CONV1D_INLINE Vec end_silu_derivative(SiluPart part) {
  const Vec one = Vec::set(1.0f);
  const Vec s = select_or_zero(not_less(part.z, lowest()), reciprocal(part.denominator));
  return mul(s, fma(part.z, sub(one, s), one));
}

template <bool kShort>
CAUSAL_CONV1D_INLINE Vec silu_derivative(Vec z) {
  return end_silu_derivative(begin_silu<kShort>(z));
}

CAUSAL_CONV1D_INLINE double sigmoid(double z) { return 1.0 / (1.0 + exp_without_errno(-z)); }

template <bool kShort>
CAUSAL_CONV1D_INLINE DoubleVec silu(DoubleVec z) {
  return {z.v / (1.0 + exp_without_errno(-z.v))};
}

template <bool kShort>
CAUSAL_CONV1D_INLINE DoubleVec silu_derivative(DoubleVec z) {
  const double s = sigmoid(z.v);
  return {s * (1.0 + z.v * (1.0 - s))};
}

// What becomes of a sum; of the gradients, *z is that of the output and becomes that of the sum.
enum class Epilogue { kIdentity, kSilu, kShortSilu, kGradient, kSiluGradient, kShortSiluGradient };

CAUSAL_CONV1D_INLINE bool is_16_bit(int32_t dtype) {
  return dtype == CAUSAL_CONV1D_FLOAT16 || dtype == CAUSAL_CONV1D_BFLOAT16;
}

CAUSAL_CONV1D_INLINE Epilogue forward_epilogue(int32_t dtype, bool with_silu) {
  if (!with_silu) return Epilogue::kIdentity;
  return is_16_bit(dtype) ? Epilogue::kShortSilu : Epilogue::kSilu;
}

CAUSAL_CONV1D_INLINE Epilogue gradient_epilogue(int32_t dtype, bool with_silu) {
  if (!with_silu) return Epilogue::kGradient;
  return is_16_bit(dtype) ? Epilogue::kShortSiluGradient : Epilogue::kSiluGradient;
}

template <class V, class S>
CAUSAL_CONV1D_INLINE V apply(Epilogue epilogue, V sum, const S* z) {
  switch (epilogue) {
    case Epilogue::kSilu: return silu<false>(sum);
    case Epilogue::kShortSilu: return silu<true>(sum);
    case Epilogue::kGradient: return V::load(z);
    case Epilogue::kSiluGradient: return mul(V::load(z), silu_derivative<false>(sum));
    case Epilogue::kShortSiluGradient: return mul(V::load(z), silu_derivative<true>(sum));
    default: return sum;
  }
}

// ---- rows of the caller's memory <-> scratch -------------------------------------------------

// n elements into scratch, padded with zeros to a whole vector.
constexpr int64_t kFew = 4;
template <class V, class T>
void load_row_as(const char* src, int64_t stride, int64_t n, typename V::Scalar* dst) {
  constexpr int64_t kLanes = V::kLanes;
  constexpr int64_t kSize = sizeof(T);
  int64_t i = 0;
  if (stride == 1) {
    for (; i + kLanes <= n; i += kLanes) {
      V::load(reinterpret_cast<const T*>(src + i * kSize)).store(dst + i);
    }
  }
  for (; i < n; i += kLanes) {
    const int64_t count = smaller(kLanes, n - i);
    const char* p = src + i * stride * kSize;
    if (count <= kFew) {  // a vector would have to wait for the elements' way through memory
      V::set(0).store(dst + i);
      for (int64_t j = 0; j < count; ++j) {
        T element;
        __builtin_memcpy(&element, p + j * stride * kSize, kSize);
        dst[i + j] = scalar_of(element);
      }
      continue;
    }
    T buffer[kLanes] = {};
    for (int64_t j = 0; j < count; ++j) __builtin_memcpy(&buffer[j], p + j * stride * kSize, kSize);
    V::load(buffer).store(dst + i);
  }
}

CAUSAL_CONV1D_INLINE void load_row(int32_t dtype, const char* src, int64_t stride, int64_t n,
                                   float* dst) {
  if (dtype == CAUSAL_CONV1D_FLOAT32) {
    load_row_as<Vec, float>(src, stride, n, dst);
  } else if (dtype == CAUSAL_CONV1D_FLOAT16) {
    load_row_as<Vec, Half>(src, stride, n, dst);
  } else {
    load_row_as<Vec, Bfloat16>(src, stride, n, dst);
  }
}

CAUSAL_CONV1D_INLINE void load_row(int32_t, const char* src, int64_t stride, int64_t n,
                                   double* dst) {
  load_row_as<DoubleVec, double>(src, stride, n, dst);
}

// Rows first to kRows - 1 of n columns, whose kRows elements lie beside each other in memory. Bits
// is an arithmetic type of T's size, for compilers vectorize no loops over structs.
template <class T, class Bits, int kRows>
void load_interleaved_as(const char* src, int64_t n, int64_t first, float* dst, int64_t pitch) {
  for (int64_t c = 0; c < n; c += kPad) {
    Bits columns[kPad * kRows], rows[kRows][kPad];
    if (c + kPad <= n) {
      __builtin_memcpy(columns, src + c * kRows * sizeof(T), sizeof(columns));
    } else {
      __builtin_memset(columns, 0, sizeof(columns));
      __builtin_memcpy(columns, src + c * kRows * sizeof(T),
                       static_cast<size_t>(n - c) * kRows * sizeof(T));
    }
    for (int i = 0; i < kPad; ++i) {
      for (int r = 0; r < kRows; ++r) rows[r][i] = columns[i * kRows + r];
    }
    for (int64_t r = first; r < kRows; ++r) {
      for (int64_t i = 0; i < kPad; i += Vec::kLanes) {
        const T* const row = reinterpret_cast<const T*>(rows[r] + i);
        Vec::load(row).store(dst + (r - first) * pitch + c + i);
      }
    }
  }
}

template <class T, class Bits>
bool load_interleaved(const char* src, int64_t rows, int64_t n, int64_t first, float* dst,
                      int64_t pitch) {
  switch (rows) {
    case 2: load_interleaved_as<T, Bits, 2>(src, n, first, dst, pitch); return true;
    case 3: load_interleaved_as<T, Bits, 3>(src, n, first, dst, pitch); return true;
    case 4: load_interleaved_as<T, Bits, 4>(src, n, first, dst, pitch); return true;
    default: return false;
  }
}

// Rows first to rows - 1 of n columns into scratch, each padded with zeros to a whole vector.
inline void load_rows(int32_t dtype, const char* src, int64_t row_stride, int64_t stride,
                      int64_t rows, int64_t n, int64_t first, float* dst, int64_t pitch) {
  if (row_stride == 1 && stride == rows) {
    const bool done = dtype == CAUSAL_CONV1D_FLOAT32
                          ? load_interleaved<float, float>(src, rows, n, first, dst, pitch)
                      : dtype == CAUSAL_CONV1D_FLOAT16
                          ? load_interleaved<Half, uint16_t>(src, rows, n, first, dst, pitch)
                          : load_interleaved<Bfloat16, uint16_t>(src, rows, n, first, dst, pitch);
    if (done) return;
  }
  for (int64_t r = first; r < rows; ++r) {
    load_row(dtype, src + r * row_stride * element_size(dtype), stride, n,
             dst + (r - first) * pitch);
  }
}

inline void load_rows(int32_t dtype, const char* src, int64_t row_stride, int64_t stride,
                      int64_t rows, int64_t n, int64_t first, double* dst, int64_t pitch) {
  for (int64_t r = first; r < rows; ++r) {
    load_row(dtype, src + r * row_stride * 8, stride, n, dst + (r - first) * pitch);
  }
}

// n elements of scratch to the caller's memory.
template <class V, class T>
void store_row_as(const typename V::Scalar* src, bool stream, char* dst, int64_t stride,
                  int64_t n) {
  constexpr int64_t kLanes = V::kLanes;
  constexpr int64_t kSize = sizeof(T);
  const auto store_some = [&](int64_t i, int64_t count) {
    T buffer[kLanes];
    V::load(src + i).store(buffer);
    char* p = dst + i * stride * kSize;
    for (int64_t j = 0; j < count; ++j) __builtin_memcpy(p + j * stride * kSize, &buffer[j], kSize);
  };
  int64_t i = 0;
  if (stride == 1) {
    const uintptr_t start = reinterpret_cast<uintptr_t>(dst);
    if (stream && start % kSize == 0) {
      const int64_t past = static_cast<int64_t>(start % (kLanes * kSize)) / kSize;
      const int64_t head = past == 0 ? 0 : smaller(n, kLanes - past);
      if (head != 0) store_some(0, head);
      for (i = head; i + kLanes <= n; i += kLanes) {
        V::load(src + i).stream(reinterpret_cast<T*>(dst + i * kSize));
      }
    } else {
      for (; i + kLanes <= n; i += kLanes) {
        V::load(src + i).store(reinterpret_cast<T*>(dst + i * kSize));
      }
    }
  }
  for (; i < n; i += kLanes) store_some(i, smaller(kLanes, n - i));
}

CAUSAL_CONV1D_INLINE void store_row(int32_t dtype, const float* src, bool stream, char* dst,
                                    int64_t stride, int64_t n) {
  if (dtype == CAUSAL_CONV1D_FLOAT32) {
    store_row_as<Vec, float>(src, stream, dst, stride, n);
  } else if (dtype == CAUSAL_CONV1D_FLOAT16) {
    store_row_as<Vec, Half>(src, stream, dst, stride, n);
  } else {
    store_row_as<Vec, Bfloat16>(src, stream, dst, stride, n);
  }
}

CAUSAL_CONV1D_INLINE void store_row(int32_t, const double* src, bool stream, char* dst,
                                    int64_t stride, int64_t n) {
  store_row_as<DoubleVec, double>(src, stream, dst, stride, n);
}

// ---- tiles ----------------------------------------------------------------------------------

// The shape of the current tile in scratch.
struct Tile {
  bool channel_first;
  int64_t width, d, cols, pitch;
};

CAUSAL_CONV1D_INLINE Tile tile_at(const Tiling& tiling, int64_t d, int64_t end) {
  const int64_t cols = smaller(tiling.cols, end - d);
  return {tiling.channel_first, tiling.width, d, cols, tiling.channel_first ? 1 : padded(cols)};
}

// Rows [t, t + rows) of a (batch, dim, time) tensor. channel_first pads with zeros.
template <class S>
void load_block(const Tile& tile, const Tensor& x, int64_t b, int64_t t, int64_t rows, S* dst) {
  if (rows <= 0) return;
  if (tile.channel_first) {
    load_row(x.dtype, address(x, b, tile.d, t), x.strides[2], rows, dst);
    return;
  }
  const int64_t bytes = x.strides[1] == 1 ? tile.cols * element_size(x.dtype) : 0;
  for (int64_t r = 0; r < rows; ++r) {
    // Rows lie too far apart for the hardware to foresee the next block's.
    const char* const next = address(x, b, tile.d, t + r + rows);
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(next + i);
    load_row(x.dtype, address(x, b, tile.d, t + r), x.strides[1], tile.cols, dst + r * tile.pitch);
  }
}

template <class S>
void store_block(const Tile& tile, const S* src, bool stream, const Tensor& out, int64_t b,
                 int64_t t, int64_t rows) {
  if (rows <= 0) return;
  if (tile.channel_first) {
    store_row(out.dtype, src, stream, address(out, b, tile.d, t), out.strides[2], rows);
    return;
  }
  for (int64_t r = 0; r < rows; ++r) {
    store_row(out.dtype, src + r * tile.pitch, stream, address(out, b, tile.d, t + r),
              out.strides[1], tile.cols);
  }
}

// Rows [first, last), and for channel_first the rest of the last vector.
template <class S>
CAUSAL_CONV1D_INLINE void zero_rows(const Tile& tile, S* x, int64_t first, int64_t last) {
  const int64_t end = tile.channel_first ? padded(last) : last * tile.pitch;
  const int64_t begin = first * tile.pitch;
  if (begin < end) __builtin_memset(x + begin, 0, static_cast<size_t>(end - begin) * sizeof(S));
}

// Moves the last `halo` of rows + halo rows to the front.
template <class S>
CAUSAL_CONV1D_INLINE void keep_halo(const Tile& tile, S* x, int64_t rows) {
  const size_t bytes = static_cast<size_t>((tile.width - 1) * tile.pitch) * sizeof(S);
  __builtin_memmove(x, x + rows * tile.pitch, bytes);
}

// The width - 1 rows x~[t - (width-1)] .. x~[t - 1].
template <class S>
void load_halo(const Tile& tile, const Tensor& x, const Tensor& initial_states, int64_t b,
               int64_t t, S* dst) {
  const int64_t halo = tile.width - 1;
  const int64_t before = larger(0, smaller(halo, halo - t));  // rows before the sequence
  if (is_given(initial_states)) {
    load_block(tile, initial_states, b, t, before, dst);
  } else {
    zero_rows(tile, dst, 0, before);
  }
  load_block(tile, x, b, t - halo + before, halo - before, dst + before * tile.pitch);
}

// Taps as w[k] (channel_first) or w[k * pitch + c], and the bias, 0 if there is none.
template <class S>
void load_weights(const Tile& tile, const Tensor& weight, const Tensor& bias, S* w, S* w0) {
  if (tile.channel_first) {
    load_row(weight.dtype, address(weight, tile.d), weight.strides[1], tile.width, w);
  } else {
    load_rows(weight.dtype, address(weight, tile.d), weight.strides[1], weight.strides[0],
              tile.width, tile.cols, 0, w, tile.pitch);
  }
  if (is_given(bias)) {
    load_row(bias.dtype, address(bias, tile.d), bias.strides[0], tile.cols, w0);
  } else {
    __builtin_memset(w0, 0, static_cast<size_t>(padded(tile.cols)) * sizeof(S));
  }
}

// ids of times [t, t + n); those before the sequence are id(0), those behind it padding. Returns
// whether all are one id that is no padding, so that ids need not be looked at.
inline bool load_ids(const Tensor& seq_idx, int64_t b, int64_t t, int64_t n, int32_t* ids) {
  const int64_t seqlen = seq_idx.sizes[1];
  const int64_t begin = smaller(n, larger(0, -t));            // the first at or after time 0
  const int64_t end = larger(begin, smaller(n, seqlen - t));  // the first behind the sequence
  const int32_t first = seqlen > 0 ? read_int32(seq_idx, b) : -1;
  for (int64_t i = 0; i < begin; ++i) ids[i] = first;
  if (begin < end && seq_idx.strides[1] == 1) {
    const char* const src =
        static_cast<const char*>(seq_idx.data) + (b * seq_idx.strides[0] + t + begin) * 4;
    __builtin_memcpy(ids + begin, src, static_cast<size_t>(end - begin) * 4);
  } else {
    for (int64_t i = begin; i < end; ++i) ids[i] = read_int32(seq_idx, b, t + i);
  }
  for (int64_t i = end; i < n; ++i) ids[i] = -1;
  const int32_t id = ids[0];
  int32_t different = 0;
  for (int64_t i = 0; i < n; ++i) different |= ids[i] ^ id;
  return different == 0 && id >= 0;
}

// Of rows x~[first] to x~[first + n - 1] of the states that precede the time `end`, makes those
// zero that padding stands for: padding itself, and the initial state if padding is what follows
// it, unless there is nothing else.
template <class S>
void zero_padding(const Tile& tile, const Tensor& seq_idx, int64_t b, int64_t end, int64_t first,
                  int64_t n, S* x) {
  for (int64_t r = 0; r < n; ++r) {
    if (end == 0 || read_int32(seq_idx, b, larger(0, first + r)) >= 0) continue;
    __builtin_memset(x + r * tile.pitch, 0, static_cast<size_t>(tile.pitch) * sizeof(S));
  }
}

// ---- the convolution ------------------------------------------------------------------------

// Where ids differ within a block: ids[i] belongs to row i of x, and row i of z has the id
// ids[i + center]. Null ids: all the same.
struct Ids {
  const int32_t* ids;
  int64_t center;
};

// kWidth 0: any width. z of n rows and the rest of the last vector.
template <class V, int kWidth, bool kIds, class S>
void convolve_first(Epilogue epilogue, int64_t width, const S* w, int64_t tap_step, S bias,
                    const S* x, Ids ids, S* z, int64_t n) {
  constexpr int kTaps = kWidth == 0 ? 1 : kWidth;
  V taps[kTaps];
  for (int k = 0; k < kTaps; ++k) taps[k] = V::set(w[k * tap_step]);
  const V start = V::set(bias);
  const int64_t count = kWidth == 0 ? width : kWidth;
  for (int64_t i = 0; i < n; i += V::kLanes) {
    V acc = start;
    for (int64_t k = 0; k < count; ++k) {
      V tap = V::load(x + i + k);
      if (kIds) {
        const auto same = equal_ids(V(), ids.ids + i + k, ids.ids + i + ids.center);
        tap = select_or_zero(same, tap);
      }
      acc = fma(kWidth == 0 ? V::set(w[k * tap_step]) : taps[k], tap, acc);
    }
    acc = apply(epilogue, acc, z + i);
    if (kIds) acc = select_or_zero(valid_ids(V(), ids.ids + i + ids.center), acc);
    acc.store(z + i);
  }
}

// Each tap is a row, or the row `zeros` where its id differs.
template <class V, class S>
void convolve_last(Epilogue epilogue, int64_t width, const S* w, int64_t tap_step, const S* bias,
                   const S* x, Ids ids, const S* zeros, int64_t pitch, S* z, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r) {
    S* const out = z + r * pitch;
    const int32_t id = ids.ids != nullptr ? ids.ids[r + ids.center] : 0;
    if (id < 0) {
      __builtin_memset(out, 0, static_cast<size_t>(pitch) * sizeof(S));
      continue;
    }
    for (int64_t c = 0; c < pitch; c += V::kLanes) {
      V acc = V::load(bias + c);
      for (int64_t k = 0; k < width; ++k) {
        const bool same = ids.ids == nullptr || ids.ids[r + k] == id;
        const S* const row = same ? x + (r + k) * pitch : zeros;
        acc = fma(V::load(w + k * tap_step + c), V::load(row + c), acc);
      }
      apply(epilogue, acc, out + c).store(out + c);
    }
  }
}

// z[r] = epilogue(bias + sum over k of w[k] * x[r + k]) for `rows` rows, 0 where the id is padding.
template <class V, class S>
void convolve(Epilogue epilogue, const Tile& tile, const S* w, int64_t tap_step, const S* bias,
              const S* x, Ids ids, const S* zeros, S* z, int64_t rows) {
  if (!tile.channel_first) {
    return convolve_last<V>(epilogue, tile.width, w, tap_step * tile.pitch, bias, x, ids, zeros,
                            tile.pitch, z, rows);
  }
  const auto run = [&](auto function) {
    function(epilogue, tile.width, w, tap_step, *bias, x, ids, z, rows);
  };
  if (ids.ids == nullptr) return run(convolve_first<V, 0, false, S>);
  if (tile.width == 4) return run(convolve_first<V, 4, true, S>);
  return run(convolve_first<V, 0, true, S>);
}

// ---- forward --------------------------------------------------------------------------------

// Hands out pieces of a thread's scratch memory; with a null base it only counts bytes.
class Arena {
 public:
  explicit Arena(char* base) : base_(base) {}

  template <class T>
  T* take(int64_t count) {
    char* const piece = base_ == nullptr ? nullptr : base_ + used_;
    // The slack lets a vector start at the last element.
    used_ += (static_cast<size_t>(count + kPad) * sizeof(T) + 63) / 64 * 64;
    return reinterpret_cast<T*>(piece);
  }

  size_t used() const { return used_; }

 private:
  char* const base_;
  size_t used_ = 0;
};

template <class S>
struct ForwardScratch {
  S *w, *bias, *zeros, *x, *z;
  int32_t* ids;

  ForwardScratch(Arena* arena, const Tiling& tiling) {
    const int64_t pitch = tiling.channel_first ? 1 : padded(tiling.cols);
    const auto rows = [&](int64_t n) { return tiling.channel_first ? padded(n) : n * pitch; };
    w = arena->take<S>(rows(tiling.width));
    bias = arena->take<S>(padded(pitch));
    zeros = arena->take<S>(padded(pitch));
    x = arena->take<S>(rows(tiling.width - 1 + tiling.block));
    z = arena->take<S>(rows(tiling.block));
    ids = arena->take<int32_t>(padded(tiling.width - 1 + tiling.block));
  }
};

// out[t0 .. t1) with the width - 1 rows before t0 in s.x, which then holds those before t1.
template <class V, class S>
void forward_rows(const Tile& tile, const Tiling& tiling, const Tensor& x, const Tensor* seq_idx,
                  const Tensor& out, bool with_silu, int64_t b, int64_t t0, int64_t t1,
                  const ForwardScratch<S>& s) {
  const int64_t halo = tile.width - 1;
  for (int64_t t = t0, rows; t < t1; t += rows) {
    rows = smaller(tiling.block, t1 - t);
    load_block(tile, x, b, t, rows, s.x + halo * tile.pitch);
    const bool plain = seq_idx == nullptr || load_ids(*seq_idx, b, t - halo, halo + rows, s.ids);
    const Ids ids = {plain ? nullptr : s.ids, halo};
    convolve<V>(forward_epilogue(x.dtype, with_silu), tile, s.w, 1, s.bias, s.x, ids, s.zeros, s.z,
                rows);
    store_block(tile, s.z, tiling.stream, out, b, t, rows);
    keep_halo(tile, s.x, rows);
  }
}

// The batch entries, channels and times of a unit.
struct Range {
  int64_t b0, b1, d0, d1, t0, t1, slot;
};

inline Range range_of(const Tiling& tiling, int64_t unit) {
  const int64_t channels = unit % tiling.channel_groups;
  const int64_t slot = unit / tiling.channel_groups;
  const int64_t chunk = slot % tiling.chunks;
  const int64_t batch = slot / tiling.chunks;
  Range r;
  r.b0 = batch * tiling.batches_per_unit;
  r.b1 = smaller(tiling.batch, r.b0 + tiling.batches_per_unit);
  r.d0 = channels * tiling.channels_per_unit;
  r.d1 = smaller(tiling.dim, r.d0 + tiling.channels_per_unit);
  r.t0 = chunk * tiling.chunk;
  r.t1 = smaller(tiling.seqlen, r.t0 + tiling.chunk);
  r.slot = slot;
  return r;
}

template <class V>
void forward_unit(const ForwardParams& p, const Tiling& tiling, int64_t unit, char* scratch) {
  using S = typename V::Scalar;
  Arena arena(scratch);
  const ForwardScratch<S> s(&arena, tiling);
  __builtin_memset(s.zeros, 0, static_cast<size_t>(padded(tiling.cols)) * sizeof(S));
  const Tensor* const seq_idx = is_given(p.seq_idx) ? &p.seq_idx : nullptr;
  const Range range = range_of(tiling, unit);
  for (int64_t d = range.d0; d < range.d1; d += tiling.cols) {
    const Tile tile = tile_at(tiling, d, range.d1);
    load_weights(tile, p.weight, p.bias, s.w, s.bias);
    for (int64_t b = range.b0; b < range.b1; ++b) {
      load_halo(tile, p.x, p.initial_states, b, range.t0, s.x);
      forward_rows<V>(tile, tiling, p.x, seq_idx, p.out, p.silu != 0, b, range.t0, range.t1, s);
      if (is_given(p.final_states_out) && range.t1 == tiling.seqlen) {
        store_block(tile, s.x, false, p.final_states_out, b, 0, tile.width - 1);
      }
    }
  }
  finish_streams();
}

template <class S>
S* take_states(Arena* arena, const Tiling& tiling) {
  const int64_t states = tiling.width - 1;
  return arena->take<S>(tiling.channel_first ? padded(states) : states * padded(tiling.cols));
}

// All of a row is read before it is written: final_states_out may be initial_states.
template <class V>
void final_states_unit(const ForwardParams& p, const Tiling& tiling, const int64_t* ends,
                       int64_t unit, char* scratch) {
  using S = typename V::Scalar;
  Arena arena(scratch);
  S* const states = take_states<S>(&arena, tiling);
  const Range range = range_of(tiling, unit);
  const int64_t halo = tiling.width - 1;
  for (int64_t d = range.d0; d < range.d1; d += tiling.cols) {
    const Tile tile = tile_at(tiling, d, range.d1);
    for (int64_t b = range.b0; b < range.b1; ++b) {
      if (ends[b] < 0) continue;
      load_halo(tile, p.x, p.initial_states, b, ends[b], states);
      if (is_given(p.seq_idx)) {
        zero_padding(tile, p.seq_idx, b, ends[b], ends[b] - halo, halo, states);
      }
      store_block(tile, states, false, p.final_states_out, b, 0, halo);
    }
  }
}

// ---- backward -------------------------------------------------------------------------------

template <class S>
struct BackwardScratch {
  S *w, *bias, *zeros, *x, *dz, *z, *dfinal, *sums;
  double* totals;
  int32_t* ids;

  BackwardScratch(Arena* arena, const Tiling& tiling) {
    const int64_t pitch = tiling.channel_first ? 1 : padded(tiling.cols);
    const auto rows = [&](int64_t n) { return tiling.channel_first ? padded(n) : n * pitch; };
    w = arena->take<S>(rows(tiling.width));
    bias = arena->take<S>(padded(pitch));
    zeros = arena->take<S>(padded(pitch));
    x = arena->take<S>(rows(tiling.width - 1 + tiling.block));
    dz = arena->take<S>(rows(tiling.width - 1 + tiling.block));
    z = arena->take<S>(rows(tiling.block));
    dfinal = arena->take<S>(rows(tiling.block));
    sums = arena->take<S>((tiling.width + 1) * pitch);
    totals = arena->take<double>((tiling.width + 1) * pitch);
    ids = arena->take<int32_t>(padded(tiling.width - 1 + tiling.block));
  }
};

template <class V, class S>
CAUSAL_CONV1D_INLINE V load_partial(const S* p, int64_t n) {
  S buffer[V::kLanes] = {};
  for (int64_t i = 0; i < n; ++i) buffer[i] = p[i];
  return V::load(buffer);
}

template <class V>
CAUSAL_CONV1D_INLINE double sum_of_lanes(V v) {
  typename V::Scalar lanes[V::kLanes];
  v.store(lanes);
  for (int half = V::kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return static_cast<double>(lanes[0]);
}

// total[k] += sum over i < n of dz[i] * x[i + k], k < kTaps; and *bias_total += sum of dz if not
// null. Runs of kRun vectors are summed in S, these sums in double, to keep rounding errors small.
template <class V, int kTaps, bool kIds, class S>
void correlate_first(const S* dz, const S* x, const int32_t* tap_ids, const int32_t* dz_ids,
                     int64_t n, double* total, double* bias_total) {
  constexpr int64_t kRun = 64 * V::kLanes;
  for (int64_t begin = 0; begin < n; begin += kRun) {
    const int64_t end = smaller(n, begin + kRun);
    V acc[kTaps], bias_acc = V::set(0);
    for (int k = 0; k < kTaps; ++k) acc[k] = V::set(0);
    int64_t i = begin;
    for (; i + V::kLanes <= end; i += V::kLanes) {
      const V g = V::load(dz + i);
      bias_acc = add(bias_acc, g);
      for (int k = 0; k < kTaps; ++k) {
        V tap = V::load(x + i + k);
        if (kIds) {
          const auto same = equal_ids(V(), tap_ids + i + k, dz_ids + i);
          tap = select_or_zero(both(same, valid_ids(V(), dz_ids + i)), tap);
        }
        acc[k] = fma(g, tap, acc[k]);
      }
    }
    if (i < end) {
      const V g = load_partial<V>(dz + i, end - i);
      bias_acc = add(bias_acc, g);
      for (int k = 0; k < kTaps; ++k) {
        V tap = load_partial<V>(x + i + k, end - i);
        if (kIds) {
          const auto same = equal_ids(V(), tap_ids + i + k, dz_ids + i);
          tap = select_or_zero(both(same, valid_ids(V(), dz_ids + i)), tap);
        }
        acc[k] = fma(g, tap, acc[k]);
      }
    }
    for (int k = 0; k < kTaps; ++k) total[k] += sum_of_lanes(acc[k]);
    if (bias_total != nullptr) *bias_total += sum_of_lanes(bias_acc);
  }
}

// sums[k * pitch + c] = sum over rows of dz[r] * x[r + k], k < kTaps, and bias_sums if not null.
template <class V, int kTaps, class S>
void correlate_last(const S* dz, const S* x, const int32_t* tap_ids, const int32_t* dz_ids,
                    const S* zeros, int64_t pitch, int64_t rows, S* sums, S* bias_sums) {
  for (int64_t c = 0; c < pitch; c += V::kLanes) {
    V acc[kTaps], bias_acc = V::set(0);
    for (int k = 0; k < kTaps; ++k) acc[k] = V::set(0);
    for (int64_t r = 0; r < rows; ++r) {
      const V g = V::load(dz + r * pitch + c);
      bias_acc = add(bias_acc, g);
      for (int k = 0; k < kTaps; ++k) {
        const bool same = tap_ids == nullptr || (tap_ids[r + k] == dz_ids[r] && dz_ids[r] >= 0);
        const S* const row = same ? x + (r + k) * pitch : zeros;
        acc[k] = fma(g, V::load(row + c), acc[k]);
      }
    }
    for (int k = 0; k < kTaps; ++k) acc[k].store(sums + k * pitch + c);
    if (bias_sums != nullptr) bias_acc.store(bias_sums + c);
  }
}

// Adds the share of `rows` rows to the totals [width + 1][pitch] of dweight and, last, dbias.
template <class V, class S>
void correlate(const Tile& tile, const S* dz, const BackwardScratch<S>& s, bool plain,
               int64_t rows) {
  if (rows <= 0) return;
  const int64_t width = tile.width, pitch = tile.pitch;
  const int32_t* const dz_ids = s.ids + width - 1;
  for (int64_t k = 0; k < width; k += 4) {
    const S* const x = s.x + k * pitch;
    const int32_t* const tap_ids = plain ? nullptr : s.ids + k;
    const auto first = [&](auto with_ids, auto without) {
      (plain ? without : with_ids)(dz, x, tap_ids, dz_ids, rows, s.totals + k,
                                   k == 0 ? s.totals + width : nullptr);
    };
    const auto last = [&](auto function) {
      function(dz, x, tap_ids, dz_ids, s.zeros, pitch, rows, s.sums + k * pitch,
               k == 0 ? s.sums + width * pitch : nullptr);
    };
    switch (smaller(4, width - k)) {
      case 1:
        if (tile.channel_first) {
          first(correlate_first<V, 1, true, S>, correlate_first<V, 1, false, S>);
        } else {
          last(correlate_last<V, 1, S>);
        }
        break;
      case 2:
        if (tile.channel_first) {
          first(correlate_first<V, 2, true, S>, correlate_first<V, 2, false, S>);
        } else {
          last(correlate_last<V, 2, S>);
        }
        break;
      case 3:
        if (tile.channel_first) {
          first(correlate_first<V, 3, true, S>, correlate_first<V, 3, false, S>);
        } else {
          last(correlate_last<V, 3, S>);
        }
        break;
      default:
        if (tile.channel_first) {
          first(correlate_first<V, 4, true, S>, correlate_first<V, 4, false, S>);
        } else {
          last(correlate_last<V, 4, S>);
        }
    }
  }
  if (tile.channel_first) return;
  for (int64_t i = 0; i < (width + 1) * pitch; ++i) s.totals[i] += static_cast<double>(s.sums[i]);
}

// Adds to s.z, gradients of x~[first] to x~[first + rows - 1], those of the states that precede the
// time `end`.
template <class S>
void add_dfinal_states(const Tile& tile, const BackwardParams& p, int64_t b, int64_t end,
                       int64_t first, int64_t rows, const BackwardScratch<S>& s) {
  const int64_t states = end - (tile.width - 1);  // the time of the first
  const int64_t begin = larger(first, states);
  const int64_t count = smaller(first + rows, end) - begin;
  if (count <= 0) return;
  load_block(tile, p.dfinal_states, b, begin - states, count, s.dfinal);
  if (is_given(p.seq_idx)) zero_padding(tile, p.seq_idx, b, end, begin, count, s.dfinal);
  S* const dx = s.z + (begin - first) * tile.pitch;
  for (int64_t i = 0; i < count * tile.pitch; ++i) dx[i] += s.dfinal[i];
}

template <class V>
void backward_unit(const BackwardParams& p, const Tiling& tiling, const int64_t* ends, int64_t unit,
                   char* scratch, double* partials) {
  using S = typename V::Scalar;
  Arena arena(scratch);
  const BackwardScratch<S> s(&arena, tiling);
  __builtin_memset(s.zeros, 0, static_cast<size_t>(padded(tiling.cols)) * sizeof(S));
  const Range range = range_of(tiling, unit);
  const int64_t halo = tiling.width - 1, seqlen = tiling.seqlen;
  for (int64_t d = range.d0; d < range.d1; d += tiling.cols) {
    const Tile tile = tile_at(tiling, d, range.d1);
    const int64_t pitch = tile.pitch;
    S* const x = s.x + halo * pitch;
    S* const dz = s.dz + halo * pitch;
    load_weights(tile, p.weight, p.bias, s.w, s.bias);
    const size_t totals_bytes = static_cast<size_t>((tile.width + 1) * pitch) * sizeof(double);
    __builtin_memset(s.totals, 0, totals_bytes);
    for (int64_t b = range.b0; b < range.b1; ++b) {
      load_halo(tile, p.x, p.initial_states, b, range.t0, s.x);
      zero_rows(tile, s.dz, 0, halo);
      // The gradient of a row needs dz of the next width - 1: go on that far past the chunk.
      for (int64_t t = range.t0, rows; t < range.t1 + halo; t += rows) {
        rows = smaller(tiling.block, range.t1 + halo - t);
        const int64_t present = larger(0, smaller(rows, seqlen - t));
        const int64_t owned = larger(0, smaller(rows, range.t1 - t));
        load_block(tile, p.x, b, t, present, x);
        load_block(tile, p.dout, b, t, present, dz);
        zero_rows(tile, x, present, rows);
        const bool plain =
            !is_given(p.seq_idx) || load_ids(p.seq_idx, b, t - halo, halo + rows, s.ids);
        const int32_t* const ids = plain ? nullptr : s.ids;
        if (p.silu != 0 || !plain) {
          convolve<V>(gradient_epilogue(p.x.dtype, p.silu != 0), tile, s.w, 1, s.bias, s.x,
                      Ids{ids, halo}, s.zeros, dz, present);
        }
        zero_rows(tile, dz, present, rows);
        if (partials != nullptr) correlate<V>(tile, dz, s, plain, owned);

        // Row r of dx is time first + r.
        const int64_t first = t - halo;
        // Those before the chunk are dinitial_states or another chunk's.
        const bool initial = is_given(p.dinitial_states) && range.t0 == 0;
        const int64_t skip = initial ? 0 : smaller(rows, larger(0, range.t0 - first));
        convolve<V>(Epilogue::kIdentity, tile, s.w + halo * (tile.channel_first ? 1 : pitch), -1,
                    s.zeros, s.dz + skip * pitch, Ids{ids == nullptr ? nullptr : ids + skip, 0},
                    s.zeros, s.z + skip * pitch, rows - skip);
        if (is_given(p.dfinal_states)) {
          add_dfinal_states(tile, p, b, ends == nullptr ? seqlen : ends[b], first, rows, s);
        }
        const int64_t begin = larger(first, range.t0);
        store_block(tile, s.z + (begin - first) * pitch, tiling.stream, p.dx, b, begin,
                    first + rows - begin);
        if (initial) {
          store_block(tile, s.z, false, p.dinitial_states, b, first + halo, smaller(rows, -first));
        }
        keep_halo(tile, s.x, rows);
        keep_halo(tile, s.dz, rows);
      }
    }
    if (partials == nullptr) continue;
    for (int64_t k = 0; k <= tile.width; ++k) {
      double* const out = partials + (range.slot * (tile.width + 1) + k) * tiling.dim + d;
      for (int64_t c = 0; c < tile.cols; ++c) out[c] = s.totals[k * pitch + c];
    }
  }
  finish_streams();
}

template <class V>
void reduce(const BackwardParams& p, const Tiling& tiling, const double* partials, int64_t first,
            int64_t last) {
  using S = typename V::Scalar;
  constexpr int64_t kBatch = 64;
  const int64_t slots = tiling.batch_groups * tiling.chunks;
  const int64_t width = tiling.width;
  for (int64_t d = first; d < last; d += kBatch) {
    const int64_t count = smaller(kBatch, last - d);
    for (int64_t k = 0; k <= width; ++k) {
      double totals[kBatch] = {};
      for (int64_t slot = 0; slot < slots; ++slot) {
        const double* const part = partials + (slot * (width + 1) + k) * tiling.dim + d;
        for (int64_t c = 0; c < count; ++c) totals[c] += part[c];
      }
      S sums[kBatch] = {};
      for (int64_t c = 0; c < count; ++c) sums[c] = static_cast<S>(totals[c]);
      if (k < width && is_given(p.dweight)) {
        store_row(p.dweight.dtype, sums, false, address(p.dweight, d, k), p.dweight.strides[0],
                  count);
      }
      if (k == width && is_given(p.dbias)) {
        store_row(p.dbias.dtype, sums, false, address(p.dbias, d), p.dbias.strides[0], count);
      }
    }
  }
}

// ---- update ---------------------------------------------------------------------------------

template <class T>
void move_elements(char* to, const char* from, int64_t stride, int64_t n) {
  const int64_t step = stride * static_cast<int64_t>(sizeof(T));
  for (int64_t i = 0; i < n; ++i) __builtin_memcpy(to + i * step, from + i * step, sizeof(T));
}

// Moves positions [shift, size) of the state to [0, size - shift); what the others hold then is
// unspecified.
inline void shift_state(const Tile& tile, const Tensor& state, int64_t row, int64_t shift) {
  const int64_t size = state.sizes[2], stride = state.strides[1];
  const int64_t bytes = element_size(state.dtype);
  const auto move = bytes == 2   ? move_elements<uint16_t>
                    : bytes == 4 ? move_elements<uint32_t>
                                 : move_elements<uint64_t>;
  char* const first = address(state, row, tile.d);
  if (state.strides[2] == 1 && stride == size) {
    const int64_t moved = (tile.cols * size - shift) * bytes;
    __builtin_memmove(first, first + shift * bytes, static_cast<size_t>(moved));
    return;
  }
  for (int64_t j = 0; j + shift < size; ++j) {
    char* const to = address(state, row, tile.d, j);
    const char* const from = address(state, row, tile.d, j + shift);
    if (stride == 1) {
      __builtin_memmove(to, from, static_cast<size_t>(tile.cols * bytes));
    } else {
      move(to, from, stride, tile.cols);
    }
  }
}

// Asks for a row of states that will be needed next: it lies too far off to be foreseen.
CAUSAL_CONV1D_INLINE void prefetch_state(const Tile& tile, const Tensor& state, int64_t row) {
  const int64_t size = state.sizes[2], bytes = tile.cols * element_size(state.dtype);
  const bool interleaved = state.strides[2] == 1 && state.strides[1] == size;
  if (row < 0 || (!interleaved && state.strides[1] != 1)) return;
  for (int64_t j = 0; j < (interleaved ? 1 : size); ++j) {
    const char* const p = address(state, row, tile.d, j);
    for (int64_t i = 0; i < (interleaved ? size : 1) * bytes; i += 64) __builtin_prefetch(p + i, 1);
  }
}

template <class V>
void update_unit(const UpdateParams& p, const Tiling& tiling, Turn turn, int64_t unit,
                 char* scratch) {
  using S = typename V::Scalar;
  Arena arena(scratch);
  const ForwardScratch<S> s(&arena, tiling);
  const Range range = range_of(tiling, unit);
  const int64_t halo = tiling.width - 1, seqlen = tiling.seqlen, size = p.conv_state.sizes[2];
  const bool ring = is_given(p.cache_seqlens);
  const bool writes_state = turn.is_last == nullptr || turn.last;
  const auto row_of = [&](int64_t b) -> int64_t {
    return is_given(p.conv_state_indices) ? read_index(p.conv_state_indices, b) : b;
  };
  for (int64_t d = range.d0; d < range.d1; d += tiling.cols) {
    const Tile tile = tile_at(tiling, d, range.d1);
    load_weights(tile, p.weight, p.bias, s.w, s.bias);
    for (int64_t b = range.b0; b < range.b1; ++b) {
      if (turn.is_last != nullptr && (turn.is_last[b] != 0) != turn.last) continue;
      const int64_t row = row_of(b);
      if (b + 1 < range.b1) prefetch_state(tile, p.conv_state, row_of(b + 1));
      if (row < 0) {
        zero_rows(tile, s.z, 0, smaller(tiling.block, seqlen));
        for (int64_t t = 0; t < seqlen; t += tiling.block) {
          store_block(tile, s.z, tiling.stream, p.out, b, t, smaller(tiling.block, seqlen - t));
        }
        continue;
      }
      // Token i goes to position (head + i) mod size; the last inputs lie just before.
      int64_t head = 0;
      if (ring && size > 0) {
        head = read_index(p.cache_seqlens, b) % size;
        if (head < 0) head += size;
      }
      if (head == 0) {
        load_rows(p.conv_state.dtype, address(p.conv_state, row, d), p.conv_state.strides[2],
                  p.conv_state.strides[1], size, tile.cols, size - halo, s.x, tile.pitch);
      } else {
        for (int64_t j = 0; j < halo; ++j) {
          const int64_t position = (head + size - halo + j) % size;
          load_row(p.conv_state.dtype, address(p.conv_state, row, d, position),
                   p.conv_state.strides[1], tile.cols, s.x + j * tile.pitch);
        }
      }
      // The state first: out may be x, in place.
      if (writes_state && !ring && seqlen < size) shift_state(tile, p.conv_state, row, seqlen);
      for (int64_t i = larger(0, seqlen - size); writes_state && i < seqlen; ++i) {
        const int64_t position = ring ? (head + i) % size : size - seqlen + i;
        load_row(p.x.dtype, address(p.x, b, d, i), p.x.strides[1], tile.cols, s.z);
        store_row(p.conv_state.dtype, s.z, false, address(p.conv_state, row, d, position),
                  p.conv_state.strides[1], tile.cols);
      }
      forward_rows<V>(tile, tiling, p.x, nullptr, p.out, p.silu != 0, b, 0, seqlen, s);
    }
  }
  finish_streams();
}

#if !defined(CAUSAL_CONV1D_ONE_LANE)
}  // namespace
}  // namespace causal_conv1d
#include "simd/groups.h"
namespace causal_conv1d {
namespace {
#include "direct.inl"
#endif

// ---- the table ------------------------------------------------------------------------------

template <class S>
size_t scratch_bytes_as(const Tiling& tiling, Operation operation) {
  Arena arena(nullptr);
  if (operation == Operation::kBackward) {
    BackwardScratch<S>(&arena, tiling);
  } else if (operation == Operation::kFinalStates) {
    take_states<S>(&arena, tiling);
  } else {
    ForwardScratch<S>(&arena, tiling);
  }
  return arena.used();
}

size_t scratch_bytes(const Tiling& tiling, Operation operation) {
#if !defined(CAUSAL_CONV1D_ONE_LANE)
  if (tiling.direct && operation != Operation::kFinalStates) {
    return direct_scratch_bytes(tiling, operation);
  }
#endif
  return tiling.fp64 ? scratch_bytes_as<double>(tiling, operation)
                     : scratch_bytes_as<float>(tiling, operation);
}

void forward(const ForwardParams& p, const Tiling& tiling, int64_t unit, char* scratch) {
#if !defined(CAUSAL_CONV1D_ONE_LANE)
  if (tiling.direct) return forward_direct(p, tiling, unit, scratch);
#endif
  (tiling.fp64 ? forward_unit<DoubleVec> : forward_unit<Vec>)(p, tiling, unit, scratch);
}

void final_states(const ForwardParams& p, const Tiling& tiling, const int64_t* ends, int64_t unit,
                  char* scratch) {
  (tiling.fp64 ? final_states_unit<DoubleVec> : final_states_unit<Vec>)(p, tiling, ends, unit,
                                                                        scratch);
}

void backward(const BackwardParams& p, const Tiling& tiling, const int64_t* ends, int64_t unit,
              char* scratch, double* partials) {
#if !defined(CAUSAL_CONV1D_ONE_LANE)
  if (tiling.direct) return backward_direct(p, tiling, unit, scratch, partials);
#endif
  (tiling.fp64 ? backward_unit<DoubleVec> : backward_unit<Vec>)(p, tiling, ends, unit, scratch,
                                                                partials);
}

void reduce_partials(const BackwardParams& p, const Tiling& tiling, const double* partials,
                     int64_t first, int64_t last) {
  (tiling.fp64 ? reduce<DoubleVec> : reduce<Vec>)(p, tiling, partials, first, last);
}

void update(const UpdateParams& p, const Tiling& tiling, Turn turn, int64_t unit, char* scratch) {
  (tiling.fp64 ? update_unit<DoubleVec> : update_unit<Vec>)(p, tiling, turn, unit, scratch);
}

#define CAUSAL_CONV1D_STRING_OF(a) #a
#define CAUSAL_CONV1D_STRING(a) CAUSAL_CONV1D_STRING_OF(a)

}  // namespace

namespace CAUSAL_CONV1D_ISA {

extern const Kernels kernels;
const Kernels kernels = {CAUSAL_CONV1D_STRING(CAUSAL_CONV1D_ISA),
#if defined(CAUSAL_CONV1D_ONE_LANE)
                         false,
#else
                         true,
#endif
                         scratch_bytes,
                         forward,
                         final_states,
                         backward,
                         reduce_partials,
                         update};

}  // namespace CAUSAL_CONV1D_ISA
}  // namespace causal_conv1d
