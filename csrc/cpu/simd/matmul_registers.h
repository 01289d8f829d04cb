// The inner loop of matrix products: a few rows times a few vectors of columns, in registers.
#pragma once

#include "lanes.h"

namespace tilewise {
namespace CPU_CAPABILITY {

// kMaxRows x kVectors sums, a row of the right factor and one number of the left one fill the
// registers that there are.
#if defined(CPU_CAPABILITY_AVX512)
constexpr int kMaxRows = 14;
#elif defined(__aarch64__)
constexpr int kMaxRows = 12;
#else
constexpr int kMaxRows = 6;
#endif
constexpr int kVectors = 2;
constexpr int kVectorLanes = kVectorBytes / sizeof(float);
constexpr int kWidth = kVectors * kVectorLanes;  // columns

typedef float Vector __attribute__((vector_size(kVectorBytes)));
typedef float VectorAnywhere __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));

TILEWISE_INLINE Vector load_vector(const float* p) {
  return *reinterpret_cast<const VectorAnywhere*>(p);
}
TILEWISE_INLINE void store_vector(const Vector& v, float* p) {
  *reinterpret_cast<VectorAnywhere*>(p) = v;
}
TILEWISE_INLINE Vector broadcast(const float* p) {  // the bits as they are
#if defined(CPU_CAPABILITY_AVX512)
  return (Vector)_mm512_set1_ps(*p);
#elif defined(CPU_CAPABILITY_AVX2)
  return (Vector)_mm256_set1_ps(*p);
#else
  return Vector{*p, *p, *p, *p};
#endif
}

// sum += a * b. As intrinsics gcc 12 moves sums through memory.
struct MultiplyFloats {
  TILEWISE_INLINE static void add(Vector& sum, const Vector& a, const Vector& b) {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
    __asm__("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
#elif defined(__aarch64__)
    sum = (Vector)vfmaq_f32((float32x4_t)sum, (float32x4_t)a, (float32x4_t)b);
#else
    sum += a * b;
#endif
  }
};

#if defined(CPU_CAPABILITY_AVX512)
// The products of two pairs of bfloat16 numbers.
struct MultiplyPairs {
  TILEWISE_INLINE static void add(Vector& sum, const Vector& a, const Vector& b) {
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  }
};
#endif

// A left factor's rows from one on, and the panel's columns, in a chunk of the depth.
struct Registers {
  const float* left;  // [row * stride + k], or transposed [k * stride + row]
  int64_t stride;
  const float* right;  // [k * kWidth + column]
  int64_t depth;
  const float* next;  // what is read soon, and may be far away: as much as 8 floats for each step
  float* out;
  int64_t out_stride;
  bool accumulate;
};

#define TILEWISE_UNROLL _Pragma("GCC unroll 16")

template <typename Multiply, int kRows, bool kTransposed>
void multiply_rows(const Registers& at) {
  constexpr int kSteps = 4, kGroups = (kRows + 2) / 3;  // rows are reached from every third one
  constexpr int64_t kAhead = 16;
  const int64_t stride = at.stride;
  const float *right = at.right, *next = at.next;
  const float* left[kGroups];
  TILEWISE_UNROLL for (int g = 0; g < kGroups; ++g) left[g] = at.left + 3 * g * stride;
  Vector sum[kRows][kVectors];
  TILEWISE_UNROLL for (int r = 0; r < kRows; ++r) {
    TILEWISE_UNROLL for (int v = 0; v < kVectors; ++v) sum[r][v] = Vector{};
  }
  int64_t k = 0;
  for (; k + kSteps <= at.depth; k += kSteps) {
    TILEWISE_UNROLL for (int step = 0; step < kSteps; ++step) {
      Vector b[kVectors];
      TILEWISE_UNROLL for (int v = 0; v < kVectors; ++v) {
        b[v] = load_vector(right + step * kWidth + v * kVectorLanes);
      }
      if (kTransposed) {  // every step reads another line, far from the last one
        __builtin_prefetch(left[0] + (kAhead + step) * stride);
        __builtin_prefetch(left[0] + (kAhead + step) * stride + kRows - 1);
      }
      TILEWISE_UNROLL for (int r = 0; r < kRows; ++r) {
        const Vector a = broadcast(kTransposed ? left[0] + step * stride + r
                                               : left[r / 3] + r % 3 * stride + step);
        TILEWISE_UNROLL for (int v = 0; v < kVectors; ++v) Multiply::add(sum[r][v], a, b[v]);
      }
    }
    __builtin_prefetch(next, 0, 2);
    __builtin_prefetch(next + 16, 0, 2);
    next += kSteps * 8;
    right += kSteps * kWidth;
    TILEWISE_UNROLL for (int g = 0; g < kGroups; ++g) left[g] +=
        kTransposed ? kSteps * stride : kSteps;
  }
  for (; k < at.depth; ++k) {
    TILEWISE_UNROLL for (int r = 0; r < kRows; ++r) {
      const Vector a = broadcast(kTransposed ? left[0] + r : left[r / 3] + r % 3 * stride);
      TILEWISE_UNROLL for (int v = 0; v < kVectors; ++v) {
        Multiply::add(sum[r][v], a, load_vector(right + v * kVectorLanes));
      }
    }
    right += kWidth;
    TILEWISE_UNROLL for (int g = 0; g < kGroups; ++g) left[g] += kTransposed ? stride : 1;
  }
  TILEWISE_UNROLL for (int r = 0; r < kRows; ++r) {
    TILEWISE_UNROLL for (int v = 0; v < kVectors; ++v) {
      float* out = at.out + r * at.out_stride + v * kVectorLanes;
      store_vector(at.accumulate ? load_vector(out) + sum[r][v] : sum[r][v], out);
    }
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace tilewise
