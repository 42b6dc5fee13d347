// From torch tensors to the sizes and pointers of problem.h; for the CPU and the CUDA layer.
#pragma once

#include <limits>
#include <tuple>
#include <vector>

#include "../common/torch_glue.h"
#include "problem.h"

namespace efficient_detr {

inline Storage storage_of(const Tensor& value) {
  switch (value.scalar_type()) {
    case ScalarType::Float:
      return Storage::Float32;
    case ScalarType::Double:
      return Storage::Float64;
    case ScalarType::Half:
      return Storage::Float16;
    case ScalarType::BFloat16:
      return Storage::BFloat16;
    default:
      STD_TORCH_CHECK(false, "value must be float32, float64, float16 or bfloat16");
  }
}

// The levels of `spatial_shapes`, which is flat: height, width, height, width, ...
inline std::vector<Level> levels_of(const std::vector<int64_t>& spatial_shapes, int64_t tokens) {
  constexpr int64_t limit = std::numeric_limits<int32_t>::max();
  STD_TORCH_CHECK(spatial_shapes.size() % 2 == 0, "spatial_shapes must hold pairs (H, W)");
  STD_TORCH_CHECK(tokens <= limit, "value has more than 2^31 - 1 tokens an image");
  std::vector<Level> levels;
  int64_t start = 0;
  for (size_t i = 0; i < spatial_shapes.size(); i += 2) {
    const int64_t height = spatial_shapes[i], width = spatial_shapes[i + 1];
    STD_TORCH_CHECK(height > 0 && width > 0, "level ", i / 2, " of spatial_shapes is empty");
    STD_TORCH_CHECK(height <= limit / width && start + height * width <= tokens,
                    "spatial_shapes hold more tokens than value has");
    levels.push_back({static_cast<int32_t>(height), static_cast<int32_t>(width),
                      static_cast<int32_t>(start)});
    start += height * width;
  }
  STD_TORCH_CHECK(start == tokens, "spatial_shapes hold fewer tokens than value has");
  return levels;
}

// The tensors that say where to sample and how to weight, of one of the two operators. Keeps
// contiguous copies alive for as long as the kernel runs.
struct SamplingTensors {
  // (B, Q, H, L, P, 2) and (B, Q, H, L, P).
  static SamplingTensors plain(const Tensor& locations, const Tensor& weights) {
    SamplingTensors result{as_contiguous(locations), as_contiguous(weights), {}};
    result.sampling.locations = result.points.const_data_ptr();
    result.sampling.weights = result.weights.const_data_ptr();
    return result;
  }

  // (B, Q, L, 2 | 4), (B, Q, H, L, P, 2) and (B, Q, H, L, P).
  static SamplingTensors fused(const Tensor& reference, const Tensor& offsets,
                               const Tensor& logits) {
    const int64_t size = reference.dim() > 0 ? reference.size(-1) : 0;
    STD_TORCH_CHECK(size == 2 || size == 4, "reference must end in 2 or 4 numbers");
    SamplingTensors result{as_contiguous(offsets), as_contiguous(logits), as_contiguous(reference)};
    result.sampling.offsets = result.points.const_data_ptr();
    result.sampling.logits = result.weights.const_data_ptr();
    result.sampling.reference = result.reference.const_data_ptr();
    result.sampling.reference_size = static_cast<int>(size);
    return result;
  }

  bool is_fused() const { return sampling.is_fused(); }

  Tensor points, weights, reference;
  Sampling sampling{};
};

// Checks that everything fits together; `levels` must outlive the result.
inline Sizes sizes_of(const Tensor& value, const std::vector<Level>& levels,
                      const SamplingTensors& sampling) {
  STD_TORCH_CHECK(value.dim() == 4, "value must be (B, S, H, D)");
  STD_TORCH_CHECK(sampling.weights.dim() == 5, "attention weights must be (B, Q, H, L, P)");
  const Sizes sizes{value.size(0),
                    value.size(1),
                    value.size(2),
                    value.size(3),
                    sampling.weights.size(1),
                    static_cast<int64_t>(levels.size()),
                    sampling.weights.size(4),
                    levels.data()};
  const bool fused = sampling.is_fused();
  const char* points_name = fused ? "sampling_offsets" : "sampling_locations";
  const char* weights_name = fused ? "attention_logits" : "attention_weights";
  check_shape(sampling.weights,
              {sizes.images, sizes.queries, sizes.heads, sizes.levels, sizes.points}, weights_name);
  check_shape(sampling.points,
              {sizes.images, sizes.queries, sizes.heads, sizes.levels, sizes.points, 2},
              points_name);
  check_type(sampling.weights, real_type(value), weights_name);
  check_type(sampling.points, real_type(value), points_name);
  check_same_device(sampling.weights, value, weights_name);
  check_same_device(sampling.points, value, points_name);
  if (fused) {
    check_shape(sampling.reference,
                {sizes.images, sizes.queries, sizes.levels, sampling.sampling.reference_size},
                "reference");
    check_type(sampling.reference, real_type(value), "reference");
    check_same_device(sampling.reference, value, "reference");
  }
  return sizes;
}

}  // namespace efficient_detr
