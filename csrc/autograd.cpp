#include "autograd.h"

#include <ATen/SavedTensorHooks.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>
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

bool is_plain(const Tensor& x) { return x.is_cpu() && !at::isTensorSubclassLike(x); }

// Whether the incoming gradient is 1, as in `loss.backward()`: those of the inputs are finished.
bool is_one(const Tensor& grad) {
  const bool readable = is_plain(grad) && !grad.is_neg() && !grad._is_zerotensor();
  if (!readable || grad.numel() != 1) return false;
  if (grad.scalar_type() == at::kFloat) return *grad.const_data_ptr<float>() == 1;
  return grad.scalar_type() == at::kDouble && *grad.const_data_ptr<double>() == 1;
}

// A tensor of its own for what is saved: Python's objects outlive their variables with a tensor.
// No view of the other for autograd, which would forbid its owner to write to it.
Tensor apart(const Tensor& x) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  return is_plain(x) ? x.detach() : x;
}

// Whether nobody else can read a saved gradient: its node holds it, and this pass of the graph.
bool held_alone(const Tensor& gradient) {
  return is_plain(gradient) && gradient.use_count() == 2 && gradient.storage().use_count() == 1;
}

// By an op, whose own formula a second differentiation meets, and which says that there is none.
variable_list scaled(const Tensor& grad, at::TensorList gradients, at::TensorList inputs) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("tilewise::scale_gradients", "")
          .typed<std::vector<Tensor>(const Tensor&, at::TensorList, at::TensorList)>();
  if (at::GradMode::is_enabled()) return op.call(grad, gradients, inputs);
  const at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(grad, gradients, inputs);
}

struct Loss : Function<Loss> {
  static constexpr bool is_traceable = true;

  // inputs: those whose gradients are needed; outputs: where to find these.
  static Tensor forward(AutogradContext* ctx, const at::TensorList& inputs, const Call& call,
                        const std::vector<size_t>& outputs) {
    call.below_autograd();
    variable_list saved;
    for (const size_t i : outputs) saved.push_back(apart(call.results()[i].toTensor()));
    saved.insert(saved.end(), inputs.begin(), inputs.end());
    // Hooks may hold what is saved, and not be seen to.
    ctx->saved_data["hooks"] = at::SavedTensorDefaultHooks::get_hooks().has_value();
    ctx->save_for_backward(std::move(saved));
    ctx->set_materialize_grads(false);
    return call.results()[0].toTensor();
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list saved = ctx->get_saved_variables();  // checkpointing lets it be read once
    const size_t count = saved.size() / 2;
    variable_list results(count + 2);  // nothing for the two other arguments
    if (!grads[0].defined()) return results;
    // A pass that ends the graph hands on what is saved, if it is the result and only its own.
    const bool last = !at::GradMode::is_enabled() && !ctx->saved_data["hooks"].toBool() &&
                      !torch::autograd::get_current_graph_task_keep_graph() && is_one(grads[0]);
    variable_list gradients, inputs;
    std::vector<size_t> places;
    for (size_t i = 0; i < count; ++i) {
      if (!ctx->needs_input_grad(i)) continue;
      const Tensor& input = saved[count + i];
      Tensor gradient = std::move(saved[i]);
      if (last && gradient.scalar_type() == input.scalar_type() &&
          gradient.sizes() == input.sizes() && held_alone(gradient)) {
        results[i] = std::move(gradient);
        continue;
      }
      places.push_back(i);
      gradients.push_back(std::move(gradient));
      inputs.push_back(input);
    }
    if (places.empty()) return results;
    const variable_list values = scaled(grads[0], gradients, inputs);
    for (size_t k = 0; k < places.size(); ++k) results[places[k]] = values[k];
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

// Of an op whose gradients are made in the backward pass.
class Formula {
 public:
  Formula(const std::string& name, const std::vector<Source::Places>& sources,
          std::vector<int64_t> targets, bool kernel)
      : sources(sources.begin(), sources.end()),
        targets(std::move(targets)),
        differentiable_(find(name + "_formula")),
        kernel_(kernel ? find(name + "_backward") : differentiable_),
        index_(static_cast<int64_t>(all().size())) {
    all().push_back(this);
  }

  const std::vector<Source> sources;
  const std::vector<int64_t> targets;

  // What a Derivative keeps is found again by a number, which compiled autograd can hold as well.
  int64_t index() const { return index_; }
  static const Formula& of(int64_t index) { return *all()[index]; }

  void run(Stack* stack) const {
    if (at::GradMode::is_enabled()) return differentiable_.callBoxed(stack);
    const at::AutoDispatchBelowADInplaceOrView guard;
    kernel_.callBoxed(stack);
  }

 private:
  static c10::OperatorHandle find(const std::string& name) {
    return c10::Dispatcher::singleton().findSchemaOrThrow(("tilewise::" + name).c_str(), "");
  }
  static std::vector<const Formula*>& all() {
    static std::vector<const Formula*> list;
    return list;
  }

  const c10::OperatorHandle differentiable_, kernel_;
  const int64_t index_;
};

// What the forward pass keeps for one argument of the backward pass; nothing for the others.
c10::IValue kept(const Source& source, c10::ArrayRef<c10::IValue> inputs,
                 c10::ArrayRef<c10::IValue> outputs) {
  if (source.input && (!source.flag || inputs[*source.flag].toBool())) return inputs[*source.input];
  return source.output ? outputs[*source.output] : c10::IValue();
}

struct Derivative : Function<Derivative> {
  static constexpr bool is_traceable = true;

  // inputs: those of `targets`. Integers among the results are no matter to autograd.
  static variable_list forward(AutogradContext* ctx, const at::TensorList&, const Call& call,
                               const Formula& formula) {
    const std::vector<c10::IValue> inputs = call.arguments().vec();
    call.below_autograd();
    variable_list saved, results;
    ctx->saved_data["formula"] = formula.index();
    for (size_t i = 0; i < formula.sources.size(); ++i) {
      c10::IValue value = kept(formula.sources[i], inputs, call.results());
      if (value.isTensor()) {
        saved.push_back(value.toTensor());
      } else {
        saved.emplace_back();
        if (!value.isNone()) ctx->saved_data[std::to_string(i)] = std::move(value);
      }
    }
    ctx->save_for_backward(std::move(saved));
    ctx->set_materialize_grads(false);
    for (const c10::IValue& value : call.results()) results.push_back(value.toTensor());
    return results;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Formula& formula = Formula::of(ctx->saved_data["formula"].toInt());
    const size_t count = formula.targets.size();
    variable_list results(count + 2);  // nothing for the two other arguments
    if (std::none_of(grads.begin(), grads.end(), [](const Tensor& x) { return x.defined(); })) {
      return results;
    }
    const variable_list saved = ctx->get_saved_variables();  // checkpointing lets it be read once
    Stack stack;
    for (size_t i = 0; i < formula.sources.size(); ++i) {
      stack.push_back(argument(ctx, formula, i, grads, saved[i]));
    }
    formula.run(&stack);
    for (size_t i = 0; i < count; ++i) {
      if (ctx->needs_input_grad(i)) results[i] = stack[i].toTensor();
    }
    return results;
  }

  static c10::IValue argument(AutogradContext* ctx, const Formula& formula, size_t i,
                              const variable_list& grads, const Tensor& saved) {
    const Source& source = formula.sources[i];
    const auto tensor = [](const Tensor& x) {
      return x.defined() ? c10::IValue(x) : c10::IValue();
    };
    if (source.gradient) return tensor(grads[*source.gradient]);
    if (!source.need) {
      const auto rest = ctx->saved_data.find(std::to_string(i));
      return rest == ctx->saved_data.end() ? tensor(saved) : rest->second;
    }
    const auto place = std::find(formula.targets.begin(), formula.targets.end(), *source.need);
    return ctx->needs_input_grad(place - formula.targets.begin());
  }
};

class FormulaKernel : public c10::OperatorKernel {
 public:
  explicit FormulaKernel(std::unique_ptr<const Formula> formula) : formula_(std::move(formula)) {}

  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
    const Call call{op, keys, stack};
    variable_list inputs;
    for (const int64_t i : formula_->targets) inputs.push_back(call.arguments()[i].toTensor());
    if (!records(inputs)) return call.below_autograd();
    variable_list results = Derivative::apply(at::TensorList(inputs), call, *formula_);
    for (size_t i = 0; i < results.size(); ++i) call.result(i) = std::move(results[i]);
  }

 private:
  const std::unique_ptr<const Formula> formula_;
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

void register_formula(const std::string& name, const std::vector<Source::Places>& sources,
                      std::vector<int64_t> targets, bool kernel) {
  auto formula = std::make_unique<const Formula>(name, sources, std::move(targets), kernel);
  library().impl(name.c_str(), torch::CppFunction::makeFromBoxedFunctor(
                                   std::make_unique<FormulaKernel>(std::move(formula))));
}

}  // namespace tilewise
