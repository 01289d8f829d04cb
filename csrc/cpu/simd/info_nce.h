// Interface of the vector kernels of info_nce.
#pragma once

#include "capability.h"
#include "cross_entropy_block.h"

namespace tilewise {

// See CrossEntropyKernels; rows choose.
#define TILEWISE_DECLARE(CAPABILITY)                                                              \
  namespace CAPABILITY {                                                                          \
  double info_nce_log_sums(const CrossEntropyBlock&, LogSum* rows, LogSum* cols);                 \
  double info_nce_gradient(const CrossEntropyBlock&, void* grads, int64_t stride, bool bfloat16); \
  }
TILEWISE_FOR_EACH_CAPABILITY(TILEWISE_DECLARE)
#undef TILEWISE_DECLARE

}  // namespace tilewise
