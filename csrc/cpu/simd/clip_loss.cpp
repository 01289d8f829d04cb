// Vector kernels of clip_loss: cross entropies of the rows and of the columns.
#include "clip_loss.h"

#include "cross_entropy.h"

namespace tilewise {
namespace CPU_CAPABILITY {

double clip_log_sums(const CrossEntropyBlock& block, LogSum* rows, LogSum* cols) {
  return log_sums_of<true>(block, rows, cols);
}

double clip_gradient(const CrossEntropyBlock& block, void* grads, int64_t stride, bool bfloat16) {
  return gradient_of<true>(block, grads, stride, bfloat16);
}

}  // namespace CPU_CAPABILITY
}  // namespace tilewise
