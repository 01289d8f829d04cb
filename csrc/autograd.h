// Autograd formulas of the operators, on every device. What they are made of stands in Python
// beside the schemas (pyext/tilewise/ops/_register.py), which registers the same where there is no
// extension; here a call takes microseconds.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace tilewise {

// Of tilewise::name, a loss whose outputs after the first are its gradients: outputs[1 + i] is that
// of inputs[places[i]], where inputs[flags[i]] says that it is needed.
void register_loss(const std::string& name, std::vector<int64_t> places,
                   std::vector<int64_t> flags);

}  // namespace tilewise
