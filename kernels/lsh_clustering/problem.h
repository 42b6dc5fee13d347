// What the operators of LSH clustering work on: sizes and raw pointers, no torch.
//
// Shape letters: B images, H heads, N tokens, D channels a head, C clusters, T rounds of hashing.
// A row is one head of one image; there are B H of them, and each is clustered on its own.
#pragma once

#include <cstdint>

#include "../common/portable.h"

namespace efficient_detr {

// Tokens of a (B, H, N, D) tensor whose channels lie next to each other; the other dimensions may
// lie in any order, because the heads of attention are views of a (B, N, H, D) tensor.
template <class Real>
struct Tokens {
  Real* data;
  int64_t images, heads, tokens, channels;
  int64_t image_stride, head_stride, token_stride;  // in elements

  ED_HOST_DEVICE int64_t rows() const { return images * heads; }
  ED_HOST_DEVICE Real* row(int64_t row) const {
    return data + row / heads * image_stride + row % heads * head_stride;
  }
};

// Cells are numbered from -cell_limit to cell_limit; what lies further out belongs to the outermost
// cell, and NaN to the lowest. The limit is a power of two so that float holds it exactly.
constexpr int32_t cell_limit = 1 << 30;

// key = sum over rounds t of floor((x . direction_t + bias_t) / width) * multiplier_t modulo 2^64.
template <class Real>
struct HashProblem {
  Tokens<const Real> points;
  int64_t rounds;              // T
  Real width;                  // above 0
  const Real* directions;      // (D, T)
  const Real* bias;            // (T)
  const int64_t* multipliers;  // (T)
  int64_t* keys;               // (B, H, N)
};

// Tokens of a row with equal keys form a cluster. Ids count clusters in the order of their first
// tokens. With a capacity, a cluster beyond it joins the one whose id is its own modulo capacity.
struct GroupProblem {
  const int64_t* keys;        // (B, H, N)
  const bool* padding;        // (B, N), true for tokens that are in no cluster; or null
  int64_t images, heads, tokens;
  int64_t capacity;           // 0: none
  int64_t* ids;               // (B, H, N), -1 for padding
  int64_t* num_clusters;      // (B, H), before clusters beyond the capacity have joined others
};

// prototype = sum of the members of a cluster, divided by their number if counts are given. Ids
// outside [0, C) belong to no cluster.
template <class Real>
struct ReduceProblem {
  Tokens<const Real> points;
  const int64_t* ids;     // (B, H, N)
  const int64_t* counts;  // (B, H, C) or null
  int64_t clusters;       // C
  Real* prototypes;       // (B, H, C, D)
};

// The transpose of the above: each token gets the prototype of its cluster, divided by the number
// of members if counts are given, and zero if it has no cluster.
template <class Real>
struct BroadcastProblem {
  Tokens<const Real> prototypes;  // (B, H, C, D)
  const int64_t* ids;             // (B, H, N)
  const int64_t* counts;          // (B, H, C) or null
  Tokens<Real> output;            // (B, H, N, D)
};

}  // namespace efficient_detr
