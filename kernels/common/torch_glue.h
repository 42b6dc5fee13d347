// What the thin layers between torch and the kernels share. Stable ABI of LibTorch only.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>

namespace efficient_detr {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Sums of 16-bit tensors, and all that is no value, are kept in float; of double tensors in double.
inline ScalarType real_type(const Tensor& value) {
  return value.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline Tensor empty_tensor(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) {
  return torch::stable::new_empty(like, {sizes.begin(), sizes.size()}, type);
}

inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline void check_type(const Tensor& tensor, ScalarType type, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == type, name, " must have dtype ",
                  type == ScalarType::Double ? "float64" : "float32", " here; convert it first");
}

inline void check_shape(const Tensor& tensor, std::initializer_list<int64_t> sizes,
                        const char* name) {
  bool same = tensor.dim() == static_cast<int64_t>(sizes.size());
  int64_t dimension = 0;
  for (const int64_t size : sizes) same = same && tensor.size(dimension++) == size;
  STD_TORCH_CHECK(same, name, " does not have the shape that the other arguments ask for");
}

inline void check_same_device(const Tensor& tensor, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(tensor.device() == like.device(), name, " is on another device than the value");
}

}  // namespace efficient_detr
