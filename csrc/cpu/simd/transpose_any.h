// Transposes of any size, in square blocks.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include "capability.h"

namespace tilewise {
namespace CPU_CAPABILITY {

constexpr int64_t kSquare = 16;  // such blocks are transposed in registers

// out[j][i] = in[i][j].
template <typename T>
TILEWISE_INLINE void transpose_any(const T* in, int64_t stride, int64_t rows, int64_t cols, T* out,
                                   int64_t out_stride) {
  for (int64_t j = 0; j < cols; j += kSquare) {
    const int64_t n = cols - j < kSquare ? cols - j : kSquare;
    for (int64_t i = 0; i < rows; i += kSquare) {
      const int64_t m = rows - i < kSquare ? rows - i : kSquare;
      const T* source = in + i * stride + j;
      T* target = out + j * out_stride + i;
      if (m == kSquare && n == kSquare) {
        at::vec::transpose_mxn<T, kSquare, kSquare>(source, stride, target, out_stride);
        continue;
      }
      for (int64_t b = 0; b < n; ++b) {
        for (int64_t a = 0; a < m; ++a) target[b * out_stride + a] = source[a * stride + b];
      }
    }
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace tilewise
