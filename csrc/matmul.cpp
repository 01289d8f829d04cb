#include "matmul.h"

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>

#include <algorithm>

namespace tilewise {
namespace {

// A vendor's gemm may split the sum over K differently for each thread count, so the threads are
// ours: every block of the output has a fixed place and is computed by one thread.
constexpr int64_t kBlockRows = 512;
constexpr int64_t kBlockCols = 512;

void matmul_block(at::Tensor out, const at::Tensor& a, const at::Tensor& b, bool accumulate) {
  if (out.scalar_type() != a.scalar_type()) {
    const at::Tensor product = at::mm(a, b);
    accumulate ? out.add_(product) : out.copy_(product);
  } else if (accumulate) {
    at::addmm_out(out, out, a, b);
  } else {
    at::mm_out(out, a, b);
  }
}

}  // namespace

void matmul(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b, bool accumulate) {
  const int64_t rows = out.size(0), cols = out.size(1);
  if (rows == 0 || cols == 0) return;
  const int64_t block_cols = (cols + kBlockCols - 1) / kBlockCols;
  const int64_t blocks = (rows + kBlockRows - 1) / kBlockRows * block_cols;
  // At least two tasks: a single one would run outside a parallel region, where gemm takes threads.
  at::parallel_for(0, std::max<int64_t>(blocks, 2), 1, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowADInplaceOrView no_autograd;  // not inherited by worker threads
    for (int64_t i = begin; i < std::min(end, blocks); ++i) {
      const int64_t r = i / block_cols * kBlockRows, c = i % block_cols * kBlockCols;
      const int64_t m = std::min(kBlockRows, rows - r), n = std::min(kBlockCols, cols - c);
      matmul_block(out.narrow(0, r, m).narrow(1, c, n), a.narrow(0, r, m), b.narrow(1, c, n),
                   accumulate);
    }
  });
}

}  // namespace tilewise
