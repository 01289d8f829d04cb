#include "autograd.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mul.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <memory>
#include <utility>

namespace tilewise {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;
using torch::jit::Stack;

// A call on its way through the dispatcher: its stack holds arguments, then results.
struct Call {
  const c10::OperatorHandle& op;
  const c10::DispatchKeySet keys;
  Stack* const stack;

  void below_autograd() const {
    const at::AutoDispatchBelowADInplaceOrView guard;
    op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
  }
  c10::ArrayRef<c10::IValue> arguments() const {
    return torch::jit::last(*stack, op.schema().arguments().size());
  }
  c10::ArrayRef<c10::IValue> results() const {
    return torch::jit::last(*stack, op.schema().returns().size());
  }
  c10::IValue& result(size_t i) const {
    return torch::jit::peek(*stack, i, op.schema().returns().size());
  }
};

bool records(const variable_list& inputs) {
  return at::GradMode::is_enabled() && torch::autograd::any_variable_requires_grad(inputs);
}

// grad * gradients[i] in the dtype and shape of inputs[i], rounded once.
variable_list scaled(const Tensor& grad, at::TensorList gradients, at::TensorList inputs) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  variable_list results;
  results.reserve(inputs.size());
  for (size_t i = 0; i < inputs.size(); ++i) {
    const Tensor& input = inputs[i];
    Tensor value;
    if (gradients[i].scalar_type() == input.scalar_type()) {
      value = at::mul(gradients[i], grad);
    } else {
      value = at::empty_symint(gradients[i].sym_sizes(), input.options());
      at::mul_out(value, gradients[i], grad);
    }
    if (value.sym_sizes() != input.sym_sizes()) value = value.view_symint(input.sym_sizes());
    results.push_back(std::move(value));
  }
  return results;
}

// The same for a second differentiation to meet: to that, the gradients would be constants, and its
// result silently wrong. The inputs are arguments, so that what it looks for lies beyond.
struct Scaled : Function<Scaled> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext*, const Tensor& grad,
                               const at::TensorList& gradients, const at::TensorList& inputs) {
    return scaled(grad, gradients, inputs);
  }

  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK(false,
                "tilewise computes this loss's gradients in the forward pass and cannot "
                "differentiate them again; for second derivatives call it under `with "
                "tilewise.backend('reference'):`");
  }
};

struct Loss : Function<Loss> {
  static constexpr bool is_traceable = true;

  // inputs: those whose gradients are needed; outputs: where to find these.
  static Tensor forward(AutogradContext* ctx, const at::TensorList& inputs, const Call& call,
                        const std::vector<size_t>& outputs) {
    call.below_autograd();
    variable_list saved;
    for (const size_t i : outputs) saved.push_back(call.results()[i].toTensor());
    saved.insert(saved.end(), inputs.begin(), inputs.end());
    ctx->save_for_backward(std::move(saved));
    ctx->set_materialize_grads(false);
    return call.results()[0].toTensor();
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();  // checkpointing lets it be read once
    const size_t count = saved.size() / 2;
    variable_list results(count + 2);  // nothing for the two other arguments
    if (!grads[0].defined()) return results;
    variable_list gradients, inputs;
    std::vector<size_t> wanted;
    for (size_t i = 0; i < count; ++i) {
      if (!ctx->needs_input_grad(i)) continue;
      wanted.push_back(i);
      gradients.push_back(saved[i]);
      inputs.push_back(saved[count + i]);
    }
    const at::TensorList scales(gradients), of(inputs);
    const variable_list values = at::GradMode::is_enabled() ? Scaled::apply(grads[0], scales, of)
                                                            : scaled(grads[0], scales, of);
    for (size_t i = 0; i < wanted.size(); ++i) results[wanted[i]] = values[i];
    return results;
  }
};

class LossKernel : public c10::OperatorKernel {
 public:
  LossKernel(std::vector<int64_t> places, std::vector<int64_t> flags)
      : places_(std::move(places)), flags_(std::move(flags)) {}

  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
    const Call call{op, keys, stack};
    variable_list inputs;
    std::vector<size_t> outputs;
    for (size_t i = 0; i < places_.size(); ++i) {
      const c10::IValue& input = call.arguments()[places_[i]];
      if (!input.isTensor() || !call.arguments()[flags_[i]].toBool()) continue;
      inputs.push_back(input.toTensor());
      outputs.push_back(1 + i);
    }
    if (!records(inputs)) return call.below_autograd();
    Tensor loss = Loss::apply(at::TensorList(inputs), call, outputs);
    call.result(0) = std::move(loss);
  }

 private:
  const std::vector<int64_t> places_, flags_;
};

torch::Library& library() {
  static torch::Library library(torch::Library::IMPL, "tilewise", c10::DispatchKey::Autograd,
                                __FILE__, __LINE__);
  return library;
}

}  // namespace

void register_loss(const std::string& name, std::vector<int64_t> places,
                   std::vector<int64_t> flags) {
  library().impl(name.c_str(),
                 torch::CppFunction::makeFromBoxedFunctor(
                     std::make_unique<LossKernel>(std::move(places), std::move(flags))));
}

}  // namespace tilewise
