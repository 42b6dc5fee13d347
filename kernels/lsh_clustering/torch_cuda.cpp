// The operators of LSH clustering for torch on a CUDA device. Their schemas are defined in Python.
#include <algorithm>
#include <tuple>

#include "../common/cuda_glue.h"
#include "cuda.h"
#include "torch_problem.h"

namespace efficient_detr {
namespace {

constexpr const char* what = "LSH clustering";

void check_limit(const Tensor& tensor, int64_t tokens) {
  const int64_t channels = tensor.dim() == 4 ? tensor.size(3) : 1;
  const char* limit = cuda_limit(tensor.size(0), tensor.size(1), tokens, channels);
  STD_TORCH_CHECK(limit == nullptr, what, " on CUDA: ", limit == nullptr ? "" : limit);
}

Tensor lsh_hash(const Tensor& points, const Tensor& directions, const Tensor& bias, double width,
                const Tensor& multipliers) {
  const HashTensors tensors(points, directions, bias, multipliers);
  check_limit(points, points.size(2));
  const OnDeviceOf device(points);
  if (points.scalar_type() == ScalarType::Double)
    check_cuda(cuda_hash_keys(tensors.problem<double>(width), device.stream()), what);
  else
    check_cuda(cuda_hash_keys(tensors.problem<float>(width), device.stream()), what);
  return tensors.keys;
}

// The largest number of clusters in a row, at least 1. Waits for the device.
int64_t most_clusters(const Tensor& num_clusters) {
  const Tensor on_host = torch::stable::to(num_clusters, torch::stable::Device("cpu"));
  const auto* numbers = static_cast<const int64_t*>(on_host.const_data_ptr());
  int64_t most = 1;
  for (int64_t row = 0; row < on_host.numel(); ++row) most = std::max(most, numbers[row]);
  return most;
}

std::tuple<Tensor, Tensor, Tensor> lsh_group(const Tensor& keys,
                                             const std::optional<Tensor>& padding_mask,
                                             std::optional<int64_t> capacity) {
  const GroupTensors tensors(keys, padding_mask);
  check_limit(keys, keys.size(2));
  const GroupProblem problem = tensors.problem(capacity);
  const OnDeviceOf device(keys);
  const int64_t bytes = cuda_group_workspace(problem);
  const Tensor workspace = empty_tensor(keys, {bytes}, ScalarType::Byte);
  void* workspace_data = bytes > 0 ? workspace.mutable_data_ptr() : nullptr;
  check_cuda(cuda_group_by_key(problem, workspace_data, device.stream()), what);
  const int64_t clusters = capacity ? *capacity : most_clusters(tensors.num_clusters);
  const Tensor counts = tensors.new_counts(clusters);
  const int64_t rows = problem.images * problem.heads;
  auto* counts_data = static_cast<int64_t*>(counts.mutable_data_ptr());
  check_cuda(cuda_count_members(problem.ids, rows, problem.tokens, clusters, counts_data,
                                device.stream()),
             what);
  return {tensors.ids, counts, tensors.num_clusters};
}

Tensor reduce(const Tensor& points, const Tensor& ids, int64_t num_clusters,
              const std::optional<Tensor>& counts) {
  const ReduceTensors tensors(points, ids, num_clusters, counts);
  check_limit(points, std::max(points.size(2), num_clusters));
  const OnDeviceOf device(points);
  if (points.scalar_type() == ScalarType::Double)
    check_cuda(cuda_cluster_reduce(tensors.problem<double>(), device.stream()), what);
  else
    check_cuda(cuda_cluster_reduce(tensors.problem<float>(), device.stream()), what);
  return tensors.prototypes;
}

Tensor broadcast(const Tensor& prototypes, const Tensor& ids, const std::optional<Tensor>& counts) {
  const BroadcastTensors tensors(prototypes, ids, counts);
  check_limit(prototypes, std::max(prototypes.size(2), ids.size(2)));
  const OnDeviceOf device(prototypes);
  if (prototypes.scalar_type() == ScalarType::Double)
    check_cuda(cuda_cluster_broadcast(tensors.problem<double>(), device.stream()), what);
  else
    check_cuda(cuda_cluster_broadcast(tensors.problem<float>(), device.stream()), what);
  return tensors.output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(efficient_detr, CUDA, library) {
  library.impl("lsh_hash", TORCH_BOX(&lsh_hash));
  library.impl("lsh_group", TORCH_BOX(&lsh_group));
  library.impl("cluster_reduce", TORCH_BOX(&reduce));
  library.impl("cluster_broadcast", TORCH_BOX(&broadcast));
}

}  // namespace efficient_detr
