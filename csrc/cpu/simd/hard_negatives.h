// Interface of the vector kernel of hard_negatives.
#pragma once

#include <cstdint>

#include "capability.h"
#include "logit_block.h"

namespace tilewise {

// The largest perturbed logit of a row or column, and where it is; -1: none yet.
struct Best {
  double value = -__builtin_inf();
  int64_t index = -1;
};

struct NegativesBlock : MatchedBlock {
  uint64_t seed, noise_row;  // of the block's first row in the random stream
  int64_t row, col;          // of the block's corner; col is a multiple of kBlockMultiple
};

// Raises what is known of the block's rows and columns, whose indices are columns and rows of all.
#define TILEWISE_DECLARE(CAPABILITY)                                     \
  namespace CAPABILITY {                                                 \
  void hard_negatives(const NegativesBlock&, Best* texts, Best* images); \
  }
TILEWISE_FOR_EACH_CAPABILITY(TILEWISE_DECLARE)
#undef TILEWISE_DECLARE

}  // namespace tilewise
