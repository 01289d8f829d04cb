#include "pages.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace tilewise {

#if defined(__linux__)

void fetch_pages(void* begin, int64_t bytes) {
  constexpr int64_t kLeast = 1 << 16;    // bytes; fewer do not pay for the calls
  constexpr int kPopulateForWrite = 23;  // MADV_POPULATE_WRITE, which older headers lack
  if (bytes < kLeast) return;
  static const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto first = reinterpret_cast<uintptr_t>(begin) / page * page;
  const auto last = reinterpret_cast<uintptr_t>(begin) + bytes;
  // Memory that an allocator had kept is there already: one page speaks for all.
  unsigned char present = 1;
  const uintptr_t middle = (first + (last - first) / 2) / page * page;
  if (mincore(reinterpret_cast<void*>(middle), page, &present) != 0 || (present & 1)) return;
  madvise(reinterpret_cast<void*>(first), last - first, kPopulateForWrite);
}

#else

void fetch_pages(void*, int64_t) {}

#endif

}  // namespace tilewise
