// The sum of exponentials of some logits, whatever their size.
#pragma once

#include "../../common/inline.h"

namespace tilewise {

// What exponentials are relative to, if the largest logit is this one. Where all are -inf any base
// will do, and -inf less -inf would be NaN.
template <typename T>
TILEWISE_INLINE T base_of(T largest) {
  return largest == -static_cast<T>(__builtin_inf()) ? 0 : largest;
}

// exp(largest) * sum.
struct LogSum {
  double largest = -__builtin_inf(), sum = 0;
};

// Adds the exponentials of b to those of a.
TILEWISE_INLINE void merge(LogSum& a, const LogSum& b) {
  const double largest = a.largest < b.largest ? b.largest : a.largest;
  if (a.sum != 0) a.sum *= __builtin_exp(a.largest - largest);
  a.sum += b.largest == largest ? b.sum : b.sum * __builtin_exp(b.largest - largest);
  a.largest = largest;
}

}  // namespace tilewise
