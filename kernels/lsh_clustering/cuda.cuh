// LSH clustering on a CUDA device: the device code.
//
// Nothing here depends on the order in which threads run: ids are ranks of first tokens, counts are
// integers, and sums are divided among warps by position and added up in a fixed order.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "../common/cuda_device.h"
#include "problem.h"

namespace efficient_detr::lsh_clustering {

// ------------------------------------------------------------------------------------------- hash

inline constexpr int hash_threads = 128;  // tokens of a block
inline constexpr int hash_channels = 32;  // staged in shared memory at a time
inline constexpr int hash_rounds = 16;    // sums that a thread holds at a time

// Points, directions and multipliers of the block, for some channels and some rounds; zero where
// there are none.
template <class Real>
struct HashStage {
  Real points[hash_threads][hash_channels + 1];  // one more, so that a column meets all banks
  Real directions[hash_channels][hash_rounds];
};

template <class Real>
__device__ __forceinline__ void stage_points(HashStage<Real>& stage,
                                             const Tokens<const Real>& points, const Real* row,
                                             int64_t first_token, int64_t first_channel) {
  for (int i = threadIdx.x; i < hash_threads * hash_channels; i += hash_threads) {
    const int n = i / hash_channels, d = i % hash_channels;
    const bool inside = first_token + n < points.tokens && first_channel + d < points.channels;
    stage.points[n][d] =
        inside ? row[(first_token + n) * points.token_stride + first_channel + d] : Real{0};
  }
}

template <class Real>
__device__ __forceinline__ void stage_directions(HashStage<Real>& stage,
                                                 const HashProblem<Real>& problem,
                                                 int64_t first_channel, int64_t first_round) {
  for (int i = threadIdx.x; i < hash_channels * hash_rounds; i += hash_threads) {
    const int64_t d = first_channel + i / hash_rounds, t = first_round + i % hash_rounds;
    const bool inside = d < problem.points.channels && t < problem.rounds;
    stage.directions[i / hash_rounds][i % hash_rounds] =
        inside ? problem.directions[d * problem.rounds + t] / problem.width : Real{0};
  }
}

// The cell of a position, which is in units of cells.
template <class Real>
__device__ __forceinline__ int64_t cell_of(Real position) {
  constexpr Real limit = cell_limit;
  position = position > -limit ? position : -limit;  // also for NaN
  position = position < limit ? position : limit;
  return static_cast<int32_t>(floor(position));
}

// A thread hashes a token. Blocks are numbered row by row.
template <class Real>
__global__ void __launch_bounds__(hash_threads) hash_kernel(HashProblem<Real> problem,
                                                            int64_t blocks_per_row) {
  __shared__ HashStage<Real> stage;
  const Tokens<const Real>& points = problem.points;
  const int64_t row = blockIdx.x / blocks_per_row;
  const int64_t first_token = blockIdx.x % blocks_per_row * hash_threads;
  const Real* row_points = points.row(row);
  uint64_t key = 0;
  for (int64_t round = 0; round < problem.rounds; round += hash_rounds) {
    Real sums[hash_rounds] = {};
    for (int64_t channel = 0; channel < points.channels; channel += hash_channels) {
      __syncthreads();
      if (round == 0 || points.channels > hash_channels)
        stage_points(stage, points, row_points, first_token, channel);
      stage_directions(stage, problem, channel, round);
      __syncthreads();
#pragma unroll 4
      for (int d = 0; d < hash_channels; ++d) {
        const Real x = stage.points[threadIdx.x][d];
#pragma unroll
        for (int t = 0; t < hash_rounds; ++t) sums[t] += x * stage.directions[d][t];
      }
    }
#pragma unroll
    for (int t = 0; t < hash_rounds; ++t)
      if (round + t < problem.rounds) {
        const int64_t cell = cell_of(sums[t] + problem.bias[round + t] / problem.width);
        key += static_cast<uint64_t>(cell) * static_cast<uint64_t>(problem.multipliers[round + t]);
      }
  }
  const int64_t token = first_token + threadIdx.x;
  if (token < points.tokens) problem.keys[row * points.tokens + token] = static_cast<int64_t>(key);
}

// ------------------------------------------------------------------------------------------ group

inline constexpr unsigned empty_slot = 0xffffffffu;

// A hash table by open addressing, from keys to tokens that have them. A slot never changes its
// key, but the token that stands for the key becomes the first one that has it.
struct TokenTable {
  unsigned* slots;
  int bits;  // 2^bits slots, more than there are tokens

  __device__ __forceinline__ unsigned size() const { return 1u << bits; }

  // Enters a token; returns its slot.
  __device__ __forceinline__ unsigned insert(const int64_t* keys, unsigned token) const {
    const uint64_t key = static_cast<uint64_t>(keys[token]);
    // As in the CPU's table: the high bits of the product depend on all bits of the key.
    unsigned slot =
        static_cast<unsigned>(((key ^ (key >> 32)) * 0x9e3779b97f4a7c15u) >> (64 - bits));
    while (true) {
      const unsigned other = atomicCAS(&slots[slot], empty_slot, token);
      if (other == empty_slot) return slot;
      if (static_cast<uint64_t>(keys[other]) == key) {
        atomicMin(&slots[slot], token);
        return slot;
      }
      slot = (slot + 1) & (size() - 1);
    }
  }
};

__device__ __forceinline__ int warp_sum(int value) {
  for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(all_lanes, value, lanes);
  return value;
}

// How many threads of the block before this one, and how many in all, satisfy the predicate. All
// threads take part. `warp_counts` holds 32 numbers.
struct BlockRank {
  int before, all;
};
__device__ __forceinline__ BlockRank block_rank(bool predicate, int* warp_counts) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const unsigned votes = __ballot_sync(all_lanes, predicate);
  if (lane == 0) warp_counts[warp] = __popc(votes);
  __syncthreads();
  const int count = lane < static_cast<int>(blockDim.x / 32) ? warp_counts[lane] : 0;
  return {warp_sum(lane < warp ? count : 0) + __popc(votes & ((1u << lane) - 1)), warp_sum(count)};
}

// A block groups a row. `scratch` holds a table for each row, or is null if a table fits into
// shared memory. The number of threads is a multiple of 32.
__global__ void __launch_bounds__(1024) group_kernel(GroupProblem problem, int bits,
                                                     unsigned* scratch) {
  __shared__ int warp_counts[32];
  const int64_t row = blockIdx.x, tokens = problem.tokens;
  TokenTable table{reinterpret_cast<unsigned*>(dynamic_shared_memory()), bits};
  if (scratch != nullptr) table.slots = scratch + (row << bits);
  const int64_t* keys = problem.keys + row * tokens;
  int64_t* ids = problem.ids + row * tokens;  // until the end: slots
  const bool* padding =
      problem.padding == nullptr ? nullptr : problem.padding + row / problem.heads * tokens;

  for (unsigned slot = threadIdx.x; slot < table.size(); slot += blockDim.x)
    table.slots[slot] = empty_slot;
  __syncthreads();
  for (int64_t n = threadIdx.x; n < tokens; n += blockDim.x) {
    const bool skipped = padding != nullptr && padding[n];
    ids[n] = skipped ? -1 : int64_t{table.insert(keys, static_cast<unsigned>(n))};
  }
  __syncthreads();

  // Every slot now holds a first token; it gets the number of first tokens before that one. A token
  // that compares itself with a slot that has its number already cannot be misled, because the
  // number is smaller than the token.
  int clusters = 0;
  for (int64_t base = 0; base < tokens; base += blockDim.x) {
    const int64_t n = base + threadIdx.x;
    const int64_t slot = n < tokens ? ids[n] : -1;
    const bool is_first = slot >= 0 && table.slots[slot] == static_cast<unsigned>(n);
    const BlockRank rank = block_rank(is_first, warp_counts);
    if (is_first) table.slots[slot] = static_cast<unsigned>(clusters + rank.before);
    clusters += rank.all;
    __syncthreads();
  }
  for (int64_t n = threadIdx.x; n < tokens; n += blockDim.x) {
    if (ids[n] < 0) continue;
    const int64_t id = table.slots[ids[n]];
    ids[n] = problem.capacity > 0 && id >= problem.capacity ? id % problem.capacity : id;
  }
  if (threadIdx.x == 0) problem.num_clusters[row] = clusters;
}

// A thread counts a token; `counts` starts as zeros.
__global__ void count_kernel(const int64_t* ids, int64_t rows, int64_t tokens, int64_t clusters,
                             unsigned long long* counts) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= rows * tokens || ids[i] < 0) return;
  atomicAdd(&counts[i / tokens * clusters + ids[i]], 1ull);
}

// ----------------------------------------------------------------------------------------- reduce

// Sums that a block holds: one for each of its warps and clusters, times 32 channels.
template <class Real>
inline constexpr int reduce_sums = sizeof(Real) == 8 ? 128 : 256;
inline constexpr int reduce_batch = 4;  // loads that a lane has under way at a time

// Adds the members among 32 tokens, one bit of `members` each, to the warp's sums of a channel.
// `cluster` is that of the lane's token, within the block. The order is that of the tokens.
template <class Real>
__device__ __forceinline__ void add_members(unsigned members, int cluster, const Real* values,
                                            int64_t token_stride, bool has_channel, Real* sums) {
  while (members != 0) {
    Real value[reduce_batch];
    int to[reduce_batch];
#pragma unroll
    for (int j = 0; j < reduce_batch; ++j) {
      const int token = members != 0 ? __ffs(static_cast<int>(members)) - 1 : 0;
      to[j] = __shfl_sync(all_lanes, cluster, token);
      if (members == 0) to[j] = -1;
      value[j] = to[j] >= 0 && has_channel ? values[token * token_stride] : Real{0};
      members &= members - 1;
    }
#pragma unroll
    for (int j = 0; j < reduce_batch; ++j)
      if (to[j] >= 0) sums[to[j] * 32] += value[j];
  }
}

// A block reduces `block_clusters` neighbouring clusters of a row, 32 channels of them: its warps
// share out the tokens of the row, look for members, and each adds up those that it finds. Blocks
// along x are numbered row by row, those along y are the channels.
template <class Real>
__global__ void __launch_bounds__(1024) reduce_kernel(ReduceProblem<Real> problem,
                                                      int block_clusters, int64_t blocks_per_row) {
  __shared__ Real sums[reduce_sums<Real>][32];
  const Tokens<const Real>& points = problem.points;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int64_t row = blockIdx.x / blocks_per_row;
  const int64_t first_cluster = blockIdx.x % blocks_per_row * block_clusters;
  const int64_t channel = static_cast<int64_t>(blockIdx.y) * 32 + lane;
  const bool has_channel = channel < points.channels;
  const int64_t* ids = problem.ids + row * points.tokens;
  const Real* values = points.row(row) + channel;
  Real* own_sums = &sums[warp * block_clusters][lane];
  for (int c = 0; c < block_clusters; ++c) own_sums[c * 32] = 0;

  for (int64_t base = warp * 128; base < points.tokens; base += warps * 128) {
    int cluster[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t n = base + 32 * j + lane;
      const int64_t id = n < points.tokens ? ids[n] : -1;
      const bool member = id >= first_cluster && id < first_cluster + block_clusters &&
                          id < problem.clusters;
      cluster[j] = member ? static_cast<int>(id - first_cluster) : -1;
    }
#pragma unroll
    for (int j = 0; j < 4; ++j)
      add_members(__ballot_sync(all_lanes, cluster[j] >= 0), cluster[j],
                  values + (base + 32 * j) * points.token_stride, points.token_stride, has_channel,
                  own_sums);
  }
  __syncthreads();
  for (int c = warp; c < block_clusters; c += warps) {
    const int64_t cluster = first_cluster + c;
    if (cluster >= problem.clusters || !has_channel) continue;
    Real sum = 0;
    for (int w = 0; w < warps; ++w) sum += sums[w * block_clusters + c][lane];
    const int64_t place = row * problem.clusters + cluster;
    if (problem.counts != nullptr && problem.counts[place] > 1)
      sum /= static_cast<Real>(problem.counts[place]);
    problem.prototypes[place * points.channels + channel] = sum;
  }
}

// -------------------------------------------------------------------------------------- broadcast

// Neighbouring channels that a thread copies at once.
template <class Real, int width>
struct alignas(sizeof(Real) * width) Channels {
  Real at[width];
};

// A thread copies `width` channels of a token; tokens of all heads of an image in turn, because the
// output is laid out so. Blocks along y are images.
template <class Real, int width>
__global__ void broadcast_kernel(BroadcastProblem<Real> problem, int64_t first_image) {
  using Vector = Channels<Real, width>;
  const Tokens<Real>& output = problem.output;
  const auto vectors = static_cast<unsigned>(output.channels / width);
  const auto heads = static_cast<unsigned>(output.heads);
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  const int64_t channel = static_cast<int64_t>(i % vectors) * width;
  const int64_t head = i / vectors % heads, token = i / vectors / heads;
  if (token >= output.tokens) return;
  const int64_t image = first_image + blockIdx.y, row = image * output.heads + head;
  const int64_t id = problem.ids[row * output.tokens + token];
  Vector value = {};
  if (id >= 0 && id < problem.prototypes.tokens) {
    const Tokens<const Real>& from = problem.prototypes;
    value = *reinterpret_cast<const Vector*>(from.data + image * from.image_stride +
                                             head * from.head_stride + id * from.token_stride +
                                             channel);
    if (problem.counts != nullptr) {
      const int64_t count = problem.counts[row * from.tokens + id];
      const Real scale = Real{1} / static_cast<Real>(count > 1 ? count : 1);
#pragma unroll
      for (int c = 0; c < width; ++c) value.at[c] *= scale;
    }
  }
  *reinterpret_cast<Vector*>(output.data + image * output.image_stride +
                             head * output.head_stride + token * output.token_stride + channel) =
      value;
}

}  // namespace efficient_detr::lsh_clustering
