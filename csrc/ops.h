// The operators of this extension. Their schemas live in Python (pyext/tilewise/ops).
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/string_view.h>

#include <optional>
#include <tuple>

namespace tilewise {

// See pyext/tilewise/ops/sigmoid_loss.py. Gradients that are not needed come back empty.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> sigmoid_loss(
    const at::Tensor& image_features, const at::Tensor& text_features,
    const at::Tensor& logit_scale, const std::optional<at::Tensor>& logit_bias,
    std::optional<int64_t> positives, const std::optional<at::Tensor>& image_ids,
    const std::optional<at::Tensor>& text_ids, bool need_image, bool need_text, bool need_scale,
    bool need_bias);

// See pyext/tilewise/ops/clip_loss.py. Gradients that are not needed come back empty.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> clip_loss(
    const at::Tensor& image_features, const at::Tensor& text_features,
    const at::Tensor& logit_scale, std::optional<int64_t> positives,
    const std::optional<at::Tensor>& image_ids, const std::optional<at::Tensor>& text_ids,
    double label_smoothing, bool need_image, bool need_text, bool need_scale);

// See pyext/tilewise/ops/itc_loss.py. matched (B, D), count (B,): the mean of the candidates that
// match each query, and how many do. Gradients that are not needed come back empty.
std::tuple<at::Tensor, at::Tensor, at::Tensor> itc_loss(
    const at::Tensor& query, const at::Tensor& keys, const at::Tensor& logit_scale,
    const std::optional<at::Tensor>& queue, const std::optional<at::Tensor>& teacher_query,
    const at::Tensor& alpha, const at::Tensor& matched, const at::Tensor& count, bool need_query,
    bool need_scale);

// See pyext/tilewise/ops/hard_negatives.py.
std::tuple<at::Tensor, at::Tensor> hard_negatives(const at::Tensor& image_features,
                                                  const at::Tensor& text_features,
                                                  const at::Tensor& logit_scale,
                                                  std::optional<int64_t> positives,
                                                  const std::optional<at::Tensor>& image_ids,
                                                  const std::optional<at::Tensor>& text_ids,
                                                  const at::Tensor& seed, int64_t row_offset);

// See pyext/tilewise/ops/nearest_code.py. x (H, N, D), codebook (H, K, D), mask (H, N); results
// (H, N, k). packed: from pack_codebook, of the same codebook and metric.
std::tuple<at::Tensor, at::Tensor> nearest_code(const at::Tensor& x, const at::Tensor& codebook,
                                                c10::string_view metric, int64_t k,
                                                const std::optional<at::Tensor>& mask,
                                                const std::optional<at::Tensor>& packed);
at::Tensor pack_codebook(const at::Tensor& codebook, c10::string_view metric);

// See pyext/tilewise/ops/code_sums.py. x (H, N, D), index (H, N); results (H, K) and (H, K, D).
std::tuple<at::Tensor, at::Tensor> code_sums(const at::Tensor& x, const at::Tensor& index,
                                             int64_t num_codes);

// See pyext/tilewise/ops/gumbel_softmax.py. saved: the relaxed sample, or logits if `hard`.
at::Tensor gumbel_softmax(const at::Tensor& logits, const at::Tensor& tau, const at::Tensor& seed,
                          int64_t row_offset, int64_t dim, bool hard);
std::tuple<at::Tensor, at::Tensor> gumbel_softmax_backward(
    const at::Tensor& grad, const at::Tensor& saved, const at::Tensor& tau, const at::Tensor& seed,
    int64_t row_offset, int64_t dim, bool hard, bool need_tau);

// See pyext/tilewise/ops/gumbel_argmax.py. Without `log_prob` the second result is empty.
std::tuple<at::Tensor, at::Tensor> gumbel_argmax(const at::Tensor& logits, const at::Tensor& seed,
                                                 int64_t row_offset, int64_t dim, int64_t k,
                                                 bool log_prob);

// See pyext/tilewise/ops/gaussian_sample.py.
std::tuple<at::Tensor, at::Tensor> gaussian_sample(const at::Tensor& mean, const at::Tensor& logvar,
                                                   const at::Tensor& seed, int64_t row_offset,
                                                   double low, double high);
std::tuple<at::Tensor, at::Tensor> gaussian_sample_backward(
    const std::optional<at::Tensor>& d_z, const std::optional<at::Tensor>& d_kl,
    const at::Tensor& mean, const at::Tensor& logvar, const at::Tensor& seed, int64_t row_offset,
    double low, double high);

}  // namespace tilewise
