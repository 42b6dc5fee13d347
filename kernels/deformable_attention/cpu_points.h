// The sampling points of one query and head, eight (double: four) at a time.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

// Before arithmetic.h, whose templates call these functions for vectors.
#include "../common/simd.h"

#include "../common/scratch.h"
#include "arithmetic.h"
#include "cpu_rows.h"
#include "problem.h"

namespace efficient_detr {

// The L P points of one query and head, in full vectors: the last one is filled up with points of
// weight zero in a level of one pixel.
template <class Real>
struct Points {
  using Vector = typename Simd<Real>::Vector;
  using Integer = typename Simd<Real>::Integer;
  using Index = std::conditional_t<std::is_same_v<Real, double>, int64_t, int32_t>;
  static constexpr int64_t lanes = Simd<Real>::lanes;

  explicit Points(const Sizes& sizes)
      : count(sizes.levels * sizes.points),
        // One vector at least, so that nobody need think of no points at all.
        padded((std::max<int64_t>(count, 1) + lanes - 1) / lanes * lanes),
        reals_(padded * 16),
        indices_(padded * 6) {
    std::fill_n(reals_.data(), padded * 16, Real{0});
    for (int64_t point = 0; point < padded; ++point) {
      const Level level = point < count ? sizes.level[point / sizes.points] : Level{1, 1, 0};
      width()[point] = static_cast<Real>(level.width);
      height()[point] = static_cast<Real>(level.height);
      level_start()[point] = level.start;
      level_width()[point] = level.width;
    }
  }

  // Of each point's level.
  ED_INLINE Real* width() const { return reals_.data(); }
  ED_INLINE Real* height() const { return reals_.data() + padded; }
  ED_INLINE Index* level_start() const { return indices_.data(); }
  ED_INLINE Index* level_width() const { return indices_.data() + padded; }
  // Of the present query: location, attention weight, and for the fused operator the factor from
  // offsets to locations.
  ED_INLINE Real* x() const { return reals_.data() + 2 * padded; }
  ED_INLINE Real* y() const { return reals_.data() + 3 * padded; }
  ED_INLINE Real* weight() const { return reals_.data() + 4 * padded; }
  ED_INLINE Real* scale_x() const { return reals_.data() + 5 * padded; }
  ED_INLINE Real* scale_y() const { return reals_.data() + 6 * padded; }
  // Of the present query and each of the four corners.
  ED_INLINE Real* corner_weight(int corner) const { return reals_.data() + (7 + corner) * padded; }
  ED_INLINE Real* product(int corner) const { return reals_.data() + (11 + corner) * padded; }
  ED_INLINE Real* grad_weight() const { return reals_.data() + 15 * padded; }
  ED_INLINE Index* corner_row(int corner) const { return indices_.data() + (2 + corner) * padded; }

  // The two axes of the points [point, point + lanes).
  ED_INLINE Neighbours<Vector, Integer> across(int64_t point) const {
    return neighbours<Vector, Integer>(load(x() + point), load(width() + point));
  }
  ED_INLINE Neighbours<Vector, Integer> down(int64_t point) const {
    return neighbours<Vector, Integer>(load(y() + point), load(height() + point));
  }

  // Rows and weights of all corners, from x, y and weight.
  ED_INLINE void find_corners() const {
    for (int64_t point = 0; point < padded; point += lanes) {
      const auto horizontal = across(point), vertical = down(point);
      const Vector top = load(weight() + point) * vertical.share_low;
      const Vector bottom = load(weight() + point) * vertical.share_high;
      store(corner_weight(0) + point, top * horizontal.share_low);
      store(corner_weight(1) + point, top * horizontal.share_high);
      store(corner_weight(2) + point, bottom * horizontal.share_low);
      store(corner_weight(3) + point, bottom * horizontal.share_high);
      const Integer start = load_bits<Integer>(level_start() + point);
      const Integer line = load_bits<Integer>(level_width() + point);
      const Integer top_row = start + vertical.low * line;
      const Integer bottom_row = start + vertical.high * line;
      store_bits(corner_row(0) + point, top_row + horizontal.low);
      store_bits(corner_row(1) + point, top_row + horizontal.high);
      store_bits(corner_row(2) + point, bottom_row + horizontal.low);
      store_bits(corner_row(3) + point, bottom_row + horizontal.high);
    }
  }

  const int64_t count, padded;

 private:
  Scratch<Real> reals_;
  Scratch<Index> indices_;
};

// Splits `count` pairs (x, y) into x and y.
template <class Real>
ED_INLINE void split_pairs(const Real* pairs, int64_t count, Real* x, Real* y) {
  constexpr int64_t lanes = Simd<Real>::lanes;
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    const auto first = load(pairs + 2 * i), second = load(pairs + 2 * i + lanes);
    store(x + i, evens(first, second));
    store(y + i, odds(first, second));
  }
  for (; i < count; ++i) {
    x[i] = pairs[2 * i];
    y[i] = pairs[2 * i + 1];
  }
}

template <class Real>
ED_INLINE void softmax(Real* numbers, int64_t count) {
  Real highest = numbers[0];
  for (int64_t i = 1; i < count; ++i) highest = std::max(highest, numbers[i]);
  Real total = 0;
  for (int64_t i = 0; i < count; ++i) {
    numbers[i] = std::exp(numbers[i] - highest);
    total += numbers[i];
  }
  for (int64_t i = 0; i < count; ++i) numbers[i] /= total;
}

// The same, eight numbers at a time.
ED_INLINE void softmax(float* numbers, int64_t count) {
  constexpr float infinity = std::numeric_limits<float>::infinity();
  const int64_t padded = (count + 7) / 8 * 8;
  for (int64_t i = count; i < padded; ++i) numbers[i] = -infinity;
  Float8 highest = load(numbers);
  for (int64_t i = 8; i < padded; i += 8) {
    const Float8 next = load(numbers + i);
    highest = select(next > highest, next, highest);
  }
  const Float8 shift = largest(highest);
  Float8 totals{};
  for (int64_t i = 0; i < padded; i += 8) {
    const Float8 power = exponential(load(numbers + i) - shift);
    store(numbers + i, power);
    totals += power;
  }
  const Float8 factor = 1 / sum(totals);
  for (int64_t i = 0; i < padded; i += 8) store(numbers + i, load(numbers + i) * factor);
}

// Reads where and how strongly a query and head samples.
template <class Real>
class Reader {
 public:
  Reader(const Sizes& sizes, const Sampling& sampling, const Points<Real>& points)
      : sizes_(sizes), sampling_(sampling), points_(points) {
    // The same for all queries with reference points.
    for (int64_t point = 0; point < points.padded; ++point) {
      points_.scale_x()[point] = offset_scale(points_.width()[point]);
      points_.scale_y()[point] = offset_scale(points_.height()[point]);
    }
  }

  ED_INLINE bool is_fused() const { return sampling_.is_fused(); }

  // `query` counts over all images.
  ED_INLINE void read(int64_t query, int64_t head) const {
    const int64_t first = (query * sizes_.heads + head) * points_.count;
    if (is_fused()) {
      read_fused(query, first);
    } else {
      const Real* locations = static_cast<const Real*>(sampling_.locations) + 2 * first;
      const Real* weights = static_cast<const Real*>(sampling_.weights) + first;
      split_pairs(locations, points_.count, points_.x(), points_.y());
      copy_row<Real>(weights, points_.weight(), points_.count);
    }
  }

  ED_INLINE void prefetch(int64_t query, int64_t head) const {
    const int64_t first = (query * sizes_.heads + head) * points_.count;
    const void* pairs = is_fused() ? sampling_.offsets : sampling_.locations;
    const void* weights = is_fused() ? sampling_.logits : sampling_.weights;
    for (int64_t point = 0; point < points_.count; point += 64 / sizeof(Real)) {
      __builtin_prefetch(static_cast<const Real*>(pairs) + 2 * (first + point));
      __builtin_prefetch(static_cast<const Real*>(pairs) + 2 * (first + point) + 64 / sizeof(Real));
      __builtin_prefetch(static_cast<const Real*>(weights) + first + point);
    }
  }

 private:
  ED_INLINE void read_fused(int64_t query, int64_t first) const {
    const Real* logits = static_cast<const Real*>(sampling_.logits) + first;
    copy_row<Real>(logits, points_.weight(), points_.count);
    softmax(points_.weight(), points_.count);
    const Real* offsets = static_cast<const Real*>(sampling_.offsets) + 2 * first;
    split_pairs(offsets, points_.count, points_.x(), points_.y());
    read_reference(query);
    for (int64_t point = 0; point < points_.padded; point += Points<Real>::lanes) {
      move(points_.x() + point, points_.scale_x() + point, center_x() + point);
      move(points_.y() + point, points_.scale_y() + point, center_y() + point);
    }
  }

  ED_INLINE static void move(Real* offset, const Real* scale, const Real* center) {
    store(offset, load(offset) * load(scale) + load(center));
  }

  // Spreads the reference of each level over its points.
  ED_INLINE void read_reference(int64_t query) const {
    const int64_t size = sampling_.reference_size;
    const Real* reference =
        static_cast<const Real*>(sampling_.reference) + query * sizes_.levels * size;
    int64_t level = 0;
    if constexpr (std::is_same_v<Real, float>) {
      if (sizes_.points == 4) {
        for (; level + 2 <= sizes_.levels; level += 2) {
          read_two_references(reference + level * size, 4 * level);
        }
      }
    }
    for (; level < sizes_.levels; ++level) {
      read_one_reference(reference + level * size, level * sizes_.points);
    }
  }

  ED_INLINE void read_one_reference(const Real* reference, int64_t first_point) const {
    const Real points = static_cast<Real>(sizes_.points);
    for (int64_t point = first_point; point < first_point + sizes_.points; ++point) {
      center_x()[point] = reference[0];
      center_y()[point] = reference[1];
      if (sampling_.reference_size == 4) {
        points_.scale_x()[point] = offset_scale(reference[2], points);
        points_.scale_y()[point] = offset_scale(reference[3], points);
      }
    }
  }

  // The usual case, two levels of four points, without single stores in front of vector loads,
  // which processors wait for.
  ED_INLINE void read_two_references(const float* reference, int64_t first_point) const {
    if (sampling_.reference_size == 2) {
      const Float8 centers{reference[0], reference[1], reference[2], reference[3]};
      store(center_x() + first_point,
            __builtin_shufflevector(centers, centers, 0, 0, 0, 0, 2, 2, 2, 2));
      store(center_y() + first_point,
            __builtin_shufflevector(centers, centers, 1, 1, 1, 1, 3, 3, 3, 3));
    } else {
      const Float8 boxes = load(reference);
      const Float8 scales = offset_scale(boxes, Float8{} + 4.0f);
      store(center_x() + first_point,
            __builtin_shufflevector(boxes, boxes, 0, 0, 0, 0, 4, 4, 4, 4));
      store(center_y() + first_point,
            __builtin_shufflevector(boxes, boxes, 1, 1, 1, 1, 5, 5, 5, 5));
      store(points_.scale_x() + first_point,
            __builtin_shufflevector(scales, scales, 2, 2, 2, 2, 6, 6, 6, 6));
      store(points_.scale_y() + first_point,
            __builtin_shufflevector(scales, scales, 3, 3, 3, 3, 7, 7, 7, 7));
    }
  }

  // Free until the corners are found.
  ED_INLINE Real* center_x() const { return points_.corner_weight(0); }
  ED_INLINE Real* center_y() const { return points_.corner_weight(1); }

  const Sizes& sizes_;
  const Sampling& sampling_;
  const Points<Real>& points_;
};

}  // namespace efficient_detr
