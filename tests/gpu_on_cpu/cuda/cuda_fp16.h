#pragma once

#include "../half.h"

struct __half2 {
  __half x, y;
};
struct float2 {
  float x, y;
};
inline __half2 __floats2half2_rn(float low, float high) {
  return {__float2half_rn(low), __float2half_rn(high)};
}
inline float2 __half22float2(__half2 v) { return {__half2float(v.x), __half2float(v.y)}; }
