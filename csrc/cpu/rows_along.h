// Tensors as rows along one of their dimensions, and pieces of them as vector kernels read them.
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

// The key of the random stream.
uint64_t random_key(const at::Tensor& seed);

// The number of a row in the random stream, which wraps.
inline uint64_t noise_row(int64_t row, int64_t row_offset) {
  return static_cast<uint64_t>(row) + static_cast<uint64_t>(row_offset);
}

// What the kernels of an op compute in: float64 for float64, else float32.
inline at::ScalarType compute_type(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// A piece of consecutive rows: where the operands' are, each (count, cols), contiguous, of the type
// that is computed in.
struct Piece {
  int64_t first, count;
  std::vector<void*> data;  // inputs, then outputs; null for an undefined tensor
};

// Cuts the rows of all operands into pieces, whose places depend on sizes alone, and hands them to
// `work` on all threads, converted and transposed where they must be. `outputs` are contiguous.
void for_pieces(const RowsAlong& shape, at::ScalarType type, const std::vector<at::Tensor>& inputs,
                const std::vector<at::Tensor>& outputs,
                const std::function<void(const Piece&)>& work);

}  // namespace tilewise
