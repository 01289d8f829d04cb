// The random stream itself, for tests: what the kernels make of it never leaves the registers.
#include "random_words.h"

#include "noise.h"

namespace tilewise {
namespace CPU_CAPABILITY {

void stream_words(uint64_t seed, uint64_t row, int64_t cols, uint32_t op, uint32_t* out) {
  for (int64_t col = 0; col < cols; col += kStep) {
    Words c[4];
    random_words({seed, row}, col, static_cast<Stream>(op), c);
    const Words a = beside(c[0], c[1]), b = beside(c[2], c[3]);
    uint32_t words[kStep];
    columns<false>(a, b).as<Wide<uint32_t>>().store(words);
    columns<true>(a, b).as<Wide<uint32_t>>().store(words + 16);
    for (int64_t i = col; i < cols && i < col + kStep; ++i) out[i] = words[i - col];
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace tilewise
