// Functions in headers. They are always inlined: the vector kernels are compiled once per
// instruction set, and of a function that is not, the linker would keep any one of the copies.
#pragma once

#define TILEWISE_INLINE inline __attribute__((always_inline))

#if defined(__CUDACC__)
#define TILEWISE_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define TILEWISE_HOST_DEVICE TILEWISE_INLINE
#endif
