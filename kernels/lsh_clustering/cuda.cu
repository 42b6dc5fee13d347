#include "cuda.h"

#include <algorithm>

#include "cuda.cuh"

namespace efficient_detr {
namespace {

using namespace lsh_clustering;

constexpr int64_t most_blocks = 0x7fffffff;     // along x
constexpr int64_t most_rows_of_blocks = 65535;  // along y
constexpr int64_t elementwise_threads = 256;

int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The table of a row is at most two thirds full.
int table_bits(int64_t tokens) {
  int bits = 1;
  while ((int64_t{2} << bits) < 3 * tokens) ++bits;
  return bits;
}

int64_t table_bytes(int64_t tokens) {
  return static_cast<int64_t>(sizeof(unsigned)) << table_bits(tokens);
}

// Bytes of shared memory that a table may take on the current device.
int64_t most_table_bytes() {
  // Some of it is taken by the kernel's other variables.
  constexpr int reserved = 1024;
  int device = 0, shared = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) !=
          cudaSuccess)
    return 0;
  return std::max(shared - reserved, 0);
}

// How many clusters a block of the reduction takes. Every block reads all ids of its row: few
// clusters a block would read them too often, many would leave the device empty.
template <class Real>
int clusters_of_block(int64_t rows, int64_t clusters) {
  constexpr int64_t enough_blocks = 512;
  constexpr int most = reduce_sums<Real> / 4;
  int result = 1;
  while (result < most && rows * divided_up(clusters, 2 * result) >= enough_blocks) result *= 2;
  return result;
}

bool is_aligned(const void* pointer, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(bytes) == 0;
}

// Whether vectors of `width` channels can be read or written everywhere.
template <class Real>
bool has_vectors(const Tokens<Real>& tokens, int width) {
  return is_aligned(tokens.data, width * static_cast<int64_t>(sizeof(Real))) &&
         tokens.channels % width == 0 && tokens.token_stride % width == 0 &&
         tokens.head_stride % width == 0 && tokens.image_stride % width == 0;
}

template <class Real, int width>
cudaError_t launch_broadcast(const BroadcastProblem<Real>& problem, cudaStream_t stream) {
  const Tokens<Real>& output = problem.output;
  const int64_t threads = output.tokens * output.heads * (output.channels / width);
  const auto blocks = static_cast<unsigned>(divided_up(threads, elementwise_threads));
  for (int64_t image = 0; image < output.images; image += most_rows_of_blocks) {
    const auto images = static_cast<unsigned>(std::min(output.images - image, most_rows_of_blocks));
    const cudaError_t error = launch(broadcast_kernel<Real, width>, dim3(blocks, images),
                                     elementwise_threads, 0, stream, problem, image);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace

const char* cuda_limit(int64_t images, int64_t heads, int64_t tokens, int64_t channels) {
  if (tokens > most_blocks / 4) return "there can be at most 2^29 - 1 tokens";
  if (channels > most_rows_of_blocks * 32) return "there can be at most 2^21 - 32 channels";
  if (tokens > 0 && heads * std::max<int64_t>(channels, 1) > most_blocks / tokens)
    return "an image can have at most 2^31 - 1 elements";
  if (images > 0 && heads > 0 && divided_up(tokens, 32) > most_blocks / images / heads)
    return "there can be at most 2^36 tokens in all rows together";
  return nullptr;
}

template <class Real>
cudaError_t cuda_hash_keys(const HashProblem<Real>& problem, cudaStream_t stream) {
  const int64_t blocks_per_row = divided_up(problem.points.tokens, hash_threads);
  const int64_t blocks = problem.points.rows() * blocks_per_row;
  if (blocks == 0) return cudaSuccess;
  if (blocks > most_blocks) return cudaErrorInvalidValue;
  return launch(hash_kernel<Real>, static_cast<unsigned>(blocks), hash_threads, 0, stream, problem,
                blocks_per_row);
}

int64_t cuda_group_workspace(const GroupProblem& problem) {
  if (table_bytes(problem.tokens) <= most_table_bytes()) return 0;
  return problem.images * problem.heads * table_bytes(problem.tokens);
}

cudaError_t cuda_group_by_key(const GroupProblem& problem, void* workspace, cudaStream_t stream) {
  const int64_t rows = problem.images * problem.heads;
  if (rows == 0) return cudaSuccess;
  if (rows > most_blocks) return cudaErrorInvalidValue;
  const bool in_shared = workspace == nullptr;
  const int64_t shared = in_shared ? table_bytes(problem.tokens) : 0;
  if (in_shared) {
    // The limit belongs to the kernel, not to this launch. All callers set the same one, because a
    // lower one could come between that of another thread and its launch.
    const cudaError_t error =
        cudaFuncSetAttribute(group_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(most_table_bytes()));
    if (error != cudaSuccess) return error;
  }
  const int64_t threads = std::clamp<int64_t>(divided_up(problem.tokens, 32) * 32, 32, 1024);
  return launch(group_kernel, static_cast<unsigned>(rows), static_cast<unsigned>(threads),
                static_cast<size_t>(shared), stream, problem, table_bits(problem.tokens),
                static_cast<unsigned*>(workspace));
}

cudaError_t cuda_count_members(const int64_t* ids, int64_t rows, int64_t tokens, int64_t clusters,
                               int64_t* counts, cudaStream_t stream) {
  if (rows * clusters == 0) return cudaSuccess;
  const size_t bytes = static_cast<size_t>(rows * clusters) * sizeof(int64_t);
  const cudaError_t error = cudaMemsetAsync(counts, 0, bytes, stream);
  const int64_t blocks = divided_up(rows * tokens, elementwise_threads);
  if (error != cudaSuccess || blocks == 0) return error;
  if (blocks > most_blocks) return cudaErrorInvalidValue;
  return launch(count_kernel, static_cast<unsigned>(blocks), elementwise_threads, 0, stream, ids,
                rows, tokens, clusters, reinterpret_cast<unsigned long long*>(counts));
}

template <class Real>
cudaError_t cuda_cluster_reduce(const ReduceProblem<Real>& problem, cudaStream_t stream) {
  const int64_t rows = problem.points.rows();
  const int block_clusters = clusters_of_block<Real>(rows, problem.clusters);
  const int64_t blocks_per_row = divided_up(problem.clusters, block_clusters);
  const int64_t blocks = rows * blocks_per_row;
  const int64_t channel_blocks = divided_up(problem.points.channels, 32);
  if (blocks == 0 || channel_blocks == 0) return cudaSuccess;
  if (blocks > most_blocks || channel_blocks > most_rows_of_blocks) return cudaErrorInvalidValue;
  // No more warps than find something to do: a warp takes 128 tokens at a time.
  const int64_t useful_warps = divided_up(std::max<int64_t>(problem.points.tokens, 1), 128);
  const auto warps = static_cast<unsigned>(
      std::min<int64_t>({32, useful_warps, reduce_sums<Real> / block_clusters}));
  return launch(reduce_kernel<Real>,
                dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(channel_blocks)),
                32 * warps, 0, stream, problem, block_clusters, blocks_per_row);
}

template <class Real>
cudaError_t cuda_cluster_broadcast(const BroadcastProblem<Real>& problem, cudaStream_t stream) {
  constexpr int width = 16 / sizeof(Real);
  const Tokens<Real>& output = problem.output;
  const int64_t elements = output.tokens * output.heads * output.channels;
  if (output.images * elements == 0) return cudaSuccess;
  if (elements > most_blocks) return cudaErrorInvalidValue;
  if (has_vectors(problem.prototypes, width) && has_vectors(output, width))
    return launch_broadcast<Real, width>(problem, stream);
  return launch_broadcast<Real, 1>(problem, stream);
}

#define ED_INSTANTIATE(Real)                                                             \
  template cudaError_t cuda_hash_keys(const HashProblem<Real>&, cudaStream_t);           \
  template cudaError_t cuda_cluster_reduce(const ReduceProblem<Real>&, cudaStream_t);    \
  template cudaError_t cuda_cluster_broadcast(const BroadcastProblem<Real>&, cudaStream_t);
ED_INSTANTIATE(float)
ED_INSTANTIATE(double)

}  // namespace efficient_detr
