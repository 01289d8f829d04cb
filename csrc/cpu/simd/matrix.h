// Rows as the vector kernels read them.
#pragma once

#include <cstdint>

namespace tilewise {

// A matrix of float or double with `stride` elements between its rows.
struct Matrix {
  const void* data;
  bool is_double;
  int64_t stride;
};

}  // namespace tilewise
