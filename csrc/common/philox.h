// The one random number generator: Philox4x32-10, a function of a key and a counter, for host and
// device. Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011.
#pragma once

#include <cstdint>

#include "inline.h"

namespace tilewise {

// The last word of the counter: what the words are for.
enum class Stream : uint32_t { Gumbel = 0, Gaussian = 1, NegativeTexts = 2, NegativeImages = 3 };

// The product of the low 32 bits of `a` and of `m`.
TILEWISE_HOST_DEVICE uint64_t low_product(uint64_t a, uint32_t m) { return (a & 0xFFFFFFFFu) * m; }

// The high 32 bits of `a` as low ones.
TILEWISE_HOST_DEVICE uint64_t high_half(uint64_t a) { return a >> 32; }

// Replaces a counter of four words by four random ones. Words are the low halves of 64-bit numbers,
// or of vectors of such. Their high halves are never read, so that nothing need clear them.
template <typename Word>
TILEWISE_HOST_DEVICE void philox4x32(Word (&c)[4], uint64_t key) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
#if defined(__GNUC__) && !defined(__CUDACC__)
#pragma GCC unroll 10
#endif
  for (int round = 0; round < 10; ++round) {
    const Word p = low_product(c[0], 0xD2511F53u), q = low_product(c[2], 0xCD9E8D57u);
    c[0] = high_half(q) ^ c[1] ^ static_cast<uint64_t>(k0);
    c[1] = q;
    c[2] = high_half(p) ^ c[3] ^ static_cast<uint64_t>(k1);
    c[3] = p;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

}  // namespace tilewise
