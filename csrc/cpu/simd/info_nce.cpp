// Vector kernels of info_nce: cross entropies of the rows.
#include "info_nce.h"

#include "cross_entropy.h"

namespace tilewise {
namespace CPU_CAPABILITY {

double info_nce_log_sums(const CrossEntropyBlock& block, LogSum* rows, LogSum* cols) {
  return log_sums_of<false>(block, rows, cols);
}

double info_nce_gradient(const CrossEntropyBlock& block, void* grads, int64_t stride,
                         bool bfloat16) {
  return gradient_of<false>(block, grads, stride, bfloat16);
}

}  // namespace CPU_CAPABILITY
}  // namespace tilewise
