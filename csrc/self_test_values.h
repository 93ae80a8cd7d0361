// The numbers of the self-tests in every element type, and how results are compared.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <string>

#include "check.h"
#include "element_size.h"

namespace causal_conv1d {

// Of errors, relative to the largest value expected: far above what rounding gives and far below
// what a wrong kernel does.
inline double tolerance(int dtype) {
  switch (dtype) {
    case CAUSAL_CONV1D_FLOAT32: return 1e-4;
    case CAUSAL_CONV1D_FLOAT16: return 1e-2;
    case CAUSAL_CONV1D_BFLOAT16: return 5e-2;
    default: return 1e-9;
  }
}

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// A float16 is a float without 13 bits of its fraction whose exponent counts from 112 less.
constexpr float kHalfScale = 0x1p112f;

inline float from_half(uint16_t half) {
  if ((half & 0x7c00) == 0x7c00) return std::numeric_limits<float>::quiet_NaN();  // or infinity
  const float magnitude = from_bits(static_cast<uint32_t>(half & 0x7fff) << 13) * kHalfScale;
  return (half & 0x8000) != 0 ? -magnitude : magnitude;
}

// Of values that float16 holds exactly, or NaN.
inline uint16_t to_half(float value) {
  if (std::isnan(value)) return 0x7e00;
  const uint32_t magnitude = to_bits(std::fabs(value) / kHalfScale) >> 13;
  return static_cast<uint16_t>(magnitude | (std::signbit(value) ? 0x8000 : 0));
}

// Of values that the dtype holds exactly, or NaN.
inline void store(char* at, int dtype, float value) {
  const double wide = value;
  const uint16_t narrow =
      dtype == CAUSAL_CONV1D_FLOAT16 ? to_half(value) : static_cast<uint16_t>(to_bits(value) >> 16);
  if (dtype == CAUSAL_CONV1D_FLOAT64) {
    std::memcpy(at, &wide, sizeof wide);
  } else if (dtype == CAUSAL_CONV1D_FLOAT32) {
    std::memcpy(at, &value, sizeof value);
  } else {
    std::memcpy(at, &narrow, sizeof narrow);
  }
}

inline double load(const char* at, int dtype) {
  if (dtype == CAUSAL_CONV1D_FLOAT64) {
    double value;
    std::memcpy(&value, at, sizeof value);
    return value;
  }
  if (dtype == CAUSAL_CONV1D_FLOAT32) {
    float value;
    std::memcpy(&value, at, sizeof value);
    return value;
  }
  uint16_t bits;
  std::memcpy(&bits, at, sizeof bits);
  return dtype == CAUSAL_CONV1D_FLOAT16 ? from_half(bits)
                                        : from_bits(static_cast<uint32_t>(bits) << 16);
}

// The largest error of the elements in a range of bytes, relative to the largest value expected,
// if it is more than rounding gives; else 0.
inline double error_between(const char* found, const char* expected, int64_t begin, int64_t end,
                            int dtype) {
  double worst = 0, largest = 0;
  for (int64_t at = begin; at < end; at += element_size(dtype)) {
    const double want = load(expected + at, dtype);
    const double error = std::fabs(load(found + at, dtype) - want);
    worst = std::isnan(error) ? INFINITY : std::fmax(worst, error);
    largest = std::fmax(largest, std::fabs(want));
  }
  return worst <= tolerance(dtype) * largest ? 0 : worst / largest;
}

inline std::string describe_error(const char* name, int dtype, const char* layout, double worst) {
  char text[128];
  std::snprintf(text, sizeof text, "%s in %s, %s, is wrong by %.2g of its largest value", name,
                dtype_name(dtype), layout, worst);
  return text;
}

}  // namespace causal_conv1d
