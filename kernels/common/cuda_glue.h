// What the CUDA layers between torch and the kernels share. Stable ABI of LibTorch only; needs
// -DUSE_CUDA, which its headers want to see before they declare anything about CUDA.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/device.h>

#include "torch_glue.h"

namespace efficient_detr {

// Makes a tensor's device the current one for as long as this lives.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  // torch's current stream on that device.
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

// Raises what went wrong, if anything did. `what` begins the sentence.
inline void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  // CUDA remembers the error of a launch and would report it to whoever asks next.
  cudaGetLastError();
  const bool not_built = error == cudaErrorNoKernelImageForDevice ||
                         error == cudaErrorInvalidDeviceFunction;
  STD_TORCH_CHECK(false, what, " failed on CUDA: ", cudaGetErrorString(error),
                  not_built ? "; the kernels were built for other GPUs, so build them again with "
                              "this one's compute capability in TORCH_CUDA_ARCH_LIST"
                            : "");
}

}  // namespace efficient_detr
