// tilewise::itc_loss on CPU: softmax-weighted means of the candidates in one pass, then arithmetic
// on B rows. The vector kernel is in simd/itc_loss.cpp.
#include "simd/itc_loss.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/integer.h"
#include "../common/registration.h"
#include "../common/sum.h"
#include "arguments.h"
#include "features.h"
#include "matmul.h"
#include "rows.h"

namespace tilewise {
namespace {

using at::Tensor;

// A block of logits, its candidates and its means stay in the cache of one core.
constexpr int64_t kRows = 256, kCols = 256;
static_assert(kCols <= kMaxBlockCols);
// Few rows are no work for many threads: then the candidates are cut into so many stretches that
// there are about this many pieces.
constexpr int64_t kPieces = 32;

// The candidates: keys, then the queue.
class Candidates {
 public:
  Candidates(const Tensor& keys, const std::optional<Tensor>& queue, at::ScalarType type)
      : segments_{keys}, type_(type) {
    if (queue) segments_.push_back(*queue);
    for (const Tensor& x : segments_) tiles_ += ceil_div(x.size(0), kCols);
  }

  int64_t tiles() const { return tiles_; }

  struct Tile {
    int64_t first;  // the number of its first candidate
    Tensor rows;    // (n, D), contiguous
  };
  Tile tile(int64_t number) const {
    size_t s = 0;
    int64_t first = 0;
    for (; number >= ceil_div(segments_[s].size(0), kCols); first += segments_[s++].size(0)) {
      number -= ceil_div(segments_[s].size(0), kCols);
    }
    return {first + number * kCols, rows_of(segments_[s], number * kCols, kCols, type_)};
  }

  // Those with the largest logit of each query (B, D), of the given type; 0 where there is none.
  Tensor largest(const std::vector<ItcRow>& of_row, const at::TensorOptions& options) const {
    const int64_t rows = of_row.size();
    const Tensor out = at::zeros({rows, segments_[0].size(1)}, options);
    int64_t first = 0;
    for (const Tensor& x : segments_) {
      const Tensor from = at::empty({rows}, options.dtype(at::kLong)), to = at::empty_like(from);
      int64_t found = 0;
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t place = of_row[i].argmax - first;
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
        across_(ceil_div(rows_, kRows)),
        stretches_(std::clamp<int64_t>(ceil_div(kPieces, std::max<int64_t>(across_, 1)), 1,
                                       std::max<int64_t>(candidates.tiles(), 1))),
        of_row_(stretches_ * rows_) {
    sums_ = at::zeros({stretches_, rows_, dim_}, query.options().dtype(compute_type(query)));
  }

  SoftmaxMean run() {
    at::parallel_for(0, across_ * stretches_, 1, [&](int64_t begin, int64_t end) {
      const BelowAutograd below;
      for (int64_t k = begin; k < end; ++k) piece(k / stretches_, k % stretches_);
    });
    SoftmaxMean out;
    out.of_row.resize(rows_);
    if (dim_) out.mean = at::empty({rows_, dim_}, sums_.options());
    sums_.scalar_type() == at::kDouble ? merge<double>(out) : merge<float>(out);
    return out;
  }

 private:
  // kRows of the queries against one stretch of the candidates.
  void piece(int64_t across, int64_t stretch) {
    const int64_t row = across * kRows, rows = std::min(kRows, rows_ - row);
    const Tensor query = query_.narrow(0, row, rows);  // (m, D)
    const Tensor sums = sums_.select(0, stretch).narrow(0, row, rows);
    const Tensor dots = at::empty({rows, kCols}, sums_.options());
    Tensor space;  // of a packed factor
    const int64_t tiles = candidates_.tiles();
    for (int64_t t = tiles * stretch / stretches_; t < tiles * (stretch + 1) / stretches_; ++t) {
      const auto [first, keys] = candidates_.tile(t);
      const int64_t n = keys.size(0);
      const Tensor z = dots.narrow(1, 0, n);
      matmul(z, query, keys.t(), /*accumulate=*/false, space);
      const ItcBlock block{
          {z.scalar_type() == at::kDouble, z.const_data_ptr(), rows, n, z.stride(0), scale_},
          first,
          of_row_.data() + stretch * rows_ + row,
          z.mutable_data_ptr(),
          sums.mutable_data_ptr(),
          dim_};
      TILEWISE_DISPATCH(itc_weights)(block);
      // Weights are not rounded to bfloat16: the loss depends on the teacher's mean.
      if (dim_) matmul(sums, z, keys.to(z.scalar_type()), /*accumulate=*/true, space);
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
          if (part.largest > total.largest) total.argmax = part.argmax;
          tilewise::merge(total, part);
        }
        // Without a logit above -inf there is no softmax.
        std::fill(mean.begin(), mean.end(), total.sum == 0 ? NAN : 0.0);
        for (int64_t s = 0; s < stretches_; ++s) {
          const ItcRow& part = of_row_[s * rows_ + i];
          if (part.sum == 0) continue;
          const double factor = std::exp(part.largest - total.largest) / total.sum;
          const T* x = sums_.const_data_ptr<T>() + (s * rows_ + i) * dim_;
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
  Tensor sums_;                 // (stretches, B, D): sums of weights times candidates
};

struct Sums {
  double loss, d_scale;
};

// With targets tau, the mean of the candidates under them: loss = log_sum - scale * <query, tau>,
// and its gradient scale * (mean - tau) in the query. The sums over the queries that have a match.
// A logit's rounding would show where the loss is small, so the largest is computed anew, in
// float64 like its target: then log_sum is off by what is rounded in logits that weigh less.
template <typename T>
class Finish {
 public:
  // All (B, D) and contiguous; largest: the candidate with the largest logit.
  const Tensor query, largest, positive_mean, student_mean, teacher_mean;
  double alpha, scale;

  // Of one query, whose loss counts `weight`. gradient (D) may be null.
  Sums row(int64_t i, double sum, double weight, T* gradient) const {
    const int64_t dim = query.size(1);
    const T *q = at(query, i), *top = at(largest, i), *match = at(positive_mean, i);
    const T *mean = at(student_mean, i), *soft = at(teacher_mean, i);
    Sum excess, rest;  // of the largest logit over the target's; of the mean
    for (int64_t d = 0; d < dim; ++d) {
      const double tau = soft ? alpha * soft[d] + (1 - alpha) * match[d] : match[d];
      excess.add(q[d] * (top[d] - tau));
      if (!mean) continue;
      rest.add(q[d] * (mean[d] - tau));
      if (gradient) gradient[d] = static_cast<T>(weight * scale * (mean[d] - tau));
    }
    const double log_sum = sum == 0 ? NAN : std::log(sum);
    return {weight * (scale * excess.value() + log_sum), weight * rest.value()};
  }

 private:
  static const T* at(const Tensor& x, int64_t i) {
    return x.defined() ? x.const_data_ptr<T>() + i * x.size(1) : nullptr;
  }
};

template <typename T>
Sums finish(const Finish<T>& each, const std::vector<ItcRow>& rows, const Tensor& num_positives,
            const Tensor& d_query) {
  const int64_t count = rows.size(), dim = each.query.size(1);
  const auto* matches = num_positives.const_data_ptr<int64_t>();
  const double weight =
      1.0 / std::max<int64_t>(count - std::count(matches, matches + count, int64_t{0}), 1);
  T* gradients = d_query.numel() ? d_query.mutable_data_ptr<T>() : nullptr;
  std::vector<Sums> terms(count);
  at::parallel_for(0, count, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      T* gradient = gradients ? gradients + i * dim : nullptr;
      if (matches[i] > 0) {
        terms[i] = each.row(i, rows[i].sum, weight, gradient);
      } else if (gradient) {
        std::fill(gradient, gradient + dim, T{0});
      }
    }
  });
  Sum loss, d_scale;  // in a fixed order: the same bits for every thread count
  for (const Sums& term : terms) {
    loss.add(term.loss);
    d_scale.add(term.d_scale);
  }
  return {loss.value(), d_scale.value()};
}

void check(const Features& features, const std::optional<Tensor>& queue,
           const std::optional<Tensor>& teacher_query, const Tensor& positive_mean,
           const Tensor& num_positives) {
  const Tensor& query = features.rows;
  if (queue) Features("query", query, "queue", *queue);
  if (teacher_query) {
    Features("query", query, "teacher_query", *teacher_query);
    TORCH_CHECK_VALUE(teacher_query->size(0) == query.size(0), "teacher_query: expected ",
                      query.sizes(), ", got ", teacher_query->sizes());
  }
  TORCH_CHECK_VALUE(
      positive_mean.sizes() == query.sizes() && positive_mean.dtype() == features.options().dtype(),
      "positive_mean: expected ", features.options().dtype(), " ", query.sizes(), ", got ",
      positive_mean.dtype(), " ", positive_mean.sizes());
  TORCH_CHECK_VALUE(
      num_positives.numel() == query.size(0) && num_positives.scalar_type() == at::kLong,
      "num_positives: expected an int64 for each query, got ", num_positives.sizes());
}

// See pyext/tilewise/ops/itc_loss.py. positive_mean (B, D), num_positives (B,): the mean of the
// candidates that match each query, and how many do. Gradients that are not needed come back empty.
std::tuple<Tensor, Tensor, Tensor> itc_loss(const Tensor& query, const Tensor& keys,
                                            const Tensor& logit_scale,
                                            const std::optional<Tensor>& queue,
                                            const std::optional<Tensor>& teacher_query,
                                            const Tensor& alpha, const Tensor& positive_mean,
                                            const Tensor& num_positives, bool need_query,
                                            bool need_scale) {
  const BelowAutograd below;
  const Features features("query", query, "keys", keys);
  check(features, queue, teacher_query, positive_mean, num_positives);
  const double scale = one_element("logit_scale", logit_scale);
  const double share = teacher_query ? one_element("alpha", alpha) : 0;
  const auto options = features.options();
  const Candidates candidates(keys, queue, features.product_type);
  const auto softmax = [&](const Tensor& x, bool need_mean) {
    return SoftmaxPass(x, candidates, features.product_type, scale, need_mean).run();
  };
  const SoftmaxMean student = softmax(query, need_query || need_scale);
  const SoftmaxMean teacher = share != 0 ? softmax(*teacher_query, true) : SoftmaxMean();
  const Tensor d_query = at::empty(need_query ? query.sizes() : at::IntArrayRef({0}), options);
  const auto finish_as = [&](auto kind) {
    const Finish<decltype(kind)> each{query.to(options).contiguous(),
                                      candidates.largest(student.of_row, options),
                                      positive_mean.contiguous(),
                                      student.mean,
                                      teacher.mean,
                                      share,
                                      scale};
    return finish(each, student.of_row, num_positives.contiguous(), d_query);
  };
  const Sums sums = options.dtype() == at::kDouble ? finish_as(double{}) : finish_as(float{});
  return {scalar_result(sums.loss, options), d_query, scalar_if(need_scale, sums.d_scale, options)};
}

// See pyext/tilewise/ops/_blocks.py.
std::tuple<Tensor, Tensor> itc_block_means(const Tensor& query, const Tensor& keys,
                                           const Tensor& logit_scale, bool need_mean) {
  const BelowAutograd below;
  const Features features("query", query, "keys", keys);
  const Candidates candidates(keys, std::nullopt, features.product_type);
  const SoftmaxMean found = SoftmaxPass(query, candidates, features.product_type,
                                        one_element("logit_scale", logit_scale), need_mean)
                                .run();
  const int64_t n = query.size(0);
  const Tensor sums = at::empty({2, n}, features.options().dtype(at::kDouble));
  auto* values = sums.mutable_data_ptr<double>();
  for (int64_t i = 0; i < n; ++i) {
    values[i] = found.of_row[i].largest;
    values[n + i] = found.of_row[i].sum;
  }
  if (!need_mean) return {sums, at::empty({0}, features.options())};
  if (query.numel() == 0 || keys.size(0) == 0)
    return {sums, at::zeros(query.sizes(), features.options())};
  return {sums, found.mean};
}

}  // namespace

TILEWISE_REGISTER(CPU, library) {
  library.impl("itc_loss", &itc_loss);
  library.impl("itc_block_means", &itc_block_means);
}

}  // namespace tilewise
