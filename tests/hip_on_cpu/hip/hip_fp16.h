// float16 of the stand-in for HIP: see hip_runtime.h.
#pragma once

#include <cmath>
#include <cstdint>

struct __half {
  uint16_t bits;
};

inline __half __ushort_as_half(uint16_t bits) { return {bits}; }

inline float __half2float(__half v) {
  const int exponent = v.bits >> 10 & 31, fraction = v.bits & 1023;
  float magnitude = exponent == 0 ? std::ldexp(float(fraction), -24)
                                  : std::ldexp(float(1024 + fraction), exponent - 25);
  if (exponent == 31) magnitude = fraction == 0 ? INFINITY : NAN;
  return (v.bits & 0x8000) != 0 ? -magnitude : magnitude;
}

inline __half __float2half_rn(float v) {
  const unsigned sign = std::signbit(v) ? 0x8000 : 0;
  if (std::isnan(v)) return {0x7fff};
  if (std::fabs(v) >= 65520) return {static_cast<uint16_t>(sign | 0x7c00)};
  int exponent = 0;
  std::frexp(v, &exponent);
  if (v == 0 || exponent < -13) exponent = -13;  // below the least normal number
  const int steps = static_cast<int>(std::nearbyint(std::ldexp(std::fabs(v), 11 - exponent)));
  return {static_cast<uint16_t>(sign | ((exponent + 13) * 1024 + steps))};
}
