// Python module tilewise._C: build information, and registration with torch's dispatcher. The
// schemas of the operators live in Python (pyext/tilewise/ops).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>
#include <torch/version.h>

#include <string>
#include <utility>
#include <vector>

#include "autograd.h"
#include "common/registration.h"
#include "cpu/contrast.h"
#include "cpu/simd/capability.h"
#include "cpu/simd/matmul.h"
#include "cpu/simd/random_words.h"

namespace py = pybind11;

namespace tilewise {
namespace {

std::vector<uint32_t> random_words(int64_t seed, int64_t row, int64_t cols, uint32_t op) {
  std::vector<uint32_t> words(cols);
  TILEWISE_DISPATCH(stream_words)
  (static_cast<uint64_t>(seed), static_cast<uint64_t>(row), cols, op, words.data());
  return words;
}

// How many blocks threads share, of the logits and of both gradients, for every tile.
std::vector<std::pair<int64_t, int64_t>> contrast_blocks(int64_t rows, int64_t cols, int64_t dim) {
  std::vector<std::pair<int64_t, int64_t>> counts;
  const Tiles tiles(rows, cols);
  tiles.for_each([&](const Tile& tile) {
    counts.emplace_back(tile.blocks().count(), gradient_blocks(tile.rows, dim).count() +
                                                   gradient_blocks(tile.cols, dim).count());
  });
  return counts;
}

py::dict build_info() {
  py::dict info;
  info["torch"] = TORCH_VERSION;
  info["compiler"] = __VERSION__;
  info["cpu_capability"] = name_of(cpu_capability());
  info["integer_unit"] = name_of(integer_unit());
  info["bfloat16_unit"] = name_of(bfloat16_unit());
  return info;
}

// A binary compiled against another torch may load and then misbehave, so nothing is registered
// before this check.
void check_torch_version() {
  const auto running = py::module_::import("torch").attr("__version__").cast<std::string>();
  if (running.substr(0, running.find('+')) != TORCH_VERSION) {
    throw py::import_error("compiled for torch " TORCH_VERSION ", running torch " + running);
  }
}

void register_ops() {
  static std::vector<torch::Library> libraries;  // what they register lasts as long as they do
  for (const Registration* r = Registration::first(); r; r = r->next) {
    libraries.emplace_back(torch::Library::IMPL, "tilewise", r->key, __FILE__, __LINE__);
    r->function(libraries.back());
  }
}

}  // namespace
}  // namespace tilewise

PYBIND11_MODULE(_C, m) {
  tilewise::check_torch_version();
  tilewise::register_ops();
  m.doc() = "Compiled part of tilewise: importing it registers the C++ operators.";
  m.def("random_words", &tilewise::random_words, py::arg("seed"), py::arg("row"), py::arg("cols"),
        py::arg("op"), "The first words of a row of the random stream, as the kernels make them.");
  m.def("register_loss", &tilewise::register_loss, py::arg("name"), py::arg("places"),
        py::arg("flags"), "Registers the autograd formula of a loss; see csrc/autograd.h.");
  m.def("register_formula", &tilewise::register_formula, py::arg("name"), py::arg("sources"),
        py::arg("targets"), py::arg("kernel"), "The same of another op.");
  m.def("contrast_blocks", &tilewise::contrast_blocks, py::arg("rows"), py::arg("cols"),
        py::arg("dim"),
        "The numbers of blocks of logits and of gradients that threads share, for every tile.");
  m.def("build_info", &tilewise::build_info, "How this extension was built and what it uses.");
}
