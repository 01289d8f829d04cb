// Tensors as rows along one of their dimensions, which vector kernels read piece by piece.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <vector>

namespace tilewise {

// Rows along a dimension of a tensor: a row for each `outer` and `inner`, numbered in this order.
struct RowsAlong {
  int64_t outer, cols, inner;

  RowsAlong(at::IntArrayRef sizes, int64_t dim);
  int64_t rows() const { return outer * inner; }
};

// Of a floating tensor, checked.
RowsAlong rows_along(const char* name, const at::Tensor& x, int64_t dim);

// A piece of consecutive rows: where the operands' are, each (count, cols), contiguous, of the type
// that is computed in.
struct Piece {
  int64_t first, count;
  std::vector<const void*> inputs;  // null for an undefined tensor
  std::vector<void*> outputs;
};

// Cuts the rows of all operands into pieces, whose places depend on sizes alone, and hands them to
// `work` on all threads, converted and transposed where they must be. `outputs` are contiguous.
// What is converted or transposed takes 4 MiB for each operand and thread, or a row where that is
// longer.
void for_pieces(const RowsAlong& shape, at::ScalarType type, const std::vector<at::Tensor>& inputs,
                const std::vector<at::Tensor>& outputs,
                const std::function<void(const Piece&)>& work);

}  // namespace tilewise
