// The operators of deformable attention for torch on a CPU.
#include "cpu.h"
#include "torch_operators.h"

namespace efficient_detr {
namespace {

// Runs `range(first, last)` over all tasks on torch's threads.
template <class Range>
void in_parallel(int64_t tasks, const Range& range) {
  torch::stable::parallel_for(0, tasks, 1, range);
}

struct Cpu {
  static void forward(const ForwardProblem& problem, const Tensor&) {
    const int64_t tasks = forward_tasks(problem.sizes, torch::stable::get_num_threads());
    in_parallel(tasks, [&](int64_t first, int64_t last) {
      efficient_detr::forward(problem, tasks, first, last);
    });
  }

  // Always deterministic.
  static void backward(const BackwardProblem& problem, bool, const Tensor&) {
    in_parallel(backward_tasks(problem.sizes), [&](int64_t first, int64_t last) {
      efficient_detr::backward(problem, first, last);
    });
    if (problem.grad_reference == nullptr) return;
    in_parallel(finish_tasks(problem.sizes), [&](int64_t first, int64_t last) {
      finish_fused_backward(problem, first, last);
    });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(efficient_detr, CPU, library) {
  library.impl("multi_scale_deformable_attention", TORCH_BOX(&Operators<Cpu>::plain));
  library.impl("multi_scale_deformable_attention_backward",
               TORCH_BOX(&Operators<Cpu>::plain_backward));
  library.impl("fused_multi_scale_deformable_attention", TORCH_BOX(&Operators<Cpu>::fused));
  library.impl("fused_multi_scale_deformable_attention_backward",
               TORCH_BOX(&Operators<Cpu>::fused_backward));
}

}  // namespace efficient_detr
