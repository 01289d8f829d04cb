// Autograd formulas of the operators, on every device. What they are made of stands in Python
// beside the schemas (pyext/tilewise/ops/_register.py), which registers the same where there is no
// extension; here a call takes microseconds.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace tilewise {

// Of tilewise::name, a loss whose outputs after the first are its gradients: outputs[1 + i] is that
// of inputs[places[i]], where inputs[flags[i]] says that it is needed.
void register_loss(const std::string& name, std::vector<int64_t> places,
                   std::vector<int64_t> flags);

// Where an argument of a backward pass comes from; see Source in _register.py.
struct Source {
  using Place = std::optional<int64_t>;
  using Places = std::tuple<Place, Place, Place, Place, Place>;

  explicit Source(const Places& places) { std::tie(gradient, need, input, output, flag) = places; }

  Place gradient, need, input, output, flag;
};

// Of tilewise::name: what its backward pass is given, and the inputs that its results belong to.
// tilewise::name_formula is made of differentiable operations; tilewise::name_backward is the
// kernel for gradients that nobody will differentiate, if there is one.
void register_formula(const std::string& name, const std::vector<Source::Places>& sources,
                      std::vector<int64_t> targets, bool kernel);

}  // namespace tilewise
