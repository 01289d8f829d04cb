// Tensors as the matrices that vector kernels read.
#pragma once

#include <ATen/core/Tensor.h>

#include "simd/matrix.h"

namespace tilewise {

// x (rows, dim) in float or double, elements of a row side by side.
inline at::Tensor readable(const at::Tensor& x) {
  const at::Tensor wide = x.scalar_type() == at::kDouble ? x : x.to(at::kFloat);
  return wide.stride(-1) == 1 || wide.size(-1) <= 1 ? wide : wide.contiguous();
}

// Of a readable tensor, which must live as long.
inline Matrix matrix_of(const at::Tensor& x) {
  return {x.const_data_ptr(), x.scalar_type() == at::kDouble, x.stride(0)};
}

}  // namespace tilewise
