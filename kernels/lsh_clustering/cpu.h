// LSH clustering on a CPU. No torch and no threads: the caller divides the tasks.
//
// Results are bit-identical however the tasks are divided, because each number is written by one
// task, which adds in a fixed order.
#pragma once

#include <cstdint>

#include "problem.h"

namespace efficient_detr {

template <class Real>
int64_t hash_tasks(const HashProblem<Real>& problem);
template <class Real>
void hash_keys(const HashProblem<Real>& problem, int64_t first_task, int64_t last_task);

// One task a row. `members` (B, H, N) receives how many tokens each cluster has; what follows the
// last cluster of a row, or the capacity, means nothing.
void group_by_key(const GroupProblem& problem, int64_t* members, int64_t first_row,
                  int64_t last_row);

// One task a row.
template <class Real>
void cluster_reduce(const ReduceProblem<Real>& problem, int64_t first_row, int64_t last_row);

template <class Real>
int64_t broadcast_tasks(const BroadcastProblem<Real>& problem);
template <class Real>
void cluster_broadcast(const BroadcastProblem<Real>& problem, int64_t first_task,
                       int64_t last_task);

}  // namespace efficient_detr
