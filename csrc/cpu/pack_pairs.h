// Interface of the vector kernel that prepares right factors of bfloat16 products.
#pragma once

#include <cstdint>

#include "capability.h"

namespace tilewise {

// Interleaves rows 2i and 2i + 1 of a 16-bit matrix: out[i][j] = (rows[2i][j], rows[2i + 1][j]).
// rows (2 * pairs, cols) with `stride` elements between rows; out (pairs, cols), contiguous.
#define TILEWISE_DECLARE(CAPABILITY)                                                       \
  namespace CAPABILITY {                                                                   \
  void pack_pairs(const uint16_t* rows, int64_t stride, int64_t pairs, int64_t cols,       \
                  uint32_t* out);                                                          \
  }
TILEWISE_FOR_EACH_CAPABILITY(TILEWISE_DECLARE)
#undef TILEWISE_DECLARE

}  // namespace tilewise
