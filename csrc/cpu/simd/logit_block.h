// A block of the logits of all pairs, as the vector kernels of the contrastive ops read it.
#pragma once

#include <cstdint>

namespace tilewise {

// Blocks of logits have at most kMaxBlockCols columns and begin at multiples of kBlockMultiple:
// kernels keep a row in a buffer, and random numbers come 32 columns at a time.
constexpr int64_t kMaxBlockCols = 256, kBlockMultiple = 32;
static_assert(kMaxBlockCols % kBlockMultiple == 0);

// The dot products <row i, column j>, of float or double, `stride` elements between rows.
struct LogitBlock {
  bool is_double;
  const void* dots;
  int64_t rows, cols, stride;
  double scale;  // logit = scale * dot
};

// And the pairs that match: of row i the columns positives[begin[i]..begin[i + 1]), ascending.
struct MatchedBlock : LogitBlock {
  const int64_t* begin;
  const int64_t* positives;
};

}  // namespace tilewise
