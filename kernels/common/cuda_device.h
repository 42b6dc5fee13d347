// What the CUDA kernels share. Everything here compiles with nvcc, and with a host compiler under
// the emulation of the thread grid in tests/kernels, which is why kernels are not started with <<<
// >>> and dynamic shared memory is not declared in the kernels themselves.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace efficient_detr {

inline constexpr unsigned all_lanes = 0xffffffffu;

// The dynamic shared memory of the block, aligned to 16 bytes.
__device__ __forceinline__ unsigned char* dynamic_shared_memory() {
#if defined(__CUDACC__)
  extern __shared__ __align__(16) unsigned char storage[];
  return storage;
#else
  return cuda_emulation::dynamic_shared;
#endif
}

// The same pointer, which the compiler cannot take apart any more. For the sum of a pointer into
// global memory and a 64-bit offset that is the same for the block: left to itself, the compiler
// adds what differs between threads to the offset first, by 64-bit additions in each thread.
template <class T>
__device__ __forceinline__ T* one_pointer(T* pointer) {
#if defined(__CUDACC__)
  asm("" : "+l"(pointer));
  __builtin_assume(__isGlobal(pointer));  // which it forgot on the way
#endif
  return pointer;
}

// Starts a kernel. The result says whether the launch was accepted; what goes wrong while the
// kernel runs is reported by later calls, as always with CUDA.
template <class... Parameters, class... Arguments>
inline cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block,
                          size_t shared_bytes, cudaStream_t stream, const Arguments&... arguments) {
  cudaLaunchConfig_t configuration = {};
  configuration.gridDim = grid;
  configuration.blockDim = block;
  configuration.dynamicSmemBytes = shared_bytes;
  configuration.stream = stream;
  return cudaLaunchKernelEx(&configuration, kernel, static_cast<Parameters>(arguments)...);
}

}  // namespace efficient_detr
