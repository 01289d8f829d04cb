// Interface of the vector kernel of gumbel_softmax.
#pragma once

#include <cstdint>

#include "capability.h"

namespace tilewise {

constexpr int64_t kSoftmaxBlock = 4096;  // columns whose maximum and sum are taken at once

// Consecutive rows, contiguous, of float or double.
struct GumbelRows {
  bool is_double;
  int64_t rows, cols;
  uint64_t seed, first_row;  // of the random stream
  double inverse_tau;        // finite, above 0
};

// gumbel_softmax: y = softmax((x + noise) / tau). maxima: space for a number per block of a row.
// softmax_gradient: d_x = y * (grad - sum(y * grad)) / tau, of relaxed samples y. d_tau, unless
//   null: adds each row's part of the gradient of tau.
#define TILEWISE_DECLARE(CAPABILITY)                                                   \
  namespace CAPABILITY {                                                               \
  void gumbel_softmax(const GumbelRows&, const void* x, void* y, float* maxima);       \
  void softmax_gradient(const GumbelRows&, const void* grad, const void* y, void* d_x, \
                        double* d_tau);                                                \
  }
TILEWISE_FOR_EACH_CAPABILITY(TILEWISE_DECLARE)
#undef TILEWISE_DECLARE

}  // namespace tilewise
