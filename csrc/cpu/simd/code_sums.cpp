// Sums of selected rows.
#include "code_sums.h"

#include <ATen/cpu/vec/vec.h>

namespace tilewise {
namespace CPU_CAPABILITY {
namespace {

template <typename T, typename Out>
void sum(const SumRows& rows, Out* out) {
  double sums[kSumColumns] = {};
  const T* x = static_cast<const T*>(rows.x) + rows.column;
  for (int64_t i = 0; i < rows.count; ++i) {
    const T* row = x + rows.rows[i] * rows.stride;
    if (rows.columns == kSumColumns) {  // a constant number of columns stays in registers
      for (int64_t c = 0; c < kSumColumns; ++c) sums[c] += static_cast<Out>(row[c]);
    } else {
      for (int64_t c = 0; c < rows.columns; ++c) sums[c] += static_cast<Out>(row[c]);
    }
  }
  for (int64_t c = 0; c < rows.columns; ++c) out[c] = static_cast<Out>(sums[c]);
}

}  // namespace

void sum_rows(const SumRows& rows, void* out, int64_t at) {
  if (rows.type == SumType::Double) return sum<double>(rows, static_cast<double*>(out) + at);
  float* sums = static_cast<float*>(out) + at;
  if (rows.type == SumType::Float) return sum<float>(rows, sums);
  rows.type == SumType::Half ? sum<c10::Half>(rows, sums) : sum<c10::BFloat16>(rows, sums);
}

}  // namespace CPU_CAPABILITY
}  // namespace tilewise
