// What lets one header serve the host compiler, nvcc and the host emulation of a CUDA grid.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define ED_HOST_DEVICE __host__ __device__
#define ED_INLINE __host__ __device__ __forceinline__
#else
#define ED_HOST_DEVICE
#define ED_INLINE inline __attribute__((always_inline))
#endif

// Compiles a function several times and lets the loader pick the fastest that the processor can
// run. The instructions of everything inlined into it follow. Other compilers and processors get
// the plain function.
#if defined(__x86_64__) && defined(__GNUC__) && defined(__linux__) && !defined(ED_NO_DISPATCH)
#define ED_DISPATCHED \
  __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define ED_DISPATCHED
#endif
