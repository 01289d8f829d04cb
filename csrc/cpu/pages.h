// Memory of large results, which the system hands out as it is first written.
#pragma once

#include <cstdint>

namespace tilewise {

// Fetches the pages of a result that is about to be written, if they are not there, in one call: a
// fault for each takes longer than most of our kernels. The memory would be needed anyway. Nothing
// happens where the system cannot do it (before Linux 5.14).
void fetch_pages(void* begin, int64_t bytes);

}  // namespace tilewise
