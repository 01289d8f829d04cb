#include "matmul.h"

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#ifdef _OPENMP
#include <omp.h>
#endif

#include <algorithm>

#include "cpu/pack_pairs.h"

// MKL's, where torch is built on MKL; null elsewhere.
extern "C" int MKL_Set_Num_Threads_Local(int count) __attribute__((weak));

namespace tilewise {
namespace {

using at::Tensor;

// Makes gemm run on, and plan for, one thread. Without it MKL and oneDNN choose their blocking by
// the number of threads that they could have, even where they then run on one.
class OneThread {
 public:
  OneThread() {
    if (MKL_Set_Num_Threads_Local) mkl_threads_ = MKL_Set_Num_Threads_Local(1);
#ifdef _OPENMP
    omp_threads_ = omp_get_max_threads();
    omp_set_num_threads(1);
#endif
  }
  ~OneThread() {
    if (MKL_Set_Num_Threads_Local) MKL_Set_Num_Threads_Local(mkl_threads_);
#ifdef _OPENMP
    omp_set_num_threads(omp_threads_);
#endif
  }
  OneThread(const OneThread&) = delete;

 private:
  int mkl_threads_ = 0, omp_threads_ = 1;
};

// A vendor's gemm may split the sum over K differently for each thread count, so the threads are
// ours: the output is cut into blocks by its size alone, and each is computed by one thread.
struct Blocks {
  int64_t rows = 512, cols = 512;

  explicit Blocks(const Tensor& out) : out_rows(out.size(0)), out_cols(out.size(1)) {
    if (count() < kEnough) rows = 256;
    if (count() < kEnough) cols = 256;
  }
  int64_t across() const { return (out_cols + cols - 1) / cols; }
  int64_t count() const { return (out_rows + rows - 1) / rows * across(); }

  // Calls block(row, rows, col, cols) for each block.
  template <typename Block>
  void for_each(const Block& block) const {
    at::parallel_for(0, count(), 1, [&](int64_t begin, int64_t end) {
      const at::AutoDispatchBelowADInplaceOrView no_autograd;  // not inherited by worker threads
      const OneThread one_thread;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t r = i / across() * rows, c = i % across() * cols;
        block(r, std::min(rows, out_rows - r), c, std::min(cols, out_cols - c));
      }
    });
  }

 private:
  static constexpr int64_t kEnough = 32;  // to keep many threads busy
  int64_t out_rows, out_cols;
};

// (K, N) bfloat16 with K even -> (K / 2, N) of the pairs of rows that the instructions multiply.
Tensor pack_pairs(const Tensor& b) {
  const int64_t pairs = b.size(0) / 2, cols = b.size(1);
  // The transpose of a matrix with whole pairs in its rows is a transpose of 32-bit elements.
  if (b.t().is_contiguous() && b.stride(1) % 2 == 0) return b.t().view(at::kInt).t().contiguous();
  const Tensor rows = b.stride(1) == 1 ? b : b.contiguous();
  const Tensor out = at::empty({pairs, cols}, b.options().dtype(at::kInt));
  const auto kernel = TILEWISE_DISPATCH(pack_pairs);
  const auto* source = reinterpret_cast<const uint16_t*>(rows.const_data_ptr());
  auto* target = reinterpret_cast<uint32_t*>(out.mutable_data_ptr());
  at::parallel_for(0, pairs, 64, [&](int64_t begin, int64_t end) {
    kernel(source + 2 * begin * rows.stride(0), rows.stride(0), end - begin, cols,
           target + begin * cols);
  });
  return out;
}

constexpr int64_t kDepth = 512;  // of one bfloat16 product: its right factor stays in cache

// torch has no float32 product of bfloat16 matrices on CPU; this is the kernel of its attention.
void matmul_bfloat16(const Tensor& out, Tensor a, Tensor b, bool accumulate) {
  if (a.size(1) % 2) {  // pairs need an even K: the last column apart
    const int64_t last = a.size(1) - 1;
    if (!accumulate) out.zero_();
    out.addr_(a.select(1, last).to(at::kFloat), b.select(0, last).to(at::kFloat));
    a = a.narrow(1, 0, last);
    b = b.narrow(0, 0, last);
    accumulate = true;
  }
  const int64_t depth = a.size(1), cols = b.size(1);
  if (depth == 0) {
    if (!accumulate) out.zero_();
    return;
  }
  const Tensor rows = as_left_factor(a);
  const Tensor pairs = pack_pairs(b);
  const auto* left = rows.const_data_ptr<at::BFloat16>();
  const auto* right = reinterpret_cast<const at::BFloat16*>(pairs.const_data_ptr());
  auto* sums = out.mutable_data_ptr<float>();
  Blocks(out).for_each([&](int64_t r, int64_t m, int64_t c, int64_t n) {
    for (int64_t k = 0; k < depth; k += kDepth) {
      at::native::cpublas::brgemm(m, n, std::min(kDepth, depth - k), rows.stride(0), cols,
                                  out.stride(0), accumulate || k > 0,
                                  left + r * rows.stride(0) + k, right + k * cols + 2 * c,
                                  sums + r * out.stride(0) + c);
    }
    at::native::cpublas::brgemm_release();
  });
}

}  // namespace

void matmul(const Tensor& out, const Tensor& a, const Tensor& b, bool accumulate) {
  if (out.numel() == 0) return;
  if (a.scalar_type() == at::kBFloat16) return matmul_bfloat16(out, a, b, accumulate);
  Blocks(out).for_each([&](int64_t r, int64_t m, int64_t c, int64_t n) {
    Tensor block = out.narrow(0, r, m).narrow(1, c, n);
    const Tensor rows = a.narrow(0, r, m), cols = b.narrow(1, c, n);
    accumulate ? at::addmm_out(block, block, rows, cols) : at::mm_out(block, rows, cols);
  });
}

Tensor as_left_factor(const Tensor& a) {
  return a.scalar_type() == at::kBFloat16 && a.stride(1) != 1 ? a.contiguous() : a;
}

bool has_bfloat16_matmul() {
  return at::globalContext().userEnabledMkldnn() && at::native::cpublas::could_pack(at::kBFloat16);
}

}  // namespace tilewise
