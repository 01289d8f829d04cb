// Vectors of 64 bytes in the compiler's own notation, which every instruction set can compute:
// for code whose bits must not depend on it. at::vec's vectors are as long as the machine's.
#pragma once

#include <cstdint>
#include <cstring>

#include "vec_math.h"

namespace tilewise {
namespace CPU_CAPABILITY {

typedef double Lanes __attribute__((vector_size(64)));
typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef float HalfFloats __attribute__((vector_size(32)));

template <typename V, typename T>
TILEWISE_INLINE V load_as(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <typename V, typename T>
TILEWISE_INLINE void store_as(T* p, V v) {
  std::memcpy(p, &v, sizeof v);
}

template <int... lanes, typename V>
TILEWISE_INLINE auto pick(V v) {
  return __builtin_shufflevector(v, v, lanes...);
}

// Lane i with lane i + n/2, and so on, down to one.
template <typename V, typename Op>
TILEWISE_INLINE auto fold(V v, const Op& op) {
  constexpr int n = sizeof(V) / sizeof(v[0]);
  if constexpr (n == 16) {
    return fold(op(pick<0, 1, 2, 3, 4, 5, 6, 7>(v), pick<8, 9, 10, 11, 12, 13, 14, 15>(v)), op);
  } else if constexpr (n == 8) {
    return fold(op(pick<0, 1, 2, 3>(v), pick<4, 5, 6, 7>(v)), op);
  } else if constexpr (n == 4) {
    return fold(op(pick<0, 1>(v), pick<2, 3>(v)), op);
  } else {
    static_assert(n == 2);
    return op(v[0], v[1]);
  }
}

struct Add {
  template <typename V>
  V operator()(V a, V b) const {
    return a + b;
  }
};

struct Largest {
  template <typename V>
  V operator()(V a, V b) const {
    return a > b ? a : b;
  }
};

struct Smallest {
  template <typename V>
  V operator()(V a, V b) const {
    return a < b ? a : b;
  }
};

}  // namespace CPU_CAPABILITY
}  // namespace tilewise
