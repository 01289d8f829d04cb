// The search of nearest_code that packs nothing: few rows, few codes, and what no bound can settle.
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../common/integer.h"
#include "nearest_code_filters.h"
#include "pack_codebook.h"

namespace tilewise {
namespace {

constexpr int64_t kLanesFrom = 3;           // rows; fewer are faster one by one
constexpr int64_t kPartElements = 1 << 14;  // of codes that a thread takes at least
constexpr int64_t kMostElements = 1 << 16;  // of a row whose sums float32 can bound

// Rows in lanes, and the lists of what is nearest to them.
class Lanes {
 public:
  Lanes(const Problem& problem, const double* norms)
      : search_(problem.search),
        norms_(norms),
        wide_(round_up(search_.dim, 8) * kLaneRows),
        x_(search_.x.is_double || search_.codebook.is_double || search_.dim > kMostElements
               ? 0
               : search_.dim * kLaneRows),
        scratch_(2 * x_.size()),
        code_(search_.dim + 8) {}

  // Searches codes first..last for the rows, of which there are at most 16. distance, index (16,
  // k): the lists. found (16).
  void search(const int64_t* rows, int64_t count, bool bounds, int64_t first, int64_t last,
              double* distance, int64_t* index, int32_t* found) {
    Row lanes[kLaneRows]{};
    float lengths[kLaneRows];
    double norms[kLaneRows];
    bool in_range = true;
    for (int64_t i = 0; i < kLaneRows; ++i) {
      Row& row = lanes[i];
      row.index = rows[std::min(i, count - 1)];
      row.best_distance = distance + i * search_.k;
      row.best_index = index + i * search_.k;
      row.best_distance[0] = std::numeric_limits<double>::infinity();
      row.best_index[0] = -1;
      if (search_.metric != Metric::L2) {
        row.norm = norms[i] = TILEWISE_DISPATCH(exact_norm)(search_.x, row.index, search_.dim);
        lengths[i] = static_cast<float>(row.norm * (1.0 + 0x1p-20));
        in_range &= row.norm <= 0x1p60;
      }
      search_.x.is_double ? transpose<double>(row.index, i) : transpose<float>(row.index, i);
    }
    const bool with_bounds = bounds && in_range && !x_.empty();
    const LaneBlock block{lanes,        count,          with_bounds ? x_.data() : nullptr,
                          wide_.data(), lengths,        norms,
                          norms_,       scratch_.data()};
    TILEWISE_DISPATCH(search_lanes)(search_, block, first, last, code_.data());
    for (int64_t i = 0; i < count; ++i) {
      found[i] = search_.k == 1 ? lanes[i].best_index[0] >= 0 : lanes[i].found;
    }
  }

 private:
  template <typename T>
  void transpose(int64_t row, int64_t lane) {
    const T* from = static_cast<const T*>(search_.x.data) + row * search_.x.stride;
    for (int64_t d = 0; d < search_.dim; ++d) wide_[d * kLaneRows + lane] = from[d];
    if (x_.empty()) return;
    for (int64_t d = 0; d < search_.dim; ++d) {
      x_[d * kLaneRows + lane] = static_cast<float>(from[d]);
    }
  }

  const Search& search_;
  const double* norms_;
  std::vector<double> wide_;
  std::vector<float> x_, scratch_;
  std::vector<double> code_;
};

// A row alone, with all codes.
void search_row(const Problem& problem, Row& row) {
  row.found = 0;
  TILEWISE_DISPATCH(compare_all)(problem.search, 0, problem.search.codes, row);
  problem.finish(row);
}

}  // namespace

void search_direct(const Problem& problem, const RowNumbers& rows, bool bounds) {
  const Search& search = problem.search;
  const int64_t n = rows.size(), k = search.k, each = n < kLanesFrom ? 1 : kLaneRows;
  if (n == 0) return;
  std::vector<double> norms;
  if (bounds && each > 1 && search.metric != Metric::L2 && !search.norms) {
    norms = exact_norms(search);
  }
  const double* code_norms = search.norms ? search.norms : norms.data();
  // Few rows share the threads by codes. Where these are cut changes nothing: of two results the
  // nearer stays, the lower index of equals.
  const int64_t blocks = ceil_div(n, each);
  const int64_t most = ceil_div(search.codes * search.dim + 1, kPartElements);
  const int64_t parts = std::clamp<int64_t>(ceil_div(4 * at::get_num_threads(), blocks), 1,
                                            std::min(most, search.codes));
  const int64_t length = ceil_div(search.codes, parts);
  std::vector<double> distance(blocks * parts * each * k);
  std::vector<int64_t> index(distance.size());
  std::vector<int32_t> found(blocks * parts * each);
  at::parallel_for(0, blocks * parts, 1, [&](int64_t begin, int64_t end) {
    Lanes lanes(problem, code_norms);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / parts * each, at = task * each;
      const int64_t first = task % parts * length, last = std::min(first + length, search.codes);
      if (each > 1) {
        lanes.search(&rows[row], std::min(each, n - row), bounds, first, last, &distance[at * k],
                     &index[at * k], &found[at]);
        continue;
      }
      Row alone{};
      alone.index = rows[row];
      alone.best_distance = &distance[at * k];
      alone.best_index = &index[at * k];
      TILEWISE_DISPATCH(compare_all)(search, first, last, alone);
      found[at] = alone.found;
    }
  });
  for (int64_t i = 0; i < n; ++i) {
    Row row{};
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t at = ((i / each) * parts + part) * each + i % each;
      if (part == 0) {
        row.index = rows[i];
        row.best_distance = &distance[at * k];
        row.best_index = &index[at * k];
        row.found = found[at];
        continue;
      }
      for (int64_t e = 0; e < found[at]; ++e) {
        TILEWISE_DISPATCH(insert)(k, distance[at * k + e], index[at * k + e], row);
      }
    }
    row.found < k ? search_row(problem, row) : problem.finish(row);
  }
}

}  // namespace tilewise
