// Sums over vectors. In float32 a lane that takes many terms loses bits with each, equal terms all
// in the same direction: it takes four, and what they give is added in float64.
#pragma once

#include "../../common/sum.h"
#include "lanes.h"

namespace tilewise {
namespace CPU_CAPABILITY {

constexpr int64_t kLanes = 16;    // floats in a vector
constexpr int64_t kShortSum = 4;  // vectors that are added in float32

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
  for (; j + kShortSum * kLanes <= end; j += kShortSum * kLanes) {
    Floats part = term(j);
#pragma GCC unroll 4
    for (int64_t k = 1; k < kShortSum; ++k) part = part + term(j + k * kLanes);
    total.add(part);
  }
  if (j < end) {
    Floats part = term(j);
    for (j += kLanes; j < end; j += kLanes) part = part + term(j);
    total.add(part);
  }
  return total.value();
}

}  // namespace CPU_CAPABILITY
}  // namespace tilewise
