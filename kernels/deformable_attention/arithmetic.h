// The arithmetic of one sampling point, shared by the CPU kernel (eight points at a time, `Real` is
// a vector) and the CUDA kernel (`Real` is float or double).
//
// A location (x, y) lies at pixel coordinates x W - 1/2, y H - 1/2. The four pixels around it are
// its corners, in the order (top left, top right, bottom left, bottom right); a corner outside the
// level counts as zero. A location that is not finite is treated as outside.
#pragma once

#include "../common/portable.h"

namespace efficient_detr {

ED_INLINE float select(bool condition, float yes, float no) { return condition ? yes : no; }
ED_INLINE double select(bool condition, double yes, double no) { return condition ? yes : no; }
ED_INLINE int32_t select(bool condition, int32_t yes, int32_t no) { return condition ? yes : no; }
ED_INLINE int64_t select(bool condition, int64_t yes, int64_t no) { return condition ? yes : no; }

// Largest integer below a number that fits into the integer type.
ED_INLINE int32_t floor_to_integer(float x, int32_t) {
  const int32_t truncated = static_cast<int32_t>(x);
  return truncated - (static_cast<float>(truncated) > x ? 1 : 0);
}
ED_INLINE int64_t floor_to_integer(double x, int64_t) {
  const int64_t truncated = static_cast<int64_t>(x);
  return truncated - (static_cast<double>(truncated) > x ? 1 : 0);
}
ED_INLINE float to_real(int32_t i, float) { return static_cast<float>(i); }
ED_INLINE double to_real(int64_t i, double) { return static_cast<double>(i); }

// One axis of a point: the two neighbouring pixels, each with its share of the sample and whether
// it lies inside. Outside pixels have share 0 and a legal index.
template <class Real, class Integer>
struct Neighbours {
  Integer low, high;
  Real share_low, share_high;    // 0 outside
  Real inside_low, inside_high;  // 1 or 0
};

// `size` is the number of pixels along the axis, at least 1.
template <class Real, class Integer>
ED_INLINE Neighbours<Real, Integer> neighbours(Real location, Real size) {
  const Real zero = Real{} + 0, one = Real{} + 1;
  Real pixel = location * size - Real{} - (one / 2);
  // False for NaN, so that -2, which has no inside neighbour, stands for everything far outside.
  pixel = select(pixel >= -one, pixel, zero - 2);
  pixel = select(pixel < size, pixel, zero - 2);
  const Integer low = floor_to_integer(pixel, Integer{});
  const Real low_real = to_real(low, Real{});
  const Real fraction = pixel - low_real;
  const Integer last = floor_to_integer(size, Integer{}) - 1;
  Neighbours<Real, Integer> result;
  result.inside_low = select(low_real >= zero, one, zero);
  result.inside_high = select((low_real >= -one) & (low_real < size - one), one, zero);
  result.share_low = result.inside_low * (one - fraction);
  result.share_high = result.inside_high * fraction;
  result.low = select(low >= 0, low, Integer{});
  const Integer high = select(low >= -1, low + 1, Integer{});
  result.high = select(high <= last, high, last);
  return result;
}

// Gradients of a * bilinear(value) with respect to a and to the location, from the products
// <grad_output, value at corner>.
template <class Real>
struct PointGradient {
  Real weight, x, y;
};

template <class Real, class Integer>
ED_INLINE PointGradient<Real> point_gradient(
    const Neighbours<Real, Integer>& x, const Neighbours<Real, Integer>& y, Real width, Real height,
    Real weight, Real top_left, Real top_right, Real bottom_left, Real bottom_right) {
  PointGradient<Real> gradient;
  gradient.weight = y.share_low * (x.share_low * top_left + x.share_high * top_right) +
                    y.share_high * (x.share_low * bottom_left + x.share_high * bottom_right);
  gradient.x = weight * width *
               (y.share_low * (x.inside_high * top_right - x.inside_low * top_left) +
                y.share_high * (x.inside_high * bottom_right - x.inside_low * bottom_left));
  gradient.y = weight * height *
               (x.share_low * (y.inside_high * bottom_left - y.inside_low * top_left) +
                x.share_high * (y.inside_high * bottom_right - y.inside_low * top_right));
  return gradient;
}

// Fused operator: how far one unit of offset moves a location. An offset counts in pixels around a
// reference point, and in 1/P of half the size of a reference box.
template <class Real>
ED_INLINE Real offset_scale(Real pixels) {
  return (Real{} + 1) / pixels;
}
template <class Real>
ED_INLINE Real offset_scale(Real box_size, Real points) {
  return box_size / (points + points);
}

// A gradient times the derivative of what lies before it. A point that contributes nothing hands no
// gradient on, not even NaN where the derivative is not finite.
template <class Real>
ED_INLINE Real chained(Real gradient, Real derivative) {
  const Real zero = Real{} + 0;
  return select(gradient == zero, zero, gradient * derivative);
}

}  // namespace efficient_detr
