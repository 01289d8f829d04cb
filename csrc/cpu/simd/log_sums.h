// Interface of the kernel that merges sums of exponentials.
#pragma once

#include <cstdint>

#include "capability.h"
#include "log_sum.h"

namespace tilewise {

// merge_log_sums: merge() of log_sum.h for each of `count`, adding those of `part` to `all`.
#define TILEWISE_DECLARE(CAPABILITY)                                   \
  namespace CAPABILITY {                                               \
  void merge_log_sums(LogSum* all, const LogSum* part, int64_t count); \
  }
TILEWISE_FOR_EACH_CAPABILITY(TILEWISE_DECLARE)
#undef TILEWISE_DECLARE

}  // namespace tilewise
