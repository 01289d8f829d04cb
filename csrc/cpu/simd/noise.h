// Random variates in vector registers, 32 neighbouring columns at a time. The words are those of
// csrc/common/philox.h on every instruction set; docs/ops/gumbel_softmax.md derives what is made of
// them.
#pragma once

#include "../../common/philox.h"
#include "flush_denormals.h"
#include "lane_math.h"

namespace tilewise {
namespace CPU_CAPABILITY {

constexpr int64_t kStep = 32;  // columns

// Whose noise is wanted.
struct NoiseRow {
  uint64_t seed, row;
};

using Words = Wide<uint64_t>;

TILEWISE_INLINE Words low_product(const Words& a, uint32_t m) {
  Words out;
#if defined(CPU_CAPABILITY_AVX512)
  out.v[0] = (Words::Vector)_mm512_mul_epu32((__m512i)a.v[0], _mm512_set1_epi64(m));
#elif defined(CPU_CAPABILITY_AVX2)
  for (int i = 0; i < 2; ++i) {
    out.v[i] = (Words::Vector)_mm256_mul_epu32((__m256i)a.v[i], _mm256_set1_epi64x(m));
  }
#elif defined(__SSE2__)
  TILEWISE_EACH_OF(Words)
  out.v[i] = (Words::Vector)_mm_mul_epu32((__m128i)a.v[i], _mm_set1_epi64x(m));
#else
  TILEWISE_EACH_OF(Words) out.v[i] = (a.v[i] & 0xFFFFFFFFu) * m;
#endif
  return out;
}

// Not by a shift, which would wait for the unit that multiplies.
TILEWISE_INLINE Words high_half(const Words& a) {
  Words out;
#if defined(CPU_CAPABILITY_AVX512)
  out.v[0] = (Words::Vector)_mm512_shuffle_epi32((__m512i)a.v[0], _MM_PERM_DDBB);
#elif defined(CPU_CAPABILITY_AVX2)
  for (int i = 0; i < 2; ++i) {
    out.v[i] = (Words::Vector)_mm256_shuffle_epi32((__m256i)a.v[i], 0xF5);
  }
#else
  out = a >> 32;
#endif
  return out;
}

// The eight calls that make 32 columns, in the order in which `columns` finds them side by side.
TILEWISE_INLINE void random_words(NoiseRow noise, int64_t col, Stream stream, Words (&c)[4]) {
  constexpr uint64_t kOrder[8] = {0, 4, 1, 5, 2, 6, 3, 7};
  c[0] = Words::load(kOrder) + Words::all(col / 4);
  c[1] = Words::all(noise.row);
  c[2] = Words::all(noise.row >> 32);
  c[3] = Words::all(static_cast<uint64_t>(stream));
  philox4x32(c, noise.seed);
}

// Low halves of a in the even lanes, of b in the odd ones.
TILEWISE_INLINE Words beside(const Words& a, const Words& b) {
  return (a & Words::all(0xFFFFFFFFu)) | (b << 32);
}

// From pairs (a0, a1) and (b0, b1) of each of eight calls: the 16 columns of the first four calls.
template <bool second>
TILEWISE_INLINE Words columns(const Words& a, const Words& b) {
  Words out;
  constexpr int s = second;
  TILEWISE_EACH_OF(Words) {
    if constexpr (Words::each == 8) {
      out.v[i] = shuffle<s, 8 + s, 2 + s, 10 + s, 4 + s, 12 + s, 6 + s, 14 + s>(a.v[i], b.v[i]);
    } else if constexpr (Words::each == 4) {
      out.v[i] = shuffle<s, 4 + s, 2 + s, 6 + s>(a.v[i], b.v[i]);
    } else {
      out.v[i] = shuffle<s, 2 + s>(a.v[i], b.v[i]);
    }
  }
  return out;
}

// In [2^-33, 1 - 2^-24]: never 0 or 1, and dense near 0.
TILEWISE_INLINE Floats uniform(const Words& words) {
  const Floats w = convert<float>(words.as<Wide<uint32_t>>());
  const Floats u = multiply_add(w, Floats::all(0x1p-32f), Floats::all(0x1p-33f));
  return lower(u, Floats::all(1.0f - 0x1p-24f));
}

// -log(1 - h) for |h| <= 1/3, relative error below 2.5e-7.
TILEWISE_INLINE Floats minus_log1p(const Floats& h) {
  const Floats p = polynomial(h, {0.152668118f, 0.169905528f, 0.164408118f, 0.198181704f,
                                  0.250063241f, 0.333367348f, 0.499999613f});
  return multiply_add(h * h, p, h);
}

// The power of two that brings v between 2/3 and 4/3, v > 0 and not denormal.
TILEWISE_INLINE Ints exponent(const Floats& v) {
  return (v.as<Ints>() - Ints::all(0x3F2AAAAB)) >> 23;  // 2/3
}

TILEWISE_INLINE Floats minus_log(const Floats& v) {
  const Ints e = exponent(v);
  const Floats m = (v.as<Ints>() - (e << 23)).as<Floats>();
  return multiply_add(convert<float>(e), Floats::all(-0.693147182f),
                      minus_log1p(Floats::all(1.0f) - m));
}

// -log(1 - u): a standard exponential variate of full precision where it is small. With 1 - u
// between 2/3 and 4/3 times 2^e, (1 - u) / 2^e - 1 is computed with one rounding.
TILEWISE_INLINE Floats exponential(const Floats& u) {
  const Ints e = exponent(Floats::all(1.0f) - u);
  const Floats scale = (Ints::all(0x3F800000) - (e << 23)).as<Floats>();
  const Floats h = multiply_add(u, scale, Floats::all(1.0f) - scale);
  return multiply_add(convert<float>(e), Floats::all(-0.693147182f), minus_log1p(h));
}

TILEWISE_INLINE Floats gumbel(const Floats& u) { return minus_log(exponential(u)); }

// At least gumbel(u): of u >= 2^n (1 + m), -log(u) <= -(n + m) log 2, and n + m stands in the bits.
TILEWISE_INLINE Floats gumbel_bound(const Floats& u) {
  const Floats bits = convert<float>(u.as<Ints>());
  return multiply_add(bits, Floats::all(-0.693147182f * 0x1p-23f),
                      Floats::all(127.0f * 0.693147182f + 1e-4f));
}

// Uniform variates of 32 columns from `col`, a multiple of 32.
TILEWISE_INLINE void uniform_columns(NoiseRow noise, Stream stream, int64_t col, Floats (&u)[2]) {
  Words c[4];
  random_words(noise, col, stream, c);
  const Words a = beside(c[0], c[1]), b = beside(c[2], c[3]);
  u[0] = uniform(columns<false>(a, b));
  u[1] = uniform(columns<true>(a, b));
}

TILEWISE_INLINE uint32_t above(const Floats (&z)[2], const Floats (&threshold)[2]) {
  return less(threshold[0], z[0]) | less(threshold[1], z[1]) << 16;
}

// Which of 32 perturbed logits exceed their thresholds, a bit for each; z: their values, unless
// there is none. Takes logarithms only where the random word leaves a chance.
TILEWISE_INLINE uint32_t candidates(NoiseRow noise, Stream stream, const Floats (&logits)[2],
                                    int64_t col, const Floats (&threshold)[2], Floats (&z)[2]) {
  Floats u[2];
  uniform_columns(noise, stream, col, u);
  for (int i = 0; i < 2; ++i) z[i] = logits[i] + gumbel_bound(u[i]);
  if (!above(z, threshold)) return 0;
  for (int i = 0; i < 2; ++i) z[i] = logits[i] + gumbel(u[i]);
  return above(z, threshold);
}

// The first place of the largest of 32 numbers, which becomes `best`; one of those with a bit. A
// NaN is no candidate.
TILEWISE_INLINE int64_t place_of_largest(const Floats (&z)[2], uint32_t bits, float& best) {
  const Floats least = Floats::all(-__builtin_inff());
  best = fold(higher(higher(z[0], least), higher(z[1], least)), Largest());
  const Floats b = Floats::all(best);
  return __builtin_ctz(bits & ~(less(z[0], b) | less(z[1], b) << 16));
}

// Lanes of a and b in turn: of each four neighbours of both, the first two or the last two.
template <bool second>
TILEWISE_INLINE Floats in_turn(const Floats& a, const Floats& b) {
  Floats out;
  constexpr int s = 2 * second;
  TILEWISE_EACH_OF(Floats) {
    if constexpr (Floats::each == 16) {
      out.v[i] = shuffle<s, 16 + s, s + 1, 17 + s, 4 + s, 20 + s, 5 + s, 21 + s, 8 + s, 24 + s,
                         9 + s, 25 + s, 12 + s, 28 + s, 13 + s, 29 + s>(a.v[i], b.v[i]);
    } else if constexpr (Floats::each == 8) {
      out.v[i] = shuffle<s, 8 + s, s + 1, 9 + s, 4 + s, 12 + s, 5 + s, 13 + s>(a.v[i], b.v[i]);
    } else {
      out.v[i] = shuffle<s, 4 + s, s + 1, 5 + s>(a.v[i], b.v[i]);
    }
  }
  return out;
}

// Standard normal variates of 32 columns (Box and Muller): words 0 and 1 of a call make its columns
// 0 and 1, words 2 and 3 the others. The radius, sqrt(-2 log u), has its full precision in the
// tail.
TILEWISE_INLINE void normal_columns(NoiseRow noise, int64_t col, Floats (&n)[2]) {
  Words c[4];
  random_words(noise, col, Stream::Gaussian, c);
  const Floats half = minus_log(uniform(beside(c[0], c[2])));
  const Floats radius = square_root(half + half);
  Floats cosine, sine;
  cosine_sine(uniform(beside(c[1], c[3])), cosine, sine);
  n[0] = in_turn<false>(radius * cosine, radius * sine);
  n[1] = in_turn<true>(radius * cosine, radius * sine);
}

// The same in memory, for code that computes in float64.
TILEWISE_INLINE void gumbel_step(NoiseRow noise, Stream stream, int64_t col, float (&g)[kStep]) {
  Floats u[2];
  uniform_columns(noise, stream, col, u);
  for (int i = 0; i < 2; ++i) gumbel(u[i]).store(g + 16 * i);
}

TILEWISE_INLINE void normal_step(NoiseRow noise, int64_t col, float (&n)[kStep]) {
  Floats lanes[2];
  normal_columns(noise, col, lanes);
  for (int i = 0; i < 2; ++i) lanes[i].store(n + 16 * i);
}

// The next 32 of the `left` elements at x: where they are, or at the end of a row a padded copy.
TILEWISE_INLINE const float* step_at(const float* x, int64_t left, float padding,
                                     float (&copy)[kStep]) {
  if (left >= kStep) return x;
  for (int64_t i = 0; i < kStep; ++i) copy[i] = i < left ? x[i] : padding;
  return copy;
}

}  // namespace CPU_CAPABILITY
}  // namespace tilewise
