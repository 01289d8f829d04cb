// Interface of the vector kernels of clip_loss.
#pragma once

#include <cstdint>

#include "capability.h"
#include "log_sum.h"
#include "logit_block.h"

namespace tilewise {

// One side's softmax, for the rows or the columns of a block.
struct ClipSide {
  const LogSum* sums;    // of the whole row or column
  const double* weight;  // 1/2 over the number that have a match; 0 without one
  const double* target;  // of each match: weight / the number of its matches, less smoothing
  double smoothing;      // times the weight: the target of every pair
};

struct ClipBlock : MatchedBlock {
  ClipSide row, col;
};

// clip_log_sums: LogSums of the block's rows and columns (`sums` is not read); returns the sum of
//   targets times logits.
// clip_gradient: grads = d(loss)/d(dot), bfloat16 or of the dots' type, may be where the dots are;
//   returns the sum of d(loss)/d(logit) * dot.
#define TILEWISE_DECLARE(CAPABILITY)                                                        \
  namespace CAPABILITY {                                                                    \
  double clip_log_sums(const ClipBlock&, LogSum* rows, LogSum* cols);                       \
  double clip_gradient(const ClipBlock&, void* grads, int64_t grads_stride, bool bfloat16); \
  }
TILEWISE_FOR_EACH_CAPABILITY(TILEWISE_DECLARE)
#undef TILEWISE_DECLARE

}  // namespace tilewise
