// What the vector kernels of cross entropies read.
#pragma once

#include "log_sum.h"
#include "logit_block.h"

namespace tilewise {

// One side's softmax, for the rows or the columns of a block.
struct CrossEntropySide {
  const LogSum* sums;    // of the whole row or column
  const double* weight;  // in the loss
  const double* target;  // of each match: weight / the number of its matches, less smoothing
  double smoothing;      // times the weight: the target of every pair
};

struct CrossEntropyBlock : MatchedBlock {
  CrossEntropySide row, col;  // col: nothing, where only rows choose
};

// A loss's kernels.
struct CrossEntropyKernels {
  // LogSums of the block's rows and columns (`sums` is not read); returns the sum of targets times
  // logits.
  double (*log_sums)(const CrossEntropyBlock&, LogSum* rows, LogSum* cols);
  // grads = d(loss)/d(dot), bfloat16 or of the dots' type, may be where the dots are; returns the
  // sum of d(loss)/d(logit) * dot.
  double (*gradient)(const CrossEntropyBlock&, void* grads, int64_t grads_stride, bool bfloat16);
};

}  // namespace tilewise
