// tilewise::scale_gradients, of the losses' backward pass, on every device.
#include <ATen/Parallel.h>
#include <ATen/ops/_foreach_mul.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mul.h>

#include <vector>

#include "common/registration.h"
#include "cpu/pages.h"
#include "cpu/simd/scale_gradients.h"

namespace tilewise {
namespace {

using at::Tensor;

constexpr int64_t kGrain = 32768;  // elements; fewer do not pay for waking a thread

template <typename From, typename To>
void scale(const Tensor& gradient, const Tensor& grad, const Tensor& result) {
  using Kernel = void (*)(const From*, From, int64_t, To*);
  const Kernel kernel = TILEWISE_DISPATCH_AS(Kernel, scale);
  const From factor = *grad.const_data_ptr<From>();
  const From* in = gradient.const_data_ptr<From>();
  To* out = result.mutable_data_ptr<To>();
  fetch_pages(out, result.nbytes());
  at::parallel_for(0, result.numel(), kGrain, [&](int64_t begin, int64_t end) {
    kernel(in + begin, factor, end - begin, out + begin);
  });
}

// Whether it was done: not for the types that losses do not have.
bool scale_on_cpu(const Tensor& gradient, const Tensor& grad, const Tensor& result) {
  const at::ScalarType from = gradient.scalar_type(), to = result.scalar_type();
  if (from == at::kDouble && to == at::kDouble) {
    scale<double, double>(gradient, grad, result);
  } else if (from == at::kFloat && to == at::kFloat) {
    scale<float, float>(gradient, grad, result);
  } else if (from == at::kFloat && to == at::kBFloat16) {
    scale<float, at::BFloat16>(gradient, grad, result);
  } else if (from == at::kFloat && to == at::kHalf) {
    scale<float, at::Half>(gradient, grad, result);
  } else {
    return false;
  }
  return true;
}

// Whether our kernels read it; the others are torch's.
bool readable(const Tensor& gradient, const Tensor& grad) {
  return gradient.is_cpu() && grad.is_cpu() && grad.numel() == 1 && gradient.is_contiguous() &&
         gradient.scalar_type() == grad.scalar_type();
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
    const bool here = readable(gradient, grad);
    if (!rounded && !here) {
      alike.push_back(gradient);
      places.push_back(i);
      continue;
    }
    results[i] = at::empty(inputs[i].sizes(), inputs[i].options());
    if (!here || !scale_on_cpu(gradient, grad, results[i])) at::mul_out(results[i], gradient, grad);
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
