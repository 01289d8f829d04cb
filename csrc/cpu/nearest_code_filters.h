// The rungs of nearest_code's ladder that look at bounds first: of small integers, then of float32.
#pragma once

#include <vector>

#include "simd/nearest_code.h"

namespace tilewise {

using RowNumbers = std::vector<int64_t>;

constexpr int64_t kFewRows = 8;  // not worth packing a codebook for

// One head's search: where results go, and everything that the rungs share.
struct Problem {
  Search search;
  Packed packed;
  int64_t* index;   // (N, k)
  float* distance;  // (N, k)

  void finish(const Row& row) const {
    for (int64_t i = 0; i < search.k; ++i) {
      index[row.index * search.k + i] = row.best_index[i];
      distance[row.index * search.k + i] = static_cast<float>(row.best_distance[i]);
    }
  }
};

// Each settles what rows it can and returns the others.
RowNumbers search_integer(const Problem& problem, const RowNumbers& rows);
RowNumbers search_float(const Problem& problem, const RowNumbers& rows);

}  // namespace tilewise
