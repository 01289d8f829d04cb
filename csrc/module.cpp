// Python module tilewise._C: build information, and registration with torch's dispatcher.
#include <ATen/Version.h>
#include <ATen/cpu/Utils.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>
#include <torch/version.h>

#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "cpu/matmul.h"
#include "cpu/simd/capability.h"
#include "cpu/simd/gumbel_softmax.h"
#include "ops.h"

namespace py = pybind11;

namespace tilewise {

Capability cpu_capability() {
  static const Capability chosen = [] {
    const std::string name = at::get_cpu_capability();
    return name == "AVX512" ? Capability::AVX512
           : name == "AVX2" ? Capability::AVX2
                            : Capability::DEFAULT;
  }();
  return chosen;
}

namespace {

constexpr const char* kUnits[] = {"none", "pairs", "vnni", "amx"};

IntegerUnit best_unit() {
#if defined(__x86_64__)
  if (cpu_capability() == Capability::DEFAULT) return IntegerUnit::NONE;
  if (cpu_capability() == Capability::AVX2) return IntegerUnit::PAIRS;
  if (!__builtin_cpu_supports("avx512vnni")) return IntegerUnit::PAIRS;
  // init_amx asks the kernel for the use of the tile registers.
  if (__builtin_cpu_supports("amx-int8") && at::cpu::init_amx()) return IntegerUnit::AMX;
  return IntegerUnit::VNNI;
#else
  return IntegerUnit::NONE;
#endif
}

}  // namespace

IntegerUnit integer_unit() {
  static const IntegerUnit chosen = [] {
    IntegerUnit unit = best_unit();
    const char* wanted = std::getenv("TILEWISE_INTEGER_UNIT");
    for (int i = 0; wanted && i < static_cast<int>(unit); ++i) {
      if (std::string(wanted) == kUnits[i]) unit = static_cast<IntegerUnit>(i);
    }
    return unit;
  }();
  return chosen;
}

namespace {

const char* capability_name() {
  switch (cpu_capability()) {
    case Capability::AVX512:
      return "AVX512";
    case Capability::AVX2:
      return "AVX2";
    default:
      return "DEFAULT";
  }
}

std::vector<uint32_t> random_words(int64_t seed, int64_t row, int64_t cols, uint32_t op) {
  std::vector<uint32_t> words(cols);
  TILEWISE_DISPATCH(stream_words)
  (static_cast<uint64_t>(seed), static_cast<uint64_t>(row), cols, op, words.data());
  return words;
}

py::dict build_info() {
  py::dict info;
  info["torch"] = TORCH_VERSION;
  info["compiler"] = __VERSION__;
  info["cpu_capability"] = capability_name();
  info["integer_unit"] = kUnits[static_cast<int>(integer_unit())];
  info["bfloat16_matmul"] = has_bfloat16_matmul();
  return info;
}

// A binary compiled against another torch may load and then misbehave, so nothing is registered
// before this check. (Static registration would run while the library is still loading.)
void check_torch_version() {
  const auto running = py::module_::import("torch").attr("__version__").cast<std::string>();
  if (running.substr(0, running.find('+')) != TORCH_VERSION) {
    throw py::import_error("compiled for torch " TORCH_VERSION ", running torch " + running);
  }
}

void register_cpu_ops() {
  static const auto library = std::make_unique<torch::Library>(
      torch::Library::IMPL, "tilewise", c10::DispatchKey::CPU, __FILE__, __LINE__);
  library->impl("clip_loss", &clip_loss);
  library->impl("code_sums", &code_sums);
  library->impl("gaussian_sample", &gaussian_sample);
  library->impl("gaussian_sample_backward", &gaussian_sample_backward);
  library->impl("gumbel_argmax", &gumbel_argmax);
  library->impl("gumbel_softmax", &gumbel_softmax);
  library->impl("gumbel_softmax_backward", &gumbel_softmax_backward);
  library->impl("hard_negatives", &hard_negatives);
  library->impl("itc_loss", &itc_loss);
  library->impl("nearest_code", &nearest_code);
  library->impl("pack_codebook", &pack_codebook);
  library->impl("sigmoid_loss", &sigmoid_loss);
}

}  // namespace
}  // namespace tilewise

PYBIND11_MODULE(_C, m) {
  tilewise::check_torch_version();
  tilewise::register_cpu_ops();
  m.doc() = "Compiled part of tilewise: importing it registers the C++ operators.";
  m.def("random_words", &tilewise::random_words, py::arg("seed"), py::arg("row"), py::arg("cols"),
        py::arg("op"), "The first words of a row of the random stream, as the kernels make them.");
  m.def("build_info", &tilewise::build_info, "How this extension was built and what it uses.");
}
