// Vectors of 64 bytes, whatever the machine's are: for code whose bits must not depend on it. Each
// is made of the compiler's own vectors, of the length that the instruction set has.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "capability.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace tilewise {
namespace CPU_CAPABILITY {

#if defined(CPU_CAPABILITY_AVX512)
constexpr int kVectorBytes = 64;
#elif defined(CPU_CAPABILITY_AVX2)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

#define TILEWISE_EACH _Pragma("GCC unroll 4") for (int i = 0; i < parts; ++i)
#define TILEWISE_EACH_OF(W) _Pragma("GCC unroll 4") for (int i = 0; i < W::parts; ++i)

template <typename T>
struct Wide {
  static constexpr int parts = 64 / kVectorBytes;
  static constexpr int each = kVectorBytes / sizeof(T);
  typedef T Vector __attribute__((vector_size(kVectorBytes)));
  typedef T Anywhere __attribute__((vector_size(kVectorBytes), aligned(1), may_alias));
  Vector v[parts];

  TILEWISE_INLINE static Wide all(T x) {
    Wide out;
    TILEWISE_EACH out.v[i] =
        x - Vector{};  // compilers know that this is x; of 0 + x, -0 is another
    return out;
  }
  TILEWISE_INLINE static Wide load(const T* p) {
    // Not by memcpy, which gcc 12 makes of shorter vectors: loading them as a longer one stalls.
    Wide out;
    TILEWISE_EACH out.v[i] = *reinterpret_cast<const Anywhere*>(p + i * each);
    return out;
  }
  TILEWISE_INLINE void store(T* p) const {
    TILEWISE_EACH* reinterpret_cast<Anywhere*>(p + i * each) = v[i];
  }
  template <typename U>
  TILEWISE_INLINE U as() const {  // the same bits
    U out;
    TILEWISE_EACH out.v[i] = (typename U::Vector)v[i];
    return out;
  }
};

#define TILEWISE_OPERATOR(op)                                               \
  template <typename T>                                                     \
  TILEWISE_INLINE Wide<T> operator op(const Wide<T>& a, const Wide<T>& b) { \
    constexpr int parts = Wide<T>::parts;                                   \
    Wide<T> out;                                                            \
    TILEWISE_EACH out.v[i] = a.v[i] op b.v[i];                              \
    return out;                                                             \
  }
TILEWISE_OPERATOR(+)
TILEWISE_OPERATOR(-)
TILEWISE_OPERATOR(*)
TILEWISE_OPERATOR(/)
TILEWISE_OPERATOR(&)
TILEWISE_OPERATOR(|)
TILEWISE_OPERATOR(^)
#undef TILEWISE_OPERATOR

#define TILEWISE_SHIFT(op)                                       \
  template <typename T>                                          \
  TILEWISE_INLINE Wide<T> operator op(const Wide<T>& a, int n) { \
    constexpr int parts = Wide<T>::parts;                        \
    Wide<T> out;                                                 \
    TILEWISE_EACH out.v[i] = a.v[i] op n;                        \
    return out;                                                  \
  }
TILEWISE_SHIFT(<<)
TILEWISE_SHIFT(>>)
#undef TILEWISE_SHIFT

template <typename T>
TILEWISE_INLINE Wide<T> operator^(const Wide<T>& a, T b) {
  return a ^ Wide<T>::all(b);
}

// The second where either is NaN.
template <typename T>
TILEWISE_INLINE Wide<T> lower(const Wide<T>& a, const Wide<T>& b) {
  constexpr int parts = Wide<T>::parts;
  Wide<T> out;
  TILEWISE_EACH out.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i];
  return out;
}

template <typename T>
TILEWISE_INLINE Wide<T> higher(const Wide<T>& a, const Wide<T>& b) {
  constexpr int parts = Wide<T>::parts;
  Wide<T> out;
  TILEWISE_EACH out.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
  return out;
}

// gcc makes a chain of a comparison and a masked load of them.
#if defined(CPU_CAPABILITY_AVX512)
#define TILEWISE_FLOAT(name, instruction)                                        \
  TILEWISE_INLINE Wide<float> name(const Wide<float>& a, const Wide<float>& b) { \
    Wide<float> out;                                                             \
    out.v[0] = (Wide<float>::Vector)_mm512_##instruction##_ps(a.v[0], b.v[0]);   \
    return out;                                                                  \
  }
#elif defined(CPU_CAPABILITY_AVX2)
#define TILEWISE_FLOAT(name, instruction)                                        \
  TILEWISE_INLINE Wide<float> name(const Wide<float>& a, const Wide<float>& b) { \
    Wide<float> out;                                                             \
    for (int i = 0; i < 2; ++i) {                                                \
      out.v[i] = (Wide<float>::Vector)_mm256_##instruction##_ps(a.v[i], b.v[i]); \
    }                                                                            \
    return out;                                                                  \
  }
#else
#define TILEWISE_FLOAT(name, instruction)
#endif
TILEWISE_FLOAT(lower, min)
TILEWISE_FLOAT(higher, max)
#undef TILEWISE_FLOAT

// Lane by lane: a < b ? x : y.
template <typename T, typename U>
TILEWISE_INLINE Wide<U> if_less(const Wide<T>& a, const Wide<T>& b, const Wide<U>& x,
                                const Wide<U>& y) {
  constexpr int parts = Wide<T>::parts;
  Wide<U> out;
  TILEWISE_EACH out.v[i] = a.v[i] < b.v[i] ? x.v[i] : y.v[i];
  return out;
}

// Of elements of the same size; a float loses its fraction.
template <typename U, typename T>
TILEWISE_INLINE Wide<U> convert(const Wide<T>& a) {
  constexpr int parts = Wide<T>::parts;
  Wide<U> out;
  TILEWISE_EACH out.v[i] = __builtin_convertvector(a.v[i], typename Wide<U>::Vector);
  return out;
}

// a * b + c, rounded kMultiplyAddRoundings times. The build never makes one of a product and a sum.
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2) || defined(__aarch64__)
constexpr int kMultiplyAddRoundings = 1;
#else
constexpr int kMultiplyAddRoundings = 2;
#endif
TILEWISE_INLINE Wide<float> multiply_add(const Wide<float>& a, const Wide<float>& b,
                                         const Wide<float>& c) {
  constexpr int parts = Wide<float>::parts;
  using V [[maybe_unused]] = Wide<float>::Vector;
  Wide<float> out;
#if defined(CPU_CAPABILITY_AVX512)
  TILEWISE_EACH out.v[i] = (V)_mm512_fmadd_ps((__m512)a.v[i], (__m512)b.v[i], (__m512)c.v[i]);
#elif defined(CPU_CAPABILITY_AVX2)
  TILEWISE_EACH out.v[i] = (V)_mm256_fmadd_ps((__m256)a.v[i], (__m256)b.v[i], (__m256)c.v[i]);
#elif defined(__aarch64__)
  TILEWISE_EACH out.v[i] =
      (V)vfmaq_f32((float32x4_t)c.v[i], (float32x4_t)a.v[i], (float32x4_t)b.v[i]);
#else
  TILEWISE_EACH out.v[i] = a.v[i] * b.v[i] + c.v[i];
#endif
  return out;
}

// Eight floats as doubles.
TILEWISE_INLINE Wide<double> widen(const float* p) {
  Wide<double> out;
#if defined(CPU_CAPABILITY_AVX512)
  out.v[0] = (Wide<double>::Vector)_mm512_cvtps_pd(_mm256_loadu_ps(p));  // gcc 12 takes several
#elif defined(CPU_CAPABILITY_AVX2)
  for (int i = 0; i < 2; ++i) {
    out.v[i] = (Wide<double>::Vector)_mm256_cvtps_pd(_mm_loadu_ps(p + 4 * i));
  }
#else
  constexpr int parts = Wide<double>::parts;
  typedef float Half __attribute__((vector_size(kVectorBytes / 2)));
  TILEWISE_EACH {
    Half half;
    std::memcpy(&half, p + i * 8 / parts, sizeof half);
    out.v[i] = __builtin_convertvector(half, Wide<double>::Vector);
  }
#endif
  return out;
}

TILEWISE_INLINE void narrow(const Wide<double>& a, float* p) {
#if defined(CPU_CAPABILITY_AVX512)
  _mm256_storeu_ps(p, _mm512_cvtpd_ps((__m512d)a.v[0]));
#else
  constexpr int parts = Wide<double>::parts;
  typedef float Half __attribute__((vector_size(kVectorBytes / 2)));
  TILEWISE_EACH {
    const Half half = __builtin_convertvector(a.v[i], Half);
    std::memcpy(p + i * 8 / parts, &half, sizeof half);
  }
#endif
}

// As bfloat16, rounded to nearest even; a NaN stays one.
#if defined(CPU_CAPABILITY_AVX512)
// The upper 16 bits of 32-bit lanes, in a row.
constexpr int16_t kHighHalves[32] = {1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};
TILEWISE_INLINE void store_bfloat16(const Wide<float>& a, void* p) {
  const __m512i bits = (__m512i)a.v[0], one = _mm512_set1_epi32(1);
  const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
  const __mmask16 nan = _mm512_cmp_ps_mask((__m512)a.v[0], (__m512)a.v[0], _CMP_UNORD_Q);
  __m512i out = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF));
  out = _mm512_mask_add_epi32(out, odd, out, one);
  out = _mm512_mask_mov_epi32(out, nan, _mm512_set1_epi32(0x7FC00000));
  const Wide<int16_t> high = Wide<int16_t>::load(kHighHalves);
  out = _mm512_permutexvar_epi16((__m512i)high.v[0], out);
  _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_castsi512_si256(out));
}
#else
TILEWISE_INLINE void store_bfloat16(const Wide<float>& a, void* p) {
  using Bits = Wide<uint32_t>;
  const Bits bits = a.as<Bits>();
  const Bits rounded = (bits + Bits::all(0x7FFF) + ((bits >> 16) & Bits::all(1))) >> 16;
  const Bits magnitude = bits & Bits::all(0x7FFFFFFF);
  const Bits out = if_less(Bits::all(0x7F800000), magnitude, Bits::all(0x7FC0), rounded);
#if defined(CPU_CAPABILITY_AVX2)
  const __m256i words = _mm256_packus_epi32((__m256i)out.v[0], (__m256i)out.v[1]);
  _mm256_storeu_si256(static_cast<__m256i*>(p), _mm256_permute4x64_epi64(words, 0xd8));
#else
  uint32_t words[16];
  out.store(words);
  uint16_t halves[16];
  for (int i = 0; i < 16; ++i) halves[i] = static_cast<uint16_t>(words[i]);
  std::memcpy(p, halves, sizeof halves);
#endif
}
#endif

// Those lanes of a, and of b behind it.
#if defined(__clang__) || __GNUC__ >= 12
template <int... lanes, typename V>
TILEWISE_INLINE auto shuffle(V a, V b) {
  return __builtin_shufflevector(a, b, lanes...);
}
#else  // older compilers shuffle whole vectors only, and narrower ones are made lane by lane
template <typename T, int n>
struct VectorOf {
  typedef T Type __attribute__((vector_size(n * sizeof(T))));
};

template <int... lanes, typename V>
TILEWISE_INLINE auto shuffle(V a, V b) {
  using T = std::remove_reference_t<decltype(a[0])>;
  constexpr int n = sizeof...(lanes), whole = sizeof(V) / sizeof(T);
  if constexpr (n == whole) {
    using Index = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
    return __builtin_shuffle(a, b, typename VectorOf<Index, n>::Type{lanes...});
  } else {
    return typename VectorOf<T, n>::Type{(lanes < whole ? a[lanes % whole] : b[lanes % whole])...};
  }
}
#endif

template <int... lanes, typename V>
TILEWISE_INLINE auto pick(V v) {
  return shuffle<lanes...>(v, v);
}

// Lane i with lane i + n / 2, and so on, down to one.
template <typename V, typename Op>
TILEWISE_INLINE auto fold_vector(V v, const Op& op) {
  constexpr int n = sizeof(V) / sizeof(v[0]);
  if constexpr (n == 16) {
    return fold_vector(op(pick<0, 1, 2, 3, 4, 5, 6, 7>(v), pick<8, 9, 10, 11, 12, 13, 14, 15>(v)),
                       op);
  } else if constexpr (n == 8) {
    return fold_vector(op(pick<0, 1, 2, 3>(v), pick<4, 5, 6, 7>(v)), op);
  } else if constexpr (n == 4) {
    return fold_vector(op(pick<0, 1>(v), pick<2, 3>(v)), op);
  } else {
    static_assert(n == 2);
    return op(v[0], v[1]);
  }
}

template <typename T, typename Op>
TILEWISE_INLINE T fold(const Wide<T>& a, const Op& op) {
  constexpr int parts = Wide<T>::parts;
  if constexpr (parts == 1) {
    return fold_vector(a.v[0], op);
  } else if constexpr (parts == 2) {
    return fold_vector(op(a.v[0], a.v[1]), op);
  } else {
    return fold_vector(op(op(a.v[0], a.v[2]), op(a.v[1], a.v[3])), op);
  }
}

// A bit for each lane where a < b, of 16.
TILEWISE_INLINE uint32_t less(const Wide<float>& a, const Wide<float>& b) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_cmp_ps_mask(a.v[0], b.v[0], _CMP_LT_OQ);
#elif defined(CPU_CAPABILITY_AVX2)
  const __m256 low = _mm256_cmp_ps(a.v[0], b.v[0], _CMP_LT_OQ);
  const __m256 high = _mm256_cmp_ps(a.v[1], b.v[1], _CMP_LT_OQ);
  return _mm256_movemask_ps(low) | _mm256_movemask_ps(high) << 8;
#else
  uint32_t bits = 0;
  for (int i = 0; i < 16; ++i) {
    constexpr int each = Wide<float>::each;
    bits |= static_cast<uint32_t>(a.v[i / each][i % each] < b.v[i / each][i % each]) << i;
  }
  return bits;
#endif
}

struct Add {
  template <typename V>
  TILEWISE_INLINE V operator()(V a, V b) const {
    return a + b;
  }
};

struct Largest {
  template <typename V>
  TILEWISE_INLINE V operator()(V a, V b) const {
    return a > b ? a : b;
  }
};

struct Smallest {
  template <typename V>
  TILEWISE_INLINE V operator()(V a, V b) const {
    return a < b ? a : b;
  }
};

using Lanes = Wide<double>;
using Longs = Wide<int64_t>;
using Floats = Wide<float>;
using Ints = Wide<int32_t>;

}  // namespace CPU_CAPABILITY
}  // namespace tilewise
