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
    std::optional<int64_t> positives, bool need_image, bool need_text, bool need_scale,
    bool need_bias);

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

}  // namespace tilewise
