// Multi-scale deformable attention on a CUDA device: the device code.
//
// A group of G lanes works on one head of one query. Together the lanes hold the D channels, V each
// (16 bytes where D allows), so that each corner of a sampling point is read by one coalesced
// access. A lane works out where G-th, 2 G-th ... point lies and hands that on by warp shuffles, so
// that no point is worked out twice. Sums are kept in float, or in double for double values.
//
// Blocks run over the queries first, then heads, then images: the queries of a block, neighbours in
// the image as a rule, sample one head and find each other's rows in the L1 cache.
//
// All lanes of a warp stay together to the end, because every shuffle names the whole warp. The
// groups beyond the last query repeat it and write nothing.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "../common/cuda_device.h"
#include "arithmetic.h"

namespace efficient_detr::deformable_attention {

inline constexpr int block_threads = 128;
inline constexpr int elementwise_threads = 256;
// Blocks that a multiprocessor must be able to hold, which bounds the registers: 72 forward, 128
// backward (168 with doubles). Without it ptxas saves registers for more blocks and spills some.
inline constexpr int forward_blocks = 7;
template <class T>
inline constexpr int backward_blocks = sizeof(T) == 8 ? 3 : 4;
inline constexpr int most_levels = 32;  // they travel in the kernel's arguments

// ---------------------------------------------------------------------------------------- numbers

template <class T>
struct Element {
  using Real = float;
  using Integer = int32_t;
  static constexpr int per_vector = 16 / sizeof(T);
};
template <>
struct Element<double> {
  using Real = double;
  using Integer = int64_t;
  static constexpr int per_vector = 2;
};

__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }
__device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ double larger(double a, double b) { return fmax(a, b); }

__device__ __forceinline__ float widened(float x) { return x; }
__device__ __forceinline__ double widened(double x) { return x; }
__device__ __forceinline__ float widened(__half x) { return __half2float(x); }
__device__ __forceinline__ float widened(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ void narrow(float x, float& to) { to = x; }
__device__ __forceinline__ void narrow(double x, double& to) { to = x; }
__device__ __forceinline__ void narrow(float x, __half& to) { to = __float2half_rn(x); }
__device__ __forceinline__ void narrow(float x, __nv_bfloat16& to) { to = __float2bfloat16_rn(x); }

__device__ __forceinline__ void unpack(unsigned bits, float* to, const float*) {
  to[0] = __uint_as_float(bits);
}
__device__ __forceinline__ void unpack(unsigned bits, float* to, const __half*) {
  to[0] = __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
  to[1] = __half2float(__ushort_as_half(static_cast<unsigned short>(bits >> 16)));
}
__device__ __forceinline__ void unpack(unsigned bits, float* to, const __nv_bfloat16*) {
  to[0] = __uint_as_float(bits << 16);
  to[1] = __uint_as_float(bits & 0xffff0000u);
}
__device__ __forceinline__ unsigned pack(const float* from, const float*) {
  return __float_as_uint(from[0]);
}
__device__ __forceinline__ unsigned pack(const float* from, const __half*) {
  return __half_as_ushort(__float2half_rn(from[0])) |
         static_cast<unsigned>(__half_as_ushort(__float2half_rn(from[1]))) << 16;
}
__device__ __forceinline__ unsigned pack(const float* from, const __nv_bfloat16*) {
  return __bfloat16_as_ushort(__float2bfloat16_rn(from[0])) |
         static_cast<unsigned>(__bfloat16_as_ushort(__float2bfloat16_rn(from[1]))) << 16;
}

// V numbers: one, or 16 bytes of them at an address that is a multiple of 16.
template <int V, class T>
__device__ __forceinline__ void load(const T* from, typename Element<T>::Real (&to)[V]) {
  if constexpr (V == 1) {
    to[0] = widened(__ldg(from));
  } else {
    static_assert(V == Element<T>::per_vector);
    const uint4 bits = __ldg(reinterpret_cast<const uint4*>(from));
    unpack(bits.x, to, from);
    unpack(bits.y, to + V / 4, from);
    unpack(bits.z, to + V / 2, from);
    unpack(bits.w, to + V / 4 * 3, from);
  }
}
template <int V, class T>
__device__ __forceinline__ void store(const typename Element<T>::Real (&from)[V], T* to) {
  if constexpr (V == 1) {
    narrow(from[0], *to);
  } else {
    static_assert(V == Element<T>::per_vector);
    *reinterpret_cast<uint4*>(to) = make_uint4(pack(from, to), pack(from + V / 4, to),
                                               pack(from + V / 2, to), pack(from + V / 4 * 3, to));
  }
}

// The sum over the lanes of a group, in every lane; the same bits in all of them.
template <int G, class Real>
__device__ __forceinline__ Real group_sum(Real x) {
#pragma unroll
  for (int step = G / 2; step > 0; step /= 2) x += __shfl_xor_sync(all_lanes, x, step, G);
  return x;
}
template <int G, class Real>
__device__ __forceinline__ Real group_maximum(Real x) {
#pragma unroll
  for (int step = G / 2; step > 0; step /= 2)
    x = larger(x, __shfl_xor_sync(all_lanes, x, step, G));
  return x;
}

// -------------------------------------------------------------------------------------- arguments

struct LevelArgument {
  int32_t height;
  int32_t width;
  int32_t start;
  int32_t right;  // elements from a corner to its right neighbour; 0 in a level of one column
  int32_t down;   // elements from a corner to the one below; 0 in a level of one row
};

template <class T>
struct Arguments {
  using Real = typename Element<T>::Real;
  const T* value;
  const Real* points;     // locations, or offsets of the fused operator
  const Real* weights;    // or logits
  const Real* reference;  // of the fused operator
  int32_t reference_size;
  int32_t first_image;  // of this launch
  int32_t queries, heads, channels, levels;
  int32_t points_of_level;  // P
  int32_t points_of_query;  // L P
  float per_point;          // 1 / P
  int32_t token_elements;   // H D
  int64_t image_elements;   // S H D
  LevelArgument level[most_levels];
};

// The levels alone.
struct LevelSizes {
  int32_t height[most_levels];
  int32_t width[most_levels];
};

// What decides the unit of the deterministic sums.
struct FixedPoint {
  unsigned long long* maxima;  // bits of max |grad_output| and of max |weight|, as Real
  int32_t count_bits;          // log2, rounded up, of how many terms one sum may have
  bool softmax;                // the weights are at most 1; their maximum is 0, or 1 if one is NaN
};

template <class T>
struct ForwardArguments : Arguments<T> {
  T* output;
};

template <class T, class Sum>
struct BackwardArguments : Arguments<T> {
  using typename Arguments<T>::Real;
  const T* grad_output;
  Sum* grad_value;  // zeros; Real, or int64 in fixed point
  Real* grad_points;
  Real* grad_weights;
  bool gradient_of_locations;  // fused: finish_reference_kernel turns them into the offsets'
  FixedPoint fixed_point;
};

// ---------------------------------------------------------------------------------- one (q, h)

// A point as its owner knows it. The first of two neighbours along an axis is always followed by
// the second, because at a border, where one of them lies outside, the pair is moved inside.
template <class T>
struct Point {
  using Real = typename Element<T>::Real;
  Neighbours<Real, typename Element<T>::Integer> x, y;
  Real weight;
  Real scale_x, scale_y;  // fused: how far a unit of offset moves the location, else 1
  Real width, height;     // of the level
  int32_t offset;         // of the first corner, in elements from the first row of the head
};

// What the other lanes need of a point: where its first corner lies, and what each corner counts.
template <class Real>
struct Corners {
  Real top_left, top_right, bottom_left, bottom_right;
};

// Moves a pair of neighbours of which one lies outside, so that both lie inside and the one that
// was outside has no share. A side without a neighbour keeps a slope of 0; `inside_low` is minus
// the slope of the first, `inside_high` the slope of the second, as point_gradient reads them.
template <class Real, class Integer>
__device__ __forceinline__ Neighbours<Real, Integer> moved_inside(
    const Neighbours<Real, Integer>& n, Integer size) {
  const Integer last_first = size > 1 ? size - 2 : 0;
  const Integer first = n.low < last_first ? n.low : last_first;
  const bool low_first = n.low == first, high_first = n.high == first;
  Neighbours<Real, Integer> result;
  result.low = first;
  result.high = size > 1 ? first + 1 : first;
  result.share_low = (low_first ? n.share_low : 0) + (high_first ? n.share_high : 0);
  result.share_high = (low_first ? 0 : n.share_low) + (high_first ? 0 : n.share_high);
  result.inside_low = (low_first ? n.inside_low : 0) - (high_first ? n.inside_high : 0);
  result.inside_high = (high_first ? 0 : n.inside_high) - (low_first ? 0 : n.inside_low);
  return result;
}

template <class T, int V, int G>
class Group {
 public:
  using Real = typename Element<T>::Real;
  using Integer = typename Element<T>::Integer;
  // The lanes hold exactly the D channels. Else they go over them in steps, one channel a lane.
  static constexpr bool whole = V > 1;

  __device__ __forceinline__ explicit Group(const Arguments<T>& arguments)
      : arguments_(arguments), lane(threadIdx.x % G) {
    const int query = blockIdx.x * (block_threads / G) + threadIdx.x / G;
    active = query < arguments.queries;
    const int64_t image = arguments.first_image + static_cast<int64_t>(blockIdx.z);
    place = image * arguments.queries + (active ? query : arguments.queries - 1);
    row = place * arguments.heads + blockIdx.y;
    head_elements = image * arguments.image_elements +
                    static_cast<int64_t>(blockIdx.y) * channels();
    if (fused()) prepare_softmax();
  }

  __device__ __forceinline__ int channels() const { return whole ? G * V : arguments_.channels; }
  // A branch that all lanes take alike, and cheaper than every kernel twice.
  __device__ __forceinline__ bool fused() const { return arguments_.reference != nullptr; }
  __device__ __forceinline__ int points() const { return arguments_.points_of_query; }
  // The last round of G points may reach beyond the last point.
  __device__ __forceinline__ int clamped(int index) const { return min(index, points() - 1); }

  // Attention weight of a point.
  __device__ __forceinline__ Real weight(int point) const {
    const Real number = __ldg(arguments_.weights + row * points() + point);
    return fused() ? exponential(number - maximum_) * inverse_sum_ : number;
  }

  __device__ __forceinline__ Point<T> point(int index) const {
    // Far cheaper than a division, and exact for up to 2^20 points.
    const int level = static_cast<int>((static_cast<float>(index) + 0.5f) * arguments_.per_point);
    const LevelArgument& at = arguments_.level[level];
    const Real* xy = arguments_.points + (row * points() + index) * 2;
    Real x = __ldg(xy), y = __ldg(xy + 1);
    Point<T> result;
    result.weight = weight(index);
    result.scale_x = result.scale_y = 1;
    if (fused()) {
      const int size = arguments_.reference_size;
      const Real* reference =
          arguments_.reference + (place * arguments_.levels + level) * size;
      const Real per_level = static_cast<Real>(arguments_.points_of_level);
      result.scale_x = size == 4 ? offset_scale(__ldg(reference + 2), per_level)
                                 : offset_scale(static_cast<Real>(at.width));
      result.scale_y = size == 4 ? offset_scale(__ldg(reference + 3), per_level)
                                 : offset_scale(static_cast<Real>(at.height));
      x = __ldg(reference) + x * result.scale_x;
      y = __ldg(reference + 1) + y * result.scale_y;
    }
    const Integer width = at.width, height = at.height;
    result.x = moved_inside(neighbours<Real, Integer>(x, static_cast<Real>(width)), width);
    result.y = moved_inside(neighbours<Real, Integer>(y, static_cast<Real>(height)), height);
    const int32_t token = at.start + static_cast<int32_t>(result.y.low) * at.width +
                          static_cast<int32_t>(result.x.low);
    result.offset = token * arguments_.token_elements;
    result.width = static_cast<Real>(width);
    result.height = static_cast<Real>(height);
    return result;
  }

  const Arguments<T>& arguments_;
  const int lane;
  bool active;
  int64_t place;          // (b, q)
  int64_t row;            // (b, q, h)
  int64_t head_elements;  // where the rows of this image and head begin; the same for the block

 protected:
  Real maximum_ = 0, inverse_sum_ = 0;  // of the softmax; if one weight is NaN, all are

 private:
  __device__ __forceinline__ void prepare_softmax() {
    const Real* logits = arguments_.weights + row * points();
    maximum_ = __ldg(logits);
    for (int k = lane; k < points(); k += G) maximum_ = larger(maximum_, __ldg(logits + k));
    maximum_ = group_maximum<G>(maximum_);
    Real sum = 0;
    for (int k = lane; k < points(); k += G) sum += exponential(__ldg(logits + k) - maximum_);
    inverse_sum_ = 1 / group_sum<G>(sum);
  }
};

// Walks along the points of a query, the same for all lanes of the warp, and knows their level.
class LevelCursor {
 public:
  template <class T>
  __device__ __forceinline__ explicit LevelCursor(const Arguments<T>& arguments)
      : points_(arguments.points_of_level), left_(points_), level_(arguments.level) {}

  __device__ __forceinline__ const LevelArgument& next() {
    const LevelArgument& level = *level_;
    if (--left_ == 0) left_ = points_, ++level_;
    return level;
  }

 private:
  int points_, left_;
  const LevelArgument* level_;
};

template <class T>
__device__ __forceinline__ Corners<typename Element<T>::Real> corner_weights(const Point<T>& p) {
  const auto top = p.weight * p.y.share_low, bottom = p.weight * p.y.share_high;
  return {top * p.x.share_low, top * p.x.share_high, bottom * p.x.share_low,
          bottom * p.x.share_high};
}

// The same from the lane of the group that owns the point.
template <int G, class Real>
__device__ __forceinline__ Corners<Real> from_owner(const Corners<Real>& own, int owner) {
  return {__shfl_sync(all_lanes, own.top_left, owner, G),
          __shfl_sync(all_lanes, own.top_right, owner, G),
          __shfl_sync(all_lanes, own.bottom_left, owner, G),
          __shfl_sync(all_lanes, own.bottom_right, owner, G)};
}

template <int V, class Real>
__device__ __forceinline__ void add_scaled(Real factor, const Real (&x)[V], Real (&sum)[V]) {
#pragma unroll
  for (int v = 0; v < V; ++v) sum[v] += factor * x[v];
}
template <int V, class Real>
__device__ __forceinline__ Real dot(const Real (&a)[V], const Real (&b)[V]) {
  Real sum = a[0] * b[0];
#pragma unroll
  for (int v = 1; v < V; ++v) sum += a[v] * b[v];
  return sum;
}

// ---------------------------------------------------------------------------------------- forward

template <class T, int V, int G>
__global__ void __launch_bounds__(block_threads, forward_blocks)
    forward_kernel(const __grid_constant__ ForwardArguments<T> arguments) {
  using Real = typename Element<T>::Real;
  const Group<T, V, G> group(arguments);
  const T* const rows = one_pointer(arguments.value + group.head_elements);
  const int points = group.points();
  for (int first_channel = 0; first_channel < group.channels(); first_channel += G * V) {
    const int channel = first_channel + group.lane * V;
    const bool holds = group.whole || channel < group.channels();
    const int first_element = holds ? channel : 0;
    LevelCursor cursor(arguments);
    Real sum[V] = {};
    for (int first = 0; first < points; first += G) {
      const Point<T> own = group.point(group.clamped(first + group.lane));
      const Corners<Real> own_weights = corner_weights(own);
      const auto add_point = [&](int owner) {
        const LevelArgument& level = cursor.next();
        const Corners<Real> weights = from_owner<G>(own_weights, owner);
        const T* const corner =
            rows + (__shfl_sync(all_lanes, own.offset, owner, G) + first_element);
        Real pixel[4][V];
        load<V>(corner, pixel[0]);
        load<V>(corner + level.right, pixel[1]);
        load<V>(corner + level.down, pixel[2]);
        load<V>(corner + (level.down + level.right), pixel[3]);
        add_scaled(weights.top_left, pixel[0], sum);
        add_scaled(weights.top_right, pixel[1], sum);
        add_scaled(weights.bottom_left, pixel[2], sum);
        add_scaled(weights.bottom_right, pixel[3], sum);
      };
      const int count = min(points - first, G);
      if (group.whole && count == G) {
#pragma unroll
        for (int owner = 0; owner < G; ++owner) add_point(owner);
      } else {
#pragma unroll 1
        for (int owner = 0; owner < count; ++owner) add_point(owner);
      }
    }
    if (group.active && holds)
      store<V>(sum, arguments.output + group.row * group.channels() + channel);
    if (group.whole) break;
  }
}

// --------------------------------------------------------------------- sums of the value gradient

// Terms arrive in any order, and floating-point sums depend on it in their last bits.
template <int V>
__device__ __forceinline__ void add_to(float* to, float factor, const float (&x)[V]) {
#if __CUDA_ARCH__ >= 900
  if constexpr (V % 4 == 0) {
#pragma unroll
    for (int v = 0; v < V; v += 4)
      atomicAdd(reinterpret_cast<float4*>(to + v),
                make_float4(factor * x[v], factor * x[v + 1], factor * x[v + 2],
                            factor * x[v + 3]));
  } else
#endif
  {
#pragma unroll
    for (int v = 0; v < V; ++v) atomicAdd(to + v, factor * x[v]);
  }
}
template <int V>
__device__ __forceinline__ void add_to(double* to, double factor, const double (&x)[V]) {
#pragma unroll
  for (int v = 0; v < V; ++v) atomicAdd(to + v, factor * x[v]);
}

// The deterministic sums: 64-bit integers in units of 2^-exponent, whose sums are exact and so
// depend on no order. Chosen over sorting the corners by row because it needs no memory for them
// (91 million in an encoder layer), no second pass over the values, and hardly another line of code.
//
// No term exceeds max |grad_output| max |weight|, and no sum has more than Q P terms, since of the
// four corners of a point at most one counts for a given token. The unit is the smallest that no sum
// of so many such terms can overflow: with 2^17 terms, 2^-45 of the largest possible term, where a
// float term itself is only good to 2^-24. Rounding to it is the one error of these sums.
// If a maximum or the weight of a softmax is not finite, neither is a sum, and the whole gradient
// becomes NaN.
inline constexpr int not_finite = 1 << 20;

__device__ __forceinline__ int exponent_above(unsigned long long bits, float) {
  const int exponent = static_cast<int>(bits >> 23);
  return exponent == 255 ? not_finite : exponent - 126;
}
__device__ __forceinline__ int exponent_above(unsigned long long bits, double) {
  const int exponent = static_cast<int>(bits >> 52);
  return exponent == 2047 ? not_finite : exponent - 1022;
}
__device__ __forceinline__ float power_of_two(int exponent, float) {
  return __uint_as_float(static_cast<unsigned>(exponent + 127) << 23);
}
__device__ __forceinline__ double power_of_two(int exponent, double) {
  return __longlong_as_double(static_cast<long long>(exponent + 1023) << 52);
}
template <class Real>
inline constexpr int largest_exponent = sizeof(Real) == 4 ? 126 : 1022;

template <class Real>
__device__ __forceinline__ int fixed_point_exponent(const FixedPoint& fixed_point) {
  const int magnitude =
      exponent_above(fixed_point.maxima[0], Real{}) +
      (fixed_point.softmax ? 1 : exponent_above(fixed_point.maxima[1], Real{}));
  if (magnitude > largest_exponent<Real> + 1) return not_finite;
  const int exponent = 62 - fixed_point.count_bits - magnitude;
  return exponent > largest_exponent<Real> ? largest_exponent<Real>
         : exponent < -largest_exponent<Real> ? -largest_exponent<Real>
                                              : exponent;
}

__device__ __forceinline__ long long rounded(float x) { return __float2ll_rn(x); }
__device__ __forceinline__ long long rounded(double x) { return __double2ll_rn(x); }

template <int V, class Real>
__device__ __forceinline__ void add_fixed(long long* to, Real factor, Real unit,
                                          const Real (&x)[V]) {
#pragma unroll
  for (int v = 0; v < V; ++v)
    atomicAdd(reinterpret_cast<unsigned long long*>(to + v),
              static_cast<unsigned long long>(rounded(factor * x[v] * unit)));
}

// --------------------------------------------------------------------------------------- backward

// Sums what each lane computed for G points over the lanes, so that each lane ends up with the sums
// of its own point. `visit(i)` computes the lane's part for point i. Half of what is held is handed
// over at each step: 4 (G - 1) shuffles where summing one by one would take 4 G log2 G.
template <int Count, int G, class Real, class Visit>
__device__ __forceinline__ Corners<Real> sums_for_owners(int first, int lane, const Visit& visit) {
  if constexpr (Count == 1) {
    return visit(first);
  } else {
    constexpr int half = Count / 2;
    const Corners<Real> a = sums_for_owners<half, G, Real>(first, lane, visit);
    const Corners<Real> b = sums_for_owners<half, G, Real>(first + half, lane, visit);
    const bool second = (lane & half) != 0;
    const auto sum = [second](Real x, Real y) {
      return (second ? y : x) + __shfl_xor_sync(all_lanes, second ? x : y, half, G);
    };
    return {sum(a.top_left, b.top_left), sum(a.top_right, b.top_right),
            sum(a.bottom_left, b.bottom_left), sum(a.bottom_right, b.bottom_right)};
  }
}

template <class T, class Sum, int V, int G>
class BackwardGroup : public Group<T, V, G> {
  using Base = Group<T, V, G>;
  static constexpr bool fixed_point = !std::is_floating_point_v<Sum>;

 public:
  using typename Base::Real;
  using Base::whole;

  __device__ __forceinline__ explicit BackwardGroup(const BackwardArguments<T, Sum>& arguments)
      : Base(arguments),
        grad_output_row_(arguments.grad_output + this->row * this->channels()),
        rows_(one_pointer(arguments.value + this->head_elements)),
        grad_rows_(one_pointer(arguments.grad_value + this->head_elements)) {
    if constexpr (whole) load<V>(grad_output_row_ + this->lane * V, grad_output_);
    if constexpr (fixed_point) {
      const int exponent = fixed_point_exponent<Real>(arguments.fixed_point);
      finite_ = exponent != not_finite;
      unit_ = power_of_two(finite_ ? exponent : 0, Real{});
      // No integer stands for NaN, so the conversion of the sums has to be told.
      if (this->fused() && !(this->inverse_sum_ > 0))
        atomicMax(arguments.fixed_point.maxima + 1, 1ull);
    }
  }

  // The products <grad_output, corner> of the point of each lane of the group, in a round of `count`
  // points; adds to the value gradient on the way.
  __device__ __forceinline__ Corners<Real> products(int count, const Point<T>& own,
                                                    LevelCursor& cursor) const {
    const Corners<Real> own_weights = corner_weights(own);
    const auto visit = [&](int owner) -> Corners<Real> {
      return visited(cursor.next(), from_owner<G>(own_weights, owner),
                     __shfl_sync(all_lanes, own.offset, owner, G));
    };
    if (whole && count == G)
      return sums_for_owners<whole ? G : 1, G, Real>(0, this->lane, visit);
    Corners<Real> mine = {};
#pragma unroll 1
    for (int owner = 0; owner < count; ++owner) {
      const Corners<Real> part = visit(owner);
      const Corners<Real> sums = {group_sum<G>(part.top_left), group_sum<G>(part.top_right),
                                  group_sum<G>(part.bottom_left),
                                  group_sum<G>(part.bottom_right)};
      if (this->lane == owner) mine = sums;
    }
    return mine;
  }

 private:
  // What the channels of this lane add to the products of one point.
  __device__ __forceinline__ Corners<Real> visited(const LevelArgument& level,
                                                   const Corners<Real>& weights,
                                                   int32_t offset) const {
    if constexpr (whole) {
      return channels_visited(level, weights, offset, this->lane * V, grad_output_);
    } else {
      return all_channels_visited(level, weights, offset);
    }
  }

  __device__ __forceinline__ Corners<Real> all_channels_visited(const LevelArgument& level,
                                                                const Corners<Real>& weights,
                                                                int32_t offset) const {
    Corners<Real> sum = {};
#pragma unroll 1
    for (int channel = this->lane * V; channel < this->channels(); channel += G * V) {
      Real grad_output[V];
      load<V>(grad_output_row_ + channel, grad_output);
      const Corners<Real> part = channels_visited(level, weights, offset, channel, grad_output);
      sum.top_left += part.top_left;
      sum.top_right += part.top_right;
      sum.bottom_left += part.bottom_left;
      sum.bottom_right += part.bottom_right;
    }
    return sum;
  }

  __device__ __forceinline__ Corners<Real> channels_visited(const LevelArgument& level,
                                                            const Corners<Real>& weights,
                                                            int32_t offset, int channel,
                                                            const Real (&grad_output)[V]) const {
    const int32_t corner = offset + channel;
    const int32_t at[4] = {corner, corner + level.right, corner + level.down,
                           corner + level.down + level.right};
    const Real shares[4] = {weights.top_left, weights.top_right, weights.bottom_left,
                            weights.bottom_right};
    // All four on their way before anything waits for one.
    Real pixel[4][V];
#pragma unroll
    for (int i = 0; i < 4; ++i) load<V>(rows_ + at[i], pixel[i]);
#pragma unroll
    for (int i = 0; i < 4; ++i) add_gradient(at[i], shares[i], grad_output);
    return {dot(pixel[0], grad_output), dot(pixel[1], grad_output), dot(pixel[2], grad_output),
            dot(pixel[3], grad_output)};
  }

  __device__ __forceinline__ void add_gradient(int32_t element, Real weight,
                                               const Real (&grad_output)[V]) const {
    // Corners outside have no weight and would all be added to a few tokens at the border.
    if (!this->active || weight == 0) return;
    if constexpr (!fixed_point)
      add_to<V>(grad_rows_ + element, weight, grad_output);
    else if (finite_)
      add_fixed<V>(grad_rows_ + element, weight, unit_, grad_output);
  }

  const T* const grad_output_row_;
  const T* const rows_;
  Sum* const grad_rows_;
  Real grad_output_[V];
  bool finite_;
  Real unit_;
};

template <class T, class Sum, int V, int G>
__global__ void __launch_bounds__(block_threads, backward_blocks<T>)
    backward_kernel(const __grid_constant__ BackwardArguments<T, Sum> arguments) {
  using Real = typename Element<T>::Real;
  const BackwardGroup<T, Sum, V, G> group(arguments);
  const int points = group.points();
  Real* const grad_weights = arguments.grad_weights + group.row * points;
  Real* const grad_points = arguments.grad_points + group.row * points * 2;
  LevelCursor cursor(arguments);
  Real total = 0;
#pragma unroll 1
  for (int first = 0; first < points; first += G) {
    const int mine = first + group.lane;
    const Point<T> own = group.point(group.clamped(mine));
    const Corners<Real> products = group.products(min(points - first, G), own, cursor);
    const PointGradient<Real> gradient = point_gradient(
        own.x, own.y, own.width, own.height, own.weight, products.top_left, products.top_right,
        products.bottom_left, products.bottom_right);
    if (mine >= points) continue;  // in the last round only
    total += own.weight * gradient.weight;
    if (!group.active) continue;
    const bool as_is = arguments.gradient_of_locations;
    grad_points[2 * mine] = as_is ? gradient.x : chained(gradient.x, own.scale_x);
    grad_points[2 * mine + 1] = as_is ? gradient.y : chained(gradient.y, own.scale_y);
    grad_weights[mine] = gradient.weight;
  }
  if (group.fused()) {
    total = group_sum<G>(total);
    if (!group.active) return;  // no shuffles from here on
    // Softmax backwards. Each lane reads back what it wrote itself.
    for (int mine = group.lane; mine < points; mine += G)
      grad_weights[mine] = group.weight(mine) * (grad_weights[mine] - total);
  }
}

// ------------------------------------------------------------------------- before and after it

// The largest |x|, as the bits of a Real, which for numbers without sign are ordered like the
// numbers; NaN above all. `maximum` starts as 0.
template <class T>
__global__ void __launch_bounds__(elementwise_threads)
    absolute_maximum_kernel(const T* numbers, int64_t count, unsigned long long* maximum) {
  using Real = typename Element<T>::Real;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  unsigned long long largest = 0;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += step) {
    const Real x = widened(__ldg(numbers + i));
    unsigned long long bits;
    if constexpr (sizeof(Real) == 4)
      bits = __float_as_uint(x) & 0x7fffffffu;
    else
      bits = __double_as_longlong(x) & 0x7fffffffffffffffll;
    largest = bits > largest ? bits : largest;
  }
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    const unsigned long long other = __shfl_xor_sync(all_lanes, largest, lanes);
    largest = other > largest ? other : largest;
  }
  if (threadIdx.x % 32 == 0) atomicMax(maximum, largest);
}

inline constexpr int converted_per_thread = 4;

// From float or fixed-point sums to how gradients are stored.
template <class T, class Sum>
__global__ void __launch_bounds__(elementwise_threads)
    convert_kernel(const Sum* sums, int64_t count, T* to, const FixedPoint fixed_point) {
  using Real = typename Element<T>::Real;
  double unit = 1;
  if constexpr (!std::is_floating_point_v<Sum>) {
    const int exponent = fixed_point_exponent<Real>(fixed_point);
    const bool bad_weight = fixed_point.softmax && fixed_point.maxima[1] != 0;
    unit = exponent == not_finite || bad_weight ? __longlong_as_double(0x7ff8000000000000ll)
                                                : power_of_two(-exponent, double{});
  }
  const int64_t block = static_cast<int64_t>(blockIdx.x) * elementwise_threads;
#pragma unroll
  for (int j = 0; j < converted_per_thread; ++j) {
    const int64_t i = block * converted_per_thread + j * elementwise_threads + threadIdx.x;
    if (i >= count) return;
    if constexpr (std::is_floating_point_v<Sum>)
      narrow(sums[i], to[i]);
    else
      narrow(static_cast<Real>(static_cast<double>(sums[i]) * unit), to[i]);
  }
}

// A warp adds up, over heads and points, the gradients of the locations of one (b, q, l) to that of
// its reference, and turns them into those of the offsets. Always in the same order.
template <class Real>
__global__ void __launch_bounds__(elementwise_threads)
    finish_reference_kernel(const Real* reference, int reference_size, const Real* offsets,
                            Real* grad_offsets, Real* grad_reference, int64_t places, int heads,
                            int levels, int points, const __grid_constant__ LevelSizes sizes) {
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * (elementwise_threads / 32) +
                       threadIdx.x / 32;
  if (warp >= places * levels) return;  // whole warps
  const int lane = threadIdx.x % 32;
  const int level = static_cast<int>(warp % levels);
  const int64_t place = warp / levels;
  const bool boxes = reference_size == 4;
  reference += warp * reference_size;
  const Real per_level = static_cast<Real>(points);
  const Real scale_x = boxes ? offset_scale(__ldg(reference + 2), per_level)
                             : offset_scale(static_cast<Real>(sizes.width[level]));
  const Real scale_y = boxes ? offset_scale(__ldg(reference + 3), per_level)
                             : offset_scale(static_cast<Real>(sizes.height[level]));
  Real sum[4] = {};
  for (int i = lane; i < heads * points; i += 32) {
    const int head = i / points, point = i % points;
    const int64_t at = (((place * heads + head) * levels + level) * points + point) * 2;
    const Real x = grad_offsets[at], y = grad_offsets[at + 1];
    sum[0] += x;
    sum[1] += y;
    sum[2] += chained(x, __ldg(offsets + at));
    sum[3] += chained(y, __ldg(offsets + at + 1));
    grad_offsets[at] = chained(x, scale_x);
    grad_offsets[at + 1] = chained(y, scale_y);
  }
#pragma unroll
  for (int c = 0; c < 4; ++c) sum[c] = group_sum<32>(sum[c]);
  if (lane != 0) return;
  grad_reference += warp * reference_size;
  grad_reference[0] = sum[0];
  grad_reference[1] = sum[1];
  if (boxes) {
    grad_reference[2] = offset_scale(sum[2], per_level);  // the same division by 2 P
    grad_reference[3] = offset_scale(sum[3], per_level);
  }
}

}  // namespace efficient_detr::deformable_attention
