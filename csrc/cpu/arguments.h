// What the operators of every family do with their arguments and results.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

namespace tilewise {

// While it lives, what an operator calls of torch neither records gradients nor casts. Worker
// threads do not inherit it.
class BelowAutograd {
  const at::AutoDispatchBelowADInplaceOrView no_autograd_;
  const c10::impl::ExcludeDispatchKeyGuard no_autocast_{c10::autocast_dispatch_keyset};
};

// What is computed in, and what sums and gradients are kept in: float64 for float64, else float32.
inline at::ScalarType compute_type(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// The value of a tensor of one element.
double one_element(const char* name, const at::Tensor& x);

// A tensor () of the options' dtype; infinite where that has no room for the value.
at::Tensor scalar_result(double value, const at::TensorOptions& options);
// The same, or an empty tensor where nobody needs it.
at::Tensor scalar_if(bool needed, double value, const at::TensorOptions& options);

// The key of the random stream.
uint64_t random_key(const at::Tensor& seed);

// The number of a row in the random stream, which wraps.
inline uint64_t noise_row(int64_t row, int64_t row_offset) {
  return static_cast<uint64_t>(row) + static_cast<uint64_t>(row_offset);
}

}  // namespace tilewise
