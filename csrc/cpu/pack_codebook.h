// A codebook as the filters of nearest_code read it, in one tensor that can be kept.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "simd/nearest_code.h"

namespace tilewise {

// The norms of all codes, as exact distances need them.
std::vector<double> exact_norms(const Search& search);

// codebook (K, D); see `packed_view`.
at::Tensor pack_codes(const Search& search);

// What pack_codes wrote. Throws if it was packed for another codebook or instruction set.
Packed packed_view(const at::Tensor& packed, const Search& search);

// Whether filters cannot serve this codebook: a code has an infinity and no NaN, and might be the
// nearest, or (in float64) squares of elements overflow or vanish.
bool needs_exact_search(const at::Tensor& packed);

}  // namespace tilewise
