// Sums of selected rows.
#include "code_sums.h"

namespace tilewise {
namespace CPU_CAPABILITY {
namespace {

template <typename T>
void sum(const SumRows& rows, T* out) {
  double sums[kSumColumns] = {};
  const T* x = static_cast<const T*>(rows.x.data) + rows.column;
  for (int64_t i = 0; i < rows.count; ++i) {
    const T* row = x + rows.rows[i] * rows.x.stride;
    if (rows.columns == kSumColumns) {  // a constant number of columns stays in registers
      for (int64_t c = 0; c < kSumColumns; ++c) sums[c] += row[c];
    } else {
      for (int64_t c = 0; c < rows.columns; ++c) sums[c] += row[c];
    }
  }
  for (int64_t c = 0; c < rows.columns; ++c) out[c] = static_cast<T>(sums[c]);
}

}  // namespace

void sum_rows(const SumRows& rows, void* out, int64_t at) {
  rows.x.is_double ? sum(rows, static_cast<double*>(out) + at)
                   : sum(rows, static_cast<float*>(out) + at);
}

}  // namespace CPU_CAPABILITY
}  // namespace tilewise
