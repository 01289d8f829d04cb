// tilewise::gumbel_argmax on CPU: checks and memory. The vector kernel is in
// simd/gumbel_argmax.cpp.
#include "simd/gumbel_argmax.h"

#include <ATen/ops/empty.h>

#include <tuple>
#include <vector>

#include "../common/registration.h"
#include "arguments.h"
#include "rows_along.h"

namespace tilewise {
namespace {

using at::Tensor;

// Results (rows, k) in the order of rows, as the shape of x with `dim` of size k.
Tensor along(const Tensor& x, const RowsAlong& shape, at::IntArrayRef sizes, int64_t dim) {
  std::vector<int64_t> out(sizes.begin(), sizes.end());
  out[dim] = x.size(1);
  return x.view({shape.outer, shape.inner, x.size(1)}).transpose(1, 2).contiguous().view(out);
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
  return {along(index, shape, logits.sizes(), dim),
          log_prob ? along(value, shape, logits.sizes(), dim) : value};
}

}  // namespace

TILEWISE_REGISTER(CPU, library) { library.impl("gumbel_argmax", &gumbel_argmax); }

}  // namespace tilewise
