// The operators of deformable attention for torch, on whatever device: checks, allocations, and the
// order of arguments and results. Their schemas are defined in Python.
//
// `Device` does the work by two functions, in which `like` is a tensor of the device:
//   static void forward(const ForwardProblem& problem, const Tensor& like);
//   static void backward(const BackwardProblem& problem, bool deterministic, const Tensor& like);
// Both are called for empty problems too.
#pragma once

#include <tuple>
#include <vector>

#include "problem.h"
#include "torch_problem.h"

namespace efficient_detr {

template <class Device>
class Operators {
  using Shapes = std::vector<int64_t>;

 public:
  static Tensor plain(Tensor value, Shapes spatial_shapes, Tensor sampling_locations,
                      Tensor attention_weights) {
    return forward(value, spatial_shapes,
                   SamplingTensors::plain(sampling_locations, attention_weights));
  }

  static Tensor fused(Tensor value, Shapes spatial_shapes, Tensor reference,
                      Tensor sampling_offsets, Tensor attention_logits) {
    return forward(value, spatial_shapes,
                   SamplingTensors::fused(reference, sampling_offsets, attention_logits));
  }

  static std::tuple<Tensor, Tensor, Tensor> plain_backward(
      Tensor grad_output, Tensor value, Shapes spatial_shapes, Tensor sampling_locations,
      Tensor attention_weights, bool deterministic) {
    const Gradients gradients =
        backward(grad_output, value, spatial_shapes,
                 SamplingTensors::plain(sampling_locations, attention_weights), false,
                 deterministic);
    return {gradients.value, gradients.points, gradients.weights};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> fused_backward(
      Tensor grad_output, Tensor value, Shapes spatial_shapes, Tensor reference,
      Tensor sampling_offsets, Tensor attention_logits, bool needs_reference_gradient,
      bool deterministic) {
    const Gradients gradients =
        backward(grad_output, value, spatial_shapes,
                 SamplingTensors::fused(reference, sampling_offsets, attention_logits),
                 needs_reference_gradient, deterministic);
    return {gradients.value, gradients.reference, gradients.points, gradients.weights};
  }

 private:
  struct Gradients {
    Tensor value, reference, points, weights;
  };

  static Tensor forward(const Tensor& given_value, const Shapes& spatial_shapes,
                        const SamplingTensors& sampling) {
    const Tensor value = as_contiguous(given_value);
    const std::vector<Level> levels = levels_of(spatial_shapes, value.size(1));
    const Sizes sizes = sizes_of(value, levels, sampling);
    Tensor output = empty_tensor(
        value, {sizes.images, sizes.queries, sizes.heads * sizes.channels}, value.scalar_type());
    Device::forward({storage_of(value), sizes, sampling.sampling, value.const_data_ptr(),
                     output.mutable_data_ptr()},
                    value);
    return output;
  }

  static Gradients backward(const Tensor& given_grad_output, const Tensor& given_value,
                            const Shapes& spatial_shapes, const SamplingTensors& sampling,
                            bool needs_reference_gradient, bool deterministic) {
    const Tensor value = as_contiguous(given_value);
    const Tensor grad_output = as_contiguous(given_grad_output);
    const std::vector<Level> levels = levels_of(spatial_shapes, value.size(1));
    const Sizes sizes = sizes_of(value, levels, sampling);
    check_shape(grad_output, {sizes.images, sizes.queries, sizes.heads * sizes.channels},
                "grad_output");
    STD_TORCH_CHECK(grad_output.scalar_type() == value.scalar_type(),
                    "grad_output must have the dtype of value");
    check_same_device(grad_output, value, "grad_output");
    Gradients gradients{torch::stable::empty_like(value),
                        needs_reference_gradient ? torch::stable::empty_like(sampling.reference)
                                                 : empty_tensor(value, {0}, real_type(value)),
                        torch::stable::empty_like(sampling.points),
                        torch::stable::empty_like(sampling.weights)};
    Device::backward(
        {storage_of(value), sizes, sampling.sampling, value.const_data_ptr(),
         grad_output.const_data_ptr(), gradients.value.mutable_data_ptr(),
         gradients.points.mutable_data_ptr(), gradients.weights.mutable_data_ptr(),
         needs_reference_gradient ? gradients.reference.mutable_data_ptr() : nullptr},
        deterministic, value);
    return gradients;
  }
};

}  // namespace efficient_detr
