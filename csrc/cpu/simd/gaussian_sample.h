// Interface of the vector kernel of gaussian_sample.
#pragma once

#include <cstdint>

#include "capability.h"

namespace tilewise {

// Consecutive rows, contiguous, of float or double; or one block of columns of a row, from
// first_col on, which is a multiple of kGaussianBlock.
struct GaussianRows {
  bool is_double;
  int64_t rows, cols;
  uint64_t seed, first_row;  // of the random stream
  double low, high;          // that logvar is clamped to
  int64_t first_col = 0;
};

// The divergence of a row is the sum of those of blocks of so many columns, in their order.
constexpr int64_t kGaussianBlock = 4096;

// gaussian_sample: z = mean + exp(logvar / 2) * noise; kl (rows): the divergence from N(0, 1).
// gaussian_gradient: of both, where d_z or d_kl may be null.
#define TILEWISE_DECLARE(CAPABILITY)                                                          \
  namespace CAPABILITY {                                                                      \
  void gaussian_sample(const GaussianRows&, const void* mean, const void* logvar, void* z,    \
                       double* kl);                                                           \
  void gaussian_gradient(const GaussianRows&, const void* d_z, const double* d_kl,            \
                         const void* mean, const void* logvar, void* d_mean, void* d_logvar); \
  }
TILEWISE_FOR_EACH_CAPABILITY(TILEWISE_DECLARE)
#undef TILEWISE_DECLARE

}  // namespace tilewise
