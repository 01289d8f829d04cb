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

// Few wide rows, which threads share by columns, in blocks whose places depend on sizes alone.
constexpr int64_t kRowBlock = 4096;

// Whether there are too few rows for the threads, of float, and wide enough to be cut.
bool is_wide(const RowsAlong& shape, at::ScalarType type);

// x as float (rows, cols), contiguous: itself, or a copy.
at::Tensor wide_rows(const at::Tensor& x, const RowsAlong& shape);

// Where such rows are computed that go to `out`, contiguous: there, or to be saved there.
at::Tensor wide_output(const at::Tensor& out, const RowsAlong& shape);

// out = such rows, unless it is them.
void save_wide(const at::Tensor& rows, const RowsAlong& shape, const at::Tensor& out);

inline int64_t row_blocks(const RowsAlong& shape) { return (shape.cols - 1) / kRowBlock + 1; }

struct RowPart {
  int64_t row, col, cols;  // a block of columns of a row
  int64_t at;              // of its first element in (rows, cols)
  int64_t number;          // in (rows, row_blocks)
};

// Hands all blocks of all rows to `work`, on all threads.
void for_row_parts(const RowsAlong& shape, const std::function<void(const RowPart&)>& work);

}  // namespace tilewise
