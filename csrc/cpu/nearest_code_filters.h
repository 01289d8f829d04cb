// The rungs of nearest_code's ladder that look at bounds first: of small integers, then of float32.
#pragma once

#include <mutex>
#include <vector>

#include "simd/nearest_code.h"

namespace tilewise {

using RowNumbers = std::vector<int64_t>;

constexpr int64_t kFewRows = 96;          // not worth packing a codebook for
constexpr double kLargestElement = 1e17;  // of a row, beside codes of 1: float32 has room for it

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

// Rows that an earlier rung could not settle.
class HardRows {
 public:
  void add(const RowNumbers& rows) {
    const std::lock_guard<std::mutex> lock(mutex_);
    rows_.insert(rows_.end(), rows.begin(), rows.end());
  }
  const RowNumbers& rows() const { return rows_; }

 private:
  std::mutex mutex_;
  RowNumbers rows_;
};

// Writes the rows that are settled and returns the others.
inline RowNumbers finish_rows(const Problem& problem, const std::vector<Row>& rows, int64_t count) {
  RowNumbers hard;
  for (int64_t i = 0; i < count; ++i) {
    if (rows[i].hard || rows[i].found < problem.search.k) {
      hard.push_back(rows[i].index);
    } else {
      problem.finish(rows[i]);
    }
  }
  return hard;
}

// Each settles what rows it can and returns the others.
RowNumbers search_integer(const Problem& problem, const RowNumbers& rows);
RowNumbers search_float(const Problem& problem, const RowNumbers& rows);

// Settles all rows without packing the codes: with bounds in float32, or else exactly.
void search_direct(const Problem& problem, const RowNumbers& rows, bool bounds);

}  // namespace tilewise
