// tilewise::gumbel_argmax on CPU: checks and memory. The vector kernel is in
// simd/gumbel_argmax.cpp.
#include "simd/gumbel_argmax.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "../common/registration.h"
#include "arguments.h"
#include "gumbel_argmax.h"
#include "rows_along.h"

namespace tilewise {
namespace {

using at::Tensor;

// Largest k of rows that threads share: every block of a row keeps as many.
constexpr int64_t kShared = 64;

// Results (rows, k) in the order of rows, as the shape of x with `dim` of size k.
Tensor along(const Tensor& x, const RowsAlong& shape, at::IntArrayRef sizes, int64_t dim) {
  std::vector<int64_t> out(sizes.begin(), sizes.end());
  out[dim] = x.size(1);
  return x.view({shape.outer, shape.inner, x.size(1)}).transpose(1, 2).contiguous().view(out);
}

}  // namespace

void argmax_wide(const Tensor& x, const RowsAlong& shape, int64_t k, uint64_t seed,
                 int64_t row_offset, int64_t* index, bool mark_invalid) {
  const auto* from = x.const_data_ptr<float>();
  const int64_t blocks = row_blocks(shape);
  std::vector<Perturbed> found(shape.rows() * blocks * k);
  std::vector<char> finite(shape.rows() * blocks);
  for_row_parts(shape, [&](const RowPart& part) {
    const ArgmaxRows row{
        false, from + part.at, 1, part.cols, k, seed, noise_row(part.row, row_offset)};
    finite[part.number] =
        TILEWISE_DISPATCH(largest_of_block)(row, part.col, &found[part.number * k], mark_invalid);
  });
  const auto larger = [](const Perturbed& a, const Perturbed& b) {
    return a.value > b.value || (a.value == b.value && a.col < b.col);
  };
  for (int64_t r = 0; r < shape.rows(); ++r, index += k) {
    const auto first = found.begin() + r * blocks * k;
    const auto last = std::remove_if(first, first + blocks * k,
                                     [](const Perturbed& item) { return item.col < 0; });
    int64_t count = std::min<int64_t>(k, last - first);
    std::partial_sort(first, first + count, last, larger);
    for (int64_t i = 0; i < count; ++i) index[i] = first[i].col;
    const bool valid =
        count > 0 && std::all_of(finite.begin() + r * blocks, finite.begin() + (r + 1) * blocks,
                                 [](char part) { return part; });
    for (int64_t col = 0; count < k; ++col) {  // what is not above -inf comes last
      if (!(from[r * shape.cols + col] > -INFINITY)) index[count++] = col;
    }
    if (mark_invalid && !valid) index[0] = -1;
  }
}

namespace {

static_assert(kArgmaxBlock == kRowBlock, "a row is cut where its sums are");

// log softmax of few wide rows x at the chosen columns (rows, k).
void log_prob_wide(const Tensor& x, const RowsAlong& shape, const Tensor& index,
                   const Tensor& log_prob) {
  const auto* from = x.const_data_ptr<float>();
  const int64_t blocks = row_blocks(shape);
  std::vector<float> largest(shape.rows() * blocks);
  std::vector<double> sums(largest.size());
  for_row_parts(shape, [&](const RowPart& part) {
    largest[part.number] = TILEWISE_DISPATCH(largest_logit)(from + part.at, part.cols);
  });
  for (int64_t r = 0; r < shape.rows(); ++r) {
    const auto first = largest.begin() + r * blocks;
    std::fill(first, first + blocks, *std::max_element(first, first + blocks));
  }
  for_row_parts(shape, [&](const RowPart& part) {
    sums[part.number] =
        TILEWISE_DISPATCH(sum_of_exponentials)(from + part.at, part.cols, largest[part.number]);
  });
  const int64_t k = index.size(1);
  const auto* chosen = index.const_data_ptr<int64_t>();
  auto* out = log_prob.mutable_data_ptr<float>();
  for (int64_t r = 0; r < shape.rows(); ++r) {
    double total = 0;
    for (int64_t b = 0; b < blocks; ++b) total += sums[r * blocks + b];
    const double base = largest[r * blocks], rest = std::log(total);
    for (int64_t i = r * k; i < (r + 1) * k; ++i) {
      out[i] = static_cast<float>((from[r * shape.cols + chosen[i]] - base) - rest);
    }
  }
}

// See pyext/tilewise/ops/gumbel_argmax.py. Without `log_prob` the second result is empty.
std::tuple<Tensor, Tensor> gumbel_argmax(const Tensor& logits, const Tensor& seed,
                                         int64_t row_offset, int64_t dim, int64_t k,
                                         bool log_prob) {
  const BelowAutograd below;
  const RowsAlong shape = rows_along("logits", logits, dim);
  TORCH_CHECK_VALUE(k >= 1 && (k <= shape.cols || logits.numel() == 0),
                    "k: expected from 1 to the ", shape.cols, " categories, got ", k);
  const at::ScalarType type = compute_type(logits);
  const uint64_t key = random_key(seed);
  const Tensor index = at::empty({shape.rows(), k}, logits.options().dtype(at::kLong));
  const Tensor value =
      at::empty(log_prob ? at::IntArrayRef({shape.rows(), k}) : at::IntArrayRef({0}),
                logits.options().dtype(type));
  const auto results = [&] {
    return std::make_tuple(along(index, shape, logits.sizes(), dim),
                           log_prob ? along(value, shape, logits.sizes(), dim) : value);
  };
  if (k <= kShared && is_wide(shape, type)) {
    const Tensor x = wide_rows(logits, shape);
    argmax_wide(x, shape, k, key, row_offset, index.mutable_data_ptr<int64_t>(), false);
    if (log_prob) log_prob_wide(x, shape, index, value);
    return results();
  }
  for_pieces(shape, type, {logits}, {}, [&](const Piece& piece) {
    std::vector<Perturbed> heap(k);
    const ArgmaxRows rows{type == at::kDouble,
                          piece.inputs[0],
                          piece.count,
                          shape.cols,
                          k,
                          key,
                          noise_row(piece.first, row_offset)};
    char* values = static_cast<char*>(value.mutable_data_ptr());
    TILEWISE_DISPATCH(gumbel_argmax)
    (rows, heap.data(), index.mutable_data_ptr<int64_t>() + piece.first * k,
     log_prob ? values + piece.first * k * value.element_size() : nullptr, false);
  });
  return results();
}

}  // namespace

TILEWISE_REGISTER(CPU, library) { library.impl("gumbel_argmax", &gumbel_argmax); }

}  // namespace tilewise
