// Interface of the vector kernel of itc_loss.
#pragma once

#include <cstdint>

#include "capability.h"
#include "log_sum.h"
#include "logit_block.h"

namespace tilewise {

// Of the logits of a query so far: the sum of exponentials, and which candidate has the largest.
struct ItcRow : LogSum {
  int64_t argmax = -1;
};

// Some queries against some candidates, and what is known of the queries from the candidates
// before.
struct ItcBlock : LogitBlock {
  int64_t first;   // the number of the first candidate
  ItcRow* of_row;  // for each query
  void* weights;   // exp(z - largest), for the product with the candidates: where the dots are
  void* sums;      // (rows, dim), contiguous, of the dots' type: of weights times candidates
  int64_t dim;     // 0 where no such sums are wanted
};

// Adds the block to what is known of the queries and writes the weights. Where a block raises the
// largest logit of a query, its row of `sums` is brought to the new one.
#define TILEWISE_DECLARE(CAPABILITY) \
  namespace CAPABILITY {             \
  void itc_weights(const ItcBlock&); \
  }
TILEWISE_FOR_EACH_CAPABILITY(TILEWISE_DECLARE)
#undef TILEWISE_DECLARE

}  // namespace tilewise
