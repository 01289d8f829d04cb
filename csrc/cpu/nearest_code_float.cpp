// The float32 rung of nearest_code: similar codes side by side, and rows block by block.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "../common/integer.h"
#include "nearest_code_filters.h"

namespace tilewise {
namespace {

using at::Tensor;

// The codes as this rung reads them.
class FloatCodes {
 public:
  explicit FloatCodes(const Problem& problem)
      : count_(problem.packed.panels),
        order_(count_ * kPanel),
        middles_(round_up(count_, 4)),
        codes_(at::empty({count_ * problem.search.dim, kPanel}, at::kFloat)),
        half_squares_(count_ * kPanel),
        lengths_(count_ * kPanel) {
    sort(problem);
    const int64_t dim = problem.search.dim;
    auto* codes = codes_.mutable_data_ptr<float>();
    at::parallel_for(0, count_, 1, [&](int64_t begin, int64_t end) {
      std::vector<double> centre(round_up(dim, 8));
      std::vector<float> row(round_up(dim, 16));
      for (int64_t p = begin; p < end; ++p) {
        const int64_t at = p * kPanel, count = std::min(kPanel, problem.packed.codes - at);
        middles_[p] = order_[at + count / 2];
        TILEWISE_DISPATCH(pack_float_panel)
        (problem.search, problem.packed, &order_[at], count, centre.data(), row.data(),
         {codes + at * dim, &half_squares_[at], &lengths_[at]});
      }
    });
    std::fill(middles_.begin() + count_, middles_.end(), middles_[0]);
  }

  // Beyond so many exact comparisons they are faster with many rows at once.
  FloatPanels panels() const {
    const int64_t max_groups = 16 + static_cast<int64_t>(order_.size()) / 32;
    return {count_,
            max_groups,
            order_.data(),
            middles_.data(),
            codes_.const_data_ptr<float>(),
            half_squares_.data(),
            lengths_.data()};
  }

 private:
  // By a projection, in which codes that nearly equal one another are close.
  void sort(const Problem& problem) {
    const Search& search = problem.search;
    const int64_t count = problem.packed.codes;
    std::vector<std::pair<double, int64_t>> places(count);
    at::parallel_for(0, count, 64, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t j = problem.packed.order[i];
        const double place = TILEWISE_DISPATCH(fingerprint)(search.codebook, j, search.dim);
        places[i] = {
            place * code_transform(search, search.norms ? search.norms[j] : 1.0, nullptr, 1.0).pre,
            j};
      }
    });
    std::sort(places.begin(), places.end());
    std::fill(order_.begin(), order_.end(), places[0].second);
    for (int64_t i = 0; i < count; ++i) order_[i] = places[i].second;
  }

  int64_t count_;
  std::vector<int64_t> order_, middles_;
  Tensor codes_;
  std::vector<float> half_squares_, lengths_;
};

// The rows of a block and its scratch memory.
struct Block {
  std::vector<Row> rows;
  std::vector<double> best_distance;
  std::vector<int64_t> best_index;
  int64_t stride;
  std::vector<float> a, shifted;  // (count, stride)
  std::vector<double> middles;

  Block(const Problem& problem, int64_t count)
      : rows(count),
        best_distance(count * problem.search.k),
        best_index(count * problem.search.k),
        stride(round_up(problem.search.dim, 16)),
        a(count * stride),
        shifted(count * stride),
        middles(count * round_up(problem.packed.panels, 4)) {
    for (int64_t i = 0; i < count; ++i) {
      rows[i].best_distance = best_distance.data() + i * problem.search.k;
      rows[i].best_index = best_index.data() + i * problem.search.k;
    }
  }
};

void search_block(const Problem& problem, const FloatPanels& panels, Block& block,
                  const int64_t* rows, int64_t count) {
  const Search& search = problem.search;
  const int64_t middles = round_up(panels.count, 4);
  for (int64_t i = 0; i < count; ++i) {
    Row& row = block.rows[i];
    row.index = rows[i];
    float* a = block.a.data() + i * block.stride;
    TILEWISE_DISPATCH(prepare_row)(search, problem.packed, row, a);
    row.hard |= !(row.largest <= kLargestElement);
    if (row.hard) {
      std::fill(a, a + block.stride, 0.0f);
      std::fill_n(block.shifted.data() + i * block.stride, block.stride, 0.0f);
    } else {
      TILEWISE_DISPATCH(compare_middles)(search, panels, row, &block.middles[i * middles]);
    }
  }
  const FloatBlock all{block.rows.data(),    count,
                       block.stride,         block.a.data(),
                       block.shifted.data(), block.middles.data()};
  for (int64_t p = 0; p < panels.count; ++p) {
    TILEWISE_DISPATCH(search_float_panel)(search, problem.packed, panels, p, all);
  }
}

}  // namespace

RowNumbers search_float(const Problem& problem, const RowNumbers& rows) {
  const int64_t n = rows.size();
  if (n == 0) return rows;
  const FloatCodes codes(problem);
  const FloatPanels panels = codes.panels();
  const int64_t size = std::min(kBlockRows, ceil_div(n, at::get_num_threads()));
  HardRows hard;
  at::parallel_for(0, ceil_div(n, size), 1, [&](int64_t begin, int64_t end) {
    Block block(problem, size);
    for (int64_t i = begin * size; i < std::min(n, end * size); i += size) {
      const int64_t count = std::min(size, n - i);
      search_block(problem, panels, block, rows.data() + i, count);
      hard.add(finish_rows(problem, block.rows, count));
    }
  });
  return hard.rows();
}

}  // namespace tilewise
