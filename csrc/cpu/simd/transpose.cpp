#include "transpose.h"

#include "transpose_any.h"

namespace tilewise {
namespace CPU_CAPABILITY {

// at::vec transposes floating types; only their bits move.
void transpose(const uint16_t* in, int64_t stride, int64_t rows, int64_t cols, uint16_t* out,
               int64_t out_stride) {
  transpose_any(reinterpret_cast<const c10::BFloat16*>(in), stride, rows, cols,
                reinterpret_cast<c10::BFloat16*>(out), out_stride);
}

void transpose(const uint32_t* in, int64_t stride, int64_t rows, int64_t cols, uint32_t* out,
               int64_t out_stride) {
  transpose_any(reinterpret_cast<const float*>(in), stride, rows, cols,
                reinterpret_cast<float*>(out), out_stride);
}

}  // namespace CPU_CAPABILITY
}  // namespace tilewise
