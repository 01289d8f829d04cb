// Interface of the vector kernel of code_sums.
#pragma once

#include <cstdint>

#include "capability.h"

namespace tilewise {

// Some columns of some rows of x (float or double).
struct SumRows {
  const void* x;
  bool is_double;
  int64_t stride, column, columns;  // at most 64 columns
  const int64_t* rows;
  int64_t count;
};

// out[at + c] = the sum of column c, in float64 and in the order of `rows`.
#define TILEWISE_DECLARE(CAPABILITY)                         \
  namespace CAPABILITY {                                     \
  void sum_rows(const SumRows& rows, void* out, int64_t at); \
  }
TILEWISE_FOR_EACH_CAPABILITY(TILEWISE_DECLARE)
#undef TILEWISE_DECLARE

}  // namespace tilewise
