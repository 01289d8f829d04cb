// Interface of the vector kernel of code_sums.
#pragma once

#include <cstdint>

#include "capability.h"
#include "matrix.h"

namespace tilewise {

constexpr int64_t kSumColumns = 64;  // whose sums a call keeps in registers

// Some columns of some rows of x.
struct SumRows {
  Matrix x;
  int64_t column, columns;  // at most kSumColumns
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
