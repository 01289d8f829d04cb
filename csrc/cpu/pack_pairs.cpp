#include "pack_pairs.h"

namespace tilewise {
namespace CPU_CAPABILITY {

void pack_pairs(const uint16_t* rows, int64_t stride, int64_t pairs, int64_t cols, uint32_t* out) {
  for (int64_t i = 0; i < pairs; ++i) {
    const uint16_t* even = rows + 2 * i * stride;
    const uint16_t* odd = even + stride;
    uint32_t* pair = out + i * cols;
    for (int64_t j = 0; j < cols; ++j) pair[j] = even[j] | static_cast<uint32_t>(odd[j]) << 16;
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace tilewise
