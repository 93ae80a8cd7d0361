// Groups: a group is a Vec of kGroup consecutive elements in the order that is cheapest for their
// type. bfloat16 comes as the even ones and then the odd ones, which are the two halves of 32-bit
// words. Every NaN of a group of bfloat16 must have zeros in its lowest 16 bits: rounding then
// keeps it.
#pragma once

#include "vec.h"

#if defined(CAUSAL_CONV1D_ONE_LANE)
#error "groups need vectors"
#endif

namespace causal_conv1d {
namespace {

constexpr int kGroup = Vec::kLanes;

template <class T>
constexpr bool kEvenOdd = false;
template <>
constexpr bool kEvenOdd<Bfloat16> = true;

// Where element i of a group is.
template <class T>
constexpr int lane_of(int i) {
  constexpr int kPair = 2 * Native::kLanes;
  return kEvenOdd<T> ? i / kPair * kPair + i % kPair / 2 + i % 2 * Native::kLanes : i;
}

template <class T>
CAUSAL_CONV1D_INLINE Vec load_group(const T* p) {
  return Vec::load(p);
}
CAUSAL_CONV1D_INLINE Vec load_group(const Bfloat16* p) {
  Vec r;
  for (int i = 0; i < kNativesInVec; i += 2) {
    load_even_odd(p + i * Native::kLanes, &r.v[i], &r.v[i + 1]);
  }
  return r;
}
template <class T>
CAUSAL_CONV1D_INLINE void store_group(Vec a, bool stream, T* p) {
  if (stream) {
    a.stream(p);
  } else {
    a.store(p);
  }
}
CAUSAL_CONV1D_INLINE void store_group(Vec a, bool stream, Bfloat16* p) {
  for (int i = 0; i < kNativesInVec; i += 2) {
    if (stream) {
      store_even_odd<true>(a.v[i], a.v[i + 1], p + i * Native::kLanes);
    } else {
      store_even_odd<false>(a.v[i], a.v[i + 1], p + i * Native::kLanes);
    }
  }
}

template <int k>
CAUSAL_CONV1D_INLINE Native from_lane(Native a, Native b) {
  if constexpr (k == 0) {
    return a;
  } else {
    return align<k>(a, b);
  }
}

// Elements k to k + kGroup - 1 of two groups, one after the other; 0 <= k <= kGroup.
template <class T, int k>
CAUSAL_CONV1D_INLINE Vec slide(Vec a, Vec b) {
  constexpr int kLanes = Native::kLanes, kCount = kNativesInVec;
  const auto vector = [&](int i) {
    return i < kCount ? a.v[i] : b.v[i < 2 * kCount ? i - kCount : 0];  // 0: not used
  };
  Vec r;
  if constexpr (kEvenOdd<T>) {
    constexpr int even = k / 2, odd = (k + 1) / 2;  // lanes that the halves move
    for (int i = 0; i < kCount; i += 2) {
      const int from_even = i + even / kLanes * 2 + k % 2;
      const int from_odd = i + odd / kLanes * 2 + 1 - k % 2;
      r.v[i] = from_lane<even % kLanes>(vector(from_even), vector(from_even + 2));
      r.v[i + 1] = from_lane<odd % kLanes>(vector(from_odd), vector(from_odd + 2));
    }
  } else {
    for (int i = 0; i < kCount; ++i) {
      const int from = i + k / kLanes;
      r.v[i] = from_lane<k % kLanes>(vector(from), vector(from + 1));
    }
  }
  return r;
}

// Of a group, kCount vectors from kFirst on.
template <int kFirst, int kCount>
CAUSAL_CONV1D_INLINE VecOf<kCount> part_of(Vec group) {
  VecOf<kCount> r;
  for (int i = 0; i < kCount; ++i) r.v[i] = group.v[kFirst + i];
  return r;
}

CAUSAL_CONV1D_INLINE Vec both_bits(Vec a, Vec b) {
  for (int i = 0; i < kNativesInVec; ++i) a.v[i] = both_bits(a.v[i], b.v[i]);
  return a;
}

}  // namespace
}  // namespace causal_conv1d
