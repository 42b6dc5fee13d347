// From torch tensors to the sizes and pointers of problem.h; for the CPU and the CUDA layer.
#pragma once

#include <optional>
#include <type_traits>

#include "../common/torch_glue.h"
#include "problem.h"

namespace efficient_detr {

// Rows can be read in place wherever the channels of a token lie next to each other.
inline Tensor with_adjacent_channels(const Tensor& tensor) {
  return tensor.size(-1) <= 1 || tensor.stride(-1) == 1 ? tensor
                                                        : torch::stable::contiguous(tensor);
}

template <class Real>
Tokens<Real> tokens_of(const Tensor& tensor) {
  Real* data;
  if constexpr (std::is_const_v<Real>)
    data = static_cast<Real*>(tensor.const_data_ptr());
  else
    data = static_cast<Real*>(tensor.mutable_data_ptr());
  return {data,           tensor.size(0),   tensor.size(1),   tensor.size(2),
          tensor.size(3), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

inline void check_points(const Tensor& points, const char* name) {
  STD_TORCH_CHECK(points.dim() == 4, name, " must be (B, H, N, D)");
  check_type(points, real_type(points), name);
}

inline void check_like(const Tensor& tensor, const Tensor& points, const char* name) {
  check_type(tensor, points.scalar_type(), name);
  check_same_device(tensor, points, name);
}

inline void check_integers(const Tensor& tensor, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Long, name, " must have dtype int64");
  check_same_device(tensor, like, name);
}

// Keeps contiguous copies alive for as long as the kernel runs. So do the other structures below.
struct HashTensors {
  HashTensors(const Tensor& points, const Tensor& directions, const Tensor& bias,
              const Tensor& multipliers)
      : points(with_adjacent_channels(points)),
        directions(as_contiguous(directions)),
        bias(as_contiguous(bias)),
        multipliers(as_contiguous(multipliers)) {
    check_points(points, "points");
    STD_TORCH_CHECK(directions.dim() == 2, "directions must be (D, T)");
    const int64_t rounds = directions.size(1);
    check_shape(directions, {points.size(3), rounds}, "directions");
    check_shape(bias, {rounds}, "bias");
    check_shape(multipliers, {rounds}, "multipliers");
    check_integers(multipliers, points, "multipliers");
    check_like(directions, points, "directions");
    check_like(bias, points, "bias");
    keys = empty_tensor(points, {points.size(0), points.size(1), points.size(2)}, ScalarType::Long);
  }

  template <class Real>
  HashProblem<Real> problem(double width) const {
    return {tokens_of<const Real>(points),
            directions.size(1),
            static_cast<Real>(width),
            static_cast<const Real*>(directions.const_data_ptr()),
            static_cast<const Real*>(bias.const_data_ptr()),
            static_cast<const int64_t*>(multipliers.const_data_ptr()),
            static_cast<int64_t*>(keys.mutable_data_ptr())};
  }

  Tensor points, directions, bias, multipliers, keys;
};

struct GroupTensors {
  GroupTensors(const Tensor& keys, const std::optional<Tensor>& padding_mask)
      : keys(as_contiguous(keys)) {
    STD_TORCH_CHECK(keys.dim() == 3, "keys must be (B, H, N)");
    check_integers(keys, keys, "keys");
    if (padding_mask) {
      check_shape(*padding_mask, {keys.size(0), keys.size(2)}, "padding_mask");
      check_same_device(*padding_mask, keys, "padding_mask");
      STD_TORCH_CHECK(padding_mask->scalar_type() == ScalarType::Bool,
                      "padding_mask must have dtype bool");
      padding = as_contiguous(*padding_mask);
    }
    ids = empty_tensor(keys, {keys.size(0), keys.size(1), keys.size(2)}, ScalarType::Long);
    num_clusters = empty_tensor(keys, {keys.size(0), keys.size(1)}, ScalarType::Long);
  }

  GroupProblem problem(std::optional<int64_t> capacity) const {
    STD_TORCH_CHECK(!capacity || *capacity >= 1, "capacity must be at least 1");
    return {static_cast<const int64_t*>(keys.const_data_ptr()),
            padding ? static_cast<const bool*>(padding->const_data_ptr()) : nullptr,
            keys.size(0),
            keys.size(1),
            keys.size(2),
            capacity.value_or(0),
            static_cast<int64_t*>(ids.mutable_data_ptr()),
            static_cast<int64_t*>(num_clusters.mutable_data_ptr())};
  }

  Tensor new_counts(int64_t clusters) const {
    return empty_tensor(keys, {keys.size(0), keys.size(1), clusters}, ScalarType::Long);
  }

  Tensor keys, ids, num_clusters;
  std::optional<Tensor> padding;
};

// What `cluster_reduce` and `cluster_broadcast` have in common: tokens or prototypes, whose rows
// are those of the ids.
struct ClusterTensors {
  ClusterTensors(const Tensor& source, const Tensor& ids, const std::optional<Tensor>& counts,
                 int64_t clusters, const char* name)
      : source(with_adjacent_channels(source)), ids(as_contiguous(ids)) {
    check_points(source, name);
    STD_TORCH_CHECK(ids.dim() == 3, "ids must be (B, H, N)");
    check_shape(ids, {source.size(0), source.size(1), ids.size(2)}, "ids");
    check_integers(ids, source, "ids");
    if (counts) {
      check_shape(*counts, {source.size(0), source.size(1), clusters}, "counts");
      check_integers(*counts, source, "counts");
      this->counts = as_contiguous(*counts);
    }
  }

  const int64_t* ids_data() const { return static_cast<const int64_t*>(ids.const_data_ptr()); }
  const int64_t* counts_data() const {
    return counts ? static_cast<const int64_t*>(counts->const_data_ptr()) : nullptr;
  }

  Tensor source, ids;
  std::optional<Tensor> counts;
};

struct ReduceTensors : ClusterTensors {
  ReduceTensors(const Tensor& points, const Tensor& ids, int64_t clusters,
                const std::optional<Tensor>& counts)
      : ClusterTensors(points, ids, counts, clusters, "points") {
    check_shape(ids, {points.size(0), points.size(1), points.size(2)}, "ids");
    STD_TORCH_CHECK(clusters >= 0, "num_clusters must not be negative");
    prototypes = empty_tensor(points, {points.size(0), points.size(1), clusters, points.size(3)},
                           points.scalar_type());
  }

  template <class Real>
  ReduceProblem<Real> problem() const {
    return {tokens_of<const Real>(source), ids_data(), counts_data(), prototypes.size(2),
            static_cast<Real*>(prototypes.mutable_data_ptr())};
  }

  Tensor prototypes;
};

struct BroadcastTensors : ClusterTensors {
  BroadcastTensors(const Tensor& prototypes, const Tensor& ids, const std::optional<Tensor>& counts)
      : ClusterTensors(prototypes, ids, counts, prototypes.size(2), "prototypes") {
    // Laid out as (B, N, H, D): what follows attention merges the heads of a token.
    const Tensor merged =
        empty_tensor(prototypes, {ids.size(0), ids.size(2), ids.size(1), prototypes.size(3)},
                  prototypes.scalar_type());
    output = torch::stable::transpose(merged, 1, 2);
  }

  template <class Real>
  BroadcastProblem<Real> problem() const {
    return {tokens_of<const Real>(source), ids_data(), counts_data(), tokens_of<Real>(output)};
  }

  Tensor output;
};

}  // namespace efficient_detr
