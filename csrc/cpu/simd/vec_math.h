// Elementary functions on at::vec vectors, from our own minimax fits: the same code for every
// instruction set, about half the instructions of the vector library, errors stated below.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include "capability.h"

namespace tilewise {
namespace CPU_CAPABILITY {

using at::vec::Vectorized;
using Float = Vectorized<float>;
using Int = Vectorized<int32_t>;

// c[0] * x^n + ... + c[n], by Horner's rule.
template <typename V, typename T, int n>
TILEWISE_INLINE V polynomial(V x, const T (&c)[n]) {
  V p(c[0]);
  for (int i = 1; i < n; ++i) p = at::vec::fmadd(p, x, V(c[i]));
  return p;
}

// exp(x) for x <= 0, relative error below 1.2e-7. Below -87.3 the result stays at 1.2e-38.
TILEWISE_INLINE Float exp_nonpositive(Float x) {
  const Float y = at::vec::clamp_min(x, Float(-87.3f));  // NaN passes
  // Adding 1.5 * 2^23 rounds to an integer n, which then stands in the low bits; 127 is the bias of
  // the exponent.
  const Float magic(12582912.0f + 127.0f);
  const Float shifted = at::vec::fmadd(y, Float(1.44269504f), magic);
  const Float n = shifted - magic;
  Float r = at::vec::fmadd(n, Float(-0.693145752f), y);  // ln 2 in two pieces, the first one exact
  r = at::vec::fmadd(n, Float(-1.42860677e-6f), r);
  const Float p = polynomial(r, {1.38145986e-3f, 8.36871698e-3f, 4.16683881e-2f, 1.66665206e-1f,
                                 4.99999934e-1f, 1.0f, 1.0f});
  return p * at::vec::cast<float>(at::vec::cast<int32_t>(shifted) << Int(23));
}

// log(1 + x) for 0 <= x <= 1, relative error below 1.2e-7, also where 1 + x rounds to 1.
TILEWISE_INLINE Float log1p_unit(Float x) {
  return x * polynomial(x, {5.3648166e-3f, -3.00657631e-2f, 7.9204491e-2f, -1.37537988e-1f,
                            1.91536534e-1f, -2.48571633e-1f, 3.33213226e-1f, -4.9999648e-1f, 1.0f});
}

// 1 / x for 1 <= x <= 2, relative error below 1.2e-7.
TILEWISE_INLINE Float reciprocal(Float x) {
#if defined(CPU_CAPABILITY_AVX512)
  // A quarter of a division's time: 14 bits and a Newton step.
  const __m512 r = _mm512_rcp14_ps(x);
  const __m512 error = _mm512_fnmadd_ps(x, r, _mm512_set1_ps(1.0f));
  return _mm512_fmadd_ps(r, error, r);
#else
  return Float(1.0f) / x;
#endif
}

using Double = Vectorized<double>;
TILEWISE_INLINE Double reciprocal(Double x) { return Double(1.0) / x; }
TILEWISE_INLINE Double exp_nonpositive(Double x) { return x.exp(); }
TILEWISE_INLINE Double log1p_unit(Double x) { return x.log1p(); }

// Numbers below 1e-38 count as zero while this lives: on x86 each of them costs 150 cycles.
class FlushDenormals {
#if defined(__SSE2__)
 public:
  FlushDenormals() : saved_(__builtin_ia32_stmxcsr()) { __builtin_ia32_ldmxcsr(saved_ | 0x8040); }
  ~FlushDenormals() { __builtin_ia32_ldmxcsr(saved_); }

 private:
  unsigned saved_;
#else
 public:
  FlushDenormals() {}  // not needed there; user-provided, so that the variable counts as used
#endif
};

}  // namespace CPU_CAPABILITY
}  // namespace tilewise
