#include "nearest_code_filters.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <array>
#include <numeric>

#include "../common/integer.h"

namespace tilewise {
namespace {

using at::Tensor;

constexpr int64_t kChunkPanels = 64;     // panels that a block of rows meets at a time
constexpr int64_t kTaskBytes = 1 << 19;  // of rows that are sorted by size together
constexpr int64_t kLongestInt = 32768;   // elements of a row whose integer products fit in 32 bits

// Beyond this many exact comparisons a float32 product is the better way.
int64_t group_limit(const Search& search) { return std::max<int64_t>(8, search.codes / 64); }

// The rows of one task and its scratch memory.
struct Space {
  std::vector<Row> rows;
  std::vector<Row*> order;
  std::vector<double> best_distance;
  std::vector<int64_t> best_index;
  std::vector<Candidate> candidates;
  std::vector<float> a;  // (count, padded_dim)
  int64_t stride;  // of minima: not a power of two, whose rows would fall on the same cache lines
  std::vector<float> minima;
  std::vector<uint8_t> quads;
  std::vector<int32_t> bias;
  int64_t padded_dim;

  Space(const Problem& problem, int64_t count, int64_t rows_per_block)
      : rows(count),
        order(count),
        best_distance(count * problem.search.k),
        best_index(count * problem.search.k),
        candidates(rows_per_block + 2 * kGroups * kChunkPanels),
        stride(kGroups * (std::min(kChunkPanels, problem.packed.panels) + 1)),
        minima(rows_per_block * stride),
        padded_dim(round_up(problem.search.dim, 16)) {
    a.resize(count * padded_dim);
    for (int64_t i = 0; i < count; ++i) {
      rows[i].best_distance = best_distance.data() + i * problem.search.k;
      rows[i].best_index = best_index.data() + i * problem.search.k;
    }
  }

  const float* a_of(const Row* row) const { return a.data() + (row - rows.data()) * padded_dim; }
};

// Rows of similar size side by side, since a block's rows share a scale.
void sort_by_size(Space& space, int64_t count) {
  constexpr int kBuckets = 256;
  int32_t top = 0;
  for (int64_t i = 0; i < count; ++i) top = std::max(top, size_step(space.rows[i].largest));
  std::array<int64_t, kBuckets + 1> place{};
  const auto bucket = [&](const Row& row) {
    return std::max(size_step(row.largest) - top + kBuckets - 1, 0);
  };
  for (int64_t i = 0; i < count; ++i) ++place[bucket(space.rows[i]) + 1];
  std::partial_sum(place.begin(), place.end(), place.begin());
  for (int64_t i = 0; i < count; ++i) space.order[place[bucket(space.rows[i])]++] = &space.rows[i];
}

// The largest element that a block's scale serves: rows far larger than the others would spoil it
// for them, and go to the next rung.
double block_range(Row* const* rows, int64_t count) {
  double top = 0.0;
  for (int64_t i = 0; i < count; ++i) top = std::max(top, rows[i]->largest);
  const double typical = 4.0 * rows[count * 3 / 4]->largest;
  return std::min(top > typical ? typical : top, kLargestElement);
}

// A block of rows through the integer filter.
void search_block(const Problem& problem, Space& space, Row** rows, int64_t count, int limit) {
  const Search& search = problem.search;
  const Packed& packed = problem.packed;
  const double range = block_range(rows, count);
  const double scale = std::max(range / limit, 0x1p-40);
  Parts parts{};  // the largest of the block
  for (int64_t i = 0; i < count; ++i) {
    rows[i]->hard |= !(rows[i]->largest <= range);
    if (rows[i]->hard) continue;
    const double residual =
        TILEWISE_DISPATCH(quantize_row)(space.a_of(rows[i]), rows[i]->length, packed.depth, scale,
                                        limit, space.quads.data() + i * packed.depth);
    parts.length = std::max(parts.length, (rows[i]->length + residual) * (1.0 + 0x1p-40));
    parts.residual = std::max(parts.residual, residual);
  }
  const RowBlock block{rows, count, space.minima.data(), space.stride};
  for (int64_t p = 0; p < packed.panels; p += kChunkPanels) {
    const int64_t panels = std::min(kChunkPanels, packed.panels - p);
    if (!TILEWISE_DISPATCH(integer_bias)(packed, p, panels, scale, parts, limit,
                                         space.bias.data())) {
      for (int64_t i = 0; i < count; ++i) rows[i]->hard = true;
      return;
    }
    TILEWISE_DISPATCH(filter_integer)(packed, p, panels, space.quads.data(), scale,
                                      space.bias.data(), block);
    TILEWISE_DISPATCH(resolve)(search, packed, p, panels, group_limit(search), block,
                               space.candidates.data());
  }
}

// Rows that are sorted by size together.
void search_task(const Problem& problem, Space& space, const int64_t* rows, int64_t count,
                 int limit) {
  for (int64_t i = 0; i < count; ++i) {
    space.rows[i].index = rows[i];
    TILEWISE_DISPATCH(prepare_row)(problem.search, problem.packed, space.rows[i],
                                   space.a.data() + i * space.padded_dim);
  }
  sort_by_size(space, count);
  int64_t failed = 0;
  for (int64_t i = 0; i < count; i += kBlockRows) {
    Row** block = space.order.data() + i;
    const int64_t rows_here = std::min(kBlockRows, count - i);
    const bool helps = 2 * failed <= i;
    if (helps) search_block(problem, space, block, rows_here, limit);
    for (int64_t r = 0; r < rows_here; ++r) failed += block[r]->hard |= !helps;
  }
}

}  // namespace

RowNumbers search_integer(const Problem& problem, const RowNumbers& rows) {
  const int limit = TILEWISE_DISPATCH(filter_limit)();
  if (limit == kNoFilter || problem.search.dim > kLongestInt) return rows;
  const int64_t n = rows.size(), blocks = ceil_div(n, kBlockRows);
  const int64_t row_bytes = problem.search.dim * static_cast<int64_t>(sizeof(float)) + 1;
  const int64_t max_blocks = std::max<int64_t>(1, kTaskBytes / row_bytes / kBlockRows);
  HardRows hard;
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    const int64_t task_rows = std::min(max_blocks, end - begin) * kBlockRows;
    Space space(problem, task_rows, kBlockRows);
    space.quads.resize(kBlockRows * problem.packed.depth + 12);
    space.bias.resize(kChunkPanels * kPanel);
    int64_t seen = 0, failed = 0;
    for (int64_t first = begin * kBlockRows; first < std::min(n, end * kBlockRows);
         first += task_rows) {
      const int64_t count = std::min({task_rows, n - first, end * kBlockRows - first});
      if (seen >= 2 * kBlockRows && failed > seen / 2) {  // it does not help on this data
        hard.add({rows.begin() + first, rows.begin() + first + count});
        continue;
      }
      search_task(problem, space, rows.data() + first, count, limit);
      const RowNumbers left = finish_rows(problem, space.rows, count);
      seen += count;
      failed += left.size();
      hard.add(left);
    }
  });
  return hard.rows();
}

}  // namespace tilewise
