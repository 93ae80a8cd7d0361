// Rows of the caller's memory, of any type and stride, to scratch memory and back.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "../integers.h"
#include "../simd/vec.h"
#include "scratch.h"
#include "tensor.h"

namespace causal_conv1d {
namespace {

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

// n elements of scratch times those of a gate, each product rounded to the gate's type.
template <class V, class T>
void multiply_row_as(const char* gate, int64_t stride, int64_t n, typename V::Scalar* x) {
  constexpr int64_t kLanes = V::kLanes;
  for (int64_t i = 0; i < n; i += kLanes) {
    typename V::Scalar factors[kLanes];
    T products[kLanes];
    load_row_as<V, T>(gate + i * stride * static_cast<int64_t>(sizeof(T)), stride,
                      smaller(kLanes, n - i), factors);
    mul(V::load(x + i), V::load(factors)).store(products);
    V::load(products).store(x + i);
  }
}

CAUSAL_CONV1D_INLINE void multiply_row(int32_t dtype, const char* gate, int64_t stride, int64_t n,
                                       float* x) {
  if (dtype == CAUSAL_CONV1D_FLOAT32) {
    multiply_row_as<Vec, float>(gate, stride, n, x);
  } else if (dtype == CAUSAL_CONV1D_FLOAT16) {
    multiply_row_as<Vec, Half>(gate, stride, n, x);
  } else {
    multiply_row_as<Vec, Bfloat16>(gate, stride, n, x);
  }
}

CAUSAL_CONV1D_INLINE void multiply_row(int32_t, const char* gate, int64_t stride, int64_t n,
                                       double* x) {
  multiply_row_as<DoubleVec, double>(gate, stride, n, x);
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

}  // namespace
}  // namespace causal_conv1d
