// Scratch memory of a thread.
#pragma once

#include <stddef.h>
#include <stdint.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#include "../simd/types.h"

namespace causal_conv1d {
namespace {

// Scratch rows start at multiples of this, the widest vector.
constexpr int64_t kPad = 32;
CAUSAL_CONV1D_INLINE int64_t padded(int64_t n) { return (n + kPad - 1) / kPad * kPad; }

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kForbidden = 64;  // bytes between pieces
#else
constexpr size_t kForbidden = 0;
#endif

// Hands out pieces of a thread's scratch memory; with a null base it only counts bytes.
class Arena {
 public:
  explicit Arena(char* base) : base_(base) {}

  template <class T>
  T* take(int64_t count) {
    char* const piece = base_ == nullptr ? nullptr : base_ + used_;
    // The slack lets a vector start at the last element.
    const size_t bytes = static_cast<size_t>(count + kPad) * sizeof(T);
    const size_t taken = (bytes + 63) / 64 * 64 + kForbidden;
#if defined(__SANITIZE_ADDRESS__)
    if (piece != nullptr) {
      ASAN_UNPOISON_MEMORY_REGION(piece, bytes);
      ASAN_POISON_MEMORY_REGION(piece + bytes, taken - bytes);
    }
#endif
    used_ += taken;
    return reinterpret_cast<T*>(piece);
  }

  size_t used() const { return used_; }

 private:
  char* const base_;
  size_t used_ = 0;
};

// What gates and other factors of a block are loaded into, if the problem has some.
template <class S>
struct GateScratch {
  S *gate = nullptr, *other = nullptr;
};

}  // namespace
}  // namespace causal_conv1d
