// tilewise::code_sums on CPU: rows sorted by code, then each code's rows summed in their order.
#include "simd/code_sums.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <numeric>
#include <tuple>
#include <vector>

#include "../common/integer.h"
#include "../common/registration.h"
#include "arguments.h"

namespace tilewise {
namespace {

using at::Tensor;

// The rows of each code, in ascending order: those of code k are order[begin[k]..begin[k + 1]).
struct Segments {
  std::vector<int64_t> begin, order;

  Segments(const int64_t* index, int64_t rows, int64_t codes) : begin(codes + 1) {
    for (int64_t i = 0; i < rows; ++i) {
      TORCH_CHECK_VALUE(index[i] < codes, "index: expected less than num_codes = ", codes, ", got ",
                        index[i]);
      if (index[i] >= 0) ++begin[index[i] + 1];
    }
    std::partial_sum(begin.begin(), begin.end(), begin.begin());
    order.resize(begin[codes]);
    std::vector<int64_t> next(begin.begin(), begin.end() - 1);
    for (int64_t i = 0; i < rows; ++i) {
      if (index[i] >= 0) order[next[index[i]]++] = i;
    }
  }
};

SumType sum_type(const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kDouble:
      return SumType::Double;
    case at::kHalf:
      return SumType::Half;
    case at::kBFloat16:
      return SumType::BFloat16;
    default:
      TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat,
                       "x: expected float16, bfloat16, float32 or float64, got ", x.scalar_type());
      return SumType::Float;
  }
}

constexpr int64_t kTaskElements = 65536;  // that a thread adds at least, about

// A thread takes some columns of some codes. Which it takes changes no sum.
void sum_head(const Tensor& x, const Tensor& index, const Tensor& counts, const Tensor& sums) {
  const int64_t codes = counts.size(0), dim = x.size(1);
  const SumType type = sum_type(x);
  const Segments segments(index.const_data_ptr<int64_t>(), x.size(0), codes);
  auto* count = counts.mutable_data_ptr<int64_t>();
  for (int64_t k = 0; k < codes; ++k) count[k] = segments.begin[k + 1] - segments.begin[k];

  const int64_t strips = ceil_div(dim, kSumColumns);
  const int64_t rows_each = segments.order.size() / std::max<int64_t>(codes, 1) + 1;
  const int64_t grain = std::max<int64_t>(1, kTaskElements / (rows_each * kSumColumns));
  at::parallel_for(0, codes * strips, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t k = task / strips, column = task % strips * kSumColumns;
      const SumRows rows{type,
                         x.const_data_ptr(),
                         x.stride(0),
                         column,
                         std::min(kSumColumns, dim - column),
                         segments.order.data() + segments.begin[k],
                         count[k]};
      TILEWISE_DISPATCH(sum_rows)(rows, sums.mutable_data_ptr(), k * dim + column);
    }
  });
}

// See pyext/tilewise/ops/code_sums.py. x (H, N, D), index (H, N); results (H, K) and (H, K, D).
std::tuple<Tensor, Tensor> code_sums(const Tensor& x, const Tensor& index, int64_t num_codes) {
  const BelowAutograd below;
  TORCH_CHECK_VALUE(x.dim() == 3, "x: expected (H, N, D), got ", x.sizes());
  TORCH_CHECK_VALUE(index.dim() == 2 && index.sizes() == x.sizes().slice(0, 2), "index: expected ",
                    x.sizes().slice(0, 2), ", got ", index.sizes());
  TORCH_CHECK_TYPE(index.scalar_type() == at::kLong, "index: expected int64, got ",
                   index.scalar_type());
  const Tensor codes = index.contiguous();
  const Tensor counts = at::empty({x.size(0), num_codes}, index.options());
  const Tensor sums =
      at::empty({x.size(0), num_codes, x.size(2)}, x.options().dtype(compute_type(x)));
  for (int64_t h = 0; h < x.size(0); ++h) {
    const Tensor rows = x.select(0, h);  // elements of a row must be side by side
    sum_head(rows.stride(1) == 1 ? rows : rows.contiguous(), codes.select(0, h),
             counts.select(0, h), sums.select(0, h));
  }
  return {counts, sums};
}

}  // namespace

TILEWISE_REGISTER(CPU, library) { library.impl("code_sums", &code_sums); }

}  // namespace tilewise
