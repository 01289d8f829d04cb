// tilewise::scale_gradients, of the losses' backward pass, on every device.
#include <ATen/ops/_foreach_mul.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mul.h>

#include <vector>

#include "common/registration.h"

namespace tilewise {
namespace {

using at::Tensor;

constexpr int64_t kSmall = 16384;  // elements; torch's product takes longer to begin than these do

template <typename From, typename To>
void multiply(const Tensor& gradient, const Tensor& grad, const Tensor& result) {
  const From factor = *grad.const_data_ptr<From>();
  const From* in = gradient.const_data_ptr<From>();
  To* out = result.mutable_data_ptr<To>();
  for (int64_t i = 0; i < result.numel(); ++i) out[i] = static_cast<To>(in[i] * factor);
}

// Whether it was done: not for the types that losses do not have.
bool multiply(const Tensor& gradient, const Tensor& grad, const Tensor& result) {
  const at::ScalarType from = gradient.scalar_type(), to = result.scalar_type();
  if (grad.scalar_type() != from) return false;
  if (from == at::kDouble && to == at::kDouble) {
    multiply<double, double>(gradient, grad, result);
  } else if (from == at::kFloat && to == at::kFloat) {
    multiply<float, float>(gradient, grad, result);
  } else if (from == at::kFloat && to == at::kBFloat16) {
    multiply<float, at::BFloat16>(gradient, grad, result);
  } else if (from == at::kFloat && to == at::kHalf) {
    multiply<float, at::Half>(gradient, grad, result);
  } else {
    return false;
  }
  return true;
}

// Whether `multiply` may do it: on the CPU, and sooner than torch's product begins.
bool small(const Tensor& gradient, const Tensor& grad) {
  const bool near = gradient.is_cpu() && grad.is_cpu() && grad.numel() == 1;
  return near && gradient.numel() <= kSmall && gradient.is_contiguous();
}

std::vector<Tensor> scale_gradients(const Tensor& grad, at::TensorList gradients,
                                    at::TensorList inputs) {
  TORCH_CHECK_VALUE(gradients.size() == inputs.size(), "gradients: expected ", inputs.size(),
                    ", got ", gradients.size());
  std::vector<Tensor> results(inputs.size());
  // A launch on a GPU costs more than most of these products: what need not be rounded shares one.
  std::vector<Tensor> alike;
  std::vector<size_t> places;
  for (size_t i = 0; i < inputs.size(); ++i) {
    TORCH_CHECK_VALUE(gradients[i].numel() == inputs[i].numel(), "gradients: expected ",
                      inputs[i].sizes(), ", got ", gradients[i].sizes());
    const Tensor gradient = gradients[i].view(inputs[i].sizes());
    const bool rounded = gradient.scalar_type() != inputs[i].scalar_type();
    const bool here = small(gradient, grad);
    if (!rounded && !here) {
      alike.push_back(gradient);
      places.push_back(i);
      continue;
    }
    results[i] = at::empty(inputs[i].sizes(), inputs[i].options());
    if (!here || !multiply(gradient, grad, results[i])) at::mul_out(results[i], gradient, grad);
  }
  if (!alike.empty()) {
    std::vector<Tensor> products = at::_foreach_mul(alike, grad);
    for (size_t k = 0; k < places.size(); ++k) results[places[k]] = std::move(products[k]);
  }
  return results;
}

}  // namespace

TILEWISE_REGISTER(CompositeExplicitAutograd, library) {
  library.impl("scale_gradients", &scale_gradients);
}

}  // namespace tilewise
