// tilewise::info_nce on CPU: cross entropies of the queries. The vector kernels are in
// simd/info_nce.cpp.
#include "simd/info_nce.h"

#include <optional>
#include <tuple>

#include "../common/registration.h"
#include "arguments.h"
#include "cross_entropy.h"

namespace tilewise {
namespace {

using at::Tensor;

// See pyext/tilewise/ops/info_nce.py. Gradients that are not needed come back empty.
std::tuple<Tensor, Tensor, Tensor, Tensor> info_nce(const Tensor& query, const Tensor& keys,
                                                    const Tensor& logit_scale,
                                                    std::optional<int64_t> positives,
                                                    const std::optional<Tensor>& query_ids,
                                                    const std::optional<Tensor>& key_ids,
                                                    double label_smoothing, bool need_query,
                                                    bool need_keys, bool need_scale) {
  const BelowAutograd below;
  const Features features("query", query, "keys", keys);
  const Positives matches = Positives::of(features, positives, query_ids, key_ids);
  using Side = CrossEntropy::Side;
  CrossEntropy loss(features, matches, one_element("logit_scale", logit_scale),
                    Side(matches.per_image(), features.cols.size(0), label_smoothing, 1.0),
                    std::nullopt,
                    {TILEWISE_DISPATCH(info_nce_log_sums), TILEWISE_DISPATCH(info_nce_gradient)});
  return loss.results(need_query, need_keys, need_scale);
}

}  // namespace

TILEWISE_REGISTER(CPU, library) { library.impl("info_nce", &info_nce); }

}  // namespace tilewise
