// Tensors share memory if a linear equation has a solution: the address of an element is a sum of
// strides times indices, each index within its size, and two addresses are to be equal. So with
// positive coefficients (an index of a negative coefficient counts from the other end):
//
//   sum over k of c[k] * u[k] = target, 0 <= u[k] <= most[k]
//
// In general this is as hard as a knapsack, but there are nine unknowns at most, and those of real
// tensors fall together: dimensions that lie one in the other are one, as are equal strides of two
// tensors. What remains is searched from the largest coefficient down. The unknowns below decide
// which values are worth a try: they reach only so far, and only to multiples of their greatest
// common divisor.
#include "overlap.h"

#include <algorithm>
#include <numeric>

namespace causal_conv1d {
namespace {

__extension__ typedef __int128 int128;

// Values of unknowns that are tried in all: less than a millisecond. Views as programs make them
// need some ten.
constexpr int kMostTries = 1 << 14;

struct Term {
  int64_t c, most;
};

// The inverse of a modulo m, which have no common divisor.
int64_t inverse(int64_t a, int64_t m) {
  int64_t r0 = m, r1 = a % m, s0 = 0, s1 = 1;
  while (r1 != 0) {
    const int64_t q = r0 / r1;
    std::swap(r0 -= q * r1, r1);
    std::swap(s0 -= q * s1, s1);
  }
  return s0 < 0 ? s0 + m : s0;
}

// All sums of terms stay below 2^63; see kMostSpan.
class Equation {
 public:
  // The coefficient is stride * scale, of either sign or 0.
  void add(int64_t stride, int64_t scale, int64_t most) {
    if (stride == 0 || most == 0) return;
    int64_t c = stride * scale;
    if (c < 0) {
      target_ -= c * most;
      c = -c;
    }
    terms_[n_++] = {c, most};
  }
  void add_to_target(int64_t value) { target_ += value; }

  Overlap solve() {
    join_terms();
    int64_t reach = 0, divisor = 0;
    for (int k = 0; k < n_; ++k) {
      levels_[k] = {reach, divisor, 0, 0, 0};
      if (divisor != 0) {
        Level& level = levels_[k];
        level.common = std::gcd(terms_[k].c, divisor);
        level.step = divisor / level.common;
        level.inverse = inverse(terms_[k].c / level.common, level.step);
      }
      reach += terms_[k].c * terms_[k].most;
      divisor = std::gcd(divisor, terms_[k].c);
    }
    if (target_ < 0 || target_ > reach) return Overlap::kNone;
    return search(n_ - 1, target_);
  }

 private:
  struct Level {
    int64_t reach;    // of the terms below
    int64_t divisor;  // the greatest common one of their coefficients
    // What the term gives has to be the target modulo divisor: so for every step-th value.
    int64_t common, step, inverse;
  };

  // Brings terms in ascending order, and takes together those that give all multiples of the
  // smaller coefficient up to their sum.
  void join_terms() {
    std::sort(terms_, terms_ + n_, [](const Term& a, const Term& b) { return a.c < b.c; });
    int kept = 0;
    for (int k = 0; k < n_; ++k) {
      const Term t = terms_[k];
      const auto takes = [&](const Term& u) { return t.c % u.c == 0 && t.c / u.c - 1 <= u.most; };
      Term* const to = std::find_if(terms_, terms_ + kept, takes);
      if (to == terms_ + kept) {
        terms_[kept++] = t;
      } else {
        to->most += t.c / to->c * t.most;
      }
    }
    n_ = kept;
  }

  // Whether terms 0 to k can give target.
  Overlap search(int k, int64_t target) {
    if (k < 0) return target == 0 ? Overlap::kFound : Overlap::kNone;
    const Term& term = terms_[k];
    if (k == 0) {
      return target % term.c == 0 && target / term.c <= term.most ? Overlap::kFound
                                                                  : Overlap::kNone;
    }
    const Level& level = levels_[k];
    if (target % level.common != 0) return Overlap::kNone;
    const int64_t beyond = target - level.reach;
    const int64_t least = beyond > 0 ? (beyond - 1) / term.c + 1 : 0;
    const int64_t last = std::min(term.most, target / term.c);
    const int64_t residue = static_cast<int64_t>(
        static_cast<int128>(target / level.common % level.step) * level.inverse % level.step);
    int64_t u = least + (residue - least % level.step + level.step) % level.step;
    for (; u <= last; u += level.step) {
      if (++tries_ > kMostTries) return Overlap::kUndecided;
      const Overlap found = search(k - 1, target - term.c * u);
      if (found != Overlap::kNone) return found;
    }
    return Overlap::kNone;
  }

  static constexpr int kMostTerms = 2 * kMostDimensions + 2;
  Term terms_[kMostTerms];
  Level levels_[kMostTerms];
  int n_ = 0, tries_ = 0;
  int64_t target_ = 0;
};

}  // namespace

Overlap find_overlap(const Strided& a, const Strided& b) {
  const int64_t size_a = element_size(a.dtype), size_b = element_size(b.dtype);
  const int64_t unit = std::min(size_a, size_b);  // all addresses are multiples of it
  const uintptr_t at_a = reinterpret_cast<uintptr_t>(a.data);
  const uintptr_t at_b = reinterpret_cast<uintptr_t>(b.data);
  // (unit i of an element of a) - (unit j of an element of b) = distance of b from a
  Equation equation;
  equation.add_to_target(static_cast<int64_t>(at_b - at_a) / unit);
  equation.add(1, 1, size_a / unit - 1);
  equation.add(1, -1, size_b / unit - 1);
  for (int i = 0; i < a.ndim; ++i) equation.add(a.strides[i], size_a / unit, a.sizes[i] - 1);
  for (int i = 0; i < b.ndim; ++i) equation.add(b.strides[i], -(size_b / unit), b.sizes[i] - 1);
  return equation.solve();
}

// Two elements are in one place if the sum of strides times differences of indices is 0. The first
// index that differs may be taken to be larger.
Overlap find_overlap_within(const Strided& t) {
  Overlap result = Overlap::kNone;
  for (int first = 0; first < t.ndim; ++first) {
    if (t.sizes[first] == 1) continue;
    if (t.strides[first] == 0) return Overlap::kFound;
    Equation equation;
    equation.add_to_target(-t.strides[first]);
    equation.add(t.strides[first], 1, t.sizes[first] - 2);
    for (int i = first + 1; i < t.ndim; ++i) {
      equation.add_to_target(t.strides[i] * (t.sizes[i] - 1));
      equation.add(t.strides[i], 1, 2 * (t.sizes[i] - 1));
    }
    const Overlap found = equation.solve();
    if (found == Overlap::kFound) return found;
    if (found == Overlap::kUndecided) result = found;
  }
  return result;
}

}  // namespace causal_conv1d
