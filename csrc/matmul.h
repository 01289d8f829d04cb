// Matrix products whose bits do not depend on the number of threads.
#pragma once

#include <ATen/core/Tensor.h>

namespace tilewise {

// out = a @ b, or out += a @ b with `accumulate`.
// out (M, N), a (M, K), b (K, N). `a` and `b` share a dtype; `out` has the same one or, for half
// precision factors, float32: then each product is rounded once and the sum is kept in float32.
void matmul(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b, bool accumulate);

}  // namespace tilewise
