// What a call of multi-scale deformable attention works on: sizes and raw pointers, no torch.
//
// Shape letters: B images, S tokens over all levels, Q queries, H heads, D channels a head,
// L levels, P points a level. All tensors are contiguous.
#pragma once

#include <cstdint>

namespace efficient_detr {

// Storage of value, output and their gradients. Everything else is float, or double with Float64.
enum class Storage { Float32, Float64, Float16, BFloat16 };

struct Level {
  int32_t height;
  int32_t width;
  int32_t start;  // row of the first token of the level within its image
};

struct Sizes {
  int64_t images;    // B
  int64_t tokens;    // S, below 2^31
  int64_t heads;     // H
  int64_t channels;  // D
  int64_t queries;   // Q
  int64_t levels;    // L
  int64_t points;    // P
  const Level* level;  // L of them, in host memory
};

// Where to sample and how to weight. The plain operator gives `locations` and `weights`, the fused
// one `reference`, `offsets` and `logits`; the pointers of the other kind are null.
struct Sampling {
  const void* locations = nullptr;  // (B, Q, H, L, P, 2) as (x, y), the level spans [0, 1]
  const void* weights = nullptr;    // (B, Q, H, L, P)
  const void* reference = nullptr;  // (B, Q, L, 2) points or (B, Q, L, 4) boxes (cx, cy, w, h)
  const void* offsets = nullptr;    // (B, Q, H, L, P, 2): cells, or 2 P-ths of the box
  const void* logits = nullptr;     // (B, Q, H, L, P), softmax over L P
  int reference_size = 0;           // 2 or 4; 0 for the plain operator

  bool is_fused() const { return reference_size != 0; }
};

struct ForwardProblem {
  Storage storage;
  Sizes sizes;
  Sampling sampling;
  const void* value;  // (B, S, H, D)
  void* output;       // (B, Q, H, D)
};

struct BackwardProblem {
  Storage storage;
  Sizes sizes;
  Sampling sampling;
  const void* value;        // (B, S, H, D)
  const void* grad_output;  // (B, Q, H, D), in storage
  void* grad_value;         // (B, S, H, D), in storage; need not be zeroed
  void* grad_locations;     // (B, Q, H, L, P, 2): of the locations, or of the offsets when fused
  void* grad_weights;       // (B, Q, H, L, P): of the weights, or of the logits when fused
  void* grad_reference;     // (B, Q, L, 2 | 4), or null when nobody wants it
};

}  // namespace efficient_detr
