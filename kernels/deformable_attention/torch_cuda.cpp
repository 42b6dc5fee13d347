// The operators of deformable attention for torch on a CUDA device.
#include "../common/cuda_glue.h"
#include "cuda.h"
#include "torch_operators.h"

namespace efficient_detr {
namespace {

constexpr const char* what = "deformable attention";

void check_limit(const Sizes& sizes) {
  const char* limit = cuda_limit(sizes);
  STD_TORCH_CHECK(limit == nullptr, what, " on CUDA: ", limit == nullptr ? "" : limit);
}

struct Cuda {
  static void forward(const ForwardProblem& problem, const Tensor& like) {
    check_limit(problem.sizes);
    const OnDeviceOf device(like);
    check_cuda(cuda_forward(problem, device.stream()), what);
  }

  static void backward(const BackwardProblem& problem, bool deterministic, const Tensor& like) {
    check_limit(problem.sizes);
    const OnDeviceOf device(like);
    // Given back to torch's allocator on return, which hands it on in the order of the stream only.
    const Tensor workspace = empty_tensor(
        like, {cuda_backward_workspace(problem, deterministic)}, ScalarType::Byte);
    check_cuda(cuda_backward(problem, deterministic, workspace.mutable_data_ptr(),
                             device.stream()),
               what);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(efficient_detr, CUDA, library) {
  library.impl("multi_scale_deformable_attention", TORCH_BOX(&Operators<Cuda>::plain));
  library.impl("multi_scale_deformable_attention_backward",
               TORCH_BOX(&Operators<Cuda>::plain_backward));
  library.impl("fused_multi_scale_deformable_attention", TORCH_BOX(&Operators<Cuda>::fused));
  library.impl("fused_multi_scale_deformable_attention_backward",
               TORCH_BOX(&Operators<Cuda>::fused_backward));
}

}  // namespace efficient_detr
