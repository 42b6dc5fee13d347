// Rows of channels: reading and writing the tensors of a call head by head.
#pragma once

#include <type_traits>

#include "../common/simd.h"
#include "problem.h"

namespace efficient_detr {

// Whether the numbers are float or double, so that kernels can work on them where they are.
inline bool stores_reals(Storage storage) {
  return storage == Storage::Float32 || storage == Storage::Float64;
}

// The rows, one a token, of one head of one image.
template <class Element>
struct Rows {
  Element* data;
  int64_t stride;  // elements from one token to the next
  ED_INLINE Element* operator[](int64_t row) const { return data + row * stride; }
};

template <class Real, class From, class To>
ED_INLINE void copy_row(const From* from, To* to, int64_t channels) {
  constexpr int64_t lanes = Simd<Real>::lanes;
  int64_t c = 0;
  for (; c + lanes <= channels; c += lanes) store(to + c, load(from + c));
  for (; c < channels; ++c) store_one(to + c, load_one(from + c));
}

template <class Real, class From, class To>
ED_INLINE void copy_rows(Rows<const From> from, Rows<To> to, int64_t rows, int64_t channels) {
  // The rows of a head lie too far apart in (B, S, H, D) for the hardware to look ahead.
  constexpr int64_t ahead = 16;
  for (int64_t row = 0; row < rows; ++row) {
    __builtin_prefetch(from[row + ahead]);
    __builtin_prefetch(from[row + ahead] + 64 / sizeof(From));
    copy_row<Real>(from[row], to[row], channels);
  }
}

// `copy_rows` for results that are too long for the cache.
ED_INLINE void stream_rows(Rows<const float> from, Rows<float> to, int64_t rows, int64_t channels) {
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t c = 0; c < channels; c += 8) stream(to[row] + c, load(from[row] + c));
  }
  finish_streaming();
}

// Rows of one head in tensors (B, N, H, D) of any storage; rows count over all images. `Real` is
// double for Float64, else float.
template <class Real>
struct Heads {
  Storage storage;
  int64_t heads, channels;

  template <class Element>
  ED_INLINE Rows<Element> rows(Element* tensor, int64_t first_row, int64_t head) const {
    return {tensor + (first_row * heads + head) * channels, heads * channels};
  }

  // Copies `count` rows from the tensor to `to`.
  ED_INLINE void read(const void* tensor, int64_t first_row, int64_t head, int64_t count,
                      Rows<Real> to) const {
    const auto copy = [&](const auto* from) __attribute__((always_inline)) {
      copy_rows<Real>(rows(from, first_row, head), to, count, channels);
    };
    if constexpr (std::is_same_v<Real, double>) {
      copy(static_cast<const double*>(tensor));
    } else if (storage == Storage::Float16) {
      copy(static_cast<const Float16*>(tensor));
    } else if (storage == Storage::BFloat16) {
      copy(static_cast<const BFloat16*>(tensor));
    } else {
      copy(static_cast<const float*>(tensor));
    }
  }

  // And back.
  ED_INLINE void write(Rows<const Real> from, int64_t count, void* tensor, int64_t first_row,
                       int64_t head) const {
    const auto copy = [&](auto* to) __attribute__((always_inline)) {
      copy_rows<Real>(from, rows(to, first_row, head), count, channels);
    };
    if constexpr (std::is_same_v<Real, double>) {
      copy(static_cast<double*>(tensor));
    } else if (storage == Storage::Float16) {
      copy(static_cast<Float16*>(tensor));
    } else if (storage == Storage::BFloat16) {
      copy(static_cast<BFloat16*>(tensor));
    } else if (channels % 8 == 0 && reinterpret_cast<uintptr_t>(tensor) % 16 == 0 && count > 1) {
      stream_rows(from, rows(static_cast<float*>(tensor), first_row, head), count, channels);
    } else {
      copy(static_cast<float*>(tensor));
    }
  }
};

}  // namespace efficient_detr
