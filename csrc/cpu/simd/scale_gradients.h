// Interface of the vector kernels of scale_gradients.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>

#include "capability.h"

namespace tilewise {

// scale: out[i] = in[i] * factor for n numbers, rounded once. `out` may be `in`.
#define TILEWISE_DECLARE(CAPABILITY)                                        \
  namespace CAPABILITY {                                                    \
  void scale(const double* in, double factor, int64_t n, double* out);      \
  void scale(const float* in, float factor, int64_t n, float* out);         \
  void scale(const float* in, float factor, int64_t n, c10::BFloat16* out); \
  void scale(const float* in, float factor, int64_t n, c10::Half* out);     \
  }
TILEWISE_FOR_EACH_CAPABILITY(TILEWISE_DECLARE)
#undef TILEWISE_DECLARE

}  // namespace tilewise
