// The sum of exponentials of some logits, whatever their size.
#pragma once

namespace tilewise {

// exp(largest) * sum.
struct LogSum {
  double largest = -__builtin_inf(), sum = 0;
};

}  // namespace tilewise
