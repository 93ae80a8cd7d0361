// float16.
#pragma once

#include <cmath>
#include <cstdint>

#include "device.h"

struct __half {
  uint16_t bits;
};

inline __half __ushort_as_half(uint16_t bits) { return {bits}; }
inline uint16_t __half_as_ushort(__half v) { return v.bits; }

// A float16 is a float without 13 bits of its fraction whose exponent counts from 112 less.
inline float __half2float(__half v) {
  const uint32_t magnitude = uint32_t{v.bits & 0x7fffu} << 13, sign = (v.bits & 0x8000u) << 16;
  const bool finite = magnitude < 0x0f800000;
  const uint32_t bits =
      finite ? __float_as_uint(__uint_as_float(magnitude) * 0x1p112f) : magnitude | 0x7f800000;
  return __uint_as_float(bits | sign);
}

inline __half __float2half_rn(float v) {
  const uint32_t sign = __float_as_uint(v) >> 16 & 0x8000, magnitude = __float_as_uint(v) << 1 >> 1;
  if (magnitude > 0x7f800000) return {0x7fff};  // NaN
  uint32_t bits;
  if (magnitude < 0x38800000) {  // below 2^-14: steps of 2^-24, as floats from 1/2 on have
    bits = __float_as_uint(__uint_as_float(magnitude) + 0.5f) - __float_as_uint(0.5f);
  } else {
    bits = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
    bits = bits < 0x7c00 ? bits : 0x7c00;
  }
  return {static_cast<uint16_t>(sign | bits)};
}
