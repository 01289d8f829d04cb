#include "log_sums.h"

#include <ATen/cpu/vec/vec.h>
#include <math.h>

namespace tilewise {
namespace CPU_CAPABILITY {

void merge_log_sums(LogSum* all, const LogSum* part, int64_t count) {
  using V = at::vec::Vectorized<double>;
  constexpr int64_t kOnce = 8;
  double factor[kOnce] = {};
  for (int64_t i = 0; i < count; i += kOnce) {
    const int64_t n = count - i < kOnce ? count - i : kOnce;
    for (int64_t k = 0; k < n; ++k) {
      const double a = all[i + k].largest, b = part[i + k].largest;
      factor[k] = a == b ? 0 : -::fabs(a - b);
    }
    for (int64_t k = 0; k < kOnce; k += V::size()) V::loadu(factor + k).exp().store(factor + k);
    for (int64_t k = 0; k < n; ++k) {
      LogSum& a = all[i + k];
      const LogSum& b = part[i + k];
      const bool raised = a.largest < b.largest;
      a.sum = raised ? a.sum * factor[k] + b.sum : a.sum + b.sum * factor[k];
      if (raised) a.largest = b.largest;
    }
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace tilewise
