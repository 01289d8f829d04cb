// tilewise::nearest_code on CPU: checks, the exact search, and the ladder that spares most of it.
// docs/ops/nearest_code.md explains it.
#include "simd/nearest_code.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/integer.h"
#include "../common/registration.h"
#include "arguments.h"
#include "nearest_code_filters.h"
#include "pack_codebook.h"
#include "rows.h"

namespace tilewise {
namespace {

using at::Tensor;

Metric metric_of(c10::string_view name) {
  TORCH_CHECK_VALUE(name == "l2" || name == "cosine" || name == "dot",
                    "metric: expected l2, cosine or dot, got ", name);
  return name == "l2" ? Metric::L2 : name == "cosine" ? Metric::Cosine : Metric::Dot;
}

void search_head(const Tensor& x, const Tensor& codebook, Metric metric, int64_t k,
                 const RowNumbers& rows, const std::optional<Tensor>& packed, int64_t* index,
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
    return search_direct(problem, rows, true);
  }
  const Tensor pack = packed ? *packed : pack_codes(problem.search);
  problem.packed = packed_view(pack, problem.search);
  problem.search.norms = problem.packed.norms;
  if (problem.packed.answers < k || needs_exact_search(pack)) {
    return search_direct(problem, rows, false);
  }
  const RowNumbers left = search_integer(problem, rows);
  if (static_cast<int64_t>(left.size()) < kFewRows) return search_direct(problem, left, true);
  search_direct(problem, search_float(problem, left), false);
}

RowNumbers wanted_rows(const std::optional<Tensor>& mask, int64_t head, int64_t n) {
  RowNumbers rows;
  rows.reserve(n);
  const bool* wanted = mask ? mask->const_data_ptr<bool>() + head * n : nullptr;
  for (int64_t i = 0; i < n; ++i) {
    if (!wanted || wanted[i]) rows.push_back(i);
  }
  return rows;
}

void check(const Tensor& x, const Tensor& codebook, int64_t k, const std::optional<Tensor>& mask) {
  TORCH_CHECK_VALUE(x.dim() == 3, "x: expected (H, N, D), got ", x.sizes());
  TORCH_CHECK_VALUE(
      codebook.dim() == 3 && codebook.size(0) == x.size(0) && codebook.size(2) == x.size(2),
      "codebook: expected (", x.size(0), ", K, ", x.size(2), "), got ", codebook.sizes());
  TORCH_CHECK_TYPE(x.is_floating_point(), "x: expected a floating dtype, got ", x.scalar_type());
  TORCH_CHECK_TYPE(codebook.is_floating_point(), "codebook: expected a floating dtype, got ",
                   codebook.scalar_type());
  TORCH_CHECK_VALUE(k >= 1 && k <= kMaxK && k <= codebook.size(1), "k: expected from 1 to ",
                    std::min(kMaxK, codebook.size(1)), ", got ", k);
  TORCH_CHECK_VALUE(
      !mask || (mask->scalar_type() == at::kBool && mask->sizes() == x.sizes().slice(0, 2)),
      "mask: expected bool ", x.sizes().slice(0, 2), ", got ", mask->scalar_type(), " ",
      mask->sizes());
}

// See pyext/tilewise/ops/nearest_code.py. x (H, N, D), codebook (H, K, D), mask (H, N); results
// (H, N, k). packed: from pack_codebook, of the same codebook and metric.
std::tuple<Tensor, Tensor> nearest_code(const Tensor& x, const Tensor& codebook,
                                        c10::string_view metric, int64_t k,
                                        const std::optional<Tensor>& mask,
                                        const std::optional<Tensor>& packed) {
  const BelowAutograd below;
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
  const BelowAutograd below;
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

}  // namespace

TILEWISE_REGISTER(CPU, library) {
  library.impl("nearest_code", &nearest_code);
  library.impl("pack_codebook", &pack_codebook);
}

}  // namespace tilewise
