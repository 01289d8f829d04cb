// Sums over vectors. In float32 a lane that takes many terms loses bits with each, equal terms all
// in the same direction: it takes four, what they give is added in pairs, and that in float64.
#pragma once

#include "../../common/sum.h"
#include "lanes.h"

namespace tilewise {
namespace CPU_CAPABILITY {

constexpr int64_t kLanes = 16;  // floats in a vector
constexpr int kShortSum = 4;    // vectors that are added one to another
constexpr int kPairedSum = 16;  // that are added in pairs of such sums, without float64

// term(first) + ... + term(first + n - 1), each called in this order.
template <int n, int first = 0, typename F>
TILEWISE_INLINE auto add_pairs(const F& term) {
  if constexpr (n > kShortSum) {
    const auto left = add_pairs<n / 2, first>(term);
    return left + add_pairs<n / 2, first + n / 2>(term);
  } else {
    auto sum = term(first);
#pragma GCC unroll 4
    for (int k = 1; k < n; ++k) sum = sum + term(first + k);
    return sum;
  }
}

template <typename V>
class LaneSum;

template <>
class LaneSum<Floats> {
 public:
  // v: sums of a few terms.
  TILEWISE_INLINE void add(const Floats& v) {
    float x[kLanes];
    v.store(x);
    low_ = low_ + widen(x);
    high_ = high_ + widen(x + 8);
  }
  TILEWISE_INLINE double value() const { return fold(low_ + high_, Add()); }

 private:
  Lanes low_ = Lanes::all(0.0), high_ = Lanes::all(0.0);
};

// Each lane as the class Sum.
template <>
class LaneSum<Lanes> {
 public:
  TILEWISE_INLINE void add(const Lanes& x) {
    const Lanes next = sum_ + x, added = next - sum_;
    rest_ = rest_ + ((sum_ - (next - added)) + (x - added));
    sum_ = next;
  }
  TILEWISE_INLINE double value() const {
    double sums[8], rests[8];
    sum_.store(sums);
    rest_.store(rests);
    Sum total;
    for (int i = 0; i < 8; ++i) total.add(sums[i]);
    for (int i = 0; i < 8; ++i) total.add(rests[i]);
    return total.value();
  }

 private:
  Lanes sum_ = Lanes::all(0.0), rest_ = Lanes::all(0.0);
};

// The sum of term(j), 16 floats, for j = 0, 16, ... below `end`.
template <typename F>
TILEWISE_INLINE double sum_lanes(int64_t end, const F& term) {
  LaneSum<Floats> total;
  int64_t j = 0;
  const auto at = [&](int k) __attribute__((always_inline)) { return term(j + k * kLanes); };
  for (; j + kPairedSum * kLanes <= end; j += kPairedSum * kLanes)
    total.add(add_pairs<kPairedSum>(at));
  for (; j + kShortSum * kLanes <= end; j += kShortSum * kLanes)
    total.add(add_pairs<kShortSum>(at));
  if (j < end) {
    Floats part = term(j);
    for (j += kLanes; j < end; j += kLanes) part = part + term(j);
    total.add(part);
  }
  return total.value();
}

}  // namespace CPU_CAPABILITY
}  // namespace tilewise
