// Matrix products whose bits do not depend on the number of threads.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>

namespace tilewise {

// Buffers that live as long as a call, so that the peak of memory stays flat.
struct Workspace {
  at::Tensor pairs;   // a packed right factor
  at::Tensor blocks;  // one block of a product for each thread
};

// out = a @ b, or out += a @ b with `accumulate`.
// out (M, N), a (M, K), b (K, N). All float32 or all float64; or `a` and `b` bfloat16 and `out`
// float32, where has_bfloat16_matmul(): then every product and sum is kept in float32.
void matmul(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b, bool accumulate,
            Workspace& workspace);

// A part of a product, computed by one thread. Blocks are numbered row by row; their places depend
// on the size of the product alone.
struct Block {
  int64_t index, row, rows, col, cols;
};

// Computes a @ b without storing it: hands each block to `finish(block, product)`, on the thread
// that computed it and while it is in that thread's cache. product (rows, cols) is contiguous.
void matmul_blocks(const at::Tensor& a, const at::Tensor& b, Workspace& workspace,
                   const std::function<void(const Block&, const at::Tensor&)>& finish);

// How many blocks an (M, N) product has.
int64_t count_blocks(int64_t rows, int64_t cols);

// `a` in the layout that matmul reads without a copy: worth calling for a factor of several
// products.
at::Tensor as_left_factor(const at::Tensor& a);

// The transpose of a float32 matrix (M, N), contiguous: (N, M). On all threads, unlike torch's.
at::Tensor transposed(const at::Tensor& x);

// Whether this CPU multiplies bfloat16 natively (AMX, AVX-512 BF16).
bool has_bfloat16_matmul();

}  // namespace tilewise
