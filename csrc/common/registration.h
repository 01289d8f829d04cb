// How operators reach torch's dispatcher: each file notes what it has to register while the library
// is being loaded, and the module's init function registers it, once it has compared the versions
// of torch. (Registration while loading would run before that.)
#pragma once

#include <torch/library.h>

namespace tilewise {

class Registration {
 public:
  using Function = void (*)(torch::Library&);

  Registration(c10::DispatchKey key, Function function)
      : key(key), function(function), next(first()) {
    first() = this;
  }
  static const Registration*& first() {
    static const Registration* list = nullptr;
    return list;
  }

  const c10::DispatchKey key;
  const Function function;
  const Registration* const next;
};

}  // namespace tilewise

// Once in a file: TILEWISE_REGISTER(CPU, library) { library.impl("op", &function); }
#define TILEWISE_REGISTER(key, library)                                         \
  static void register_ops(torch::Library& library);                            \
  static const Registration registration(c10::DispatchKey::key, &register_ops); \
  static void register_ops(torch::Library& library)
