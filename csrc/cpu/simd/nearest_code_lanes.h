// Elements of a row in lanes of float64, and their sum; or an element of 16 rows in lanes.
#pragma once

#include <cstring>

#include "lanes.h"
#include "nearest_code.h"

namespace tilewise {
namespace CPU_CAPABILITY {

TILEWISE_INLINE Lanes load(const double* p) { return Lanes::load(p); }
TILEWISE_INLINE Lanes load(const float* p) { return widen(p); }

template <typename T>
TILEWISE_INLINE Lanes load_first(const T* p, int64_t count) {
  T buffer[8] = {};
  std::memcpy(buffer, p, count * sizeof(T));
  return load(buffer);
}

// ((0 + 4) + (2 + 6)) + ((1 + 5) + (3 + 7))
TILEWISE_INLINE double tree(Lanes v) { return fold(v, Add()); }

template <typename T>
TILEWISE_INLINE const T* row_of(const Matrix& matrix, int64_t row) {
  return static_cast<const T*>(matrix.data) + row * matrix.stride;
}

// Codes whose sums fit into the registers.
#if defined(CPU_CAPABILITY_AVX512)
constexpr int kTileCodes = 8;
#elif defined(CPU_CAPABILITY_AVX2) || defined(__aarch64__)
constexpr int kTileCodes = 4;
#else
constexpr int kTileCodes = 2;
#endif

// Of 16 rows x (dim, 16) with some codes: sums of squared differences, or of products.
template <bool l2>
TILEWISE_INLINE void sum_tile(const float* x, const float* const (&codes)[kTileCodes], int64_t dim,
                              Floats (&sums)[kTileCodes]) {
#pragma GCC unroll 8
  for (int c = 0; c < kTileCodes; ++c) sums[c] = Floats::all(0.0f);
  for (int64_t d = 0; d < dim; ++d) {
    const Floats v = Floats::load(x + d * kLaneRows);
#pragma GCC unroll 8
    for (int c = 0; c < kTileCodes; ++c) {
      const Floats element = Floats::all(codes[c][d]);
      if (l2) {
        const Floats difference = v - element;
        sums[c] = multiply_add(difference, difference, sums[c]);
      } else {
        sums[c] = multiply_add(v, element, sums[c]);
      }
    }
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace tilewise
