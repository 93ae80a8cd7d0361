// What the files of each instruction set have in common: the 16-bit types.
#pragma once

#include <stdint.h>

#define CAUSAL_CONV1D_INLINE inline __attribute__((always_inline))

namespace causal_conv1d {
namespace {

struct Half {
  uint16_t bits;
};
struct Bfloat16 {
  uint16_t bits;
};

}  // namespace
}  // namespace causal_conv1d
