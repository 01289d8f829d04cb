// Matrix products whose bits do not depend on the number of threads.
#pragma once

#include <ATen/core/Tensor.h>

namespace tilewise {

// out = a @ b, or out += a @ b with `accumulate`.
// out (M, N), a (M, K), b (K, N). All float32 or all float64; or `a` and `b` bfloat16 and `out`
// float32, where has_bfloat16_matmul(): then every product and sum is kept in float32.
void matmul(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b, bool accumulate);

// `a` in the layout that matmul reads without a copy: worth calling for a factor of several products.
at::Tensor as_left_factor(const at::Tensor& a);

// Whether this CPU multiplies bfloat16 natively (AMX, AVX-512 BF16).
bool has_bfloat16_matmul();

}  // namespace tilewise
