// Interface of the random stream.
#pragma once

#include <cstdint>

#include "capability.h"

namespace tilewise {

// The first words of a row of the random stream; op: the number of a Stream, philox.h.
#define TILEWISE_DECLARE(CAPABILITY)                                                        \
  namespace CAPABILITY {                                                                    \
  void stream_words(uint64_t seed, uint64_t row, int64_t cols, uint32_t op, uint32_t* out); \
  }
TILEWISE_FOR_EACH_CAPABILITY(TILEWISE_DECLARE)
#undef TILEWISE_DECLARE

}  // namespace tilewise
