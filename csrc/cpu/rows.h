// Tensors as the matrices that products and vector kernels read.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>

#include "arguments.h"
#include "simd/matrix.h"

namespace tilewise {

// Rows begin..begin + size of x, as far as there are, contiguous and of the given type.
inline at::Tensor rows_of(const at::Tensor& x, int64_t begin, int64_t size, at::ScalarType type) {
  return x.narrow(0, begin, std::min(size, x.size(0) - begin)).to(type).contiguous();
}

// x (rows, dim) in float or double, elements of a row side by side.
inline at::Tensor readable(const at::Tensor& x) {
  const at::Tensor rows = x.to(compute_type(x));
  return rows.stride(-1) == 1 || rows.size(-1) <= 1 ? rows : rows.contiguous();
}

// Of a readable tensor, which must live as long.
inline Matrix matrix_of(const at::Tensor& x) {
  return {x.const_data_ptr(), x.scalar_type() == at::kDouble, x.stride(0)};
}

}  // namespace tilewise
