// A codebook as the filters of nearest_code read it, in one tensor that can be kept.
#pragma once

#include <ATen/core/Tensor.h>

#include "cpu/nearest_code.h"

namespace tilewise {

// codebook (K, D); see `packed_view`.
at::Tensor pack_codes(const Search& search);

// What pack_codes wrote. Throws if it was packed for another codebook or instruction set.
Packed packed_view(const at::Tensor& packed, const Search& search);

// Whether a code has an infinity and no NaN: such a code can be the nearest.
bool has_infinite_codes(const at::Tensor& packed);

}  // namespace tilewise
