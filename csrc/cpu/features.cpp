#include "features.h"

#include "arguments.h"
#include "simd/matmul.h"

namespace tilewise {
namespace {

// bfloat16 products only where they are faster than float32. float16, and bfloat16 elsewhere, are
// widened tile by tile.
at::ScalarType product_type_of(at::ScalarType type) {
  const bool widened =
      type == at::kHalf || (type == at::kBFloat16 && bfloat16_unit() == Bfloat16Unit::NONE);
  return widened ? at::kFloat : type;
}

}  // namespace

Features::Features(const char* rows_name, const at::Tensor& rows, const char* cols_name,
                   const at::Tensor& cols)
    : rows(rows), cols(cols), product_type(product_type_of(rows.scalar_type())) {
  TORCH_CHECK_VALUE(rows.dim() == 2, rows_name, ": expected (B, D), got ", rows.sizes());
  TORCH_CHECK_VALUE(cols.dim() == 2 && cols.size(1) == rows.size(1), cols_name, ": expected (N, ",
                    rows.size(1), "), got ", cols.sizes());
  TORCH_CHECK_TYPE(rows.is_floating_point(), rows_name, ": expected a floating dtype, got ",
                   rows.scalar_type());
  TORCH_CHECK_TYPE(cols.scalar_type() == rows.scalar_type(), cols_name, ": expected ",
                   rows.scalar_type(), ", as ", rows_name, ", got ", cols.scalar_type());
}

at::TensorOptions Features::options() const { return rows.options().dtype(compute_type(rows)); }

}  // namespace tilewise
