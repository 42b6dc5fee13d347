// LSH clustering on a CUDA device. No torch: problems hold device pointers, and all work is queued
// on the given stream. Results are the same bits in every run.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "problem.h"

namespace efficient_detr {

// Why rows of these sizes cannot be worked on, in words that continue "... on CUDA: ", or null.
const char* cuda_limit(int64_t images, int64_t heads, int64_t tokens, int64_t channels);

// All of these return the first error of a launch.
template <class Real>
cudaError_t cuda_hash_keys(const HashProblem<Real>& problem, cudaStream_t stream);

// Bytes of device memory that grouping needs beside its results; most often none.
int64_t cuda_group_workspace(const GroupProblem& problem);
cudaError_t cuda_group_by_key(const GroupProblem& problem, void* workspace, cudaStream_t stream);

// Members of each of the C clusters of `rows` rows, as (rows, C).
cudaError_t cuda_count_members(const int64_t* ids, int64_t rows, int64_t tokens, int64_t clusters,
                               int64_t* counts, cudaStream_t stream);

template <class Real>
cudaError_t cuda_cluster_reduce(const ReduceProblem<Real>& problem, cudaStream_t stream);

template <class Real>
cudaError_t cuda_cluster_broadcast(const BroadcastProblem<Real>& problem, cudaStream_t stream);

}  // namespace efficient_detr
