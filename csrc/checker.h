// What every argument check is made of: messages, sizes, types, and memory. For tensors of three
// dimensions (check.cpp) and of four (scan_check.cpp).
#pragma once

#include <cstdarg>
#include <cstdio>

#include "check.h"
#include "overlap.h"

namespace causal_conv1d {

template <class T>
constexpr int kMostDims = static_cast<int>(sizeof(T::sizes) / sizeof(int64_t));

inline bool is_float(int32_t dtype) {
  return dtype >= CAUSAL_CONV1D_FLOAT32 && dtype <= CAUSAL_CONV1D_FLOAT64;
}

struct Shape {
  char text[112];
};

inline Shape shape(int ndim, const int64_t* sizes, int most = 4) {
  Shape s;
  int n = std::snprintf(s.text, sizeof s.text, "(");
  for (int i = 0; i < ndim && i < most; ++i) {
    n += std::snprintf(s.text + n, sizeof s.text - static_cast<size_t>(n), i ? ", %lld" : "%lld",
                       static_cast<long long>(sizes[i]));
  }
  std::snprintf(s.text + n, sizeof s.text - static_cast<size_t>(n),
                ndim > most ? ", ...)" : (ndim == 1 ? ",)" : ")"));
  return s;
}

template <class T>
Shape shape(const T& t) {
  return shape(t.ndim, t.sizes, kMostDims<T>);
}

// Bounds that no memory reaches, within which the kernels' products of sizes fit int64_t.
constexpr int64_t kMostElements = int64_t{1} << 52;
constexpr int64_t kMostProducts = int64_t{1} << 58;  // of a tap and an input
// The bytes from a tensor's first to past its last.
struct Range {
  uintptr_t begin, end;
};

template <class T>
struct ArgumentOf {
  const char* name;
  const T* tensor;
};

// Makes messages "op: name ..."; the tensor called `first` tells whether all are float64.
struct Checker {
  const char* op;
  const char* first = "x";

  Status fail(const char* name, const char* format, ...) const
      __attribute__((format(printf, 3, 4))) {
    char text[200];
    va_list args;
    va_start(args, format);
    std::vsnprintf(text, sizeof text, format, args);
    va_end(args);
    return error(CAUSAL_CONV1D_INVALID_ARGUMENT, "%s: %s %s", op, name, text);
  }

  template <class T>
  Status no_negative_size(const char* name, const T& t) const {
    for (int i = 0; i < t.ndim; ++i) {
      if (t.sizes[i] < 0) return fail(name, "must have sizes >= 0, got %s", shape(t).text);
    }
    return ok();
  }

  // A required tensor of the given sizes; -1 in want matches any size.
  template <class T>
  Status sizes(const char* name, const T& t, const char* dims, int ndim,
               const int64_t* want) const {
    bool same = t.ndim == ndim;
    for (int i = 0; same && i < ndim; ++i) same = want[i] < 0 || t.sizes[i] == want[i];
    if (same) return no_negative_size(name, t);
    if (!given(t)) return fail(name, "must be given");
    bool known = true;
    for (int i = 0; i < ndim; ++i) known = known && want[i] >= 0;
    if (known)
      return fail(name, "must be %s = %s, got %s", dims, shape(ndim, want).text, shape(t).text);
    for (int i = 0; i < ndim; ++i) {
      if (want[i] >= 0) {
        return fail(name, "must be %s with dim = %lld, got %s", dims,
                    static_cast<long long>(want[i]), shape(t).text);
      }
    }
    return fail(name, "must be %s, got %s", dims, shape(t).text);
  }

  // Floating point, and float64 exactly if x is.
  template <class T>
  Status float_like(const char* name, const T& t, const T& x) const {
    if (!is_float(t.dtype)) {
      return fail(name, "must be float32, float16 or bfloat16 (or float64 with %s), got %s", first,
                  dtype_name(t.dtype));
    }
    if ((t.dtype == CAUSAL_CONV1D_FLOAT64) != (x.dtype == CAUSAL_CONV1D_FLOAT64)) {
      return fail(name, "must be float64 if and only if %s is, got %s with %s %s", first,
                  dtype_name(t.dtype), first, dtype_name(x.dtype));
    }
    return ok();
  }

  template <class T>
  Status same_dtype(const char* name, const T& t, const T& x) const {
    if (t.dtype == x.dtype) return ok();
    return fail(name, "must have %s's dtype %s, got %s", first, dtype_name(x.dtype),
                dtype_name(t.dtype));
  }

  template <class T>
  Status index(const char* name, const T& t) const {
    if (t.dtype == CAUSAL_CONV1D_INT32 || t.dtype == CAUSAL_CONV1D_INT64) return ok();
    return fail(name, "must be int32 or int64, got %s", dtype_name(t.dtype));
  }
};

#define RETURN_IF_FAILED(expression)                      \
  do {                                                    \
    Status status_ = (expression);                        \
    if (status_.code != CAUSAL_CONV1D_OK) return status_; \
  } while (0)

// Whether a tensor is in memory that is there and can be addressed, and what range it is. Runs for
// every argument of every call, so what is wrong is left to describe_range.
template <class T>
bool find_range(const T& t, Range* range) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(t.data);
  const uintptr_t size = static_cast<uintptr_t>(element_size(t.dtype));
  int64_t elements = 1, below = 0, above = 0;
  bool wrong = false;
  for (int i = 0; i < t.ndim; ++i) {
    int64_t span;
    wrong |= __builtin_mul_overflow(elements, t.sizes[i], &elements);
    wrong |= __builtin_mul_overflow(t.sizes[i] - 1, t.strides[i], &span);
    wrong |= span <= -kMostSpan || span >= kMostSpan;
    if (wrong) return false;
    below += span < 0 ? span : 0;
    above += span < 0 ? 0 : span;
  }
  *range = {0, 0};
  if (elements == 0 || t.ndim == 0) return true;
  const uintptr_t before = static_cast<uintptr_t>(-below) * size;
  const uintptr_t after = static_cast<uintptr_t>(above + 1) * size;
  *range = {at - before, at + after};
  return at != 0 && (at & (size - 1)) == 0 && elements <= kMostElements && before <= at &&
         after <= UINTPTR_MAX - at;
}

// What keeps find_range from its answer, if anything does: tensors without elements may be
// anywhere.
template <class T>
Status describe_range(const Checker& c, const ArgumentOf<T>& argument) {
  const T& t = *argument.tensor;
  if (!has_elements(t)) return ok();
  const int64_t size = element_size(t.dtype);
  if (t.data == nullptr) return c.fail(argument.name, "has no data");
  if (reinterpret_cast<uintptr_t>(t.data) % static_cast<uintptr_t>(size) != 0) {
    return c.fail(argument.name, "must have data aligned to its elements' %d bytes",
                  static_cast<int>(size));
  }
  int64_t elements = 1;
  bool few = true;
  for (int i = 0; i < t.ndim; ++i) {
    few = few && !__builtin_mul_overflow(elements, t.sizes[i], &elements);
  }
  if (!few || elements > kMostElements) {
    return c.fail(argument.name, "must have at most 2^52 elements, got %s", shape(t).text);
  }
  return c.fail(argument.name, "must lie within memory, got sizes %s and strides %s", shape(t).text,
                shape(t.ndim, t.strides).text);
}

// Whether no dimension reaches the next larger stride: the common case, told fast.
template <class T>
bool is_nested(const T& t) {
  struct Dimension {
    int64_t stride, size;
  } dims[kMostDims<T>];
  int n = 0;
  for (int i = t.ndim - 1; i >= 0; --i) {
    if (t.sizes[i] == 1) continue;
    const Dimension d{t.strides[i] < 0 ? -t.strides[i] : t.strides[i], t.sizes[i]};
    int at = n++;
    for (; at > 0 && dims[at - 1].stride > d.stride; --at) dims[at] = dims[at - 1];
    dims[at] = d;
  }
  int64_t reach = 0;
  for (int i = 0; i < n; ++i) {
    if (dims[i].stride <= reach) return false;
    reach += dims[i].stride * (dims[i].size - 1);
  }
  return true;
}

// A tensor that is written is a set of distinct elements.
template <class T>
Status check_distinct(const Checker& c, const ArgumentOf<T>& argument) {
  const T& t = *argument.tensor;
  const Overlap found = find_overlap_within(t);
  if (found == Overlap::kNone) return ok();
  for (int i = 0; i < t.ndim; ++i) {
    if (t.sizes[i] > 1 && t.strides[i] == 0) {
      return c.fail(argument.name, "is written and must not be an expanded tensor (stride 0)");
    }
  }
  return c.fail(argument.name,
                found == Overlap::kFound
                    ? "is written and must not overlap itself in memory, got sizes %s, strides %s"
                    : "is written and may overlap itself in memory, which takes too long to find "
                      "out for sizes %s, strides %s",
                shape(t).text, shape(t.ndim, t.strides).text);
}

template <class T>
Status check_disjoint(const Checker& c, const ArgumentOf<T>& written, const ArgumentOf<T>& other) {
  const Overlap found = find_overlap(*written.tensor, *other.tensor);
  if (found == Overlap::kNone) return ok();
  return c.fail(
      written.name,
      found == Overlap::kFound
          ? "must not overlap %s in memory"
          : "may overlap %s in memory, which takes too long to find out for their strides",
      other.name);
}

template <class T>
bool is_same(const T& a, const T& b) {
  bool same = a.data == b.data && a.dtype == b.dtype && a.ndim == b.ndim;
  for (int i = 0; same && i < a.ndim; ++i) {
    same = a.sizes[i] == b.sizes[i] && (a.strides[i] == b.strides[i] || a.sizes[i] == 1);
  }
  return same;
}

constexpr int kMostArguments = 24;

// Whether all arguments lie in memory, and those that are written, which follow `read` others,
// apart from each other and from the rest. in_place: one that is written and may be one that is
// read.
template <class T>
Status check_memory(const Checker& c, const ArgumentOf<T>* arguments, int count, int read,
                    const T* in_place = nullptr, const T* as = nullptr) {
  Range ranges[kMostArguments];
  for (int i = 0; i < count; ++i) {
    if (find_range(*arguments[i].tensor, &ranges[i])) continue;
    RETURN_IF_FAILED(describe_range(c, arguments[i]));
    ranges[i] = {0, 0};
  }
  for (int i = read; i < count; ++i) {
    if (ranges[i].begin == ranges[i].end) continue;
    if (!is_nested(*arguments[i].tensor)) RETURN_IF_FAILED(check_distinct(c, arguments[i]));
    for (int j = 0; j < i; ++j) {
      if (ranges[i].begin >= ranges[j].end || ranges[j].begin >= ranges[i].end) continue;
      const T &a = *arguments[i].tensor, &b = *arguments[j].tensor;
      if (&a == in_place && &b == as && is_same(a, b)) continue;
      RETURN_IF_FAILED(check_disjoint(c, arguments[i], arguments[j]));
    }
  }
  return ok();
}

template <class T, int N>
Status check_memory(const Checker& c, const ArgumentOf<T> (&arguments)[N], int read,
                    const T* in_place = nullptr, const T* as = nullptr) {
  static_assert(N <= kMostArguments, "check_memory has no room for them");
  return check_memory(c, arguments, N, read, in_place, as);
}

// Of every convolution, in check.cpp; x is (batch, dim, ...) and valid. Whether weight and bias fit
// it, and whether the products of taps and inputs can be counted.
Status check_weight(const Checker& c, const Tensor& weight, const Tensor& bias, const Tensor& x);
Status check_work(const Checker& c, const Tensor& x, int64_t width);

}  // namespace causal_conv1d
