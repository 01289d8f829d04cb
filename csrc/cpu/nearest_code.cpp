// tilewise::nearest_code on CPU: checks, the ladder of filters (docs/ops/nearest_code.md).
#include "simd/nearest_code.h"

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <mutex>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "../ops.h"
#include "pack_codebook.h"
#include "rows.h"

namespace tilewise {
namespace {

using at::Tensor;
using Rows = std::vector<int64_t>;

constexpr int64_t kChunkPanels = 64;      // panels that a block of rows meets at a time
constexpr int64_t kTaskBytes = 1 << 19;   // of rows that are sorted by size together
constexpr int64_t kLongestInt = 32768;    // elements of a row whose integer products fit in 32 bits
constexpr int64_t kFewRows = 8;           // not worth packing a codebook for
constexpr double kLargestElement = 1e17;  // of a row, beside codes of 1: float32 has room for it

Metric metric_of(c10::string_view name) {
  TORCH_CHECK_VALUE(name == "l2" || name == "cosine" || name == "dot",
                    "metric: expected l2, cosine or dot, got ", name);
  return name == "l2" ? Metric::L2 : name == "cosine" ? Metric::Cosine : Metric::Dot;
}

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
        padded_dim((problem.search.dim + 15) / 16 * 16) {
    a.resize(count * padded_dim);
    for (int64_t i = 0; i < count; ++i) {
      rows[i].best_distance = best_distance.data() + i * problem.search.k;
      rows[i].best_index = best_index.data() + i * problem.search.k;
    }
  }

  const float* a_of(const Row* row) const { return a.data() + (row - rows.data()) * padded_dim; }
};

// Rows that an earlier rung could not settle.
class HardRows {
 public:
  void add(const Rows& rows) {
    const std::lock_guard<std::mutex> lock(mutex_);
    rows_.insert(rows_.end(), rows.begin(), rows.end());
  }
  const Rows& rows() const { return rows_; }

 private:
  std::mutex mutex_;
  Rows rows_;
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

// Writes the rows that are settled and returns the others.
Rows finish_rows(const Problem& problem, const std::vector<Row>& rows, int64_t count) {
  Rows hard;
  for (int64_t i = 0; i < count; ++i) {
    if (rows[i].hard || rows[i].found < problem.search.k) {
      hard.push_back(rows[i].index);
    } else {
      problem.finish(rows[i]);
    }
  }
  return hard;
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
  for (int64_t i = 0; i < count; i += kBlockRows) {
    search_block(problem, space, space.order.data() + i, std::min(kBlockRows, count - i), limit);
  }
}

// The integer rung.
Rows search_integer(const Problem& problem, const Rows& rows) {
  const int limit = TILEWISE_DISPATCH(filter_limit)();
  if (limit == kNoFilter || problem.search.dim > kLongestInt) return rows;
  const int64_t n = rows.size(), blocks = (n + kBlockRows - 1) / kBlockRows;
  const int64_t row_bytes = problem.search.dim * static_cast<int64_t>(sizeof(float)) + 1;
  const int64_t most = std::max<int64_t>(1, kTaskBytes / row_bytes / kBlockRows);
  HardRows hard;
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    const int64_t task_rows = std::min(most, end - begin) * kBlockRows;
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
      const Rows left = finish_rows(problem, space.rows, count);
      seen += count;
      failed += left.size();
      hard.add(left);
    }
  });
  return hard.rows();
}

// The codes as they enter the float rung: (panels, dim, 64), in the panels' order.
Tensor float_codes(const Problem& problem) {
  const int64_t dim = problem.search.dim, panels = problem.packed.panels;
  const Tensor codes = at::empty({panels, dim, kPanel}, at::kFloat);
  auto* out = codes.mutable_data_ptr<float>();
  at::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> row((dim + 15) / 16 * 16);
    for (int64_t p = begin; p < end; ++p) {
      TILEWISE_DISPATCH(pack_floats)(problem.search, problem.packed, p, row.data(),
                                     out + p * dim * kPanel);
    }
  });
  return codes;
}

// A slice of rows through the float rung.
void search_slice(const Problem& problem, const float* codes, Space& space, const int64_t* rows,
                  int64_t count) {
  const Search& search = problem.search;
  const Packed& packed = problem.packed;
  std::vector<float> lengths(count);
  for (int64_t i = 0; i < count; ++i) {
    Row& row = space.rows[i];
    row.index = rows[i];
    float* a = space.a.data() + i * space.padded_dim;
    TILEWISE_DISPATCH(prepare_row)(search, packed, row, a);
    row.hard |= !(row.largest <= kLargestElement);
    if (row.hard) std::fill(a, a + space.padded_dim, 0.0f);
    lengths[i] = row.hard ? 0.0f : static_cast<float>(row.length * (1.0 + 0x1p-20));
    space.order[i] = &row;
  }
  const RowBlock block{space.order.data(), count, space.minima.data(), space.stride};
  for (int64_t p = 0; p < packed.panels; p += kChunkPanels) {
    const int64_t panels = std::min(kChunkPanels, packed.panels - p);
    TILEWISE_DISPATCH(filter_float)(packed, codes, search.dim, p, panels, space.a.data(),
                                    space.padded_dim, lengths.data(), block);
    TILEWISE_DISPATCH(resolve)(search, packed, p, panels, packed.codes, block,
                               space.candidates.data());
  }
}

// The float rung: rows whose codes integers cannot tell apart.
Rows search_float(const Problem& problem, const Rows& rows) {
  const int64_t n = rows.size();
  if (n < kFewRows) return rows;
  const Tensor codes = float_codes(problem);
  const int64_t threads = at::get_num_threads();
  const int64_t slice = std::min(kBlockRows, (n + threads - 1) / threads);
  HardRows hard;
  at::parallel_for(0, (n + slice - 1) / slice, 1, [&](int64_t begin, int64_t end) {
    Space space(problem, slice, slice);
    for (int64_t i = begin * slice; i < std::min(n, end * slice); i += slice) {
      const int64_t count = std::min(slice, n - i);
      search_slice(problem, codes.const_data_ptr<float>(), space, rows.data() + i, count);
      hard.add(finish_rows(problem, space.rows, count));
    }
  });
  return hard.rows();
}

// Every remaining row with every code, exactly. Few rows share the threads by codes.
void search_exact(const Problem& problem, const Rows& rows) {
  const Search& search = problem.search;
  const int64_t n = rows.size(), k = search.k;
  if (n == 0) return;
  const int64_t threads = at::get_num_threads();
  const int64_t parts =
      std::clamp<int64_t>((4 * threads + n - 1) / n, 1, (search.codes + 1023) / 1024);
  const int64_t length = (search.codes + parts - 1) / parts;
  std::vector<Row> found(n * parts);
  std::vector<double> distance(n * parts * k);
  std::vector<int64_t> index(n * parts * k);
  const int64_t grain = std::max<int64_t>(1, 65536 / (length * (search.dim + 16)));
  at::parallel_for(0, n * parts, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      Row& row = found[i];
      row = Row{};
      row.index = rows[i / parts];
      row.best_distance = distance.data() + i * k;
      row.best_index = index.data() + i * k;
      const int64_t first = i % parts * length;
      TILEWISE_DISPATCH(compare_all)(search, first, std::min(first + length, search.codes), row);
    }
  });
  for (int64_t i = 0; i < n; ++i) {
    Row& row = found[i * parts];
    for (int64_t part = 1; part < parts; ++part) {
      const Row& other = found[i * parts + part];
      for (int64_t e = 0; e < other.found; ++e) {
        TILEWISE_DISPATCH(insert)(k, other.best_distance[e], other.best_index[e], row);
      }
    }
    problem.finish(row);
  }
}

void search_head(const Tensor& x, const Tensor& codebook, Metric metric, int64_t k,
                 const Rows& rows, const std::optional<Tensor>& packed, int64_t* index,
                 float* distance) {
  const Tensor x_rows = readable(x), codes = readable(codebook);
  Problem problem{{metric, k, codes.size(0), codes.size(1), matrix_of(x_rows), matrix_of(codes)}};
  problem.index = index;
  problem.distance = distance;
  const int64_t n = rows.size();
  if (!packed && (n < kFewRows || problem.search.codes <= kPanel / 2)) {
    const bool cosine = metric == Metric::Cosine;
    const std::vector<double> norms = cosine ? exact_norms(problem.search) : std::vector<double>();
    if (cosine) problem.search.norms = norms.data();
    return search_exact(problem, rows);
  }
  const Tensor pack = packed ? *packed : pack_codes(problem.search);
  problem.packed = packed_view(pack, problem.search);
  problem.search.norms = problem.packed.norms;
  if (problem.packed.codes < k || needs_exact_search(pack)) return search_exact(problem, rows);
  search_exact(problem, search_float(problem, search_integer(problem, rows)));
}

Rows wanted_rows(const std::optional<Tensor>& mask, int64_t head, int64_t n) {
  Rows rows;
  rows.reserve(n);
  const bool* wanted = mask ? mask->const_data_ptr<bool>() + head * n : nullptr;
  for (int64_t i = 0; i < n; ++i) {
    if (!wanted || wanted[i]) rows.push_back(i);
  }
  return rows;
}

void check(const Tensor& x, const Tensor& codebook, int64_t k, const std::optional<Tensor>& mask) {
  TORCH_CHECK_VALUE(x.dim() == 3 && codebook.dim() == 3 && x.size(0) == codebook.size(0) &&
                        x.size(2) == codebook.size(2),
                    "x (H, N, D) and codebook (H, K, D) expected, got ", x.sizes(), " and ",
                    codebook.sizes());
  TORCH_CHECK_TYPE(x.is_floating_point() && codebook.is_floating_point(),
                   "x and codebook: floating dtypes expected, got ", x.scalar_type(), " and ",
                   codebook.scalar_type());
  TORCH_CHECK_VALUE(k >= 1 && k <= kMaxK && k <= codebook.size(1), "k: 1 to ", kMaxK,
                    " and at most K expected, got ", k);
  TORCH_CHECK_VALUE(!mask || (mask->scalar_type() == at::kBool && mask->dim() == 2 &&
                              mask->size(0) == x.size(0) && mask->size(1) == x.size(1)),
                    "mask: bool (H, N) expected");
}

}  // namespace

std::tuple<Tensor, Tensor> nearest_code(const Tensor& x, const Tensor& codebook,
                                        c10::string_view metric, int64_t k,
                                        const std::optional<Tensor>& mask,
                                        const std::optional<Tensor>& packed) {
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  check(x, codebook, k, mask);
  const int64_t heads = x.size(0), n = x.size(1);
  const std::optional<Tensor> wanted = mask ? std::optional(mask->contiguous()) : std::nullopt;
  const Tensor index = at::empty({heads, n, k}, x.options().dtype(at::kLong));
  const Tensor distance = at::empty({heads, n, k}, x.options().dtype(at::kFloat));
  if (mask) {  // what stays of the rows that are left out
    index.fill_(-1);
    distance.zero_();
  }
  for (int64_t h = 0; h < heads; ++h) {
    const auto pack = packed ? std::optional(packed->select(0, h)) : std::nullopt;
    search_head(x.select(0, h), codebook.select(0, h), metric_of(metric), k,
                wanted_rows(wanted, h, n), pack, index.mutable_data_ptr<int64_t>() + h * n * k,
                distance.mutable_data_ptr<float>() + h * n * k);
  }
  return {index, distance};
}

Tensor pack_codebook(const Tensor& codebook, c10::string_view metric) {
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  std::vector<Tensor> heads;
  for (int64_t h = 0; h < codebook.size(0); ++h) {
    const Tensor codes = readable(codebook.select(0, h));
    heads.push_back(pack_codes(
        {metric_of(metric), 1, codes.size(0), codes.size(1), Matrix{}, matrix_of(codes)}));
  }
  int64_t longest = 0;
  for (const Tensor& head : heads) longest = std::max(longest, head.numel());
  const Tensor result = at::empty({codebook.size(0), longest}, at::kByte);
  for (size_t h = 0; h < heads.size(); ++h) {
    result.select(0, h).narrow(0, 0, heads[h].numel()).copy_(heads[h]);
  }
  return result;
}

}  // namespace tilewise
