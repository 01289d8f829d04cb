// Interface of the vector kernel of gumbel_argmax.
#pragma once

#include <cstdint>

#include "capability.h"

namespace tilewise {

// Consecutive rows, contiguous, of float or double.
struct ArgmaxRows {
  bool is_double;
  const void* x;
  int64_t rows, cols, k;
  uint64_t seed, first_row;  // of the random stream
};

// The sum of exponentials of a row is that of blocks of so many columns, in their order.
constexpr int64_t kArgmaxBlock = 4096;

// A column and what its logit became; of equal ones, the lower column counts as larger.
struct Perturbed {
  double value;
  int64_t col;
};

// index (rows, k): the columns of the k largest perturbed logits, in order. log_prob (rows, k),
// unless null: log softmax of x there. heap: space for k. With `mark_invalid`, the first index is
// -1 in rows that have a NaN, +inf, or nothing but -inf, whose softmax is NaN.
// largest_of_block: the k largest of a row's columns from first_col to first_col + row.cols (row.x:
//   where they are), in no order; fewer leave entries of column -1. Of float. False if, with
//   `mark_invalid`, a logit is a NaN or +inf.
// largest_logit, sum_of_exponentials: of a block of columns, the latter of x - base.
#define TILEWISE_DECLARE(CAPABILITY)                                                     \
  namespace CAPABILITY {                                                                 \
  bool largest_of_block(const ArgmaxRows& row, int64_t first_col, Perturbed* heap,       \
                        bool mark_invalid);                                              \
  float largest_logit(const float* x, int64_t cols);                                     \
  double sum_of_exponentials(const float* x, int64_t cols, float base);                  \
  void gumbel_argmax(const ArgmaxRows&, Perturbed* heap, int64_t* index, void* log_prob, \
                     bool mark_invalid);                                                 \
  }
TILEWISE_FOR_EACH_CAPABILITY(TILEWISE_DECLARE)
#undef TILEWISE_DECLARE

}  // namespace tilewise
