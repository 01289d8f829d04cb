// tilewise::itc_loss on CPU: softmax-weighted means of the candidates in one pass, then arithmetic
// on B rows. The vector kernel is cpu/itc_loss.cpp.
#include "simd/itc_loss.h"

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "../ops.h"
#include "contrast.h"

namespace tilewise {
namespace {

using at::Tensor;

// A block of logits, its candidates and its means stay in the cache of one core.
constexpr int64_t kRows = 256, kCols = 256;
// Few rows are no work for many threads: then the candidates are cut into so many stretches that
// there are about this many pieces.
constexpr int64_t kPieces = 32;

int64_t divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The candidates: keys, then the queue.
class Candidates {
 public:
  Candidates(const Tensor& keys, const std::optional<Tensor>& queue, at::ScalarType type)
      : segments_{keys}, type_(type) {
    if (queue) segments_.push_back(*queue);
    for (const Tensor& x : segments_) tiles_ += divide(x.size(0), kCols);
  }

  int64_t tiles() const { return tiles_; }

  struct Tile {
    int64_t first;  // the number of its first candidate
    Tensor rows;    // (n, D), contiguous
  };
  Tile tile(int64_t number) const {
    size_t s = 0;
    int64_t first = 0;
    for (; number >= divide(segments_[s].size(0), kCols); first += segments_[s++].size(0)) {
      number -= divide(segments_[s].size(0), kCols);
    }
    return {first + number * kCols, rows_of(segments_[s], number * kCols, kCols, type_)};
  }

  // The nearest of each query (B, D), of the given type; 0 where none is.
  Tensor nearest(const std::vector<ItcRow>& of_row, const at::TensorOptions& options) const {
    const int64_t rows = of_row.size();
    const Tensor out = at::zeros({rows, segments_[0].size(1)}, options);
    int64_t first = 0;
    for (const Tensor& x : segments_) {
      const Tensor from = at::empty({rows}, options.dtype(at::kLong)), to = at::empty_like(from);
      int64_t found = 0;
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t place = of_row[i].nearest - first;
        if (place < 0 || place >= x.size(0)) continue;
        from.mutable_data_ptr<int64_t>()[found] = place;
        to.mutable_data_ptr<int64_t>()[found++] = i;
      }
      const Tensor values = x.index_select(0, from.narrow(0, 0, found));
      out.index_copy_(0, to.narrow(0, 0, found), values.to(options.dtype()));
      first += x.size(0);
    }
    return out;
  }

 private:
  std::vector<Tensor> segments_;
  at::ScalarType type_;
  int64_t tiles_ = 0;
};

// Softmax over the candidates, for each of B queries.
struct SoftmaxMean {
  std::vector<ItcRow> of_row;
  Tensor mean;  // (B, D) of the candidates; undefined if not needed
};

class SoftmaxPass {
 public:
  SoftmaxPass(const Tensor& query, const Candidates& candidates, at::ScalarType type, double scale,
              bool need_mean)
      : candidates_(candidates),
        scale_(scale),
        query_(query.to(type).contiguous()),
        rows_(query.size(0)),
        dim_(need_mean ? query.size(1) : 0),
        across_(divide(rows_, kRows)),
        stretches_(std::clamp<int64_t>(divide(kPieces, std::max<int64_t>(across_, 1)), 1,
                                       std::max<int64_t>(candidates.tiles(), 1))),
        of_row_(stretches_ * rows_) {
    const auto sum_type = type == at::kDouble ? at::kDouble : at::kFloat;
    means_ = at::zeros({stretches_, rows_, dim_}, query.options().dtype(sum_type));
  }

  SoftmaxMean run() {
    at::parallel_for(0, across_ * stretches_, 1, [&](int64_t begin, int64_t end) {
      const at::AutoDispatchBelowADInplaceOrView no_autograd;  // not inherited by worker threads
      for (int64_t k = begin; k < end; ++k) piece(k / stretches_, k % stretches_);
    });
    SoftmaxMean out;
    out.of_row.resize(rows_);
    if (dim_) out.mean = at::empty({rows_, dim_}, means_.options());
    means_.scalar_type() == at::kDouble ? merge<double>(out) : merge<float>(out);
    return out;
  }

 private:
  // kRows of the queries against one stretch of the candidates.
  void piece(int64_t across, int64_t stretch) {
    const int64_t row = across * kRows, rows = std::min(kRows, rows_ - row);
    const Tensor query = query_.narrow(0, row, rows);  // (m, D)
    const Tensor mean = means_.select(0, stretch).narrow(0, row, rows);
    const Tensor dots = at::empty({rows, kCols}, means_.options());
    Workspace workspace;
    const int64_t tiles = candidates_.tiles();
    for (int64_t t = tiles * stretch / stretches_; t < tiles * (stretch + 1) / stretches_; ++t) {
      const auto [first, keys] = candidates_.tile(t);
      const int64_t n = keys.size(0);
      const Tensor z = dots.narrow(1, 0, n);
      matmul(z, query, keys.t(), /*accumulate=*/false, workspace);
      const ItcBlock block{z.scalar_type() == at::kDouble,
                           z.mutable_data_ptr(),
                           rows,
                           n,
                           z.stride(0),
                           first,
                           scale_,
                           of_row_.data() + stretch * rows_ + row,
                           mean.mutable_data_ptr(),
                           dim_};
      TILEWISE_DISPATCH(itc_weights)(block);
      // Weights are not rounded to bfloat16: the loss depends on the teacher's mean.
      if (dim_) matmul(mean, z, keys.to(z.scalar_type()), /*accumulate=*/true, workspace);
    }
  }

  template <typename T>
  void merge(SoftmaxMean& out) const {
    at::parallel_for(0, rows_, 16, [&](int64_t begin, int64_t end) {
      std::vector<double> mean(dim_);
      for (int64_t i = begin; i < end; ++i) {
        ItcRow& total = out.of_row[i];
        for (int64_t s = 0; s < stretches_; ++s) {
          const ItcRow& part = of_row_[s * rows_ + i];
          if (part.largest > total.largest) total.nearest = part.nearest;
          tilewise::merge(total, part);
        }
        // Without a logit above -inf there is no softmax.
        std::fill(mean.begin(), mean.end(), total.sum == 0 ? NAN : 0.0);
        for (int64_t s = 0; s < stretches_; ++s) {
          const ItcRow& part = of_row_[s * rows_ + i];
          if (part.sum == 0) continue;
          const double factor = std::exp(part.largest - total.largest) / total.sum;
          const T* x = means_.const_data_ptr<T>() + (s * rows_ + i) * dim_;
          for (int64_t d = 0; d < dim_; ++d) mean[d] += factor * x[d];
        }
        if (dim_) std::copy(mean.begin(), mean.end(), out.mean.mutable_data_ptr<T>() + i * dim_);
      }
    });
  }

  const Candidates& candidates_;
  double scale_;
  Tensor query_;
  int64_t rows_, dim_, across_, stretches_;
  std::vector<ItcRow> of_row_;  // [stretch * rows_ + row]
  Tensor means_;                // (stretches, B, D): sums of weights times candidates
};

struct Sums {
  double loss = 0, d_scale = 0;
};

// With targets tau, the mean of the candidates under them: loss = log_sum - scale * <query, tau>,
// and its gradient scale * (mean - tau) in the query. The sums over the queries that have a match.
// A logit's rounding would show where the loss is small, so the largest is computed anew, in
// float64 like its target: then log_sum is off by what is rounded in logits that weigh less.
template <typename T>
Sums finish(const Tensor& query, const SoftmaxMean& student, const Tensor& nearest,
            const SoftmaxMean& teacher, const Tensor& matched, const Tensor& count, double alpha,
            double scale, const Tensor& d_query) {
  const int64_t rows = query.size(0), dim = query.size(1);
  const auto* matches = count.const_data_ptr<int64_t>();
  const double weight =
      1.0 / std::max<int64_t>(rows - std::count(matches, matches + rows, int64_t{0}), 1);
  std::vector<Sums> terms(rows);
  at::parallel_for(0, rows, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T* q = query.const_data_ptr<T>() + i * dim;
      const T* near = nearest.const_data_ptr<T>() + i * dim;
      const T* match = matched.const_data_ptr<T>() + i * dim;
      const T* soft = teacher.mean.defined() ? teacher.mean.const_data_ptr<T>() + i * dim : match;
      const T* mean = student.mean.defined() ? student.mean.const_data_ptr<T>() + i * dim : nullptr;
      T* gradient = d_query.numel() ? d_query.mutable_data_ptr<T>() + i * dim : nullptr;
      if (matches[i] == 0) {
        if (gradient) std::fill(gradient, gradient + dim, T{0});
        continue;
      }
      double excess = 0, rest = 0;  // of the largest logit over the target's; of the mean
      for (int64_t d = 0; d < dim; ++d) {
        const double tau = alpha * soft[d] + (1 - alpha) * match[d];
        excess += q[d] * (near[d] - tau);
        if (!mean) continue;
        rest += q[d] * (mean[d] - tau);
        if (gradient) gradient[d] = static_cast<T>(weight * scale * (mean[d] - tau));
      }
      const double sum = student.of_row[i].sum;
      const double log_sum = sum == 0 ? NAN : std::log(sum);
      terms[i] = {weight * (scale * excess + log_sum), weight * rest};
    }
  });
  Sums total;  // in a fixed order: the same bits for every thread count
  for (const Sums& term : terms) {
    total.loss += term.loss;
    total.d_scale += term.d_scale;
  }
  return total;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> itc_loss(const Tensor& query, const Tensor& keys,
                                            const Tensor& logit_scale,
                                            const std::optional<Tensor>& queue,
                                            const std::optional<Tensor>& teacher_query,
                                            const Tensor& alpha, const Tensor& matched,
                                            const Tensor& count, bool need_query, bool need_scale) {
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const Features features(query, keys);
  if (queue) Features(query, *queue);
  if (teacher_query) {
    Features(query, *teacher_query);
    TORCH_CHECK_VALUE(teacher_query->size(0) == query.size(0), "teacher_query: expected ",
                      query.sizes(), ", got ", teacher_query->sizes());
  }
  TORCH_CHECK_VALUE(
      matched.sizes() == query.sizes() && matched.dtype() == features.options().dtype(),
      "matched: expected ", query.sizes(), ", got ", matched.sizes());
  TORCH_CHECK_VALUE(count.numel() == query.size(0) && count.scalar_type() == at::kLong,
                    "count: expected an int64 for each query, got ", count.sizes());
  const double scale = one_element("logit_scale", logit_scale);
  const double part = teacher_query ? one_element("alpha", alpha) : 0;
  const auto options = features.options();
  const Candidates candidates(keys, queue, features.product_type);
  const auto softmax = [&](const Tensor& x, bool need_mean) {
    return SoftmaxPass(x, candidates, features.product_type, scale, need_mean).run();
  };
  const SoftmaxMean student = softmax(query, need_query || need_scale);
  const SoftmaxMean teacher = part != 0 ? softmax(*teacher_query, true) : SoftmaxMean();
  const Tensor nearest = candidates.nearest(student.of_row, options);
  const Tensor d_query = at::empty(need_query ? query.sizes() : at::IntArrayRef({0}), options);
  const auto finish_as = [&](auto kind) {
    using T = decltype(kind);
    return finish<T>(query.to(options).contiguous(), student, nearest, teacher,
                     matched.contiguous(), count.contiguous(), part, scale, d_query);
  };
  const Sums sums = options.dtype() == at::kDouble ? finish_as(double{}) : finish_as(float{});
  return {at::scalar_tensor(sums.loss, options), d_query,
          need_scale ? at::scalar_tensor(sums.d_scale, options) : at::empty({0}, options)};
}

}  // namespace tilewise
