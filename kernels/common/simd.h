// Vectors of numbers through the compiler's vector types: eight floats or four doubles at a time on
// any processor; the compiler splits or keeps them according to what the target has.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "portable.h"

namespace efficient_detr {

typedef float Float8 __attribute__((vector_size(32)));
typedef int32_t Int8 __attribute__((vector_size(32)));
typedef double Double4 __attribute__((vector_size(32)));
typedef int64_t Long4 __attribute__((vector_size(32)));
typedef uint16_t Short8 __attribute__((vector_size(16)));

template <class Real>
struct Simd;
template <>
struct Simd<float> {
  using Vector = Float8;
  using Integer = Int8;
  static constexpr int lanes = 8;
};
template <>
struct Simd<double> {
  using Vector = Double4;
  using Integer = Long4;
  static constexpr int lanes = 4;
};

ED_INLINE Float8 select(Int8 condition, Float8 yes, Float8 no) { return condition ? yes : no; }
ED_INLINE Double4 select(Long4 condition, Double4 yes, Double4 no) { return condition ? yes : no; }
ED_INLINE Int8 select(Int8 condition, Int8 yes, Int8 no) { return condition ? yes : no; }
ED_INLINE Long4 select(Long4 condition, Long4 yes, Long4 no) { return condition ? yes : no; }

ED_INLINE Float8 to_real(Int8 i, Float8) { return __builtin_convertvector(i, Float8); }
ED_INLINE Double4 to_real(Long4 i, Double4) { return __builtin_convertvector(i, Double4); }

// A comparison that holds is -1 in every lane.
ED_INLINE Int8 floor_to_integer(Float8 x, Int8) {
  const Int8 truncated = __builtin_convertvector(x, Int8);
  return truncated + (to_real(truncated, Float8{}) > x);
}
ED_INLINE Long4 floor_to_integer(Double4 x, Long4) {
  const Long4 truncated = __builtin_convertvector(x, Long4);
  return truncated + (to_real(truncated, Double4{}) > x);
}

// 16-bit numbers as they lie in memory.
struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <class Vector, class Element>
ED_INLINE Vector load_bits(const Element* from) {
  Vector result;
  std::memcpy(&result, from, sizeof(Vector));
  return result;
}

ED_INLINE Float8 load(const float* from) { return load_bits<Float8>(from); }
ED_INLINE Double4 load(const double* from) { return load_bits<Double4>(from); }
ED_INLINE Float8 load(const BFloat16* from) {
  return (Float8)(__builtin_convertvector(load_bits<Short8>(from), Int8) << 16);
}
ED_INLINE Float8 load(const Float16* from) {
  const Int8 bits = __builtin_convertvector(load_bits<Short8>(from), Int8);
  const Int8 magnitude = (bits & 0x7fff) << 13;
  // The product moves the exponent from half's bias to float's and mends subnormal numbers.
  Float8 real = (Float8)magnitude * 0x1p112f;
  const Int8 special = (bits & 0x7c00) == 0x7c00;
  real = special ? (Float8)(magnitude | 0x7f800000) : real;
  return (Float8)((Int8)real | ((bits & 0x8000) << 16));
}

// Integers of any kind, as they are.
template <class Vector, class Element>
ED_INLINE void store_bits(Element* to, Vector x) {
  std::memcpy(to, &x, sizeof x);
}

ED_INLINE float load_one(const float* from) { return *from; }
ED_INLINE double load_one(const double* from) { return *from; }
template <class Half>
ED_INLINE float load_one(const Half* from) {
  Half padded[8] = {*from};
  return load(padded)[0];
}

ED_INLINE void store(float* to, Float8 x) { std::memcpy(to, &x, sizeof x); }
ED_INLINE void store(double* to, Double4 x) { std::memcpy(to, &x, sizeof x); }
// Rounds to the nearest number, to the even one of two that are equally near.
ED_INLINE void store(BFloat16* to, Float8 x) {
  const Int8 bits = (Int8)x;
  const Int8 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Int8 quiet_nan = (bits >> 16) | 0x40;
  const Short8 result = __builtin_convertvector((x != x) ? quiet_nan : rounded, Short8);
  std::memcpy(to, &result, sizeof result);
}
ED_INLINE void store(Float16* to, Float8 x) {
  const Int8 bits = (Int8)x;
  const Int8 sign = (bits >> 16) & 0x8000;
  const Int8 magnitude = bits & 0x7fffffff;
  // Normal results: move the exponent's bias and round the 13 low bits of the mantissa away.
  const Int8 normal = (magnitude - (112 << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Subnormal results: adding 1/2 leaves the rounded multiple of 2^-24 in the low bits.
  const Int8 subnormal = (Int8)((Float8)magnitude + 0.5f) - 0x3f000000;
  Int8 result = (magnitude < (113 << 23)) ? subnormal : normal;
  result = (magnitude >= 0x477ff000) ? Int8{} + 0x7c00 : result;  // rounds beyond 65504
  result = (x != x) ? Int8{} + 0x7e00 : result;
  const Short8 half = __builtin_convertvector(result | sign, Short8);
  std::memcpy(to, &half, sizeof half);
}

// Stores past the cache, for long results that nobody reads soon: the memory need not be read first.
// `to` is aligned to 16 bytes; a `finish_streaming` must follow.
ED_INLINE void stream(float* to, Float8 x) {
#if defined(__SSE2__)
  _mm_stream_ps(to, __builtin_shufflevector(x, x, 0, 1, 2, 3));
  _mm_stream_ps(to + 4, __builtin_shufflevector(x, x, 4, 5, 6, 7));
#else
  store(to, x);
#endif
}
ED_INLINE void finish_streaming() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

ED_INLINE void store_one(float* to, float x) { *to = x; }
ED_INLINE void store_one(double* to, double x) { *to = x; }
template <class Half>
ED_INLINE void store_one(Half* to, float x) {
  Half padded[8];
  store(padded, Float8{x});
  *to = padded[0];
}

// Every second number of two vectors in a row, and back.
ED_INLINE Float8 evens(Float8 a, Float8 b) {
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14);
}
ED_INLINE Float8 odds(Float8 a, Float8 b) {
  return __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
}
ED_INLINE Float8 interleaved_low(Float8 a, Float8 b) {
  return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
}
ED_INLINE Float8 interleaved_high(Float8 a, Float8 b) {
  return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
}
ED_INLINE Double4 evens(Double4 a, Double4 b) { return __builtin_shufflevector(a, b, 0, 2, 4, 6); }
ED_INLINE Double4 odds(Double4 a, Double4 b) { return __builtin_shufflevector(a, b, 1, 3, 5, 7); }
ED_INLINE Double4 interleaved_low(Double4 a, Double4 b) {
  return __builtin_shufflevector(a, b, 0, 4, 1, 5);
}
ED_INLINE Double4 interleaved_high(Double4 a, Double4 b) {
  return __builtin_shufflevector(a, b, 2, 6, 3, 7);
}

// The sums over the lanes of as many vectors as there are lanes. Shuffles stay inside 16 bytes
// until the last step, which is what processors do best.
ED_INLINE Float8 pair_sums(Float8 a, Float8 b) {
  return __builtin_shufflevector(a, b, 0, 8, 1, 9, 4, 12, 5, 13) +
         __builtin_shufflevector(a, b, 2, 10, 3, 11, 6, 14, 7, 15);
}
ED_INLINE Float8 quad_sums(Float8 a, Float8 b) {
  return __builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13) +
         __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
}
ED_INLINE Float8 sums(const Float8 (&v)[8]) {
  const Float8 low = quad_sums(pair_sums(v[0], v[1]), pair_sums(v[2], v[3]));
  const Float8 high = quad_sums(pair_sums(v[4], v[5]), pair_sums(v[6], v[7]));
  return __builtin_shufflevector(low, high, 0, 1, 2, 3, 8, 9, 10, 11) +
         __builtin_shufflevector(low, high, 4, 5, 6, 7, 12, 13, 14, 15);
}
ED_INLINE Double4 sums(const Double4 (&v)[4]) {
  const Double4 low = __builtin_shufflevector(v[0], v[1], 0, 4, 2, 6) +
                      __builtin_shufflevector(v[0], v[1], 1, 5, 3, 7);
  const Double4 high = __builtin_shufflevector(v[2], v[3], 0, 4, 2, 6) +
                       __builtin_shufflevector(v[2], v[3], 1, 5, 3, 7);
  return __builtin_shufflevector(low, high, 0, 1, 4, 5) +
         __builtin_shufflevector(low, high, 2, 3, 6, 7);
}

// The sum and the maximum over all lanes, in every lane.
ED_INLINE Float8 sum(Float8 v) {
  v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3);
  v += __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5);
  return v + __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6);
}
ED_INLINE Double4 sum(Double4 v) {
  v += __builtin_shufflevector(v, v, 2, 3, 0, 1);
  return v + __builtin_shufflevector(v, v, 1, 0, 3, 2);
}
ED_INLINE Float8 largest(Float8 v) {
  Float8 other = __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3);
  v = select(v > other, v, other);
  other = __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5);
  v = select(v > other, v, other);
  other = __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6);
  return select(v > other, v, other);
}

// e^x for x <= 0, at most 2 units in the last place off; below -87 the result is 0 instead of a
// number that nobody notices beside 1. NaN stays NaN.
ED_INLINE Float8 exponential(Float8 x) {
  const Float8 lowest = Float8{} - 87.0f;
  const Float8 bounded = select(x < lowest, lowest, x);
  const Int8 power = floor_to_integer(bounded * 1.44269504f + 0.5f, Int8{});
  const Float8 power_real = to_real(power, Float8{});
  // ln 2 in two parts, the first of which is exact after multiplication.
  const Float8 r = (bounded - power_real * 0.693359375f) + power_real * 2.12194440e-4f;
  Float8 tail = 1.0f / 5040 + Float8{};
  tail = tail * r + 1.0f / 720;
  tail = tail * r + 1.0f / 120;
  tail = tail * r + 1.0f / 24;
  tail = tail * r + 1.0f / 6;
  tail = tail * r + 0.5f;
  const Float8 mantissa = (tail * r) * r + (r + 1.0f);
  const Float8 result = mantissa * (Float8)((power + 127) << 23);
  return select(x < lowest, Float8{}, result);
}

}  // namespace efficient_detr
