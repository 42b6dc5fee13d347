// Multi-scale deformable attention on a CUDA device. No torch: problems hold device pointers (the
// list of levels alone lies in host memory), and all work is queued on the given stream.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "problem.h"

namespace efficient_detr {

// Why these sizes cannot be worked on, in words that continue "... on CUDA: ", or null.
const char* cuda_limit(const Sizes& sizes);

// Bytes of device memory, aligned to 16 bytes, that the backward pass needs; its content is
// arbitrary before and after.
int64_t cuda_backward_workspace(const BackwardProblem& problem, bool deterministic);

// The first error of a launch. Nothing is read or written where there is nothing to do.
cudaError_t cuda_forward(const ForwardProblem& problem, cudaStream_t stream);

// Gradients of the sampling and, with a `grad_reference`, of the reference are the same bits in
// every run. Those of the value are sums of terms that arrive in any order: the same bits only if
// `deterministic`, which adds in 64-bit fixed point and is slower.
cudaError_t cuda_backward(const BackwardProblem& problem, bool deterministic, void* workspace,
                          cudaStream_t stream);

}  // namespace efficient_detr
