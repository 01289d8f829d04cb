// Interface of the vector kernels of clip_loss.
#pragma once

#include "capability.h"
#include "cross_entropy_block.h"

namespace tilewise {

// See CrossEntropyKernels; rows and columns choose.
#define TILEWISE_DECLARE(CAPABILITY)                                                          \
  namespace CAPABILITY {                                                                      \
  double clip_log_sums(const CrossEntropyBlock&, LogSum* rows, LogSum* cols);                 \
  double clip_gradient(const CrossEntropyBlock&, void* grads, int64_t stride, bool bfloat16); \
  }
TILEWISE_FOR_EACH_CAPABILITY(TILEWISE_DECLARE)
#undef TILEWISE_DECLARE

}  // namespace tilewise
