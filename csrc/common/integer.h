// Sizes in whole parts.
#pragma once

#include <cstdint>

#include "inline.h"

namespace tilewise {

TILEWISE_HOST_DEVICE constexpr int64_t ceil_div(int64_t n, int64_t size) {
  return (n + size - 1) / size;
}

// The next multiple of `size`.
TILEWISE_HOST_DEVICE constexpr int64_t round_up(int64_t n, int64_t size) {
  return ceil_div(n, size) * size;
}

}  // namespace tilewise
