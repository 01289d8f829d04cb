#include "arguments.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/scalar_tensor.h>

namespace tilewise {

using at::Tensor;

double one_element(const char* name, const Tensor& x) {
  TORCH_CHECK_VALUE(x.numel() == 1, name, ": expected one element, got ", x.sizes());
  return x.item<double>();
}

Tensor scalar_result(double value, const at::TensorOptions& options) {
  // scalar_tensor itself throws where the value is finite and too large for the dtype.
  return at::scalar_tensor(value, options.dtype(at::kDouble)).to(options);
}

Tensor scalar_if(bool needed, double value, const at::TensorOptions& options) {
  return needed ? scalar_result(value, options) : at::empty({0}, options);
}

uint64_t random_key(const Tensor& seed) {
  TORCH_CHECK_TYPE(seed.scalar_type() == at::kLong && seed.numel() == 1,
                   "seed: expected one int64 element, got ", seed.scalar_type(), " ", seed.sizes());
  return static_cast<uint64_t>(seed.item<int64_t>());
}

}  // namespace tilewise
