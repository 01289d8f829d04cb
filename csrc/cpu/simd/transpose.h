// Interface of the kernels that transpose matrices of 2 or 4 bytes a number.
#pragma once

#include <cstdint>

#include "capability.h"

namespace tilewise {

// transpose: out[j][i] = in[i][j] for the `cols` columns that `in` starts with.
//   in (rows, cols), out (cols, rows), with `stride` and `out_stride` elements between their rows.
#define TILEWISE_DECLARE(CAPABILITY)                                                            \
  namespace CAPABILITY {                                                                        \
  void transpose(const uint16_t* in, int64_t stride, int64_t rows, int64_t cols, uint16_t* out, \
                 int64_t out_stride);                                                           \
  void transpose(const uint32_t* in, int64_t stride, int64_t rows, int64_t cols, uint32_t* out, \
                 int64_t out_stride);                                                           \
  }
TILEWISE_FOR_EACH_CAPABILITY(TILEWISE_DECLARE)
#undef TILEWISE_DECLARE

}  // namespace tilewise
