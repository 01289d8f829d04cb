// The operators of this extension. Their schemas live in Python (pyext/tilewise/ops).
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace tilewise {

// See pyext/tilewise/ops/sigmoid_loss.py. Gradients that are not needed come back empty.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> sigmoid_loss(
    const at::Tensor& image_features, const at::Tensor& text_features,
    const at::Tensor& logit_scale, const std::optional<at::Tensor>& logit_bias,
    std::optional<int64_t> positives, bool need_image, bool need_text, bool need_scale,
    bool need_bias);

}  // namespace tilewise
