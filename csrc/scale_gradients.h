// What the losses' backward pass does: finished gradients times the incoming one.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace tilewise {

// grad * gradient, in the dtype and shape of each input. `in_place`: nobody else will read the
// gradients, and their memory may become the results'.
std::vector<at::Tensor> scale_gradients(const at::Tensor& grad, at::TensorList gradients,
                                        at::TensorList inputs, bool in_place);

}  // namespace tilewise
