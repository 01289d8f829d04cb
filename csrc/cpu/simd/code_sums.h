// Interface of the vector kernel of code_sums.
#pragma once

#include <cstdint>

#include "capability.h"

namespace tilewise {

constexpr int64_t kSumColumns = 64;  // whose sums a call keeps in registers

enum class SumType { Float, Double, BFloat16, Half };

// Some columns of some rows of x, `stride` elements from each other.
struct SumRows {
  SumType type;
  const void* x;
  int64_t stride;
  int64_t column, columns;  // at most kSumColumns
  const int64_t* rows;
  int64_t count;
};

// out[at + c] = the sum of column c, in float64 and in the order of `rows`. out is of float, or of
// double for double.
#define TILEWISE_DECLARE(CAPABILITY)                         \
  namespace CAPABILITY {                                     \
  void sum_rows(const SumRows& rows, void* out, int64_t at); \
  }
TILEWISE_FOR_EACH_CAPABILITY(TILEWISE_DECLARE)
#undef TILEWISE_DECLARE

}  // namespace tilewise
