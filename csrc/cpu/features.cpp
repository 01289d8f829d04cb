#include "features.h"

#include "arguments.h"
#include "matmul.h"

namespace tilewise {
namespace {

// bfloat16 products only where the CPU has instructions for them. float16, and bfloat16 elsewhere,
// are widened tile by tile: faster there, and more accurate.
at::ScalarType product_type_of(at::ScalarType type) {
  if (type == at::kHalf || (type == at::kBFloat16 && !has_bfloat16_matmul())) return at::kFloat;
  return type;
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
