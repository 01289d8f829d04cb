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

  Segments(const int64_t* index, int64_t rows, int64_t codes) : begin(codes + 2) {
    for (int64_t i = 0; i < rows; ++i) {
      TORCH_CHECK_VALUE(index[i] < codes, "index: expected less than num_codes = ", codes, ", got ",
                        index[i]);
      if (index[i] >= 0) ++begin[index[i] + 2];
    }
    std::partial_sum(begin.begin(), begin.end(), begin.begin());
    order.resize(begin.back());
    int64_t* next = begin.data() + 1;  // begins of segments become their ends
    for (int64_t i = 0; i < rows; ++i) {
      if (index[i] >= 0) order[next[index[i]]++] = i;
    }
  }

  // The codes that have rows.
  std::vector<int64_t> used(const int64_t* index) const {
    std::vector<int64_t> codes;
    for (const int64_t row : order) {
      if (codes.empty() || codes.back() != index[row]) codes.push_back(index[row]);
    }
    return codes;
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

// One head: rows x (N, D), whose elements lie side by side, and their codes.
struct Head {
  SumType type;
  const char* x;
  int64_t rows, stride, dim;
  const int64_t* index;
};

// Whether most codes have no rows: their sums are written at once.
bool is_sparse(int64_t rows, int64_t codes) { return rows < codes; }

// A thread takes some columns of some codes. Which it takes changes no sum.
void sum_head(const Head& head, int64_t codes, int64_t* count, void* sums) {
  const Segments segments(head.index, head.rows, codes);
  for (int64_t k = 0; k < codes; ++k) count[k] = segments.begin[k + 1] - segments.begin[k];

  const bool sparse = is_sparse(head.rows, codes);
  const std::vector<int64_t> used = sparse ? segments.used(head.index) : std::vector<int64_t>();
  const int64_t visited = sparse ? used.size() : codes;
  const int64_t strips = ceil_div(head.dim, kSumColumns);
  const int64_t rows_each = segments.order.size() / std::max<int64_t>(visited, 1) + 1;
  const int64_t grain = std::max<int64_t>(1, kTaskElements / (rows_each * kSumColumns));
  at::parallel_for(0, visited * strips, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t k = sparse ? used[task / strips] : task / strips;
      const int64_t column = task % strips * kSumColumns;
      const SumRows rows{head.type,
                         head.x,
                         head.stride,
                         column,
                         std::min(kSumColumns, head.dim - column),
                         segments.order.data() + segments.begin[k],
                         count[k]};
      TILEWISE_DISPATCH(sum_rows)(rows, sums, k * head.dim + column);
    }
  });
}

// See pyext/tilewise/ops/code_sums.py. x (N, D), index (N), results (K) and (K, D); or all of them
// with heads before that.
std::tuple<Tensor, Tensor> code_sums(const Tensor& x, const Tensor& index, int64_t num_codes) {
  const BelowAutograd below;
  TORCH_CHECK_VALUE(x.dim() == 2 || x.dim() == 3, "x: expected (N, D) or (H, N, D), got ",
                    x.sizes());
  const at::IntArrayRef places = x.sizes().slice(0, x.dim() - 1);
  TORCH_CHECK_VALUE(index.sizes() == places, "index: expected ", places, ", got ", index.sizes());
  TORCH_CHECK_TYPE(index.scalar_type() == at::kLong, "index: expected int64, got ",
                   index.scalar_type());
  const SumType type = sum_type(x);
  const bool heads = x.dim() == 3;
  const int64_t n = x.size(-2), dim = x.size(-1), h = heads ? x.size(0) : 1;
  const auto sums_options = x.options().dtype(compute_type(x));
  const Tensor counts =
      heads ? at::empty({h, num_codes}, index.options()) : at::empty({num_codes}, index.options());
  const Tensor sums = heads ? at::empty({h, num_codes, dim}, sums_options)
                            : at::empty({num_codes, dim}, sums_options);
  if (is_sparse(n, num_codes)) sums.zero_();
  const Tensor codes = index.contiguous();
  const Tensor rows = x.stride(-1) == 1 ? x : x.contiguous();
  const int64_t head_bytes = heads ? rows.stride(0) * x.element_size() : 0;
  for (int64_t i = 0; i < h; ++i) {
    const Head head{type, static_cast<const char*>(rows.const_data_ptr()) + i * head_bytes,
                    n,    rows.stride(-2),
                    dim,  codes.const_data_ptr<int64_t>() + i * n};
    sum_head(
        head, num_codes, counts.mutable_data_ptr<int64_t>() + i * num_codes,
        static_cast<char*>(sums.mutable_data_ptr()) + i * num_codes * dim * sums.element_size());
  }
  return {counts, sums};
}

}  // namespace

TILEWISE_REGISTER(CPU, library) { library.impl("code_sums", &code_sums); }

}  // namespace tilewise
