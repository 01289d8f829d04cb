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

// Of a block of a row: its largest perturbed logit, and the sum of exponentials below that.
struct SoftmaxPart {
  float max;
  double sum;
};

// gumbel_softmax: y = softmax((x + noise) / tau). parts: space for one per block of a row.
// The same in steps, where threads share a row of float by its blocks of kSoftmaxBlock columns:
// softmax_block: the exponentials of row.cols columns from `col`; softmax_factors: what each
// block's
//   are to be multiplied with (in `sum`); softmax_scale does it.
// softmax_dot: a block's part of sum(y * grad); softmax_gradient_block: d_x and, unless null, the
//   part of d_tau, given the whole row's.
// softmax_gradient: d_x = y * (grad - sum(y * grad)) / tau, of relaxed samples y. d_tau, unless
//   null: adds each row's part of the gradient of tau.
#define TILEWISE_DECLARE(CAPABILITY)                                                       \
  namespace CAPABILITY {                                                                   \
  void gumbel_softmax(const GumbelRows&, const void* x, void* y, SoftmaxPart* parts);      \
  void softmax_gradient(const GumbelRows&, const void* grad, const void* y, void* d_x,     \
                        double* d_tau);                                                    \
  SoftmaxPart softmax_block(const GumbelRows& row, int64_t col, const float* x, float* y); \
  void softmax_factors(SoftmaxPart* parts, int64_t blocks, double inverse_tau);            \
  void softmax_scale(float* y, int64_t cols, double factor);                               \
  double softmax_dot(const float* y, const float* grad, int64_t cols);                     \
  void softmax_gradient_block(const GumbelRows& row, const float* grad, const float* y,    \
                              double dot, float* d_x, double* d_tau);                      \
  }
TILEWISE_FOR_EACH_CAPABILITY(TILEWISE_DECLARE)
#undef TILEWISE_DECLARE

}  // namespace tilewise
