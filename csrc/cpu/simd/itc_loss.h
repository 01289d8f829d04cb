// Interface of the vector kernel of itc_loss.
#pragma once

#include <cstdint>

#include "capability.h"
#include "log_sum.h"

namespace tilewise {

// Of the logits of a query so far: the sum of exponentials, and which candidate has the largest.
struct ItcRow : LogSum {
  int64_t nearest = -1;
};

// A block of the dot products <query i, candidate j>, of float or double, and what is known of its
// rows from the candidates before.
struct ItcBlock {
  bool is_double;
  void* dots;
  int64_t rows, cols, stride;
  int64_t first;   // the number of the first candidate
  double scale;    // logit = scale * dot
  ItcRow* of_row;  // for each row
  void* means;  // (rows, dim) of the dots' type, contiguous: sums of exp(z - largest) * candidate
  int64_t dim;  // 0 where no means are wanted
};

// Adds the block to what is known of the rows, multiplies the means by what a larger logit asks
// for, and puts the weights exp(z - largest) in the place of the dots.
#define TILEWISE_DECLARE(CAPABILITY) \
  namespace CAPABILITY {             \
  void itc_weights(const ItcBlock&); \
  }
TILEWISE_FOR_EACH_CAPABILITY(TILEWISE_DECLARE)
#undef TILEWISE_DECLARE

}  // namespace tilewise
