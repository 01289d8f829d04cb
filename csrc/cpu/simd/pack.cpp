#include "pack.h"

#include <ATen/cpu/vec/vec.h>

namespace tilewise {
namespace CPU_CAPABILITY {
namespace {

constexpr int64_t kBlock = 16;  // square blocks are transposed in registers

template <typename T>
inline void transpose_any(const T* in, int64_t stride, int64_t rows, int64_t cols, T* out,
                          int64_t out_stride) {
  for (int64_t j = 0; j < cols; j += kBlock) {
    const int64_t n = cols - j < kBlock ? cols - j : kBlock;
    for (int64_t i = 0; i < rows; i += kBlock) {
      const int64_t m = rows - i < kBlock ? rows - i : kBlock;
      const T* source = in + i * stride + j;
      T* target = out + j * out_stride + i;
      if (m == kBlock && n == kBlock) {
        at::vec::transpose_mxn<T, kBlock, kBlock>(source, stride, target, out_stride);
        continue;
      }
      for (int64_t b = 0; b < n; ++b) {
        for (int64_t a = 0; a < m; ++a) target[b * out_stride + a] = source[a * stride + b];
      }
    }
  }
}

}  // namespace

void pack_pairs(const uint16_t* rows, int64_t stride, int64_t pairs, int64_t cols, uint32_t* out) {
  for (int64_t i = 0; i < pairs; ++i) {
    const uint16_t* even = rows + 2 * i * stride;
    const uint16_t* odd = even + stride;
    uint32_t* pair = out + i * cols;
    for (int64_t j = 0; j < cols; ++j) pair[j] = even[j] | static_cast<uint32_t>(odd[j]) << 16;
  }
}

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
