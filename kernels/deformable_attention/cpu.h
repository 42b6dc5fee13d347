// Multi-scale deformable attention on a CPU. No torch and no threads: the caller divides the tasks.
//
// Results are bit-identical however the tasks are divided, because each number is written by one
// task, which adds in a fixed order.
#pragma once

#include <cstdint>

#include "problem.h"

namespace efficient_detr {

// How many tasks `forward` has if about so many are wanted.
int64_t forward_tasks(const Sizes& sizes, int64_t wanted);
void forward(const ForwardProblem& problem, int64_t tasks, int64_t first, int64_t last);

int64_t backward_tasks(const Sizes& sizes);
void backward(const BackwardProblem& problem, int64_t first, int64_t last);

// After all of `backward`, if `grad_reference` is wanted: adds up the gradients of the locations to
// those of the reference, and replaces them by those of the offsets.
int64_t finish_tasks(const Sizes& sizes);
void finish_fused_backward(const BackwardProblem& problem, int64_t first, int64_t last);

}  // namespace efficient_detr
