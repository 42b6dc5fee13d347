// LSH clustering on the emulated CUDA grid: launchers and kernels, unchanged.
#include "../../kernels/lsh_clustering/cuda.cu"

#include <vector>

#include "driver.h"

namespace {

using namespace efficient_detr;

void check(cudaError_t error) {
  if (error != cudaSuccess) driver::fail(cudaGetErrorString(error));
}

// Laid out as (B, H, tokens, D) or, with `merged`, as (B, tokens, H, D).
template <class Real>
Tokens<Real> tokens_of(driver::Call& call, Real* data, int64_t tokens) {
  const int64_t images = call.integer("images"), heads = call.integer("heads");
  const int64_t channels = call.integer("channels"), image = heads * tokens * channels;
  if (call.integer("merged") != 0)
    return {data, images, heads, tokens, channels, image, channels, heads * channels};
  return {data, images, heads, tokens, channels, image, tokens * channels, channels};
}

template <class Real>
void hash(driver::Call& call) {
  const auto points = tokens_of(call, call.tensor<const Real>("points"), call.integer("tokens"));
  auto* keys = call.output<int64_t>("keys", points.rows() * points.tokens);
  check(cuda_hash_keys(
      HashProblem<Real>{points, call.integer("rounds"), *call.tensor<Real>("width"),
                        call.tensor<Real>("directions"), call.tensor<Real>("bias"),
                        call.tensor<int64_t>("multipliers"), keys},
      nullptr));
}

void group(driver::Call& call) {
  const int64_t images = call.integer("images"), heads = call.integer("heads");
  const int64_t tokens = call.integer("tokens"), capacity = call.integer("capacity");
  const int64_t rows = images * heads;
  cuda_emulation::largest_shared = static_cast<int>(call.integer("shared_bytes"));
  const GroupProblem problem{call.tensor<int64_t>("keys"), call.tensor<bool>("padding"), images,
                             heads, tokens, capacity, call.output<int64_t>("ids", rows * tokens),
                             call.output<int64_t>("num_clusters", rows)};
  const int64_t bytes = cuda_group_workspace(problem);
  if ((bytes != 0) != (call.integer("expect_workspace") != 0)) driver::fail("wrong workspace");
  const driver::Record workspace = driver::allocate(static_cast<size_t>(bytes));
  check(cuda_group_by_key(problem, workspace.data, nullptr));
  // Were this to follow the size of the problem, threads with other sizes would get in the way.
  for (const auto& [kernel, limit] : cuda_emulation::shared_limits)
    call.output<int64_t>("shared_limit", 1)[0] = limit;
  int64_t clusters = capacity;
  if (capacity == 0)
    for (int64_t row = 0; row < rows; ++row)
      clusters = std::max(clusters, problem.num_clusters[row]);
  check(cuda_count_members(problem.ids, rows, tokens, clusters,
                           call.output<int64_t>("counts", rows * clusters), nullptr));
}

template <class Real>
void reduce(driver::Call& call) {
  const auto points = tokens_of(call, call.tensor<const Real>("points"), call.integer("tokens"));
  const int64_t clusters = call.integer("clusters");
  auto* prototypes = call.output<Real>("prototypes", points.rows() * clusters * points.channels);
  check(cuda_cluster_reduce(ReduceProblem<Real>{points, call.tensor<int64_t>("ids"),
                                                call.tensor<int64_t>("counts"), clusters,
                                                prototypes},
                            nullptr));
}

template <class Real>
void broadcast(driver::Call& call) {
  const auto prototypes =
      tokens_of(call, call.tensor<const Real>("prototypes"), call.integer("clusters"));
  const int64_t tokens = call.integer("tokens");
  auto* output = call.output<Real>("output", prototypes.rows() * tokens * prototypes.channels);
  check(cuda_cluster_broadcast(
      BroadcastProblem<Real>{prototypes, call.tensor<int64_t>("ids"),
                             call.tensor<int64_t>("counts"), tokens_of(call, output, tokens)},
      nullptr));
}

}  // namespace

int main(int count, char** arguments) {
  return driver::run(count, arguments,
                     {{"hash_float32", hash<float>},
                      {"hash_float64", hash<double>},
                      {"group", group},
                      {"reduce_float32", reduce<float>},
                      {"reduce_float64", reduce<double>},
                      {"broadcast_float32", broadcast<float>},
                      {"broadcast_float64", broadcast<double>}});
}
