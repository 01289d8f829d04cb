// Matrix products in blocks, whose bits do not depend on the number of threads.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>

#include "simd/matmul.h"

namespace tilewise {

// A part of a matrix, computed by one thread.
struct Block {
  int64_t index, row, rows, col, cols;
};

// How a matrix (rows, cols) is cut into blocks: by its size alone. They are numbered in bands of
// rows, from left to right, so that neighbours in number share what they read.
class Grid {
 public:
  // Blocks of block_rows x block_cols, and what is left at the edges.
  Grid(int64_t rows, int64_t cols, int64_t block_rows, int64_t block_cols)
      : rows_(rows), cols_(cols), block_rows_(block_rows), block_cols_(block_cols) {}

  int64_t down() const { return ceil_div(rows_, block_rows_); }
  int64_t across() const { return ceil_div(cols_, block_cols_); }
  int64_t count() const { return down() * across(); }
  Block block(int64_t index) const;
  int64_t index(int64_t down, int64_t across) const;  // of the block in that place

 private:
  int64_t rows_, cols_, block_rows_, block_cols_;
};

// Runs task(0), ..., task(count - 1) on all threads, below autograd. Each takes a few of those that
// are left and comes back for more, so that nobody waits for one that is slow. A small `work`, in
// multiplications, is not worth waking threads.
void deal(int64_t count, int64_t work, const std::function<void(int64_t)>& task);

// A left factor (M, K) of products with a RightFactor of the same type: a matrix, for torch's
// product of doubles, or as our kernels read it. Its memory must live as long.
struct Left {
  at::Tensor matrix;
  LeftFactor elements;

  Left() = default;
  explicit Left(const at::Tensor& rows);  // with the numbers of a row side by side
  Left(const at::Tensor& matrix, const LeftFactor& elements) : matrix(matrix), elements(elements) {}
};

// A right factor (K, N): float32, bfloat16 where bfloat16_unit() is not NONE, or float64. Packed
// once, then read by all threads.
class RightFactor {
 public:
  // What a factor (depth, cols) needs of memory, in numbers of float: a multiple of 64 bytes.
  static int64_t floats(int64_t depth, int64_t cols, at::ScalarType type);

  // b and `memory` must live as long. pack() has to follow, on any thread, for each of the panels.
  void set(const at::Tensor& b, float* memory);
  int64_t panels() const;
  void pack(int64_t panel) const;

  // out = or += that block of left @ b, on this thread. Its columns begin with a panel. out (rows,
  // cols) is of floats, or of doubles, with `stride` between its rows.
  void multiply(const Left& left, const Block& block, void* out, int64_t stride,
                bool accumulate) const;

 private:
  at::Tensor b_;
  float* packed_ = nullptr;
};

// out = a @ b, or out += a @ b with `accumulate`, on this thread. out (M, N), a (M, K), b (K, N).
// `space` keeps its memory for the next product.
void matmul(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b, bool accumulate,
            at::Tensor& space);

}  // namespace tilewise
