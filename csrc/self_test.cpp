#include "self_test.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>

#include "element_size.h"

namespace causal_conv1d {
namespace {

constexpr int32_t kBounds[] = {0, 2, 24};  // cu_seqlens

// Of errors, relative to the largest value expected: far above what rounding gives and far below
// what a wrong kernel does.
double tolerance(int dtype) {
  switch (dtype) {
    case CAUSAL_CONV1D_FLOAT32: return 1e-4;
    case CAUSAL_CONV1D_FLOAT16: return 1e-2;
    case CAUSAL_CONV1D_BFLOAT16: return 5e-2;
    default: return 1e-9;
  }
}

float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// A float16 is a float without 13 bits of its fraction whose exponent counts from 112 less.
constexpr float kHalfScale = 0x1p112f;

float from_half(uint16_t half) {
  if ((half & 0x7c00) == 0x7c00) return std::numeric_limits<float>::quiet_NaN();  // or infinity
  const float magnitude = from_bits(static_cast<uint32_t>(half & 0x7fff) << 13) * kHalfScale;
  return (half & 0x8000) != 0 ? -magnitude : magnitude;
}

// Of values that float16 holds exactly, or NaN.
uint16_t to_half(float value) {
  if (std::isnan(value)) return 0x7e00;
  const uint32_t magnitude = to_bits(std::fabs(value) / kHalfScale) >> 13;
  return static_cast<uint16_t>(magnitude | (std::signbit(value) ? 0x8000 : 0));
}

// Of values that the dtype holds exactly, or NaN.
void store(char* at, int dtype, float value) {
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

double load(const char* at, int dtype) {
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

}  // namespace

SelfTest::SelfTest(Operator which, int dtype, bool channel_last)
    : which_(which), dtype_(dtype), channel_last_(channel_last) {
  constexpr int64_t kElements[kParts] = {
      kBatch * kDim * kSeqlen, kBatch * kDim * kSeqlen, kBatch * kDim * (kWidth - 1),
      kBatch * kDim * kWidth,  kDim * kWidth,           kDim,
      kBatch * kDim * kSeqlen, kDim * kWidth,           kDim};
  static_assert(kDim % 8 == 0, "every part begins at a multiple of 16 bytes");
  begin_[0] = 0;
  for (int i = 0; i < kParts; ++i) {
    begin_[i + 1] = begin_[i] + kElements[i] * element_size(dtype);
  }
}

std::vector<char> SelfTest::inputs() const {
  std::vector<char> memory(static_cast<size_t>(begin_[kParts]) + sizeof kBounds);
  const int64_t size = element_size(dtype_);
  for (int64_t at = 0; at < begin_[kParts]; at += size) {
    const float number = static_cast<float>(at / size * 37 % 17 - 8) / 8;
    const bool is_input = at < begin_[kOut];
    store(&memory[static_cast<size_t>(at)], dtype_, is_input ? number : NAN);
  }
  std::memcpy(&memory[static_cast<size_t>(begin_[kParts])], kBounds, sizeof kBounds);
  return memory;
}

Tensor SelfTest::tensor(void* memory, Part part, int64_t size0, int64_t size1,
                        int64_t size2) const {
  Tensor t{};
  t.data = static_cast<char*>(memory) + begin_[part];
  t.dtype = dtype_;
  t.ndim = size1 == 0 ? 1 : size2 == 0 ? 2 : 3;
  t.sizes[0] = size0;
  t.sizes[1] = size1;
  t.sizes[2] = size2;
  const bool last = t.ndim == 3 && channel_last_;
  t.strides[0] = t.ndim == 1 ? 1 : t.ndim == 2 ? size1 : size1 * size2;
  t.strides[1] = t.ndim < 3 || last ? 1 : size2;
  t.strides[2] = last ? size1 : 1;
  return t;
}

Tensor SelfTest::cu_seqlens(void* memory) const {
  Tensor t{};
  t.data = static_cast<char*>(memory) + begin_[kParts];
  t.dtype = CAUSAL_CONV1D_INT32;
  t.ndim = 1;
  t.sizes[0] = kBatch + 1;
  t.strides[0] = 1;
  return t;
}

std::vector<SelfTest::Output> SelfTest::outputs() const {
  const auto output = [&](const char* name, Part part, int64_t elements) {
    return Output{name, begin_[part], begin_[part] + elements * element_size(dtype_)};
  };
  switch (which_) {
    case kForward: return {output("out", kOut, kBatch * kDim * kSeqlen)};
    case kBackward:
      return {output("dx", kOut, kBatch * kDim * kSeqlen),
              output("dweight", kDweight, kDim * kWidth), output("dbias", kDbias, kDim)};
    case kUpdate:
      return {output("update's out", kOut, kBatch * kDim),
              output("conv_state", kConvState, kBatch * kDim * kWidth)};
    default: return {output("varlen_states", kOut, kBatch * kDim * (kWidth - 1))};
  }
}

std::string SelfTest::problem(const char* found, const char* expected) const {
  for (const Output& output : outputs()) {
    double worst = 0, largest = 0;
    for (int64_t at = output.begin; at < output.end; at += element_size(dtype_)) {
      const double want = load(expected + at, dtype_);
      const double error = std::fabs(load(found + at, dtype_) - want);
      worst = std::isnan(error) ? INFINITY : std::fmax(worst, error);
      largest = std::fmax(largest, std::fabs(want));
    }
    if (!(worst <= tolerance(dtype_) * largest)) {
      char text[128];
      std::snprintf(text, sizeof text, "%s in %s, %s, is wrong by %.2g of its largest value",
                    output.name, dtype_name(dtype_),
                    channel_last_ ? "channel-last" : "channel-first", worst / largest);
      return text;
    }
  }
  return {};
}

}  // namespace causal_conv1d
