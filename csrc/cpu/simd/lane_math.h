// Elementary functions on the 16 floats of lanes.h, from our own minimax fits: the same code for
// every instruction set, about half the instructions of a vector library, errors stated below.
#pragma once

#include "lanes.h"

namespace tilewise {
namespace CPU_CAPABILITY {

// c[0] * x^n + ... + c[n], by Horner's rule.
template <int n>
TILEWISE_INLINE Floats polynomial(const Floats& x, const float (&c)[n]) {
  Floats p = Floats::all(c[0]);
#pragma GCC unroll 10
  for (int i = 1; i < n; ++i) p = multiply_add(p, x, Floats::all(c[i]));
  return p;
}

// x = n log 2 + r with an integer n and |r| <= log(2) / 2.
struct Reduced {
  Floats n, r;
};

TILEWISE_INLINE Reduced reduce(const Floats& x) {
  const Floats magic = Floats::all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  Reduced out;
  out.n = multiply_add(x, Floats::all(1.44269504f), magic) - magic;
  out.r = multiply_add(out.n, Floats::all(-0.693145752f), x);  // log 2 in two pieces
  out.r = multiply_add(out.n, Floats::all(-1.42860677e-6f), out.r);
  return out;
}

// x * 2^n for an integer n from -126 to 127; 0 for n = -127, where denormals count as 0.
TILEWISE_INLINE Floats times_power_of_two(const Floats& x, const Floats& n) {
#if defined(CPU_CAPABILITY_AVX512)
  Floats out;
  out.v[0] = (Floats::Vector)_mm512_scalef_ps(x.v[0], n.v[0]);
  return out;
#else
  return x * ((convert<int32_t>(n) + Ints::all(127)) << 23).as<Floats>();
#endif
}

// exp(x) for x <= 0, relative error below 1.2e-7; exactly 0 below -88.
TILEWISE_INLINE Floats exp_nonpositive(const Floats& x) {
  const Reduced y = reduce(higher(Floats::all(-88.0f), x));  // NaN passes
  const Floats e = polynomial(y.r, {1.38145986e-3f, 8.36871698e-3f, 4.16683881e-2f, 1.66665206e-1f,
                                    4.99999934e-1f, 1.0f, 1.0f});
  return times_power_of_two(e, y.n);
}

// log(1 + x) for 0 <= x <= 1, relative error below 1.2e-7, also where 1 + x rounds to 1.
TILEWISE_INLINE Floats log1p_unit(const Floats& x) {
  return x * polynomial(x, {5.3648166e-3f, -3.00657631e-2f, 7.9204491e-2f, -1.37537988e-1f,
                            1.91536534e-1f, -2.48571633e-1f, 3.33213226e-1f, -4.9999648e-1f, 1.0f});
}

// 1 / x for 1 <= x <= 2, relative error below 1.2e-7.
TILEWISE_INLINE Floats reciprocal(const Floats& x) {
#if defined(CPU_CAPABILITY_AVX512)
  // A quarter of a division's time: 14 bits and a Newton step.
  Floats out;
  const __m512 r = _mm512_rcp14_ps(x.v[0]);
  const __m512 error = _mm512_fnmadd_ps(x.v[0], r, _mm512_set1_ps(1.0f));
  out.v[0] = (Floats::Vector)_mm512_fmadd_ps(r, error, r);
  return out;
#else
  return Floats::all(1.0f) / x;
#endif
}

// -|x|
TILEWISE_INLINE Floats minus_abs(const Floats& x) {
  return (x.as<Ints>() | Ints::all(INT32_MIN)).as<Floats>();
}

TILEWISE_INLINE Floats square_root(const Floats& x) {
  Floats out;
#if defined(CPU_CAPABILITY_AVX512)
  out.v[0] = (Floats::Vector)_mm512_sqrt_ps(x.v[0]);
#elif defined(CPU_CAPABILITY_AVX2)
  for (int i = 0; i < 2; ++i) out.v[i] = (Floats::Vector)_mm256_sqrt_ps(x.v[i]);
#else
  for (int i = 0; i < 16; ++i) {
    out.v[i / Floats::each][i % Floats::each] =
        __builtin_sqrtf(x.v[i / Floats::each][i % Floats::each]);
  }
#endif
  return out;
}

// The cosine and the sine of 2 pi t for 0 <= t <= 1, absolute error below 1e-7.
TILEWISE_INLINE void cosine_sine(const Floats& t, Floats& cosine, Floats& sine) {
  const Floats magic = Floats::all(12582912.0f);
  const Floats turns = t + t + t + t;  // quarters of one, exactly
  const Floats nearest = (turns + magic) - magic;
  const Floats r = turns - nearest;  // from -1/2 to 1/2
  const Floats square = r * r;
  const Floats s =
      r * polynomial(square, {-4.60165786e-3f, 7.96800330e-2f, -6.45963490e-1f, 1.57079637f});
  const Floats c =
      polynomial(square, {9.03631677e-4f, -2.08600722e-2f, 2.53669202e-1f, -1.23370051f, 1.0f});
  const Ints quadrant = convert<int32_t>(nearest);
  const Ints even = (quadrant & Ints::all(1)) - Ints::all(1);  // all bits where nothing is swapped
  const auto pick_bits = [&](const Floats& a, const Floats& b) {
    return (a.as<Ints>() & even) | (b.as<Ints>() & (even ^ -1));
  };
  const auto sign = [](const Ints& q) { return (q & Ints::all(2)) << 30; };
  cosine = (pick_bits(c, s) ^ sign(quadrant + Ints::all(1))).as<Floats>();
  sine = (pick_bits(s, c) ^ sign(quadrant)).as<Floats>();
}

}  // namespace CPU_CAPABILITY
}  // namespace tilewise
