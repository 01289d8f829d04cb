// The one way in which sums of float64 numbers are taken.
#pragma once

#include "inline.h"

namespace tilewise {

// A sum that carries its rounding errors along (Knuth's two-sum), so that its own error does not
// grow with the number of terms. One that overflows, or has a NaN, is what a plain sum would be.
class Sum {
 public:
  TILEWISE_INLINE void add(double x) {
    const double next = sum_ + x, added = next - sum_;
    rest_ += (sum_ - (next - added)) + (x - added);
    sum_ = next;
  }
  TILEWISE_INLINE double value() const { return rest_ - rest_ == 0 ? sum_ + rest_ : sum_; }

 private:
  double sum_ = 0, rest_ = 0;
};

}  // namespace tilewise
