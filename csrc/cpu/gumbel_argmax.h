// The search for the largest perturbed logits, where threads share a row.
#pragma once

#include "rows_along.h"

namespace tilewise {

// index (rows, k): the columns of the k largest of few wide rows x, in order. With `mark_invalid`
// the first is -1 in rows whose softmax is NaN.
void argmax_wide(const at::Tensor& x, const RowsAlong& shape, int64_t k, uint64_t seed,
                 int64_t row_offset, int64_t* index, bool mark_invalid);

}  // namespace tilewise
