// The least of arithmetic on sizes, without the standard library's inline functions, which kernels
// must not use (kernels/table.h).
#pragma once

#include <stdint.h>

namespace causal_conv1d {
namespace {

__attribute__((always_inline)) inline int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}
__attribute__((always_inline)) inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace
}  // namespace causal_conv1d
