// The operators of LSH clustering for torch on a CPU. Their schemas are defined in Python.
#include <algorithm>
#include <tuple>

#include "../common/scratch.h"
#include "cpu.h"
#include "torch_problem.h"

namespace efficient_detr {
namespace {

using torch::stable::parallel_for;

template <class Real>
void run_hash(const HashProblem<Real>& problem) {
  parallel_for(0, hash_tasks(problem), 16,
               [&](int64_t first, int64_t last) { hash_keys(problem, first, last); });
}

Tensor lsh_hash(const Tensor& points, const Tensor& directions, const Tensor& bias, double width,
                const Tensor& multipliers) {
  const HashTensors tensors(points, directions, bias, multipliers);
  if (points.scalar_type() == ScalarType::Double)
    run_hash(tensors.problem<double>(width));
  else
    run_hash(tensors.problem<float>(width));
  return tensors.keys;
}

std::tuple<Tensor, Tensor, Tensor> lsh_group(const Tensor& keys,
                                             const std::optional<Tensor>& padding_mask,
                                             std::optional<int64_t> capacity) {
  const GroupTensors tensors(keys, padding_mask);
  const GroupProblem problem = tensors.problem(capacity);
  const int64_t rows = problem.images * problem.heads;
  const Scratch<int64_t> members(rows * problem.tokens);
  parallel_for(0, rows, 1, [&](int64_t first, int64_t last) {
    group_by_key(problem, members.data(), first, last);
  });
  int64_t clusters = capacity.value_or(1);
  if (!capacity)
    for (int64_t row = 0; row < rows; ++row)
      clusters = std::max(clusters, problem.num_clusters[row]);
  const Tensor counts = tensors.new_counts(clusters);
  auto* counts_data = static_cast<int64_t*>(counts.mutable_data_ptr());
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t used = std::min(clusters, problem.num_clusters[row]);
    int64_t* rest = std::copy_n(members.data() + row * problem.tokens, used,
                                counts_data + row * clusters);
    std::fill_n(rest, clusters - used, 0);
  }
  return {tensors.ids, counts, tensors.num_clusters};
}

template <class Real>
void run_reduce(const ReduceProblem<Real>& problem) {
  parallel_for(0, problem.points.rows(), 1,
               [&](int64_t first, int64_t last) { cluster_reduce(problem, first, last); });
}

Tensor reduce(const Tensor& points, const Tensor& ids, int64_t num_clusters,
              const std::optional<Tensor>& counts) {
  const ReduceTensors tensors(points, ids, num_clusters, counts);
  if (points.scalar_type() == ScalarType::Double)
    run_reduce(tensors.problem<double>());
  else
    run_reduce(tensors.problem<float>());
  return tensors.prototypes;
}

template <class Real>
void run_broadcast(const BroadcastProblem<Real>& problem) {
  parallel_for(0, broadcast_tasks(problem), 2,
               [&](int64_t first, int64_t last) { cluster_broadcast(problem, first, last); });
}

Tensor broadcast(const Tensor& prototypes, const Tensor& ids, const std::optional<Tensor>& counts) {
  const BroadcastTensors tensors(prototypes, ids, counts);
  if (prototypes.scalar_type() == ScalarType::Double)
    run_broadcast(tensors.problem<double>());
  else
    run_broadcast(tensors.problem<float>());
  return tensors.output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(efficient_detr, CPU, library) {
  library.impl("lsh_hash", TORCH_BOX(&lsh_hash));
  library.impl("lsh_group", TORCH_BOX(&lsh_group));
  library.impl("cluster_reduce", TORCH_BOX(&reduce));
  library.impl("cluster_broadcast", TORCH_BOX(&broadcast));
}

}  // namespace efficient_detr
