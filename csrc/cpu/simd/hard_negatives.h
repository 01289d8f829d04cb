// Interface of the vector kernel of hard_negatives.
#pragma once

#include <cstdint>

#include "capability.h"

namespace tilewise {

// The largest perturbed logit of a row or column, and where it is; -1: none yet.
struct Best {
  double value = -__builtin_inf();
  int64_t index = -1;
};

// A block of the dot products <image i, text j>, of float or double.
struct NegativesBlock {
  bool is_double;
  const void* dots;
  int64_t rows, cols, stride;
  const int64_t* begin;      // of row i, the columns
  const int64_t* positives;  // positives[begin[i]..begin[i + 1]) match
  double scale;              // logit = scale * dot
  uint64_t seed, noise_row;  // of the block's first row in the random stream
  int64_t row, col;          // of the block's corner; col is a multiple of 32
};

// Raises what is known of the block's rows and columns, whose indices are columns and rows of all.
#define TILEWISE_DECLARE(CAPABILITY)                                     \
  namespace CAPABILITY {                                                 \
  void hard_negatives(const NegativesBlock&, Best* texts, Best* images); \
  }
TILEWISE_FOR_EACH_CAPABILITY(TILEWISE_DECLARE)
#undef TILEWISE_DECLARE

}  // namespace tilewise
